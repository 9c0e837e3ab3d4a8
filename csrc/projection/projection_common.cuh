// What the projection's kernels share. T: float, double, __half or __nv_bfloat16, the dtype of theta_D; Acc: float or
// double, that of theta_d.
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "projection/projection.h"

namespace unilora {

constexpr int kProjectionBlock = 256;

// Blocks of a kernel whose blocks first fill a table: as many as run at a time, each with many items.
template <typename Kernel>
unsigned resident_grid_size(Kernel kernel, int block, int64_t items, int64_t items_per_block) {
  int device = 0, multiprocessors = 1, blocks_each = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, kernel, block, 0);
  return std::min(grid_size(items, items_per_block), static_cast<unsigned>(multiprocessors * std::max(1, blocks_each)));
}

// The last k in [low, high] with start[k] <= x, where start[low] is known to be: `start` ascends.
__device__ __forceinline__ int last_at_most(const uint32_t* start, int low, int high, uint32_t x) {
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (start[middle] <= x) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

}  // namespace unilora

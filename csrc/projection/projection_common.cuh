// What the projection's kernels share. T: float, double, __half or __nv_bfloat16, the dtype of theta_D; Acc: float or
// double, that of theta_d.
#pragma once

#include "cuda/launch.cuh"
#include "projection/projection.h"

namespace unilora {

constexpr int kProjectionBlock = 256;

// Blocks of a kernel whose blocks first fill a table: as many as run at a time, each with many items.
inline unsigned resident_grid_size(int64_t items, int64_t items_per_block, int blocks_per_multiprocessor) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const auto resident = static_cast<unsigned>(multiprocessors * blocks_per_multiprocessor);
  const unsigned blocks = grid_size(items, items_per_block);
  return blocks < resident ? blocks : resident;
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

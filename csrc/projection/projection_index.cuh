// Index generation: index[k] = column of position start + k
//
// One thread for a position or a pair of them, by the integer arithmetic of projection.h: the same columns as on
// the CPU, whatever the grid. Writes 4 n bytes; bound by arithmetic.
#pragma once

#include "projection/projection_common.cuh"

namespace unilora {

// A thread computes one Philox block and so both positions of a pair; the first and last pair may be cut.
static __global__ void __launch_bounds__(kProjectionBlock)
    uniform_index_kernel(int32_t* __restrict__ index,  // [n]
                         int64_t n, int64_t pairs, UniformMap map, uint64_t start) {
  const uint64_t first_pair = start / 2;
  const int64_t cut = static_cast<int64_t>(start % 2);  // positions of the first pair that lie before `start`
  for (int64_t p = grid_begin(); p < pairs; p += grid_step()) {
    const ColumnPair columns = uniform_columns(map, first_pair + static_cast<uint64_t>(p));
    const int64_t even = 2 * p - cut, odd = even + 1;
    if (even >= 0) index[even] = static_cast<int32_t>(columns.even);
    if (odd < n) index[odd] = static_cast<int32_t>(columns.odd);
  }
}

inline void launch_index(int32_t* index,  // [n]
                         int64_t n, const UniformMap& map, uint64_t start, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t pairs = ceil_div(static_cast<int64_t>(start % 2) + n, 2);
  uniform_index_kernel<<<grid_size(pairs, kProjectionBlock), kProjectionBlock, 0, stream>>>(index, n, pairs, map,
                                                                                            start);
}

static __global__ void __launch_bounds__(kProjectionBlock)
    balanced_index_kernel(int32_t* __restrict__ index,  // [n]
                          int64_t n, BalancedMap map, uint32_t start) {
  for (int64_t k = grid_begin(); k < n; k += grid_step())
    index[k] = static_cast<int32_t>(map.column(start + static_cast<uint32_t>(k)));
}

inline void launch_index(int32_t* index,  // [n]
                         int64_t n, const BalancedMap& map, uint64_t start, cudaStream_t stream) {
  if (n == 0) return;
  balanced_index_kernel<<<grid_size(n, kProjectionBlock), kProjectionBlock, 0, stream>>>(index, n, map,
                                                                                         static_cast<uint32_t>(start));
}

}  // namespace unilora

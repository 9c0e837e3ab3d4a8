// Sums of a column's terms, for the kernels that own a column by lanes or by blocks.
#pragma once

#include "projection/projection_common.cuh"

namespace unilora {

constexpr int kSumBlock = 256;

// The sum of terms lane, lane + lanes, ... of `size`, by four sums in turn. Terms: place(k) says where term k is,
// settle(place) may change four of them, and term(place, inside) is the term, 0 where it is not inside. Four places
// first, then four terms, so that as many loads are in flight; outside the last place is taken, which leaves the loads
// without branches.
template <typename Acc, typename Terms>
__device__ __forceinline__ Acc sum_terms(const Terms& terms, int size, int lane, int lanes) {
  Acc sum[4] = {0, 0, 0, 0};
  for (int k = lane; k < size; k += 4 * lanes) {
    uint32_t place[4];
    Acc term[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) place[i] = terms.place(min(k + i * lanes, size - 1));
    terms.settle(place);
#pragma unroll
    for (int i = 0; i < 4; ++i) term[i] = terms.term(place[i], k + i * lanes < size);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += term[i];
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sum over the block in a fixed order; thread 0 holds it. blockDim.x = kSumBlock.
template <typename Acc>
__device__ Acc block_sum(Acc value) {
  __shared__ Acc warp_sums[kSumBlock / kWarp];
  value = lane_sum(value, kWarp);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp) value = lane_sum(threadIdx.x < kSumBlock / kWarp ? warp_sums[threadIdx.x] : Acc(0), kWarp);
  return value;
}

}  // namespace unilora

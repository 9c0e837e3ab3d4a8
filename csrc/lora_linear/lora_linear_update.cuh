// y += s h factor (contract: lora_linear.h; conventions: lora_linear_kernels.cuh). No torch.
#pragma once

#include "lora_linear/lora_linear_factor.cuh"

namespace unilora {

// ---- rank_update ------------------------------------------------------------------------------------------
// y[i, c] += s sum_q h[i, q] factor[q, c], in place
//
// Work: a block owns a tile of 32 rows and 256 columns, a thread one column of it. The 32 sums stay in registers
// while all ranks are applied; then y is read and written once, coalesced along the row.
// Bytes: y read and written, 2 tokens columns sizeof(T); from L2, h, tokens r sizeof(Acc), for each column tile and the
// factor, r columns sizeof(T), for each row tile.
// Determinism: a thread adds the ranks of its elements in ascending order, then y; one rounding to T.

constexpr int kUpdateColumns = 256;  // one a thread
constexpr int kUpdateRows = 32;

template <int kRanks, typename T, typename Acc>
__global__ void __launch_bounds__(kUpdateColumns)
    rank_update_kernel(T* __restrict__ y,  // [tokens, columns]
                       int64_t tokens, int64_t columns,
                       const Acc* __restrict__ h,  // [tokens, r]
                       int64_t r,
                       const T* __restrict__ factor,  // [r, columns] or [columns, r]
                       FactorLayout layout, Acc scaling) {
  __shared__ __align__(16) Acc weight[kUpdateRows][kRanks];
  __shared__ Acc factor_tile[kRanks][kUpdateColumns + 1];
  const int64_t column_tiles = ceil_div(columns, kUpdateColumns), tiles = ceil_div(tokens, kUpdateRows) * column_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row0 = tile / column_tiles * kUpdateRows, c0 = tile % column_tiles * kUpdateColumns;
    const int64_t column = c0 + threadIdx.x;
    Acc sum[kUpdateRows] = {};
    for (int64_t q0 = 0; q0 < r; q0 += kRanks) {
      __syncthreads();
      for (int e = threadIdx.x; e < kUpdateRows * kRanks; e += kUpdateColumns) {
        const int64_t row = row0 + e / kRanks, rank = q0 + e % kRanks;
        weight[e / kRanks][e % kRanks] = row < tokens && rank < r ? h[row * r + rank] : Acc(0);
      }
      load_factor<kRanks, kUpdateColumns>(factor, layout, r, columns, q0, c0, scaling, factor_tile);
      __syncthreads();
      Acc p[kRanks];
#pragma unroll
      for (int q = 0; q < kRanks; ++q) p[q] = factor_tile[q][threadIdx.x];
#pragma unroll
      for (int i = 0; i < kUpdateRows; ++i) {
#pragma unroll
        for (int q = 0; q < kRanks; ++q) sum[i] += weight[i][q] * p[q];
      }
    }
    if (column >= columns) continue;
#pragma unroll
    for (int i = 0; i < kUpdateRows; ++i) {
      if (row0 + i >= tokens) break;
      T& element = y[(row0 + i) * columns + column];
      element = narrow<T>(widen<Acc>(element) + sum[i]);
    }
  }
}

template <typename T, typename Acc>
void launch_rank_update(T* y,  // [tokens, columns]
                        int64_t tokens, int64_t columns,
                        const Acc* h,  // [tokens, r]
                        int64_t r,
                        const T* factor,  // [r, columns] or [columns, r]
                        FactorLayout layout, double scaling, cudaStream_t stream) {
  if (tokens == 0 || columns == 0) return;
  with_rank_tile(r, [&](auto rank_tile) {
    constexpr int kRanks = decltype(rank_tile)::value;
    const int64_t tiles = ceil_div(tokens, kUpdateRows) * ceil_div(columns, kUpdateColumns);
    rank_update_kernel<kRanks><<<grid_size(tiles, 1), kUpdateColumns, 0, stream>>>(y, tokens, columns, h, r, factor,
                                                                                   layout, static_cast<Acc>(scaling));
  });
}

}  // namespace unilora

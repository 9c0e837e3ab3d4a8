// out = x factor^T (contract: lora_linear.h; conventions: lora_linear_kernels.cuh). No torch.
#pragma once

#include "lora_linear/lora_linear_factor.cuh"

namespace unilora {

// ---- dot --------------------------------------------------------------------------------------------------
// out[i, q] = sum_c x[i, c] factor[q, c]
//
// Work: a warp owns four rows and one rank tile; its lanes take neighbouring columns. The block's warps share each
// tile of the factor. Rank tiles are the fastest grid index: for r > 16 the blocks that read the same rows run
// together, and x comes from L2 after the first.
// Bytes: x once, tokens columns sizeof(T), and out, tokens r sizeof(Acc); from L2, the factor, r columns sizeof(T), for
// every 16 rows.
// Determinism: a lane adds its columns in ascending order, then the lanes are added by a fixed tree. A row's result
// does not depend on the other rows or on their number.

constexpr int kDotBlock = 128;
constexpr int kDotRows = 4;  // rows of a warp
constexpr int kDotBlockRows = kDotRows * kDotBlock / kWarp;
constexpr int kDotColumns = 128;

template <int kRanks, typename T, typename Acc>
__global__ void __launch_bounds__(kDotBlock) dot_kernel(const T* __restrict__ x,  // [tokens, columns]
                                                        int64_t tokens, int64_t columns,
                                                        const T* __restrict__ factor,  // [r, columns] or [columns, r]
                                                        FactorLayout layout, int64_t r,
                                                        Acc* __restrict__ out) {  // [tokens, r]
  __shared__ Acc factor_tile[kRanks][kDotColumns + 1];  // odd pitch: no bank conflict when filled from [columns, r]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t rank_tiles = ceil_div(r, kRanks), tiles = ceil_div(tokens, kDotBlockRows) * rank_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t q0 = tile % rank_tiles * kRanks, row0 = tile / rank_tiles * kDotBlockRows + warp * kDotRows;
    Acc sum[kDotRows][kRanks] = {};
    for (int64_t c0 = 0; c0 < columns; c0 += kDotColumns) {
      __syncthreads();
      load_factor<kRanks, kDotColumns>(factor, layout, r, columns, q0, c0, Acc(1), factor_tile);
      __syncthreads();
#pragma unroll
      for (int c = lane; c < kDotColumns; c += kWarp) {
        Acc value[kDotRows];
#pragma unroll
        for (int i = 0; i < kDotRows; ++i)
          value[i] = row0 + i < tokens && c0 + c < columns ? widen<Acc>(x[(row0 + i) * columns + c0 + c]) : Acc(0);
#pragma unroll
        for (int q = 0; q < kRanks; ++q) {
          const Acc p = factor_tile[q][c];
#pragma unroll
          for (int i = 0; i < kDotRows; ++i) sum[i][q] += value[i] * p;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDotRows; ++i) {
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        const Acc total = lane_sum(sum[i][q], kWarp);
        if (lane == 0 && row0 + i < tokens && q0 + q < r) out[(row0 + i) * r + q0 + q] = total;
      }
    }
  }
}

template <typename T, typename Acc>
void launch_dot(const T* x,  // [tokens, columns]
                int64_t tokens, int64_t columns,
                const T* factor,  // [r, columns] or [columns, r]
                FactorLayout layout, int64_t r,
                Acc* out,  // [tokens, r]
                cudaStream_t stream) {
  if (tokens == 0) return;
  with_rank_tile(r, [&](auto rank_tile) {
    constexpr int kRanks = decltype(rank_tile)::value;
    const int64_t tiles = ceil_div(tokens, kDotBlockRows) * ceil_div(r, kRanks);
    dot_kernel<kRanks><<<grid_size(tiles, 1), kDotBlock, 0, stream>>>(x, tokens, columns, factor, layout, r, out);
  });
}

}  // namespace unilora

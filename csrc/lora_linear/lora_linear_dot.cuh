// out = x factor^T (contract: lora_linear.h; conventions: lora_linear_kernels.cuh). No torch.
#pragma once

#include "lora_linear/lora_linear_dot_mma.cuh"
#include "lora_linear/lora_linear_factor.cuh"

namespace unilora {

// ---- float and double: a block's part ---------------------------------------------------------------------------
// out[i, q] = sum_c x[i, c] factor[q, c] for kRows rows and kRanks ranks
//
// Work: columns in tiles of 1024 bytes. A warp owns kWarpRows rows and half of the tile, a lane 16 bytes of each row,
// whose loads are under way while the block stages the tile's factor in shared memory.
// Determinism: a lane adds its columns in ascending order, then the lanes are added by a fixed tree, then the halves.
// The order of a sum follows from the number of columns alone: not from the other rows, kWarpRows, kRanks or kWide.

// kWide: x can be read in 16 bytes
template <typename T_, FactorLayout kLayout, int kWarpRows, int kRanks_, bool kWide>
struct DotPlain {
  using T = T_;
  using Acc = T;
  static constexpr int kRowWarps = 4, kColumnWarps = 2, kThreads = kRowWarps * kColumnWarps * kWarp;
  static constexpr int kRows = kRowWarps * kWarpRows, kRanks = kRanks_;
  static constexpr int kWidth = Numbers<T>::kCount, kColumns = kColumnWarps * kWarp * kWidth;

  // As many numbers of a row as a lane takes; zero from `left` on.
  static __device__ __forceinline__ Numbers<T> load(const T* p, int64_t left) {
    Numbers<T> out = {};
    if constexpr (kWide) {
      if (left > 0) out = *reinterpret_cast<const Numbers<T>*>(p);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) out.value[k] = k < left ? p[k] : T(0);
    }
    return out;
  }

  // store(row, rank, out[row, rank]) for the tile's elements that exist, once each, by any thread. The whole block
  // calls it.
  template <typename Store>
  static __device__ __forceinline__ void run(const T* __restrict__ x,  // [tokens, columns]
                                             int64_t tokens, int64_t columns,
                                             const T* __restrict__ factor,  // [r, columns] or [columns, r]
                                             int64_t r, int64_t row0, int64_t q0, const Store& store) {
    // A pitch that keeps 16-byte reads aligned, and writes from [columns, r] to two a bank
    __shared__ __align__(16) T factor_tile[kRanks][kColumns + kWidth];
    __shared__ T halves[kColumnWarps][kRows][kRanks];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, half = warp / kRowWarps,
              warp_row = warp % kRowWarps * kWarpRows, column = (half * kWarp + lane) * kWidth;
    const T* lane_x = x + (row0 + warp_row) * columns + column;
    T sum[kWarpRows][kRanks] = {};
    for (int64_t c0 = 0; c0 < columns; c0 += kColumns) {
      Numbers<T> value[kWarpRows];
#pragma unroll
      for (int i = 0; i < kWarpRows; ++i)
        value[i] = load(lane_x + i * columns + c0, row0 + warp_row + i < tokens ? columns - c0 - column : 0);
      __syncthreads();
      stage_factor<kRanks, kColumns, kThreads>(factor, kLayout, r, columns, q0, c0,
                                               [&](int q, int c, T p) { factor_tile[q][c] = p; });
      __syncthreads();
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        const Numbers<T> p = *reinterpret_cast<const Numbers<T>*>(&factor_tile[q][column]);
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum[i][q] += value[i].value[k] * p.value[k];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
#pragma unroll
      for (int q = 0; q < kRanks; ++q) {
        const T total = lane_sum(sum[i][q], kWarp);
        if (lane == 0) halves[half][warp_row + i][q] = total;
      }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kRows * kRanks; e += kThreads) {
      const int row = e / kRanks, q = e % kRanks;
      if (row0 + row < tokens && q0 + q < r) store(row0 + row, q0 + q, halves[0][row][q] + halves[1][row][q]);
    }
  }

  // Whether kWide may be set
  static bool wide(const T* x, int64_t columns, const T*, int64_t) {
    return columns % kWidth == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  }
};

// ---- dot ----------------------------------------------------------------------------------------------------------
// out[i, q] = sum_c x[i, c] factor[q, c]
//
// Work: a block owns a tile of rows and ranks, as Dot says. Rank tiles are the fastest grid index: where there are
// several, the blocks that read the same rows run together, and x comes from L2 after the first.
// Bytes: x once, tokens columns sizeof(T), and out, tokens r sizeof(Acc); from L2, the factor, r columns sizeof(T), for
// each row tile.
// Determinism: Dot's.

template <typename Dot>
__global__ void __launch_bounds__(Dot::kThreads, 512 / Dot::kThreads)
    dot_kernel(const typename Dot::T* __restrict__ x,  // [tokens, columns]
               int64_t tokens, int64_t columns,
               const typename Dot::T* __restrict__ factor,  // [r, columns] or [columns, r]
               int64_t r,
               typename Dot::Acc* __restrict__ out) {  // [tokens, r]
  const int64_t rank_tiles = ceil_div(r, Dot::kRanks), tiles = ceil_div(tokens, Dot::kRows) * rank_tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Dot::run(x, tokens, columns, factor, r, tile / rank_tiles * Dot::kRows, tile % rank_tiles * Dot::kRanks,
             [&](int64_t row, int64_t rank, typename Dot::Acc total) { out[row * r + rank] = total; });
  }
}

// body(Dot) with tiles for `ranks`, up to 64 in 16 bits, kTall: of twice as many rows. Where registers do not allow it,
// with fewer of either.
template <typename T, FactorLayout kLayout, bool kTall, typename Body>
void with_dot(const T* x, int64_t columns, const T* factor, int64_t r, int64_t ranks, const Body& body) {
  const auto either = [&](auto wide, auto narrow) {
    if (wide.wide(x, columns, factor, r)) {
      body(wide);
    } else {
      body(narrow);
    }
  };
  constexpr int kTiles = kTall ? 2 : 1;
  if constexpr (sizeof(T) == 2) {
    const auto with = [&](auto rank_tiles) {
      constexpr int kRankTiles = decltype(rank_tiles)::value;
      constexpr int kLowTiles = kRankTiles < 4 ? kRankTiles : 4;
      constexpr bool kFits = kRankTiles < 8 || kLayout == FactorLayout::kRankMajor;  // two tiles of rows, in registers
      either(DotMma<T, kLayout, kFits ? kTiles : 1, kTall ? kRankTiles : kLowTiles, true>{},
             DotMma<T, kLayout, 1, kLowTiles, false>{});
    };
    if (ranks <= 8) {
      with(std::integral_constant<int, 1>{});
    } else if (ranks <= 16) {
      with(std::integral_constant<int, 2>{});
    } else if (ranks <= 32) {
      with(std::integral_constant<int, 4>{});
    } else {
      with(std::integral_constant<int, 8>{});
    }
  } else {
    with_rank_tile(ranks, [&](auto rank_tile) {
      constexpr int kRanks = decltype(rank_tile)::value;
      either(DotPlain<T, kLayout, sizeof(T) == 4 ? 2 * kTiles : 2, kRanks, true>{},
             DotPlain<T, kLayout, 2, kRanks, false>{});
    });
  }
}

// More tokens: tall tiles, which read the factor half as often. Up to here they would leave multiprocessors without a
// block.
constexpr int64_t kDotTallTokens = 2048;
// Rank tiles are halved while there are fewer blocks.
constexpr int64_t kDotBlocks = 128;

template <typename T, typename Acc>
void launch_dot(const T* x,  // [tokens, columns]
                int64_t tokens, int64_t columns,
                const T* factor,  // [r, columns] or [columns, r]
                FactorLayout layout, int64_t r,
                Acc* out,  // [tokens, r]
                cudaStream_t stream) {
  if (tokens == 0) return;
  int64_t ranks = 64;
  while (ranks > 8 && (ranks / 2 >= r || ceil_div(tokens, 16) * ceil_div(r, ranks) < kDotBlocks)) ranks /= 2;
  if (r < ranks) ranks = r;
  const auto launch = [&](auto dot) {
    using Dot = decltype(dot);
    const int64_t tiles = ceil_div(tokens, Dot::kRows) * ceil_div(r, Dot::kRanks);
    dot_kernel<Dot><<<grid_size(tiles, 1), Dot::kThreads, 0, stream>>>(x, tokens, columns, factor, r, out);
  };
  const auto with_layout = [&](auto layout_constant) {
    constexpr FactorLayout kLayout = decltype(layout_constant)::value;
    if (tokens > kDotTallTokens) {
      with_dot<T, kLayout, true>(x, columns, factor, r, ranks, launch);
    } else {
      with_dot<T, kLayout, false>(x, columns, factor, r, ranks, launch);
    }
  };
  if (layout == FactorLayout::kRankMajor) {
    with_layout(std::integral_constant<FactorLayout, FactorLayout::kRankMajor>{});
  } else {
    with_layout(std::integral_constant<FactorLayout, FactorLayout::kRankMinor>{});
  }
}

}  // namespace unilora

// CUDA kernels of the LoRA matmul's low-rank part (contract: lora_linear.h). No torch.
// T: float, double, __half or __nv_bfloat16, the dtype of the matrices; Acc: float (double for double), that
// of h, u and all sums. Every matrix is dense and row-major; sizes may exceed 2^31 elements.
//
// Ranks are taken in tiles of kRanks = 4 (r <= 4) or 16, columns in tiles; a tile of the factor goes through shared
// memory, where its layout no longer matters and where what lies beyond its sizes is zero. Each output element has one
// owner that adds in an order given by the sizes alone, without atomics: results are bit-equal run to run.
#pragma once

#include "cuda/launch.cuh"
#include "lora_linear/lora_linear.h"

namespace unilora {

// body(std::integral_constant<int, kRanks>) with the rank tile for r
template <typename Body>
void with_rank_tile(int64_t r, const Body& body) {
  if (r <= 4) {
    body(std::integral_constant<int, 4>{});
  } else {
    body(std::integral_constant<int, 16>{});
  }
}

// tile[q][c] = scaling * factor[q0 + q, c0 + c], zero beyond the factor. The whole block calls it; threads follow its
// storage order, so that reads are coalesced in both layouts. kPitch >= kTileColumns: row length of the tile.
template <int kRanks, int kTileColumns, int kPitch, typename T, typename Acc>
__device__ __forceinline__ void load_factor(const T* __restrict__ factor,  // [r, columns] or [columns, r]
                                            FactorLayout layout, int64_t r, int64_t columns, int64_t q0, int64_t c0,
                                            Acc scaling, Acc (&tile)[kRanks][kPitch]) {
  const bool rank_major = layout == FactorLayout::kRankMajor;
  for (int e = threadIdx.x; e < kRanks * kTileColumns; e += blockDim.x) {
    const int q = rank_major ? e / kTileColumns : e % kRanks, c = rank_major ? e % kTileColumns : e / kRanks;
    const int64_t rank = q0 + q, column = c0 + c;
    const bool inside = rank < r && column < columns;
    tile[q][c] =
        inside ? scaling * widen<Acc>(factor[rank_major ? rank * columns + column : column * r + rank]) : Acc(0);
  }
}

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

// ---- outer ------------------------------------------------------------------------------------------------
// out[q, c] = s sum_i h[i, q] g[i, c]
//
// Work: the rows are cut into chunks. A block owns a chunk, a rank tile and 256 columns, one a thread, and walks
// its rows with the sums in registers; h goes through shared memory. A second kernel adds the chunks.
// Bytes: g once, tokens columns sizeof(T) (for r > 16 the other rank tiles read it from L2), out, r columns sizeof(T),
// and partial sums, 2 chunks r columns sizeof(Acc); from L2, h, tokens r sizeof(Acc), for each column tile.
// Determinism: the number of chunks follows from the sizes alone (about kOuterBlocks blocks); rows are added in
// ascending order within a chunk, then the chunks in ascending order.

constexpr int kOuterColumns = 256;
constexpr int kOuterRows = 32;  // rows of h in shared memory at a time
constexpr int64_t kOuterBlocks = 512;

inline int64_t outer_chunks(int64_t tokens, int64_t columns, int64_t r) {
  const int64_t tiles = ceil_div(columns, kOuterColumns) * ceil_div(r, 16);
  const int64_t wanted = tiles < kOuterBlocks ? kOuterBlocks / (tiles > 0 ? tiles : 1) : 1;
  const int64_t possible = ceil_div(tokens, kOuterRows);
  return possible < 1 ? 1 : (wanted < possible ? wanted : possible);
}

// Elements of Acc that launch_outer wants as scratch.
inline int64_t outer_scratch(int64_t tokens, int64_t columns, int64_t r) {
  return outer_chunks(tokens, columns, r) * r * columns;
}

template <int kRanks, typename T, typename Acc>
__global__ void __launch_bounds__(kOuterColumns)
    outer_chunk_kernel(const T* __restrict__ g,  // [tokens, columns]
                       int64_t tokens, int64_t columns,
                       const Acc* __restrict__ h,  // [tokens, r]
                       int64_t r, int64_t chunks,
                       Acc* __restrict__ partial) {  // [chunks, r, columns]
  __shared__ __align__(16) Acc weight[kOuterRows][kRanks];
  const int64_t rank_tiles = ceil_div(r, kRanks), column_tiles = ceil_div(columns, kOuterColumns);
  const int64_t tiles = chunks * column_tiles * rank_tiles, chunk_rows = ceil_div(tokens, chunks);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t q0 = tile % rank_tiles * kRanks, chunk = tile / rank_tiles / column_tiles;
    const int64_t column = tile / rank_tiles % column_tiles * kOuterColumns + threadIdx.x;
    const int64_t end = (chunk + 1) * chunk_rows < tokens ? (chunk + 1) * chunk_rows : tokens;
    Acc sum[kRanks] = {};
    for (int64_t row0 = chunk * chunk_rows; row0 < end; row0 += kOuterRows) {
      __syncthreads();
      for (int e = threadIdx.x; e < kOuterRows * kRanks; e += kOuterColumns) {
        const int64_t row = row0 + e / kRanks, rank = q0 + e % kRanks;
        weight[e / kRanks][e % kRanks] = row < end && rank < r ? h[row * r + rank] : Acc(0);
      }
      __syncthreads();
      if (column >= columns) continue;
#pragma unroll 4
      for (int i = 0; i < kOuterRows; ++i) {
        if (row0 + i >= end) break;
        const Acc value = widen<Acc>(g[(row0 + i) * columns + column]);
#pragma unroll
        for (int q = 0; q < kRanks; ++q) sum[q] += weight[i][q] * value;
      }
    }
    if (column >= columns) continue;
#pragma unroll
    for (int q = 0; q < kRanks; ++q) {
      if (q0 + q < r) partial[(chunk * r + q0 + q) * columns + column] = sum[q];
    }
  }
}

template <typename T, typename Acc>
__global__ void __launch_bounds__(kOuterColumns)
    outer_finish_kernel(const Acc* __restrict__ partial,  // [chunks, r, columns]
                        int64_t chunks, int64_t columns, int64_t r, Acc scaling,
                        T* __restrict__ out,  // [r, columns] or [columns, r]
                        FactorLayout layout) {
  const bool rank_major = layout == FactorLayout::kRankMajor;
  for (int64_t e = grid_begin(); e < r * columns; e += grid_step()) {
    Acc sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * r * columns + e];
    out[rank_major ? e : e % columns * r + e / columns] = narrow<T>(scaling * sum);
  }
}

template <typename T, typename Acc>
void launch_outer(const T* g,  // [tokens, columns]
                  int64_t tokens, int64_t columns,
                  const Acc* h,  // [tokens, r]
                  int64_t r, double scaling,
                  Acc* partial,  // [outer_scratch(tokens, columns, r)], scratch
                  T* out,        // [r, columns] or [columns, r]
                  FactorLayout layout, cudaStream_t stream) {
  if (columns == 0) return;
  const int64_t chunks = outer_chunks(tokens, columns, r);
  with_rank_tile(r, [&](auto rank_tile) {
    constexpr int kRanks = decltype(rank_tile)::value;
    const int64_t tiles = chunks * ceil_div(columns, kOuterColumns) * ceil_div(r, kRanks);
    outer_chunk_kernel<kRanks>
        <<<grid_size(tiles, 1), kOuterColumns, 0, stream>>>(g, tokens, columns, h, r, chunks, partial);
  });
  outer_finish_kernel<<<grid_size(r * columns, kOuterColumns), kOuterColumns, 0, stream>>>(
      partial, chunks, columns, r, static_cast<Acc>(scaling), out, layout);
}

}  // namespace unilora

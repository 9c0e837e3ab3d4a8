// out = s h^T g (contract: lora_linear.h; conventions: lora_linear_kernels.cuh). No torch.
#pragma once

#include "lora_linear/lora_linear_factor.cuh"

namespace unilora {

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

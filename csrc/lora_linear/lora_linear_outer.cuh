// out = s h^T g (contract: lora_linear.h; conventions: lora_linear_kernels.cuh). No torch.
//
// out[q, c] = s sum_i h[i, q] g[i, c]
//
// Work: the rows are cut into chunks. A block owns a chunk, a tile of columns and a tile of ranks; its warps share the
// chunk's rows, keep their sums in registers and add them through shared memory. A second kernel adds the chunks; with
// one chunk there is none. Two kernels for the chunks: plain products for float and double, tensor cores for the
// 16-bit types.
// Bytes: g once, tokens columns sizeof(T) (rank tiles after the first find it in L2), h, tokens r sizeof(Acc), out, and
// partial sums, 2 chunks r columns sizeof(Acc), which stay in L2: of 4096 x 4096 16-bit numbers and r = 16, 4 chunks,
// 3 % of g written and read.
// Determinism: the number of chunks follows from the sizes alone. In a chunk a warp adds its rows in ascending order,
// then the warps are added in ascending order, then the chunks.
#pragma once

#include "lora_linear/lora_linear_outer_mma.cuh"
#include "lora_linear/lora_linear_outer_sums.cuh"

namespace unilora {

// ---- float and double ---------------------------------------------------------------------------------------
// A thread owns 16 bytes of a row, the threads of a row 64 columns, and the rows of a batch go round the groups of
// threads, `kBatch` each: so many loads in flight before the first product. h goes through shared memory.

template <int kRanks, bool kWide, typename T>
__global__ void __launch_bounds__(kOuterBlock, 2) outer_plain_kernel(Outer<T, T> p) {
  constexpr int kNumbers = 16 / sizeof(T), kGroups = kOuterBlock * kNumbers / kOuterColumns;
  constexpr int kBatch = kWide || sizeof(T) == 8 ? 4 : 2;  // what 128 registers hold
  constexpr int kRows = kBatch * kGroups, kShown = 4;
  __shared__ __align__(16) T weight[kRows][kRanks];
  __shared__ __align__(16) T part[kGroups][kShown][kOuterColumns + kNumbers];
  const int group = threadIdx.x * kNumbers / kOuterColumns, within = threadIdx.x * kNumbers % kOuterColumns;
  const int64_t rank_tiles = ceil_div(p.r, kRanks), column_tiles = ceil_div(p.columns, kOuterColumns);
  const int64_t tiles = p.chunks * column_tiles * rank_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t q0 = tile % rank_tiles * kRanks, c0 = tile / rank_tiles % column_tiles * kOuterColumns;
    const int64_t chunk = tile / rank_tiles / column_tiles, begin = p.chunk_begin(chunk);
    const int columns = left(p.columns, c0 + within, kNumbers), ranks = left(p.r, q0, kRanks);
    const T* g = p.g + (begin + group) * p.columns + c0 + within;
    const T* h = p.h + begin * p.r + q0;
    T sum[kRanks][kNumbers] = {};
    for (int rows = static_cast<int>(p.chunk_begin(chunk + 1) - begin); rows > 0; rows -= kRows) {
      alignas(16) T value[kBatch][kNumbers] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const bool has_row = b * kGroups + group < rows;
        const T* from = g + b * kGroups * p.columns;
        if constexpr (kWide) {
          if (has_row && columns > 0) reinterpret_cast<uint4&>(value[b]) = *reinterpret_cast<const uint4*>(from);
        } else {
#pragma unroll
          for (int k = 0; k < kNumbers; ++k) value[b][k] = has_row && k < columns ? from[k] : T(0);
        }
      }
      __syncthreads();
#pragma unroll
      for (int e = threadIdx.x; e < kRows * kRanks; e += kOuterBlock) {
        const int row = e / kRanks, q = e % kRanks;
        weight[row][q] = row < rows && q < ranks ? h[row * p.r + q] : T(0);
      }
      __syncthreads();
      g += kRows * p.columns;
      h += kRows * p.r;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
#pragma unroll
        for (int q = 0; q < kRanks; ++q) {
          const T w = weight[b * kGroups + group][q];
#pragma unroll
          for (int k = 0; k < kNumbers; ++k) sum[q][k] += w * value[b][k];
        }
      }
    }
#pragma unroll
    for (int shown = 0; shown < kRanks; shown += kShown) {
      if (q0 + shown >= p.r) break;
      __syncthreads();
#pragma unroll
      for (int q = 0; q < kShown; ++q) store_together(&part[group][q][within], sum[shown + q]);
      __syncthreads();
      store_sums<kShown, kOuterColumns>(p, chunk, p.chunks == 1, q0 + shown, c0, [&](int q, int c) {
        T total = 0;
#pragma unroll
        for (int k = 0; k < kGroups; ++k) total += part[k][q][c];
        return total;
      });
    }
  }
}

// ---- launch -------------------------------------------------------------------------------------------------

template <typename T, typename Acc>
void launch_outer(const T* g,  // [tokens, columns]
                  int64_t tokens, int64_t columns,
                  const Acc* h,  // [tokens, r]
                  int64_t r, double scaling,
                  Acc* partial,  // [outer_scratch(tokens, columns, r)], scratch
                  T* out,        // [r, columns] or [columns, r]
                  FactorLayout layout, cudaStream_t stream) {
  if (columns == 0) return;
  const Outer<T, Acc> p = {
      g, h, tokens, columns, r, outer_chunks(tokens, columns, r), static_cast<Acc>(scaling), partial, out, layout};
  const bool wide = reinterpret_cast<uintptr_t>(g) % 16 == 0 && columns * sizeof(T) % 16 == 0;
  // Wide loads or not, rows and warps are paired alike: the bits of a result do not depend on the pointer.
  const auto launch = [&](auto* kernel, int64_t ranks, int64_t tile_columns) {
    const int64_t tiles = p.chunks * ceil_div(columns, tile_columns) * ceil_div(r, ranks);
    kernel<<<grid_size(tiles, 1), kOuterBlock, 0, stream>>>(p);
  };
  if constexpr (std::is_same_v<T, Acc>) {
    if (r <= 4) {
      launch(wide ? outer_plain_kernel<4, true, T> : outer_plain_kernel<4, false, T>, 4, kOuterColumns);
    } else {
      launch(wide ? outer_plain_kernel<16, true, T> : outer_plain_kernel<16, false, T>, 16, kOuterColumns);
    }
  } else if (r <= 16) {
    launch(wide ? outer_mma_kernel<1, 1, 1, true, T> : outer_mma_kernel<1, 1, 1, false, T>, 16, kOuterColumns);
  } else if (r <= 32) {
    launch(wide ? outer_mma_kernel<2, 1, 1, true, T> : outer_mma_kernel<2, 1, 1, false, T>, 32, kOuterColumns);
  } else {
    wide ? launch(outer_mma_kernel<2, 2, 2, true, T>, 64, 2 * kOuterColumns)
         : launch(outer_mma_kernel<2, 2, 1, false, T>, 32, 2 * kOuterColumns);
  }
  if (p.chunks > 1) outer_finish_kernel<<<grid_size(finish_tiles(columns, r), 1), kOuterBlock, 0, stream>>>(p);
}

}  // namespace unilora

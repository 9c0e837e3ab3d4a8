// y += s h factor, and y = bias + s h factor (contract: lora_linear.h; conventions: lora_linear_kernels.cuh). No torch.
#pragma once

#include "lora_linear/lora_linear_update_mma.cuh"

namespace unilora {

// ---- float and double -------------------------------------------------------------------------------------------
// kOnto:  y[i, c] += s sum_q h[i, q] factor[q, c]
// else:   y[i, c]  = bias[c] + s sum_q h[i, q] factor[q, c]
//
// Work: a block owns a tile of 32 rows and 512 bytes of columns, a warp four of the rows, a lane 16 bytes of each,
// whose y it loads first. Ranks in tiles of 16 through shared memory.
//
// Bytes: y read (kOnto) and written once, 2 or 1 tokens columns sizeof(T); from L2, h, tokens r sizeof(T), for each
// column tile, and the factor, r columns sizeof(T), for each row tile.
//
// Determinism: a lane adds the ranks of its elements in ascending order, to zero or its bias; then y; one rounding.

constexpr int kPlainUpdateBlock = 256;
constexpr int kPlainUpdateRows = 32;
constexpr int kPlainUpdateRanks = 16;

// kWide: y and bias are 16-byte aligned and rows multiples of 16 bytes. A lane's columns are neighbours; otherwise a
// warp apart, so that narrow accesses are neighbours across lanes.
template <bool kWide, bool kOnto, typename T>
__global__ void __launch_bounds__(kPlainUpdateBlock, 2)
    rank_update_kernel(T* __restrict__ y,  // [tokens, columns]
                       int64_t tokens, int64_t columns,
                       const T* __restrict__ bias,  // [columns] or null
                       const T* __restrict__ h,     // [tokens, r]
                       int64_t r,
                       const T* __restrict__ factor,  // [r, columns] or [columns, r]
                       FactorLayout layout, T scaling) {
  using Vector = Numbers<T>;
  constexpr int kWidth = Vector::kCount, kColumns = kWarp * kWidth, kRanks = kPlainUpdateRanks,
                kStride = kWide ? 1 : kWarp;
  constexpr int kRows = kPlainUpdateRows / (kPlainUpdateBlock / kWarp);  // of a warp
  __shared__ __align__(16) T weight[kRanks][kPlainUpdateRows + kWidth];
  __shared__ __align__(16) T factor_tile[kRanks][kColumns + kWidth];
  const int lane = threadIdx.x % kWarp, warp_row = threadIdx.x / kWarp * kRows;
  const int64_t column_tiles = ceil_div(columns, kColumns), tiles = ceil_div(tokens, kPlainUpdateRows) * column_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row0 = tile / column_tiles * kPlainUpdateRows, c0 = tile % column_tiles * kColumns;
    const int64_t column = c0 + (kWide ? lane * kWidth : lane);
    T* own = y + (row0 + warp_row) * columns + column;
    const auto inside = [&](int i, int k) { return row0 + warp_row + i < tokens && column + k * kStride < columns; };
    const auto load = [&](const T* from, int i) {
      Vector out{};
      if constexpr (kWide) {
        if (inside(i, 0)) out = *reinterpret_cast<const Vector*>(from);
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (inside(i, k)) out.value[k] = from[k * kStride];
      }
      return out;
    };

    Vector old[kRows], sum[kRows] = {};
    if constexpr (kOnto) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) old[i] = load(own + i * columns, i);
    } else if (bias != nullptr) {
      const Vector start = load(bias + column, 0);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sum[i] = start;
    }

    for (int64_t q0 = 0; q0 < r; q0 += kRanks) {
      __syncthreads();
      stage_factor<kRanks, kColumns, kPlainUpdateBlock, 4>(
          factor, layout, r, columns, q0, c0,
          [&](int q, int c, T value) { factor_tile[q][kWide ? c : c % kWarp * kWidth + c / kWarp] = value; });
#pragma unroll
      for (int e = threadIdx.x; e < kPlainUpdateRows * kRanks; e += kPlainUpdateBlock) {
        const int64_t row = row0 + e / kRanks, rank = q0 + e % kRanks;
        weight[e % kRanks][e / kRanks] = row < tokens && rank < r ? scaling * h[row * r + rank] : T(0);
      }
      __syncthreads();
      const int ranks = r - q0 < kRanks ? static_cast<int>(r - q0) : kRanks;
#pragma unroll 2
      for (int q = 0; q < ranks; ++q) {
        const Vector p = *reinterpret_cast<const Vector*>(&factor_tile[q][lane * kWidth]);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const T w = weight[q][warp_row + i];
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum[i].value[k] += w * p.value[k];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Vector result = sum[i];
      if constexpr (kOnto) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) result.value[k] = old[i].value[k] + sum[i].value[k];
      }
      if constexpr (kWide) {
        if (inside(i, 0)) *reinterpret_cast<Vector*>(own + i * columns) = result;
      } else {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          if (inside(i, k)) own[i * columns + k * kStride] = result.value[k];
      }
    }
  }
}

template <bool kOnto, typename T>
void launch_update_plain(T* y, int64_t tokens, int64_t columns, const T* bias, const T* h, int64_t r, const T* factor,
                         FactorLayout layout, T scaling, cudaStream_t stream) {
  constexpr int kWidth = Numbers<T>::kCount;
  const unsigned grid = grid_size(ceil_div(tokens, kPlainUpdateRows) * ceil_div(columns, kWarp * kWidth), 1);
  const auto launch = [&](auto wide) {
    rank_update_kernel<decltype(wide)::value, kOnto>
        <<<grid, kPlainUpdateBlock, 0, stream>>>(y, tokens, columns, bias, h, r, factor, layout, scaling);
  };
  if (columns % kWidth == 0 && (reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(bias)) % 16 == 0) {
    launch(std::true_type{});
  } else {
    launch(std::false_type{});
  }
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <bool kOnto, typename T, typename Acc>
void launch_update(T* y, int64_t tokens, int64_t columns, const T* bias, const Acc* h, int64_t r, const T* factor,
                   FactorLayout layout, double scaling, cudaStream_t stream) {
  if (tokens == 0 || columns == 0) return;
  const Acc s = static_cast<Acc>(scaling);
  if constexpr (sizeof(T) == 2) {
    launch_update_mma<kOnto>(y, tokens, columns, bias, h, r, factor, layout, s, stream);
  } else {
    launch_update_plain<kOnto>(y, tokens, columns, bias, h, r, factor, layout, s, stream);
  }
}

template <typename T, typename Acc>
void launch_rank_update(T* y,  // [tokens, columns]
                        int64_t tokens, int64_t columns,
                        const Acc* h,  // [tokens, r]
                        int64_t r,
                        const T* factor,  // [r, columns] or [columns, r]
                        FactorLayout layout, double scaling, cudaStream_t stream) {
  launch_update<true>(y, tokens, columns, static_cast<const T*>(nullptr), h, r, factor, layout, scaling, stream);
}

// y is written, not read.
template <typename T, typename Acc>
void launch_rank_product(T* y,  // [tokens, columns]
                         int64_t tokens, int64_t columns,
                         const T* bias,  // [columns] or null
                         const Acc* h,   // [tokens, r]
                         int64_t r,
                         const T* factor,  // [r, columns] or [columns, r]
                         FactorLayout layout, double scaling, cudaStream_t stream) {
  launch_update<false>(y, tokens, columns, bias, h, r, factor, layout, scaling, stream);
}

}  // namespace unilora

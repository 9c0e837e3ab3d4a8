// CPU kernels of the LoRA matmul's low-rank part, on blocks of rows. No torch but its 16-bit types.
// T: the dtype of the matrices; Acc: that of sums, float (double for double). Factors come packed, [r, columns] in Acc.
//
// Each kernel works on tiles of up to 4 rows by 4 ranks: a value that is loaded serves a whole side of the tile, so
// that the multiplications are the limit and not the loads. The rows of the next tile are prefetched, as those of one
// tile are too short for the hardware to run ahead. A result is summed in an order that its row's place in its block
// and the sizes give.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/multiversion.h"

namespace unilora {

// Calls body(tile_rows, tile_ranks, row, rank) for tiles that cover rows x r; their sizes are integral_constants.
template <typename Body>
UNILORA_INLINE void for_tiles(int64_t rows, int64_t r, const Body& body) {
  using One = std::integral_constant<int, 1>;
  using Four = std::integral_constant<int, 4>;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t q = 0;
    for (; q + 4 <= r; q += 4) body(Four{}, Four{}, i, q);
    for (; q < r; ++q) body(Four{}, One{}, i, q);
  }
  for (; i < rows; ++i) {
    int64_t q = 0;
    for (; q + 4 <= r; q += 4) body(One{}, Four{}, i, q);
    for (; q < r; ++q) body(One{}, One{}, i, q);
  }
}

// out[i, q] = sum_c x[i, c] factor[q, c]
template <int kRows, int kRanks, typename T, typename Acc>
UNILORA_INLINE void dot_tile(const T* x, const Acc* factor, int64_t columns, int64_t r, Acc* out) {
  constexpr int64_t kLanes = LanesOf<Acc>::kLanes;
  Lanes<Acc> sum[kRows][kRanks] = {}, p[kRanks], value;
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    for (int q = 0; q < kRanks; ++q) load_lanes<Acc>(factor + q * columns + c, p[q]);
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(x + (kRows + i) * columns + c);
      load_lanes<Acc>(x + i * columns + c, value);
      for (int q = 0; q < kRanks; ++q) sum[i][q] += value * p[q];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int q = 0; q < kRanks; ++q) {
      Acc total = 0;
      for (int64_t l = 0; l < kLanes; ++l) total += sum[i][q][l];
      for (int64_t t = c; t < columns; ++t) total += static_cast<Acc>(x[i * columns + t]) * factor[q * columns + t];
      out[i * r + q] = total;
    }
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void dot_rows(const T* x,  // [rows, columns]
                             int64_t rows, int64_t columns,
                             const Acc* factor,  // [r, columns]
                             int64_t r,
                             Acc* out) {  // [rows, r]
  for_tiles(rows, r, [=](auto tile_rows, auto tile_ranks, int64_t i, int64_t q) __attribute__((always_inline)) {
    dot_tile<tile_rows(), tile_ranks()>(x + i * columns, factor + q * columns, columns, r, out + i * r + q);
  });
}

// y[i, c] += sum_q h[i, q] factor[q, c] for c < width, all ranks in registers' time: y is read and written once,
// whatever r
template <int kRows, typename T, typename Acc>
UNILORA_INLINE void update_tile(T* y, int64_t columns, int64_t width, const Acc* h, int64_t r, const Acc* factor) {
  constexpr int64_t kLanes = LanesOf<Acc>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Lanes<Acc> sum[kRows], p;
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(y + (kRows + i) * columns + c, 1);
      load_lanes<Acc>(y + i * columns + c, sum[i]);
    }
    for (int64_t q = 0; q < r; ++q) {
      load_lanes<Acc>(factor + q * columns + c, p);
      for (int i = 0; i < kRows; ++i) sum[i] += h[i * r + q] * p;
    }
    for (int i = 0; i < kRows; ++i) store_lanes<Acc>(y + i * columns + c, sum[i]);
  }
  for (; c < width; ++c) {
    for (int i = 0; i < kRows; ++i) {
      Acc sum = static_cast<Acc>(y[i * columns + c]);
      for (int64_t q = 0; q < r; ++q) sum += h[i * r + q] * factor[q * columns + c];
      y[i * columns + c] = static_cast<T>(sum);
    }
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void update_rows(T* y,  // [rows, columns]
                                int64_t rows, int64_t columns,
                                const Acc* h,  // [rows, r]
                                int64_t r,
                                const Acc* factor) {  // [r, columns]
  constexpr int64_t kColumns = 512;                   // a tile of the factor stays in the cache for all rows
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t width = std::min(kColumns, columns - c);
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) update_tile<8>(y + i * columns + c, columns, width, h + i * r, r, factor + c);
    for (; i < rows; ++i) update_tile<1>(y + i * columns + c, columns, width, h + i * r, r, factor + c);
  }
}

// y[c] += scaling sum_q h[q] factor[c, q], one row: the factor as B is stored, in its own dtype
template <int kRank, typename T, typename Acc>
UNILORA_INLINE void update_row_of(T* y, int64_t columns, const Acc* h, int64_t r, const T* factor, Acc scaling) {
  const int64_t ranks = kRank > 0 ? kRank : r;
  for (int64_t c = 0; c < columns; ++c) {
    Acc sum = 0;
    for (int64_t q = 0; q < ranks; ++q) sum += h[q] * static_cast<Acc>(factor[c * ranks + q]);
    y[c] = static_cast<T>(static_cast<Acc>(y[c]) + scaling * sum);
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void update_one_row(T* y, int64_t columns, const Acc* h, int64_t r, const T* factor, Acc scaling) {
  switch (r) {
    case 4:
      return update_row_of<4>(y, columns, h, r, factor, scaling);
    case 8:
      return update_row_of<8>(y, columns, h, r, factor, scaling);
    case 16:
      return update_row_of<16>(y, columns, h, r, factor, scaling);
    default:
      return update_row_of<0>(y, columns, h, r, factor, scaling);
  }
}

// sums[q, c] += sum_i h[i, q] g[i, c]
template <int kRows, int kRanks, typename T, typename Acc>
UNILORA_INLINE void outer_tile(const T* g, int64_t columns, const Acc* h, int64_t r, Acc* sums) {
  constexpr int64_t kLanes = LanesOf<Acc>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= columns; c += kLanes) {
    Lanes<Acc> value[kRows], sum;
    for (int i = 0; i < kRows; ++i) {
      __builtin_prefetch(g + (kRows + i) * columns + c);
      load_lanes<Acc>(g + i * columns + c, value[i]);
    }
    for (int q = 0; q < kRanks; ++q) {
      load_lanes<Acc>(sums + q * columns + c, sum);
      for (int i = 0; i < kRows; ++i) sum += h[i * r + q] * value[i];
      store_lanes<Acc>(sums + q * columns + c, sum);
    }
  }
  for (; c < columns; ++c) {
    for (int q = 0; q < kRanks; ++q) {
      for (int i = 0; i < kRows; ++i) sums[q * columns + c] += h[i * r + q] * static_cast<Acc>(g[i * columns + c]);
    }
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void outer_rows(const T* g,  // [rows, columns]
                               int64_t rows, int64_t columns,
                               const Acc* h,  // [rows, r]
                               int64_t r,
                               Acc* sums) {  // [r, columns]
  for_tiles(rows, r, [=](auto tile_rows, auto tile_ranks, int64_t i, int64_t q) __attribute__((always_inline)) {
    outer_tile<tile_rows(), tile_ranks()>(g + i * columns, columns, h + i * r + q, r, sums + q * columns);
  });
}

// Multiversioning works on plain functions only: one set for each dtype.
#define UNILORA_LORA_KERNELS(T, Acc)                                                                                  \
  UNILORA_MULTIVERSION inline void dot_block(const T* x, int64_t rows, int64_t columns, const Acc* factor, int64_t r, \
                                             Acc* o) {                                                                \
    dot_rows(x, rows, columns, factor, r, o);                                                                         \
  }                                                                                                                   \
  UNILORA_MULTIVERSION inline void update_block(T* y, int64_t rows, int64_t columns, const Acc* h, int64_t r,         \
                                                const Acc* factor) {                                                  \
    update_rows(y, rows, columns, h, r, factor);                                                                      \
  }                                                                                                                   \
  UNILORA_MULTIVERSION inline void update_row(T* y, int64_t columns, const Acc* h, int64_t r, const T* factor,        \
                                              Acc scaling) {                                                          \
    update_one_row(y, columns, h, r, factor, scaling);                                                                \
  }                                                                                                                   \
  UNILORA_MULTIVERSION inline void outer_block(const T* g, int64_t rows, int64_t columns, const Acc* h, int64_t r,    \
                                               Acc* sums) {                                                           \
    outer_rows(g, rows, columns, h, r, sums);                                                                         \
  }
UNILORA_LORA_KERNELS(float, float)
UNILORA_LORA_KERNELS(double, double)
UNILORA_LORA_KERNELS(torch::headeronly::Half, float)
UNILORA_LORA_KERNELS(torch::headeronly::BFloat16, float)
#undef UNILORA_LORA_KERNELS

}  // namespace unilora

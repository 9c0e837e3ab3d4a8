// CPU kernels of the LoRA matmul's low-rank part, on blocks of rows. No torch but its 16-bit types.
// T: the dtype of the matrices; Acc: that of sums, float (double for double). Factors come packed, [r, C] in Acc.
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

// Calls body(R, Q, row, rank) for tiles of R x Q that cover rows x r; R and Q are integral_constants.
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

// out[i, q] = sum_c x[i, c] P[q, c]
template <int R, int Q, typename T, typename Acc>
UNILORA_INLINE void dot_tile(const T* x, const Acc* P, int64_t K, int64_t r, Acc* out) {
  constexpr int64_t kLanes = LanesOf<Acc>::kLanes;
  Lanes<Acc> sum[R][Q] = {}, p[Q], value;
  int64_t c = 0;
  for (; c + kLanes <= K; c += kLanes) {
    for (int q = 0; q < Q; ++q) load_lanes<Acc>(P + q * K + c, p[q]);
    for (int i = 0; i < R; ++i) {
      __builtin_prefetch(x + (R + i) * K + c);
      load_lanes<Acc>(x + i * K + c, value);
      for (int q = 0; q < Q; ++q) sum[i][q] += value * p[q];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int q = 0; q < Q; ++q) {
      Acc total = 0;
      for (int64_t l = 0; l < kLanes; ++l) total += sum[i][q][l];
      for (int64_t t = c; t < K; ++t) total += static_cast<Acc>(x[i * K + t]) * P[q * K + t];
      out[i * r + q] = total;
    }
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void dot_rows(const T* x,  // [rows, K]
                             int64_t rows, int64_t K,
                             const Acc* P,  // [r, K]
                             int64_t r,
                             Acc* out) {  // [rows, r]
  for_tiles(rows, r, [=](auto R, auto Q, int64_t i, int64_t q) __attribute__((always_inline)) {
    dot_tile<R(), Q()>(x + i * K, P + q * K, K, r, out + i * r + q);
  });
}

// y[i, c] += sum_q h[i, q] P[q, c] for c < width, all ranks in registers' time: y is read and written once, whatever r
template <int R, typename T, typename Acc>
UNILORA_INLINE void update_tile(T* y, int64_t M, int64_t width, const Acc* h, int64_t r, const Acc* P) {
  constexpr int64_t kLanes = LanesOf<Acc>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Lanes<Acc> sum[R], p;
    for (int i = 0; i < R; ++i) {
      __builtin_prefetch(y + (R + i) * M + c, 1);
      load_lanes<Acc>(y + i * M + c, sum[i]);
    }
    for (int64_t q = 0; q < r; ++q) {
      load_lanes<Acc>(P + q * M + c, p);
      for (int i = 0; i < R; ++i) sum[i] += h[i * r + q] * p;
    }
    for (int i = 0; i < R; ++i) store_lanes<Acc>(y + i * M + c, sum[i]);
  }
  for (; c < width; ++c) {
    for (int i = 0; i < R; ++i) {
      Acc sum = static_cast<Acc>(y[i * M + c]);
      for (int64_t q = 0; q < r; ++q) sum += h[i * r + q] * P[q * M + c];
      y[i * M + c] = static_cast<T>(sum);
    }
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void update_rows(T* y,  // [rows, M]
                                int64_t rows, int64_t M,
                                const Acc* h,  // [rows, r]
                                int64_t r,
                                const Acc* P) {  // [r, M]
  constexpr int64_t kColumns = 512;              // a tile of P stays in the cache for all rows
  for (int64_t c = 0; c < M; c += kColumns) {
    const int64_t width = std::min(kColumns, M - c);
    int64_t i = 0;
    for (; i + 8 <= rows; i += 8) update_tile<8>(y + i * M + c, M, width, h + i * r, r, P + c);
    for (; i < rows; ++i) update_tile<1>(y + i * M + c, M, width, h + i * r, r, P + c);
  }
}

// y[c] += scaling sum_q h[q] P[c, q], one row: P as B is stored, in its own dtype
template <int kRank, typename T, typename Acc>
UNILORA_INLINE void update_row_of(T* y, int64_t M, const Acc* h, int64_t r, const T* P, Acc scaling) {
  const int64_t ranks = kRank > 0 ? kRank : r;
  for (int64_t c = 0; c < M; ++c) {
    Acc sum = 0;
    for (int64_t q = 0; q < ranks; ++q) sum += h[q] * static_cast<Acc>(P[c * ranks + q]);
    y[c] = static_cast<T>(static_cast<Acc>(y[c]) + scaling * sum);
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void update_one_row(T* y, int64_t M, const Acc* h, int64_t r, const T* P, Acc scaling) {
  switch (r) {
    case 4:
      return update_row_of<4>(y, M, h, r, P, scaling);
    case 8:
      return update_row_of<8>(y, M, h, r, P, scaling);
    case 16:
      return update_row_of<16>(y, M, h, r, P, scaling);
    default:
      return update_row_of<0>(y, M, h, r, P, scaling);
  }
}

// sums[q, c] += sum_i h[i, q] g[i, c]
template <int R, int Q, typename T, typename Acc>
UNILORA_INLINE void outer_tile(const T* g, int64_t M, const Acc* h, int64_t r, Acc* sums) {
  constexpr int64_t kLanes = LanesOf<Acc>::kLanes;
  int64_t c = 0;
  for (; c + kLanes <= M; c += kLanes) {
    Lanes<Acc> value[R], sum;
    for (int i = 0; i < R; ++i) {
      __builtin_prefetch(g + (R + i) * M + c);
      load_lanes<Acc>(g + i * M + c, value[i]);
    }
    for (int q = 0; q < Q; ++q) {
      load_lanes<Acc>(sums + q * M + c, sum);
      for (int i = 0; i < R; ++i) sum += h[i * r + q] * value[i];
      store_lanes<Acc>(sums + q * M + c, sum);
    }
  }
  for (; c < M; ++c) {
    for (int q = 0; q < Q; ++q) {
      for (int i = 0; i < R; ++i) sums[q * M + c] += h[i * r + q] * static_cast<Acc>(g[i * M + c]);
    }
  }
}
template <typename T, typename Acc>
UNILORA_INLINE void outer_rows(const T* g,  // [rows, M]
                               int64_t rows, int64_t M,
                               const Acc* h,  // [rows, r]
                               int64_t r,
                               Acc* sums) {  // [r, M]
  for_tiles(rows, r, [=](auto R, auto Q, int64_t i, int64_t q) __attribute__((always_inline)) {
    outer_tile<R(), Q()>(g + i * M, M, h + i * r + q, r, sums + q * M);
  });
}

// Multiversioning works on plain functions only: one set for each dtype.
#define UNILORA_LORA_KERNELS(T, Acc)                                                                                 \
  UNILORA_MULTIVERSION inline void dot_block(const T* x, int64_t rows, int64_t K, const Acc* P, int64_t r, Acc* o) { \
    dot_rows(x, rows, K, P, r, o);                                                                                   \
  }                                                                                                                  \
  UNILORA_MULTIVERSION inline void update_block(T* y, int64_t rows, int64_t M, const Acc* h, int64_t r,              \
                                                const Acc* P) {                                                      \
    update_rows(y, rows, M, h, r, P);                                                                                \
  }                                                                                                                  \
  UNILORA_MULTIVERSION inline void update_row(T* y, int64_t M, const Acc* h, int64_t r, const T* P, Acc scaling) {   \
    update_one_row(y, M, h, r, P, scaling);                                                                          \
  }                                                                                                                  \
  UNILORA_MULTIVERSION inline void outer_block(const T* g, int64_t rows, int64_t M, const Acc* h, int64_t r,         \
                                               Acc* sums) {                                                          \
    outer_rows(g, rows, M, h, r, sums);                                                                              \
  }
UNILORA_LORA_KERNELS(float, float)
UNILORA_LORA_KERNELS(double, double)
UNILORA_LORA_KERNELS(torch::headeronly::Half, float)
UNILORA_LORA_KERNELS(torch::headeronly::BFloat16, float)
#undef UNILORA_LORA_KERNELS

}  // namespace unilora

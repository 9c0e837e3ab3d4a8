// CPU kernels of the LoRA matmul's low-rank part. The factor is first copied to [r, C] in the accumulator dtype (r C
// elements, small beside the N C of the large operand), so that each inner loop runs along contiguous columns.
#include <vector>

#include "cpu/parallel.h"
#include "lora_linear/lora_linear.h"

namespace unilora {
namespace {

constexpr int64_t kRows = 16;      // rows that share one read of the factor
constexpr int64_t kColumns = 512;  // columns of y or g held in L1 while all ranks are applied
constexpr int64_t kRanks = 4;      // ranks served by one load of the large operand

template <typename T, typename Acc>
std::vector<Acc> packed(const T* P, int64_t r, int64_t C, FactorLayout layout, Acc scaling) {
  std::vector<Acc> out(static_cast<size_t>(r * C));
  const int64_t rank_stride = layout == FactorLayout::kRankMajor ? C : 1;
  const int64_t column_stride = layout == FactorLayout::kRankMajor ? 1 : r;
  for (int64_t q = 0; q < r; ++q)
    for (int64_t c = 0; c < C; ++c) out[q * C + c] = scaling * static_cast<Acc>(P[q * rank_stride + c * column_stride]);
  return out;
}

// out[q] = sum_c x[c] P[q, c] for Q <= kRanks ranks
template <int Q, typename T, typename Acc>
UNILORA_INLINE void dot_row(const T* __restrict x, const Acc* __restrict P, int64_t K, Acc* __restrict out) {
  const Acc *p0 = P, *p1 = P + (Q > 1 ? K : 0), *p2 = P + (Q > 2 ? 2 * K : 0), *p3 = P + (Q > 3 ? 3 * K : 0);
  Acc s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t c = 0; c < K; ++c) {
    const Acc value = static_cast<Acc>(x[c]);
    s0 += value * p0[c];
    if (Q > 1) s1 += value * p1[c];
    if (Q > 2) s2 += value * p2[c];
    if (Q > 3) s3 += value * p3[c];
  }
  const Acc sums[4] = {s0, s1, s2, s3};
  for (int q = 0; q < Q; ++q) out[q] = sums[q];
}

template <typename T, typename Acc>
UNILORA_INLINE void dot_rows(const T* x, int64_t rows, int64_t K, const Acc* P, int64_t r, Acc* out) {
  for (int64_t q = 0; q < r; q += kRanks) {
    for (int64_t i = 0; i < rows; ++i) {
      switch (std::min(kRanks, r - q)) {
        case 4:
          dot_row<4>(x + i * K, P + q * K, K, out + i * r + q);
          break;
        case 3:
          dot_row<3>(x + i * K, P + q * K, K, out + i * r + q);
          break;
        case 2:
          dot_row<2>(x + i * K, P + q * K, K, out + i * r + q);
          break;
        default:
          dot_row<1>(x + i * K, P + q * K, K, out + i * r + q);
      }
    }
  }
}

template <typename T, typename Acc>
UNILORA_INLINE void rank_update_rows(T* y, int64_t rows, int64_t M, const Acc* h, int64_t r, const Acc* P) {
  Acc tile[kColumns];
  for (int64_t c0 = 0; c0 < M; c0 += kColumns) {
    const int64_t width = std::min(kColumns, M - c0);
    for (int64_t i = 0; i < rows; ++i) {
      T* __restrict row = y + i * M + c0;
      for (int64_t c = 0; c < width; ++c) tile[c] = static_cast<Acc>(row[c]);
      for (int64_t q = 0; q < r; ++q) {
        const Acc weight = h[i * r + q];
        const Acc* __restrict p = P + q * M + c0;
        for (int64_t c = 0; c < width; ++c) tile[c] += weight * p[c];
      }
      for (int64_t c = 0; c < width; ++c) row[c] = static_cast<T>(tile[c]);
    }
  }
}

// One tile of columns, all N rows in order: sums[q, c] = sum_i h[i, q] g[i, c]; sums is [r, width]
template <typename T, typename Acc>
UNILORA_INLINE void outer_tile(const T* g, int64_t N, int64_t M, int64_t width, const Acc* h, int64_t r,
                               Acc* __restrict sums) {
  Acc row[kColumns];
  std::fill(sums, sums + r * width, Acc(0));
  for (int64_t i = 0; i < N; ++i) {
    for (int64_t c = 0; c < width; ++c) row[c] = static_cast<Acc>(g[i * M + c]);
    for (int64_t q = 0; q < r; ++q) {
      const Acc weight = h[i * r + q];
      Acc* __restrict sum = sums + q * width;
      for (int64_t c = 0; c < width; ++c) sum[c] += weight * row[c];
    }
  }
}

// Multiversioning works on plain functions only: one set for each dtype.
#define UNILORA_LORA_KERNELS(T, Acc)                                                                                  \
  UNILORA_MULTIVERSION void dot_block(const T* x, int64_t rows, int64_t K, const Acc* P, int64_t r, Acc* out) {       \
    dot_rows(x, rows, K, P, r, out);                                                                                  \
  }                                                                                                                   \
  UNILORA_MULTIVERSION void rank_update_block(T* y, int64_t rows, int64_t M, const Acc* h, int64_t r, const Acc* P) { \
    rank_update_rows(y, rows, M, h, r, P);                                                                            \
  }                                                                                                                   \
  UNILORA_MULTIVERSION void outer_block(const T* g, int64_t N, int64_t M, int64_t width, const Acc* h, int64_t r,     \
                                        Acc* sums) {                                                                  \
    outer_tile(g, N, M, width, h, r, sums);                                                                           \
  }
UNILORA_LORA_KERNELS(float, float)
UNILORA_LORA_KERNELS(double, double)
UNILORA_LORA_KERNELS(torch::headeronly::Half, float)
UNILORA_LORA_KERNELS(torch::headeronly::BFloat16, float)
#undef UNILORA_LORA_KERNELS

struct CpuLoraLinear {
  explicit CpuLoraLinear(const Tensor&) {}

  template <typename T, typename Acc>
  void dot(const T* x, int64_t N, int64_t K, const T* P, FactorLayout layout, int64_t r, Acc* out) const {
    const std::vector<Acc> factor = packed<T, Acc>(P, r, K, layout, 1);
    parallel((N + kRows - 1) / kRows, kRows * K * r, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kRows; i < std::min(N, end * kRows); i += kRows)
        dot_block(x + i * K, std::min(kRows, N - i), K, factor.data(), r, out + i * r);
    });
  }

  template <typename T, typename Acc>
  void rank_update(T* y, int64_t N, int64_t M, const Acc* h, int64_t r, const T* P, FactorLayout layout,
                   double scaling) const {
    const std::vector<Acc> factor = packed<T, Acc>(P, r, M, layout, static_cast<Acc>(scaling));
    parallel((N + kRows - 1) / kRows, kRows * M * r, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kRows; i < std::min(N, end * kRows); i += kRows)
        rank_update_block(y + i * M, std::min(kRows, N - i), M, h + i * r, r, factor.data());
    });
  }

  template <typename T, typename Acc>
  void outer(const T* g, int64_t N, int64_t M, const Acc* h, int64_t r, double scaling, T* out,
             FactorLayout layout) const {
    const int64_t rank_stride = layout == FactorLayout::kRankMajor ? M : 1;
    const int64_t column_stride = layout == FactorLayout::kRankMajor ? 1 : r;
    constexpr int64_t kTile = 128;
    static_assert(kTile <= kColumns, "outer_tile holds one tile of a row");
    parallel((M + kTile - 1) / kTile, kTile * N * r, [&](int64_t begin, int64_t end) {
      std::vector<Acc> sums(static_cast<size_t>(r * kTile));
      for (int64_t c0 = begin * kTile; c0 < std::min(M, end * kTile); c0 += kTile) {
        const int64_t width = std::min(kTile, M - c0);
        outer_block(g + c0, N, M, width, h, r, sums.data());
        for (int64_t q = 0; q < r; ++q)
          for (int64_t c = 0; c < width; ++c)
            out[q * rank_stride + (c0 + c) * column_stride] =
                static_cast<T>(static_cast<Acc>(scaling) * sums[q * width + c]);
      }
    });
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CPU, m) { UNILORA_IMPL_LORA_LINEAR(m, unilora::CpuLoraLinear); }

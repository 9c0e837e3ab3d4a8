// The LoRA matmul's low-rank part on the CPU. Factors that do not lie as [r, C] in the accumulator dtype are first
// copied so: r C elements, small beside the N C of the large operand, but for few rows (kFewRows).
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "lora_linear/lora_linear.h"
#include "lora_linear/lora_linear_kernels.h"

namespace unilora {
namespace {

constexpr int64_t kRows = 16;  // rows of a block: they share one read of the factor, and stay in the cache

constexpr int64_t kFewRows = 2;  // of y, to which B is added as it lies: a copy of it would be most of the work

template <typename T, typename Acc>
std::vector<Acc> packed(const T* P, int64_t r, int64_t C, FactorLayout layout, Acc scaling) {
  std::vector<Acc> out(static_cast<size_t>(r * C));
  const int64_t rank_stride = layout == FactorLayout::kRankMajor ? C : 1;
  const int64_t column_stride = layout == FactorLayout::kRankMajor ? 1 : r;
  for (int64_t q = 0; q < r; ++q)
    for (int64_t c = 0; c < C; ++c) out[q * C + c] = scaling * static_cast<Acc>(P[q * rank_stride + c * column_stride]);
  return out;
}

// body(first, rows) for the blocks of [begin, end), in order
template <typename Body>
void for_row_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += kRows) body(i, std::min(kRows, end - i));
}

// Rows in chunks that are summed apart and then added in order. Their number follows from the sizes alone: enough for
// some threads, while the sums stay a fraction of the rows.
int64_t row_chunks(int64_t N, int64_t r) { return std::clamp<int64_t>(N / (4 * std::max<int64_t>(r, 16)), 1, 8); }

struct CpuLoraLinear {
  explicit CpuLoraLinear(const Tensor&) {}

  template <typename T, typename Acc>
  void dot(const T* x, int64_t N, int64_t K, const T* P, FactorLayout layout, int64_t r, Acc* out) const {
    std::vector<Acc> copy;
    const Acc* factor = nullptr;
    if constexpr (std::is_same_v<T, Acc>) factor = layout == FactorLayout::kRankMajor ? P : nullptr;
    if (factor == nullptr) {
      copy = packed<T, Acc>(P, r, K, layout, 1);
      factor = copy.data();
    }
    parallel((N + kRows - 1) / kRows, kRows * K * r, [&](int64_t begin, int64_t end) {
      for_row_blocks(begin * kRows, std::min(N, end * kRows),
                     [&](int64_t i, int64_t rows) { dot_block(x + i * K, rows, K, factor, r, out + i * r); });
    });
  }

  template <typename T, typename Acc>
  void rank_update(T* y, int64_t N, int64_t M, const Acc* h, int64_t r, const T* P, FactorLayout layout,
                   double scaling) const {
    if (N <= kFewRows && layout == FactorLayout::kRankMinor) {
      for (int64_t i = 0; i < N; ++i) update_row(y + i * M, M, h + i * r, r, P, static_cast<Acc>(scaling));
      return;
    }
    const std::vector<Acc> factor = packed<T, Acc>(P, r, M, layout, static_cast<Acc>(scaling));
    parallel((N + kRows - 1) / kRows, kRows * M * r, [&](int64_t begin, int64_t end) {
      for_row_blocks(begin * kRows, std::min(N, end * kRows),
                     [&](int64_t i, int64_t rows) { update_block(y + i * M, rows, M, h + i * r, r, factor.data()); });
    });
  }

  template <typename T, typename Acc>
  void outer(const T* g, int64_t N, int64_t M, const Acc* h, int64_t r, double scaling, T* out,
             FactorLayout layout) const {
    sum_outer(N, M, r, scaling, out, layout,
              [&](int64_t i, int64_t rows, Acc* sums) { outer_block(g + i * M, rows, M, h + i * r, r, sums); });
  }

  // Both from one read of g: each block of rows is still in the cache for the second.
  template <typename T, typename Acc>
  void dot_and_outer(const T* g, int64_t N, int64_t M, const T* P, FactorLayout layout, const Acc* h, int64_t r,
                     double scaling, Acc* u, T* out) const {
    const std::vector<Acc> factor = packed<T, Acc>(P, r, M, layout, 1);
    sum_outer(N, M, r, scaling, out, layout, [&](int64_t i, int64_t rows, Acc* sums) {
      dot_block(g + i * M, rows, M, factor.data(), r, u + i * r);
      outer_block(g + i * M, rows, M, h + i * r, r, sums);
    });
  }

 private:
  // out[q, c] = scaling * the sums [r, M] that add(first row, rows, sums) builds up over all blocks of rows
  template <typename T, typename Acc = accumulator<T>, typename Add>
  void sum_outer(int64_t N, int64_t M, int64_t r, double scaling, T* out, FactorLayout layout, const Add& add) const {
    const int64_t chunks = row_chunks(N, r), size = r * M;
    const std::unique_ptr<Acc[]> sums(new Acc[static_cast<size_t>(chunks * size)]);
    parallel(chunks, N / chunks * M * r, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        Acc* own = sums.get() + chunk * size;
        std::fill(own, own + size, Acc(0));
        for_row_blocks(N * chunk / chunks, N * (chunk + 1) / chunks,
                       [&](int64_t i, int64_t rows) { add(i, rows, own); });
      }
    });
    Acc* total = sums.get();
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const Acc* own = total + chunk * size;
      for (int64_t e = 0; e < size; ++e) total[e] += own[e];
    }
    const int64_t rank_stride = layout == FactorLayout::kRankMajor ? M : 1;
    const int64_t column_stride = layout == FactorLayout::kRankMajor ? 1 : r;
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t c = 0; c < M; ++c)
        out[q * rank_stride + c * column_stride] = static_cast<T>(static_cast<Acc>(scaling) * total[q * M + c]);
    }
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CPU, m) { UNILORA_IMPL_LORA_LINEAR(m, unilora::CpuLoraLinear); }

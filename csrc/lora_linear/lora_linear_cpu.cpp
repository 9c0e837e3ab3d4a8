// The LoRA matmul's low-rank part on the CPU. Factors that do not lie as [r, columns] in the accumulator dtype are
// first copied so: small beside the large operand, but for few tokens (kFewTokens).
#include <memory>
#include <vector>

#include "cpu/parallel.h"
#include "lora_linear/lora_linear_kernels.h"
#include "lora_linear/lora_linear_ops.h"

namespace unilora {
namespace {

constexpr int64_t kBlockRows = 16;  // rows of a block: they share one read of the factor, and stay in the cache

constexpr int64_t kFewTokens = 2;  // of y, to which B is added as it lies: a copy of it would be most of the work

template <typename T, typename Acc>
std::vector<Acc> packed(const T* factor, int64_t r, int64_t columns, FactorLayout layout, Acc scaling) {
  std::vector<Acc> out(static_cast<size_t>(r * columns));
  const int64_t rank_stride = layout == FactorLayout::kRankMajor ? columns : 1;
  const int64_t column_stride = layout == FactorLayout::kRankMajor ? 1 : r;
  for (int64_t q = 0; q < r; ++q)
    for (int64_t c = 0; c < columns; ++c)
      out[q * columns + c] = scaling * static_cast<Acc>(factor[q * rank_stride + c * column_stride]);
  return out;
}

// body(first, rows) for the blocks of [begin, end), in order
template <typename Body>
void for_row_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += kBlockRows) body(i, std::min(kBlockRows, end - i));
}

// Rows in chunks that are summed apart and then added in order. Their number follows from the sizes alone: enough for
// some threads, while the sums stay a fraction of the rows.
int64_t row_chunks(int64_t tokens, int64_t r) {
  return std::clamp<int64_t>(tokens / (4 * std::max<int64_t>(r, 16)), 1, 8);
}

struct CpuLoraLinear {
  explicit CpuLoraLinear(const Tensor&) {}

  template <typename T>
  Tensor linear_with_update(const LoraForward& f, const Tensor& weight, const std::optional<Tensor>& bias) const {
    return linear_then_update<T>(*this, f, weight, bias);
  }

  template <typename T>
  void add_update(const LoraForward& f, const Tensor& y) const {
    dot_then_update<T>(*this, f, y);
  }

  template <typename T>
  Tensor grad_x(const LoraBackward& b) const {
    return matmul_then_update<T>(*this, b);
  }

  template <typename T, typename Acc>
  void dot(const T* x, int64_t tokens, int64_t columns, const T* factor, FactorLayout layout, int64_t r,
           Acc* out) const {
    std::vector<Acc> copy;
    const Acc* packed_factor = nullptr;
    if constexpr (std::is_same_v<T, Acc>) packed_factor = layout == FactorLayout::kRankMajor ? factor : nullptr;
    if (packed_factor == nullptr) {
      copy = packed<T, Acc>(factor, r, columns, layout, 1);
      packed_factor = copy.data();
    }
    parallel((tokens + kBlockRows - 1) / kBlockRows, kBlockRows * columns * r, [&](int64_t begin, int64_t end) {
      for_row_blocks(begin * kBlockRows, std::min(tokens, end * kBlockRows), [&](int64_t i, int64_t rows) {
        dot_block(x + i * columns, rows, columns, packed_factor, r, out + i * r);
      });
    });
  }

  template <typename T, typename Acc>
  void rank_update(T* y, int64_t tokens, int64_t columns, const Acc* h, int64_t r, const T* factor, FactorLayout layout,
                   double scaling) const {
    if (tokens <= kFewTokens && layout == FactorLayout::kRankMinor) {
      for (int64_t i = 0; i < tokens; ++i)
        update_row(y + i * columns, columns, h + i * r, r, factor, static_cast<Acc>(scaling));
      return;
    }
    const std::vector<Acc> packed_factor = packed<T, Acc>(factor, r, columns, layout, static_cast<Acc>(scaling));
    parallel((tokens + kBlockRows - 1) / kBlockRows, kBlockRows * columns * r, [&](int64_t begin, int64_t end) {
      for_row_blocks(begin * kBlockRows, std::min(tokens, end * kBlockRows), [&](int64_t i, int64_t rows) {
        update_block(y + i * columns, rows, columns, h + i * r, r, packed_factor.data());
      });
    });
  }

  template <typename T, typename Acc>
  void outer(const T* g, int64_t tokens, int64_t columns, const Acc* h, int64_t r, double scaling, T* out,
             FactorLayout layout) const {
    sum_outer(tokens, columns, r, scaling, out, layout, [&](int64_t i, int64_t rows, Acc* sums) {
      outer_block(g + i * columns, rows, columns, h + i * r, r, sums);
    });
  }

  // Both from one read of g: each block of rows is still in the cache for the second.
  template <typename T, typename Acc>
  void dot_and_outer(const T* g, int64_t tokens, int64_t columns, const T* factor, FactorLayout layout, const Acc* h,
                     int64_t r, double scaling, Acc* u, T* out) const {
    const std::vector<Acc> packed_factor = packed<T, Acc>(factor, r, columns, layout, 1);
    sum_outer(tokens, columns, r, scaling, out, layout, [&](int64_t i, int64_t rows, Acc* sums) {
      dot_block(g + i * columns, rows, columns, packed_factor.data(), r, u + i * r);
      outer_block(g + i * columns, rows, columns, h + i * r, r, sums);
    });
  }

 private:
  // out[q, c] = scaling * the sums [r, columns] that add(first row, rows, sums) builds up over all blocks of rows
  template <typename T, typename Acc = accumulator<T>, typename Add>
  void sum_outer(int64_t tokens, int64_t columns, int64_t r, double scaling, T* out, FactorLayout layout,
                 const Add& add) const {
    const int64_t chunks = row_chunks(tokens, r), size = r * columns;
    const std::unique_ptr<Acc[]> sums(new Acc[static_cast<size_t>(chunks * size)]);
    parallel(chunks, tokens / chunks * columns * r, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        Acc* own = sums.get() + chunk * size;
        std::fill(own, own + size, Acc(0));
        for_row_blocks(tokens * chunk / chunks, tokens * (chunk + 1) / chunks,
                       [&](int64_t i, int64_t rows) { add(i, rows, own); });
      }
    });
    Acc* total = sums.get();
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const Acc* own = total + chunk * size;
      for (int64_t e = 0; e < size; ++e) total[e] += own[e];
    }
    const int64_t rank_stride = layout == FactorLayout::kRankMajor ? columns : 1;
    const int64_t column_stride = layout == FactorLayout::kRankMajor ? 1 : r;
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t c = 0; c < columns; ++c)
        out[q * rank_stride + c * column_stride] = static_cast<T>(static_cast<Acc>(scaling) * total[q * columns + c]);
    }
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CPU, m) { unilora::register_lora_linear<unilora::CpuLoraLinear>(m); }

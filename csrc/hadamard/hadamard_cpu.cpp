// The Walsh-Hadamard transform on the CPU. Threads share blocks of a row as they share rows: the butterflies are the
// same, in the same order for each element, however they are dealt.
#include <algorithm>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "hadamard/hadamard_kernels.h"
#include "hadamard/hadamard_ops.h"

namespace unilora {
namespace {

// A row's part that stays in the L2 cache for all its passes; larger than a block only where there are enough parts for
// all threads.
constexpr int64_t kCacheBytes = 1 << 20, kEnoughParts = 64;

// Bits [0, bits) of n numbers, a whole number of rows, of at most kBlock numbers each.
template <typename T>
void transform_block(const T* x, T* out, int64_t n, int bits, T scale) {
  constexpr int64_t kUnit = Tiling<T>::kUnit;
  const int64_t whole = n / kUnit * kUnit;
  hadamard_rows(x, out, whole, bits, scale);
  if (whole == n) return;
  alignas(64) T rest[kUnit] = {};  // rows shorter than a unit
  std::copy(x + whole, x + n, rest);
  hadamard_rows(rest, rest, kUnit, bits, scale);
  std::copy(rest, rest + (n - whole), out + whole);
}

// Columns [begin, end) of one pass, those of a row's groups one after the other: group g has `pitch` of them.
template <typename T>
void transform_columns(T* data, int64_t pitch, int width, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t group = begin / pitch, first = begin % pitch, columns = std::min(pitch - first, end - begin);
    hadamard_strips(data + group * (pitch << width) + first, pitch, width, columns);
    begin += columns;
  }
}

struct CpuHadamard {
  explicit CpuHadamard(const Tensor&) {}

  Tensor new_like(const Tensor& x) const {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
    return torch::stable::view(new_result(x, x.numel(), x.scalar_type()), sizes);
  }

  template <typename T>
  void transform(const T* x, T* out, int64_t total, int bits) const {
    using S = Tiling<T>;
    const T scale = hadamard_scale<T>(bits);
    int part_bits = S::kBlockBits;  // all bits below are done for one part after the other
    for_hadamard_passes(bits, S::kBlockBits, kMostStripBits, [&](int begin, int width) {
      const int64_t part = int64_t{1} << (begin + width);
      if (part * static_cast<int64_t>(sizeof(T)) <= kCacheBytes && total / part >= kEnoughParts)
        part_bits = begin + width;
    });
    const int64_t part = int64_t{1} << part_bits;
    parallel((total + part - 1) / part, part * std::max(1, bits), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin * part; at < std::min(total, end * part); at += part) {
        for (int64_t block = at; block < std::min(total, at + part); block += S::kBlock)
          transform_block(x + block, out + block, std::min(S::kBlock, total - block), std::min(bits, S::kBlockBits),
                          scale);
        for_hadamard_passes(bits, S::kBlockBits, kMostStripBits, [&](int bit, int width) {
          if (bit < part_bits) transform_columns(out + at, int64_t{1} << bit, width, 0, part >> width);
        });
      }
    });
    for_hadamard_passes(bits, S::kBlockBits, kMostStripBits, [&](int bit, int width) {
      if (bit < part_bits) return;
      const int64_t strips = (total >> width) / S::kColumns;
      parallel(strips, (S::kColumns << width) * width, [&](int64_t begin, int64_t end) {
        transform_columns(out, int64_t{1} << bit, width, begin * S::kColumns, end * S::kColumns);
      });
    });
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CPU, m) { unilora::register_hadamard<unilora::CpuHadamard>(m); }

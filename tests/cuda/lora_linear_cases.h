// What the tests of the LoRA matmul's kernels share: sizes, factor layouts, comparison with sums in double precision.
#pragma once

#include "lora_linear/lora_linear_kernels.cuh"
#include "testing.h"

namespace testing {

using std::to_string;
using unilora::FactorLayout;

constexpr FactorLayout kRankMajor = FactorLayout::kRankMajor, kRankMinor = FactorLayout::kRankMinor;

struct LoraCase {
  int64_t tokens, columns, r;  // columns: of the large operand
  FactorLayout layout;
  Values values;

  double scaling() const { return values == Values::kInteger ? -2 : 0.75; }
  // factor [r, columns] as it is stored
  int64_t at(int64_t q, int64_t c) const { return layout == kRankMajor ? q * columns + c : c * r + q; }

  template <typename T>
  std::string name(const char* kernel) const {
    return std::string(kernel) + "<" + Type<T>::name + ">: tokens " + to_string(tokens) + ", columns " +
           to_string(columns) + ", r " + to_string(r) + (layout == kRankMajor ? ", [r, columns]" : ", [columns, r]");
  }
};

inline void compare(const std::string& name, int64_t row, int64_t column, double got, bool good, double wanted) {
  if (good) {
    ++checks;
    return;
  }
  check(false, name + ", element [" + to_string(row) + ", " + to_string(column) + "]: expected " + to_string(wanted) +
                   ", got " + to_string(got));
}

// Device copy of a vector, `offset` elements past an aligned address.
template <typename T>
class Displaced {
 public:
  Displaced(const std::vector<T>& values, size_t offset) : memory_(displaced(values, offset)), offset_(offset) {}
  T* get() const { return memory_.get() + offset_; }
  std::vector<T> values() const {
    const std::vector<T> all = memory_.values();
    return {all.begin() + static_cast<std::ptrdiff_t>(offset_), all.end()};
  }

 private:
  Device<T> memory_;
  size_t offset_;
  static std::vector<T> displaced(const std::vector<T>& values, size_t offset) {
    std::vector<T> out(offset);
    out.insert(out.end(), values.begin(), values.end());
    return out;
  }
};

// Terms of an oracle's sum whose float32 factor the kernel split in two TF32 parts, with a relative error of 2^-21:
// 16 units of float32 beside the roundings of close().
inline void allow_split(Sum& sum) { sum.terms += 16; }

// body(case) for sizes that fill no tile, empty ones, ranks within and beyond a rank tile, both layouts.
template <typename Body>
void for_cases(std::mt19937_64& generator, const Body& body) {
  struct Size {
    int64_t tokens, columns, r;
  };
  const Size sizes[] = {{0, 37, 3},   {17, 0, 3},   {1, 1, 1},    {17, 37, 3}, {1, 259, 16},
                        {35, 131, 5}, {3, 129, 64}, {2, 300, 65}, {70, 260, 1}};
  FactorLayout layout = generator() % 2 == 0 ? kRankMajor : kRankMinor;
  for (const Size& size : sizes) {
    for (const Values values : {Values::kReal, Values::kInteger}) {
      layout = layout == kRankMajor ? kRankMinor : kRankMajor;
      body(LoraCase{size.tokens, size.columns, size.r, layout, values});
    }
    layout = layout == kRankMajor ? kRankMinor : kRankMajor;  // next size: the other layout first
  }
}

#ifndef CUDAHOST
// Offsets beyond 2^31 elements: of the large operand, in float16, only the last row is not zero.
struct LargeCase {
  static constexpr int64_t tokens = 32771, columns = 65539, r = 3;
  std::vector<__half> row, factor;  // [columns], [r, columns]
  std::vector<float> weights;       // [r]

  explicit LargeCase(std::mt19937_64& generator)
      : row(random_values<__half>(generator, columns, Values::kInteger)),
        factor(random_values<__half>(generator, r * columns, Values::kInteger)),
        weights(random_values<float>(generator, r, Values::kInteger)) {}

  static bool fits() {
    size_t available = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    if (available >= static_cast<size_t>(tokens * columns) * 3) return true;
    std::printf("skipped: %lld elements do not fit in device memory\n", static_cast<long long>(tokens * columns));
    return false;
  }
  void fill(const Device<__half>& large) const {
    CUDA_CHECK(cudaMemset(large.get(), 0, static_cast<size_t>(tokens * columns) * sizeof(__half)));
    CUDA_CHECK(cudaMemcpy(large.get() + (tokens - 1) * columns, row.data(), row.size() * sizeof(__half),
                          cudaMemcpyHostToDevice));
  }
  std::vector<float> hidden() const {  // [tokens, r]
    std::vector<float> h(static_cast<size_t>(tokens * r));
    std::copy(weights.begin(), weights.end(), h.end() - r);
    return h;
  }
};
#endif

}  // namespace testing

// Tests of lora_linear_dot.cuh against sums in double precision, every dtype; on a GPU also more than 2^31 elements.
#include "lora_linear_cases.h"

using namespace testing;

struct DotCase : LoraCase {
  size_t offset;  // of x and factor, in elements
};

// out by tiles that launch_dot need not choose for these sizes
template <bool kTall, typename T, typename Acc>
void launch_tiles(const T* x, const DotCase& c, const T* factor, int64_t ranks, Acc* out) {
  const auto launch = [&](auto dot) {
    using Dot = decltype(dot);
    const int64_t tiles = unilora::ceil_div(c.tokens, Dot::kRows) * unilora::ceil_div(c.r, Dot::kRanks);
    unilora::dot_kernel<Dot><<<unilora::grid_size(tiles, 1), Dot::kThreads>>>(x, c.tokens, c.columns, factor, c.r, out);
  };
  if (c.layout == kRankMajor) {
    unilora::with_dot<T, kRankMajor, kTall>(x, c.columns, factor, c.r, ranks, launch);
  } else {
    unilora::with_dot<T, kRankMinor, kTall>(x, c.columns, factor, c.r, ranks, launch);
  }
}

template <typename T, typename Acc>
void test_dot(std::mt19937_64& generator, const DotCase& c) {
  const std::string name = c.name<T>("dot") + ", offset " + to_string(c.offset);
  const auto x = random_values<T>(generator, c.tokens * c.columns, c.values),
             factor = random_values<T>(generator, c.r * c.columns, c.values);
  const Displaced<T> x_d(x, c.offset), factor_d(factor, c.offset);
  const auto run = [&](const auto& launch) {
    const Device<Acc> out(c.tokens * c.r);
    launch(out.get());
    return out.values();
  };
  const auto launch_dot = [&](Acc* out) {
    unilora::launch_dot(x_d.get(), c.tokens, c.columns, factor_d.get(), c.layout, c.r, out, nullptr);
  };
  const std::vector<Acc> got = run(launch_dot);
  check(same_bits(got, run(launch_dot)), name + ": two launches differ");
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      Sum sum;
      for (int64_t k = 0; k < c.columns; ++k) sum.add(exact(x[i * c.columns + k]) * exact(factor[c.at(q, k)]));
      compare(name, i, q, got[i * c.r + q], close<Acc, Acc>(got[i * c.r + q], sum, 1, c.values), sum.value);
    }
  }
  if (c.tokens == 0 || c.tokens > unilora::kDotTallTokens) return;

  // A sum does not depend on the tiles, nor on the other rows.
  for (const int64_t ranks : {9, 17, 33}) {
    if (ranks > c.r) break;
    const auto tall = [&](Acc* out) { launch_tiles<true>(x_d.get(), c, factor_d.get(), ranks, out); };
    const auto low = [&](Acc* out) { launch_tiles<false>(x_d.get(), c, factor_d.get(), ranks, out); };
    check(same_bits(got, run(tall)) && same_bits(got, run(low)), name + ": tiles for " + to_string(ranks) + " ranks");
  }
  const Device<Acc> last(c.r);
  unilora::launch_dot(x_d.get() + (c.tokens - 1) * c.columns, 1, c.columns, factor_d.get(), c.layout, c.r, last.get(),
                      nullptr);
  check(same_bits(last.values(), {got.end() - c.r, got.end()}), name + ": the last row alone");
}

// Infinity and NaN reach the sums they are terms of, and no others.
template <typename T, typename Acc>
void test_not_finite(std::mt19937_64& generator, const DotCase& c) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  auto x = random_values<T>(generator, c.tokens * c.columns, c.values),
       factor = random_values<T>(generator, c.r * c.columns, c.values);
  x[c.columns - 1] = rounded<T>(infinity);
  x[2 * c.columns - 1] = rounded<T>(nan);
  factor[c.at(c.r - 1, c.columns - 1)] = rounded<T>(nan);
  factor[c.at(0, 0)] = rounded<T>(-infinity);
  const Displaced<T> x_d(x, c.offset), factor_d(factor, c.offset);
  const Device<Acc> out(c.tokens * c.r);
  unilora::launch_dot(x_d.get(), c.tokens, c.columns, factor_d.get(), c.layout, c.r, out.get(), nullptr);
  const std::vector<Acc> got = out.values();
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      double sum = 0;
      for (int64_t k = 0; k < c.columns; ++k) sum += exact(x[i * c.columns + k]) * exact(factor[c.at(q, k)]);
      const double value = got[i * c.r + q];
      compare(c.name<T>("dot, not finite"), i, q, value, value == sum || (std::isnan(value) && std::isnan(sum)), sum);
    }
  }
}

#ifndef CUDAHOST
void test_large(std::mt19937_64& generator) {
  const LargeCase c(generator);
  if (!c.fits()) return;
  const Device<__half> x(static_cast<size_t>(c.tokens * c.columns)), factor(c.factor);
  const Device<float> out(static_cast<size_t>(c.tokens * c.r));
  c.fill(x);
  unilora::launch_dot(x.get(), c.tokens, c.columns, factor.get(), kRankMajor, c.r, out.get(), nullptr);
  const std::vector<float> dots = out.values();
  for (int64_t q = 0; q < c.r; ++q) {
    double sum = 0;
    for (int64_t k = 0; k < c.columns; ++k) sum += exact(c.row[k]) * exact(c.factor[q * c.columns + k]);
    check(dots[(c.tokens - 1) * c.r + q] == sum && dots[q] == 0, "dot: more than 2^31 elements");
  }
}
#endif

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  struct Size {
    int64_t tokens, columns, r;
    size_t offset;
  };
  // Nothing to sum or to write; wide, 8-byte and element alignment; more chunks than are under way; ranks that fill a
  // tile, that do not, and more than one.
  const Size sizes[] = {{0, 37, 3, 0},    {17, 0, 3, 0},    {1, 1, 1, 0},     {17, 37, 3, 1},
                        {3, 4136, 16, 0}, {35, 264, 4, 0},  {33, 520, 16, 0}, {3, 264, 33, 0},
                        {35, 131, 5, 0},  {3, 1544, 64, 0}, {4, 520, 48, 0},  {2, 300, 65, 4},
                        {2, 72, 130, 0},  {2, 264, 64, 1},  {18, 24, 1, 4},   {2, 264, 12, 2}};
  FactorLayout layout = generator() % 2 == 0 ? kRankMajor : kRankMinor, other = kRankMajor;
  const auto next = [&](const Size& size, Values values) {
    std::swap(layout, other);
    return DotCase{{size.tokens, size.columns, size.r, layout, values}, size.offset};
  };
  other = layout == kRankMajor ? kRankMinor : kRankMajor;
  for (const Size& size : sizes) {
    test_dot<float, float>(generator, next(size, Values::kReal));
    test_dot<double, double>(generator, next(size, Values::kInteger));
    test_dot<__half, float>(generator, next(size, Values::kReal));
    test_dot<__half, float>(generator, next(size, Values::kInteger));
    test_dot<__nv_bfloat16, float>(generator, next(size, Values::kInteger));
    std::swap(layout, other);
  }
  const Size tall{unilora::kDotTallTokens + 1, 24, 9, 0};
  test_dot<__half, float>(generator, next(tall, Values::kInteger));
  for (const size_t offset : {0, 1}) {
    const Size size{5, 40, 7, offset};
    for (int i = 0; i < 2; ++i) {
      test_not_finite<float, float>(generator, next(size, Values::kInteger));
      test_not_finite<__half, float>(generator, next(size, Values::kInteger));
      test_not_finite<__nv_bfloat16, float>(generator, next(size, Values::kInteger));
    }
  }
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

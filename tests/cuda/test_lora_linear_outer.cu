// Tests of lora_linear_outer.cuh against sums in double precision, every dtype; on a GPU also more than 2^31 elements.
#include "lora_linear_cases.h"

using namespace testing;

// `offset`, in elements: of g, h and out in a second launch, which must give the same bits.
template <typename T, typename Acc>
void test_outer(std::mt19937_64& generator, const LoraCase& c, size_t offset = 1) {
  const auto g = random_values<T>(generator, c.tokens * c.columns, c.values);
  const auto h = random_values<Acc>(generator, c.tokens * c.r, c.values);
  const auto run = [&](size_t skipped) {
    const Displaced<T> g_d(g, skipped), out(std::vector<T>(c.r * c.columns), skipped);
    const Displaced<Acc> h_d(h, skipped);
    const Device<Acc> partial(static_cast<size_t>(unilora::outer_scratch(c.tokens, c.columns, c.r)));
    unilora::launch_outer(g_d.get(), c.tokens, c.columns, h_d.get(), c.r, c.scaling(), partial.get(), out.get(),
                          c.layout, nullptr);
    return out.values();
  };
  const std::string name = c.name<T>("outer");
  const std::vector<T> got = run(0);
  check(same_bits(got, run(offset)), name + ": two launches differ, the second at offset " + to_string(offset));
  for (int64_t q = 0; q < c.r; ++q) {
    for (int64_t k = 0; k < c.columns; ++k) {
      Sum sum;
      for (int64_t i = 0; i < c.tokens; ++i) sum.add(exact(h[i * c.r + q]) * exact(g[i * c.columns + k]));
      if (!std::is_same_v<T, Acc>) allow_split(sum);
      const T value = got[c.at(q, k)];
      const bool good = close<T, Acc>(value, sum, c.scaling(), c.values);
      compare(name, q, k, exact(value), good, c.scaling() * sum.value);
    }
  }
}

template <typename T, typename Acc>
void test_shapes(std::mt19937_64& generator) {
  const auto layout = [&] { return generator() % 2 == 0 ? kRankMajor : kRankMinor; };
  const auto values = [&] { return generator() % 2 == 0 ? Values::kReal : Values::kInteger; };
  // aligned rows, several chunks and more than one round of the warps; every set of warps; a last rank tile of one
  for (const int64_t r : {3, 16}) test_outer<T, Acc>(generator, {270, 72, r, layout(), values()});
  for (const int64_t r : {17, 33, 65}) test_outer<T, Acc>(generator, {140, 40, r, layout(), values()});
  for (const int64_t r : {1, 4, 64})
    test_outer<T, Acc>(generator, {37, 136, r, layout(), values()}, (r == 4 ? 16 : 8) / sizeof(T));
}

// Numbers that are not finite, in g and in h: each sum is what the equation gives.
template <typename T, typename Acc>
void test_not_finite(std::mt19937_64& generator, int64_t tokens, FactorLayout layout) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const LoraCase c = {tokens, 40, 16, layout, Values::kInteger};
  auto g = random_values<T>(generator, c.tokens * c.columns, c.values);
  auto h = random_values<Acc>(generator, c.tokens * c.r, c.values);
  for (int64_t q = 0; q < c.r; ++q) h[5 * c.r + q] = static_cast<Acc>(q < 8 ? q + 1 : q + 0x1p-13);
  g[5 * c.columns + 3] = rounded<T>(kInfinity);
  g[5 * c.columns + 9] = rounded<T>(-kInfinity);
  g[6 * c.columns + 20] = rounded<T>(std::numeric_limits<double>::quiet_NaN());
  h[7 * c.r + 2] = static_cast<Acc>(kInfinity);
  const Device<T> g_d(g), out(static_cast<size_t>(c.r * c.columns));
  const Device<Acc> h_d(h), partial(static_cast<size_t>(unilora::outer_scratch(c.tokens, c.columns, c.r)));
  unilora::launch_outer(g_d.get(), c.tokens, c.columns, h_d.get(), c.r, c.scaling(), partial.get(), out.get(), c.layout,
                        nullptr);
  const std::vector<T> got = out.values();
  const std::string name = c.name<T>("outer, not finite");
  for (int64_t q = 0; q < c.r; ++q) {
    for (int64_t k = 0; k < c.columns; ++k) {
      double wanted = 0;
      for (int64_t i = 0; i < c.tokens; ++i) wanted += exact(h[i * c.r + q]) * exact(g[i * c.columns + k]);
      wanted *= c.scaling();
      const double value = exact(got[c.at(q, k)]);
      const bool good = std::isnan(wanted) ? std::isnan(value) : value == exact(rounded<T>(wanted));
      compare(name, q, k, value, good, wanted);
    }
  }
}

#ifndef CUDAHOST
void test_large(std::mt19937_64& generator) {
  const LargeCase c(generator);
  if (!c.fits()) return;
  const Device<__half> g(static_cast<size_t>(c.tokens * c.columns)), out(static_cast<size_t>(c.r * c.columns));
  const Device<float> h(c.hidden()), partial(unilora::outer_scratch(c.tokens, c.columns, c.r));
  c.fill(g);
  unilora::launch_outer(g.get(), c.tokens, c.columns, h.get(), c.r, 1.0, partial.get(), out.get(), kRankMajor, nullptr);
  const std::vector<__half> products = out.values();
  bool good = true;
  for (int64_t q = 0; q < c.r; ++q) {
    for (int64_t k = 0; k < c.columns; ++k)
      good = good && exact(products[q * c.columns + k]) == exact(c.weights[q]) * exact(c.row[k]);
  }
  check(good, "outer: more than 2^31 elements");
}
#endif

template <typename T, typename Acc>
void test_type(std::mt19937_64& generator) {
  test_shapes<T, Acc>(generator);
  test_not_finite<T, Acc>(generator, 20, kRankMajor);
  test_not_finite<T, Acc>(generator, 300, kRankMinor);
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  for_cases(generator, [&](const LoraCase& c) { test_outer<__nv_bfloat16, float>(generator, c); });
  test_type<float, float>(generator);
  test_type<double, double>(generator);
  test_type<__half, float>(generator);
  test_type<__nv_bfloat16, float>(generator);
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

// Tests of lora_linear_dot.cuh against sums in double precision, every dtype; on a GPU also more than 2^31 elements.
#include "lora_linear_cases.h"

using namespace testing;

template <typename T, typename Acc>
void test_dot(std::mt19937_64& generator, const LoraCase& c) {
  const auto x = random_values<T>(generator, c.tokens * c.columns, c.values),
             factor = random_values<T>(generator, c.r * c.columns, c.values);
  const Device<T> x_d(x), factor_d(factor);
  const auto run = [&] {
    const Device<Acc> out(c.tokens * c.r);
    unilora::launch_dot(x_d.get(), c.tokens, c.columns, factor_d.get(), c.layout, c.r, out.get(), nullptr);
    return out.values();
  };
  const std::vector<Acc> got = run();
  check(same_bits(got, run()), c.name<T>("dot") + ": two launches differ");
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      Sum sum;
      for (int64_t k = 0; k < c.columns; ++k) sum.add(exact(x[i * c.columns + k]) * exact(factor[c.at(q, k)]));
      compare(c.name<T>("dot"), i, q, got[i * c.r + q], close<Acc, Acc>(got[i * c.r + q], sum, 1, c.values), sum.value);
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
  for_cases(generator, [&](const LoraCase& c) {
    test_dot<float, float>(generator, c);
    test_dot<double, double>(generator, c);
    test_dot<__half, float>(generator, c);
    test_dot<__nv_bfloat16, float>(generator, c);
  });
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

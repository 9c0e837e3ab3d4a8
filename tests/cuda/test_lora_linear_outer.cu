// Tests of lora_linear_outer.cuh against sums in double precision, every dtype; on a GPU also more than 2^31 elements.
#include "lora_linear_cases.h"

using namespace testing;

template <typename T, typename Acc>
void test_outer(std::mt19937_64& generator, const LoraCase& c) {
  const auto g = random_values<T>(generator, c.tokens * c.columns, c.values);
  const auto h = random_values<Acc>(generator, c.tokens * c.r, c.values);
  const Device<T> g_d(g);
  const Device<Acc> h_d(h);
  const auto run = [&] {
    const Device<T> out(c.r * c.columns);
    const Device<Acc> partial(static_cast<size_t>(unilora::outer_scratch(c.tokens, c.columns, c.r)));
    unilora::launch_outer(g_d.get(), c.tokens, c.columns, h_d.get(), c.r, c.scaling(), partial.get(), out.get(),
                          c.layout, nullptr);
    return out.values();
  };
  const std::vector<T> got = run();
  check(same_bits(got, run()), c.name<T>("outer") + ": two launches differ");
  for (int64_t q = 0; q < c.r; ++q) {
    for (int64_t k = 0; k < c.columns; ++k) {
      Sum sum;
      for (int64_t i = 0; i < c.tokens; ++i) sum.add(exact(h[i * c.r + q]) * exact(g[i * c.columns + k]));
      const T value = got[c.at(q, k)];
      compare(c.name<T>("outer"), q, k, exact(value), close<T, Acc>(value, sum, c.scaling(), c.values),
              c.scaling() * sum.value);
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

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  for_cases(generator, [&](const LoraCase& c) {
    test_outer<float, float>(generator, c);
    test_outer<double, double>(generator, c);
    test_outer<__half, float>(generator, c);
    test_outer<__nv_bfloat16, float>(generator, c);
  });
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

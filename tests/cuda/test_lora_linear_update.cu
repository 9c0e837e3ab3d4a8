// Tests of lora_linear_update.cuh against sums in double precision, every dtype; on a GPU also more than 2^31 elements.
#include "lora_linear_cases.h"

using namespace testing;

template <typename T, typename Acc>
void test_update(std::mt19937_64& generator, const LoraCase& c) {
  const auto y = random_values<T>(generator, c.tokens * c.columns, c.values),
             factor = random_values<T>(generator, c.r * c.columns, c.values);
  const auto h = random_values<Acc>(generator, c.tokens * c.r, c.values);
  const Device<T> factor_d(factor);
  const Device<Acc> h_d(h);
  const auto run = [&] {
    const Device<T> y_d(y);
    unilora::launch_rank_update(y_d.get(), c.tokens, c.columns, h_d.get(), c.r, factor_d.get(), c.layout, c.scaling(),
                                nullptr);
    return y_d.values();
  };
  const std::vector<T> got = run();
  check(same_bits(got, run()), c.name<T>("rank_update") + ": two launches differ");
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t k = 0; k < c.columns; ++k) {
      Sum sum;
      sum.add(exact(y[i * c.columns + k]));
      for (int64_t q = 0; q < c.r; ++q) sum.add(c.scaling() * exact(h[i * c.r + q]) * exact(factor[c.at(q, k)]));
      const T value = got[i * c.columns + k];
      compare(c.name<T>("rank_update"), i, k, exact(value), close<T, Acc>(value, sum, 1, c.values), sum.value);
    }
  }
}

#ifndef CUDAHOST
void test_large(std::mt19937_64& generator) {
  const LargeCase c(generator);
  if (!c.fits()) return;
  const Device<__half> y(static_cast<size_t>(c.tokens * c.columns)), factor(c.factor);
  const Device<float> h(c.hidden());
  c.fill(y);
  unilora::launch_rank_update(y.get(), c.tokens, c.columns, h.get(), c.r, factor.get(), kRankMajor, 1.0, nullptr);
  synchronize();
  std::vector<__half> updated(static_cast<size_t>(c.columns));
  CUDA_CHECK(cudaMemcpy(updated.data(), y.get() + (c.tokens - 1) * c.columns, updated.size() * sizeof(__half),
                        cudaMemcpyDeviceToHost));
  bool good = true;
  for (int64_t k = 0; k < c.columns; ++k) {
    double sum = exact(c.row[k]);
    for (int64_t q = 0; q < c.r; ++q) sum += exact(c.weights[q]) * exact(c.factor[q * c.columns + k]);
    good = good && exact(updated[k]) == sum;
  }
  check(good, "rank_update: more than 2^31 elements");
}
#endif

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  for_cases(generator, [&](const LoraCase& c) {
    test_update<float, float>(generator, c);
    test_update<double, double>(generator, c);
    test_update<__half, float>(generator, c);
    test_update<__nv_bfloat16, float>(generator, c);
  });
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

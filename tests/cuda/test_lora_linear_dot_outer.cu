// Tests of lora_linear_dot_outer.cuh against sums in double precision, every dtype; on a GPU also more than 2^31
// elements.
#include "lora_linear/lora_linear_dot_outer.cuh"

#include "lora_linear_cases.h"

using namespace testing;

template <typename T, typename Acc>
struct Results {
  std::vector<Acc> u;  // [tokens, r]
  std::vector<T> out;  // [r, columns] or [columns, r]
};

// g, factor, h and out at `skipped` elements from where their memory starts.
template <typename T, typename Acc>
Results<T, Acc> launch(const LoraCase& c, const std::vector<T>& g, const std::vector<T>& factor,
                       const std::vector<Acc>& h, size_t skipped) {
  const Displaced<T> g_d(g, skipped), factor_d(factor, skipped), out(std::vector<T>(c.r * c.columns), skipped);
  const Displaced<Acc> h_d(h, skipped);
  const Device<Acc> u(static_cast<size_t>(c.tokens * c.r));
  const Device<Acc> scratch(static_cast<size_t>(unilora::dot_and_outer_scratch(c.tokens, c.columns, c.r)));
  unilora::launch_dot_and_outer(g_d.get(), c.tokens, c.columns, factor_d.get(), c.layout, h_d.get(), c.r, c.scaling(),
                                scratch.get(), u.get(), out.get(), nullptr);
  return {u.values(), out.values()};
}

// `offset`, in elements: of a second launch, which must give the same bits.
template <typename T, typename Acc>
void test_dot_outer(std::mt19937_64& generator, const LoraCase& c, size_t offset = 1) {
  const auto g = random_values<T>(generator, c.tokens * c.columns, c.values);
  const auto factor = random_values<T>(generator, c.r * c.columns, c.values);
  const auto h = random_values<Acc>(generator, c.tokens * c.r, c.values);
  const Results<T, Acc> got = launch(c, g, factor, h, 0), again = launch(c, g, factor, h, offset);
  const std::string name = c.name<T>("dot_and_outer");
  check(same_bits(got.u, again.u) && same_bits(got.out, again.out),
        name + ": two launches differ, the second at offset " + to_string(offset));
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      Sum sum;
      for (int64_t k = 0; k < c.columns; ++k) sum.add(exact(g[i * c.columns + k]) * exact(factor[c.at(q, k)]));
      const Acc value = got.u[i * c.r + q];
      compare(name + ", u", i, q, value, close<Acc, Acc>(value, sum, 1, c.values), sum.value);
    }
  }
  for (int64_t q = 0; q < c.r; ++q) {
    for (int64_t k = 0; k < c.columns; ++k) {
      Sum sum;
      for (int64_t i = 0; i < c.tokens; ++i) sum.add(exact(h[i * c.r + q]) * exact(g[i * c.columns + k]));
      if (!std::is_same_v<T, Acc>) allow_split(sum);
      const T value = got.out[c.at(q, k)];
      compare(name + ", out", q, k, exact(value), close<T, Acc>(value, sum, c.scaling(), c.values),
              c.scaling() * sum.value);
    }
  }
}

// Numbers that are not finite where they meet one of h that TF32 holds, so that its lower part is zero.
template <typename T>
void test_not_finite(std::mt19937_64& generator, FactorLayout layout) {
  const LoraCase c = {70, 24, 5, layout, Values::kInteger};
  auto g = random_values<T>(generator, c.tokens * c.columns, c.values);
  const auto factor = std::vector<T>(c.r * c.columns, rounded<T>(2));
  auto h = random_values<float>(generator, c.tokens * c.r, c.values);
  g[66 * c.columns + 9] = rounded<T>(std::numeric_limits<double>::infinity());
  g[3 * c.columns + 11] = rounded<T>(std::numeric_limits<double>::quiet_NaN());
  for (int64_t q = 0; q < c.r; ++q) h[66 * c.r + q] = 1.0f;
  const Results<T, float> got = launch(c, g, factor, h, 0);
  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      const float value = got.u[i * c.r + q];
      check(i == 3    ? std::isnan(value)
            : i == 66 ? std::isinf(value) && value > 0
                      : std::isfinite(value),
            c.name<T>("dot_and_outer, not finite, u"));
    }
  }
  for (int64_t q = 0; q < c.r; ++q) {
    for (int64_t k = 0; k < c.columns; ++k) {
      const double value = exact(got.out[c.at(q, k)]);
      check(k == 11  ? std::isnan(value)
            : k == 9 ? std::isinf(value) && value < 0
                     : std::isfinite(value),
            c.name<T>("dot_and_outer, not finite, out"));
    }
  }
}

#ifndef CUDAHOST
void test_large(std::mt19937_64& generator) {
  const LargeCase c(generator);
  if (!c.fits()) return;
  const Device<__half> g(static_cast<size_t>(c.tokens * c.columns)), out(static_cast<size_t>(c.r * c.columns));
  const Device<__half> factor(c.factor);
  const Device<float> h(c.hidden()), u(static_cast<size_t>(c.tokens * c.r));
  const Device<float> scratch(static_cast<size_t>(unilora::dot_and_outer_scratch(c.tokens, c.columns, c.r)));
  c.fill(g);
  unilora::launch_dot_and_outer(g.get(), c.tokens, c.columns, factor.get(), kRankMajor, h.get(), c.r, 1.0,
                                scratch.get(), u.get(), out.get(), nullptr);
  const std::vector<__half> products = out.values();
  const std::vector<float> sums = u.values();
  bool good = true;
  for (int64_t q = 0; q < c.r; ++q) {
    double wanted = 0;
    for (int64_t k = 0; k < c.columns; ++k) {
      good = good && exact(products[q * c.columns + k]) == exact(c.weights[q]) * exact(c.row[k]);
      wanted += exact(c.row[k]) * exact(c.factor[q * c.columns + k]);
    }
    good = good && sums[(c.tokens - 1) * c.r + q] == wanted && sums[q] == 0;
  }
  check(good, "dot_and_outer: more than 2^31 elements");
}
#endif

template <typename T>
void test_fused(std::mt19937_64& generator) {
  constexpr Values kReal = Values::kReal, kInteger = Values::kInteger;
  for (const LoraCase& c : {LoraCase{0, 37, 3, kRankMinor, kReal},
                            {17, 0, 3, kRankMinor, kReal},
                            {1, 1, 1, kRankMajor, kInteger},
                            {17, 37, 3, kRankMajor, kReal},
                            {70, 515, 16, kRankMajor, kInteger},
                            {35, 131, 5, kRankMinor, kReal},
                            {3, 65, 33, kRankMinor, kReal}})
    test_dot_outer<T, float>(generator, c);
  // aligned rows: chunks of several steps, tiles of columns, a last tile of one piece
  test_dot_outer<T, float>(generator, {100, 520, 16, kRankMinor, kInteger});
  test_dot_outer<T, float>(generator, {66, 520, 9, kRankMajor, kReal}, 8);
  test_dot_outer<T, float>(generator, {130, 96, 4, kRankMinor, kReal}, 4);
  test_dot_outer<T, float>(generator, {33, 72, 8, kRankMajor, kInteger}, 8);
  test_not_finite<T>(generator, generator() % 2 == 0 ? kRankMajor : kRankMinor);
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_fused<__half>(generator);
  test_fused<__nv_bfloat16>(generator);
  test_dot_outer<float, float>(generator, {35, 131, 5, kRankMinor, Values::kReal});
  test_dot_outer<double, double>(generator, {20, 72, 17, kRankMajor, Values::kReal});
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

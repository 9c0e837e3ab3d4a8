// Tests of lora_linear_kernels.cuh against sums in double precision: every dtype, both factor layouts, ranks
// within and beyond a rank tile, sizes that fill no tile, empty sizes; on a GPU also more than 2^31 elements.
#include "lora_linear/lora_linear_kernels.cuh"
#include "testing.h"

using namespace testing;
using std::to_string;
using unilora::FactorLayout;

constexpr FactorLayout kRankMajor = FactorLayout::kRankMajor, kRankMinor = FactorLayout::kRankMinor;

template <typename T, typename Acc>
struct LoraTest {
  int64_t tokens, columns, r;  // columns: of the large operand
  FactorLayout layout;
  Values values;
  std::string sizes;

  std::string name(const char* kernel) const { return std::string(kernel) + "<" + Type<T>::name + ">: " + sizes; }
  // factor [r, columns] as it is stored
  int64_t at(int64_t q, int64_t c) const { return layout == kRankMajor ? q * columns + c : c * r + q; }

  void compare(const char* kernel, int64_t row, int64_t column, double got, bool good, double wanted) const {
    check(good, name(kernel) + ", element [" + to_string(row) + ", " + to_string(column) + "]: expected " +
                    to_string(wanted) + ", got " + to_string(got));
  }

  void dot(std::mt19937_64& generator) const {
    const auto x = random_values<T>(generator, tokens * columns, values),
               factor = random_values<T>(generator, r * columns, values);
    const Device<T> x_d(x), factor_d(factor);
    const auto run = [&] {
      const Device<Acc> out(tokens * r);
      unilora::launch_dot(x_d.get(), tokens, columns, factor_d.get(), layout, r, out.get(), nullptr);
      return out.values();
    };
    const std::vector<Acc> got = run();
    check(same_bits(got, run()), name("dot") + ": two launches differ");
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t q = 0; q < r; ++q) {
        Sum sum;
        for (int64_t c = 0; c < columns; ++c) sum.add(exact(x[i * columns + c]) * exact(factor[at(q, c)]));
        compare("dot", i, q, got[i * r + q], close<Acc, Acc>(got[i * r + q], sum, 1, values), sum.value);
      }
    }
  }

  void rank_update(std::mt19937_64& generator) const {
    const double s = values == Values::kInteger ? -2 : 0.75;
    const auto y = random_values<T>(generator, tokens * columns, values),
               factor = random_values<T>(generator, r * columns, values);
    const auto h = random_values<Acc>(generator, tokens * r, values);
    const Device<T> factor_d(factor);
    const Device<Acc> h_d(h);
    const auto run = [&] {
      const Device<T> y_d(y);
      unilora::launch_rank_update(y_d.get(), tokens, columns, h_d.get(), r, factor_d.get(), layout, s, nullptr);
      return y_d.values();
    };
    const std::vector<T> got = run();
    check(same_bits(got, run()), name("rank_update") + ": two launches differ");
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        Sum sum;
        sum.add(exact(y[i * columns + c]));
        for (int64_t q = 0; q < r; ++q) sum.add(s * exact(h[i * r + q]) * exact(factor[at(q, c)]));
        compare("rank_update", i, c, exact(got[i * columns + c]), close<T, Acc>(got[i * columns + c], sum, 1, values),
                sum.value);
      }
    }
  }

  void outer(std::mt19937_64& generator) const {
    const double s = values == Values::kInteger ? -2 : 0.75;
    const auto g = random_values<T>(generator, tokens * columns, values);
    const auto h = random_values<Acc>(generator, tokens * r, values);
    const Device<T> g_d(g);
    const Device<Acc> h_d(h);
    const auto run = [&] {
      const Device<T> out(r * columns);
      const Device<Acc> partial(static_cast<size_t>(unilora::outer_scratch(tokens, columns, r)));
      unilora::launch_outer(g_d.get(), tokens, columns, h_d.get(), r, s, partial.get(), out.get(), layout, nullptr);
      return out.values();
    };
    const std::vector<T> got = run();
    check(same_bits(got, run()), name("outer") + ": two launches differ");
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t c = 0; c < columns; ++c) {
        Sum sum;
        for (int64_t i = 0; i < tokens; ++i) sum.add(exact(h[i * r + q]) * exact(g[i * columns + c]));
        compare("outer", q, c, exact(got[at(q, c)]), close<T, Acc>(got[at(q, c)], sum, s, values), s * sum.value);
      }
    }
  }
};

template <typename T, typename Acc>
void test_dtype(std::mt19937_64& generator) {
  struct Size {
    int64_t tokens, columns, r;
  };
  const Size sizes[] = {{0, 37, 3},   {17, 0, 3},   {1, 1, 1},    {17, 37, 3}, {1, 259, 16},
                        {35, 131, 5}, {3, 129, 64}, {2, 300, 65}, {70, 260, 1}};
  FactorLayout layout = generator() % 2 == 0 ? kRankMajor : kRankMinor;
  for (const Size& size : sizes) {
    for (const Values values : {Values::kReal, Values::kInteger}) {
      layout = layout == kRankMajor ? kRankMinor : kRankMajor;
      const LoraTest<T, Acc> test{size.tokens,
                                  size.columns,
                                  size.r,
                                  layout,
                                  values,
                                  "tokens " + to_string(size.tokens) + ", columns " + to_string(size.columns) + ", r " +
                                      to_string(size.r) + (layout == kRankMajor ? ", [r, columns]" : ", [columns, r]")};
      test.dot(generator);
      test.rank_update(generator);
      test.outer(generator);
    }
    layout = layout == kRankMajor ? kRankMinor : kRankMajor;  // next size: the other layout first
  }
}

// Offsets beyond 2^31 elements: only the last row of the large operand is not zero.
void test_large(std::mt19937_64& generator) {
#ifdef CUDAHOST
  (void)generator;
#else
  const int64_t tokens = 32771, columns = 65539, r = 3;
  size_t available = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&available, &total));
  if (available < static_cast<size_t>(tokens * columns) * 3) {
    std::printf("skipped: %lld elements do not fit in device memory\n", static_cast<long long>(tokens * columns));
    return;
  }
  const auto row = random_values<__half>(generator, columns, Values::kInteger);
  const auto factor = random_values<__half>(generator, r * columns, Values::kInteger);
  const auto weights = random_values<float>(generator, r, Values::kInteger);
  std::vector<float> h(static_cast<size_t>(tokens * r));
  std::copy(weights.begin(), weights.end(), h.end() - r);
  const Device<__half> x(static_cast<size_t>(tokens * columns)), factor_d(factor),
      out(static_cast<size_t>(r * columns));
  const Device<float> h_d(h), u(static_cast<size_t>(tokens * r)), partial(unilora::outer_scratch(tokens, columns, r));
  __half* last = x.get() + (tokens - 1) * columns;
  CUDA_CHECK(cudaMemset(x.get(), 0, static_cast<size_t>(tokens * columns) * sizeof(__half)));
  CUDA_CHECK(cudaMemcpy(last, row.data(), row.size() * sizeof(__half), cudaMemcpyHostToDevice));

  unilora::launch_dot(x.get(), tokens, columns, factor_d.get(), kRankMajor, r, u.get(), nullptr);
  const std::vector<float> dots = u.values();
  unilora::launch_outer(x.get(), tokens, columns, h_d.get(), r, 1.0, partial.get(), out.get(), kRankMajor, nullptr);
  const std::vector<__half> products = out.values();
  unilora::launch_rank_update(x.get(), tokens, columns, h_d.get(), r, factor_d.get(), kRankMajor, 1.0, nullptr);
  synchronize();
  std::vector<__half> updated(static_cast<size_t>(columns));
  CUDA_CHECK(cudaMemcpy(updated.data(), last, updated.size() * sizeof(__half), cudaMemcpyDeviceToHost));

  bool good_outer = true, good_update = true;
  for (int64_t q = 0; q < r; ++q) {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      sum += exact(row[c]) * exact(factor[q * columns + c]);
      good_outer = good_outer && exact(products[q * columns + c]) == exact(weights[q]) * exact(row[c]);
    }
    check(dots[(tokens - 1) * r + q] == sum && dots[q] == 0, "dot: more than 2^31 elements");
  }
  for (int64_t c = 0; c < columns; ++c) {
    double sum = exact(row[c]);
    for (int64_t q = 0; q < r; ++q) sum += exact(weights[q]) * exact(factor[q * columns + c]);
    good_update = good_update && exact(updated[c]) == sum;
  }
  check(good_outer, "outer: more than 2^31 elements");
  check(good_update, "rank_update: more than 2^31 elements");
#endif
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_dtype<float, float>(generator);
  test_dtype<double, double>(generator);
  test_dtype<__half, float>(generator);
  test_dtype<__nv_bfloat16, float>(generator);
  test_large(generator);
  return finish();
}

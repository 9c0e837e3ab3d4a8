// Tests of lora_linear_kernels.cuh against sums in double precision: every dtype, both factor layouts, ranks
// within and beyond a rank tile, sizes that fill no tile, empty sizes; on a GPU also more than 2^31 elements.
#include "lora_linear/lora_linear_kernels.cuh"
#include "testing.h"

using namespace testing;
using std::to_string;

template <typename T, typename Acc>
struct LoraTest {
  int64_t N, C, r;  // C: columns of the large operand, K or M
  bool rank_major;
  Values values;
  std::string sizes;

  std::string name(const char* kernel) const { return std::string(kernel) + "<" + Type<T>::name + ">: " + sizes; }
  // P [r, C] as it is stored
  int64_t at(int64_t q, int64_t c) const { return rank_major ? q * C + c : c * r + q; }

  void compare(const char* kernel, int64_t row, int64_t column, double got, bool good, double wanted) const {
    check(good, name(kernel) + ", element [" + to_string(row) + ", " + to_string(column) + "]: expected " +
                    to_string(wanted) + ", got " + to_string(got));
  }

  void dot(std::mt19937_64& generator) const {
    const auto x = random_values<T>(generator, N * C, values), P = random_values<T>(generator, r * C, values);
    const Device<T> x_d(x), P_d(P);
    const auto run = [&] {
      const Device<Acc> out(N * r);
      unilora::launch_dot(x_d.get(), N, C, P_d.get(), rank_major, r, out.get(), nullptr);
      return out.values();
    };
    const std::vector<Acc> got = run();
    check(same_bits(got, run()), name("dot") + ": two launches differ");
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t q = 0; q < r; ++q) {
        Sum sum;
        for (int64_t c = 0; c < C; ++c) sum.add(exact(x[i * C + c]) * exact(P[at(q, c)]));
        compare("dot", i, q, got[i * r + q], close<Acc, Acc>(got[i * r + q], sum, 1, values), sum.value);
      }
    }
  }

  void rank_update(std::mt19937_64& generator) const {
    const double s = values == Values::kInteger ? -2 : 0.75;
    const auto y = random_values<T>(generator, N * C, values), P = random_values<T>(generator, r * C, values);
    const auto h = random_values<Acc>(generator, N * r, values);
    const Device<T> P_d(P);
    const Device<Acc> h_d(h);
    const auto run = [&] {
      const Device<T> y_d(y);
      unilora::launch_rank_update(y_d.get(), N, C, h_d.get(), r, P_d.get(), rank_major, s, nullptr);
      return y_d.values();
    };
    const std::vector<T> got = run();
    check(same_bits(got, run()), name("rank_update") + ": two launches differ");
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t c = 0; c < C; ++c) {
        Sum sum;
        sum.add(exact(y[i * C + c]));
        for (int64_t q = 0; q < r; ++q) sum.add(s * exact(h[i * r + q]) * exact(P[at(q, c)]));
        compare("rank_update", i, c, exact(got[i * C + c]), close<T, Acc>(got[i * C + c], sum, 1, values), sum.value);
      }
    }
  }

  void outer(std::mt19937_64& generator) const {
    const double s = values == Values::kInteger ? -2 : 0.75;
    const auto g = random_values<T>(generator, N * C, values);
    const auto h = random_values<Acc>(generator, N * r, values);
    const Device<T> g_d(g);
    const Device<Acc> h_d(h);
    const auto run = [&] {
      const Device<T> out(r * C);
      const Device<Acc> partial(static_cast<size_t>(unilora::outer_scratch(N, C, r)));
      unilora::launch_outer(g_d.get(), N, C, h_d.get(), r, s, partial.get(), out.get(), rank_major, nullptr);
      return out.values();
    };
    const std::vector<T> got = run();
    check(same_bits(got, run()), name("outer") + ": two launches differ");
    for (int64_t q = 0; q < r; ++q) {
      for (int64_t c = 0; c < C; ++c) {
        Sum sum;
        for (int64_t i = 0; i < N; ++i) sum.add(exact(h[i * r + q]) * exact(g[i * C + c]));
        compare("outer", q, c, exact(got[at(q, c)]), close<T, Acc>(got[at(q, c)], sum, s, values), s * sum.value);
      }
    }
  }
};

template <typename T, typename Acc>
void test_dtype(std::mt19937_64& generator) {
  struct Size {
    int64_t N, C, r;
  };
  const Size sizes[] = {{0, 37, 3},   {17, 0, 3},   {1, 1, 1},    {17, 37, 3}, {1, 259, 16},
                        {35, 131, 5}, {3, 129, 64}, {2, 300, 65}, {70, 260, 1}};
  bool rank_major = generator() % 2 == 0;
  for (const Size& size : sizes) {
    for (const Values values : {Values::kReal, Values::kInteger}) {
      rank_major = !rank_major;
      const LoraTest<T, Acc> test{size.N,
                                  size.C,
                                  size.r,
                                  rank_major,
                                  values,
                                  "N " + to_string(size.N) + ", columns " + to_string(size.C) + ", r " +
                                      to_string(size.r) + (rank_major ? ", [r, C]" : ", [C, r]")};
      test.dot(generator);
      test.rank_update(generator);
      test.outer(generator);
    }
    rank_major = !rank_major;  // next size: the other layout first
  }
}

// Offsets beyond 2^31 elements: only the last row of the large operand is not zero.
void test_large(std::mt19937_64& generator) {
#ifdef CUDAHOST
  (void)generator;
#else
  const int64_t N = 32771, C = 65539, r = 3;
  size_t available = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&available, &total));
  if (available < static_cast<size_t>(N * C) * 3) {
    std::printf("skipped: %lld elements do not fit in device memory\n", static_cast<long long>(N * C));
    return;
  }
  const auto row = random_values<__half>(generator, C, Values::kInteger);
  const auto P = random_values<__half>(generator, r * C, Values::kInteger);
  const auto weights = random_values<float>(generator, r, Values::kInteger);
  std::vector<float> h(static_cast<size_t>(N * r));
  std::copy(weights.begin(), weights.end(), h.end() - r);
  const Device<__half> x(static_cast<size_t>(N * C)), P_d(P), out(static_cast<size_t>(r * C));
  const Device<float> h_d(h), u(static_cast<size_t>(N * r)), partial(unilora::outer_scratch(N, C, r));
  __half* last = x.get() + (N - 1) * C;
  CUDA_CHECK(cudaMemset(x.get(), 0, static_cast<size_t>(N * C) * sizeof(__half)));
  CUDA_CHECK(cudaMemcpy(last, row.data(), row.size() * sizeof(__half), cudaMemcpyHostToDevice));

  unilora::launch_dot(x.get(), N, C, P_d.get(), true, r, u.get(), nullptr);
  const std::vector<float> dots = u.values();
  unilora::launch_outer(x.get(), N, C, h_d.get(), r, 1.0, partial.get(), out.get(), true, nullptr);
  const std::vector<__half> products = out.values();
  unilora::launch_rank_update(x.get(), N, C, h_d.get(), r, P_d.get(), true, 1.0, nullptr);
  synchronize();
  std::vector<__half> updated(static_cast<size_t>(C));
  CUDA_CHECK(cudaMemcpy(updated.data(), last, updated.size() * sizeof(__half), cudaMemcpyDeviceToHost));

  bool good_outer = true, good_update = true;
  for (int64_t q = 0; q < r; ++q) {
    double sum = 0;
    for (int64_t c = 0; c < C; ++c) {
      sum += exact(row[c]) * exact(P[q * C + c]);
      good_outer = good_outer && exact(products[q * C + c]) == exact(weights[q]) * exact(row[c]);
    }
    check(dots[(N - 1) * r + q] == sum && dots[q] == 0, "dot: more than 2^31 elements");
  }
  for (int64_t c = 0; c < C; ++c) {
    double sum = exact(row[c]);
    for (int64_t q = 0; q < r; ++q) sum += exact(weights[q]) * exact(P[q * C + c]);
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

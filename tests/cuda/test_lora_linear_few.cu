// Tests of lora_linear_few.cuh against sums in double precision and against dot, every dtype.
#include "lora_linear/lora_linear_few.cuh"
#include "lora_linear_cases.h"

using namespace testing;

struct FewCase {
  int64_t tokens, n, m, r;
  size_t offset;  // of all pointers, in elements
  Values values;
};

template <typename T, typename Acc>
void test_few(std::mt19937_64& generator, const FewCase& c) {
  const std::string name = std::string("few<") + Type<T>::name + ">: tokens " + to_string(c.tokens) + ", n " +
                           to_string(c.n) + ", m " + to_string(c.m) + ", r " + to_string(c.r) + ", offset " +
                           to_string(c.offset);
  const auto y = random_values<T>(generator, c.tokens * c.m, c.values),
             x = random_values<T>(generator, c.tokens * c.n, c.values),
             A = random_values<T>(generator, c.r * c.n, c.values), B = random_values<T>(generator, c.m * c.r, c.values);
  const double s = c.values == Values::kInteger ? -2 : 0.75;
  const Displaced<T> x_d(x, c.offset), A_d(A, c.offset), B_d(B, c.offset);
  struct Result {
    std::vector<T> y;
    std::vector<Acc> h;
  };
  const auto run = [&] {
    const Displaced<T> y_d(y, c.offset);
    const Device<Acc> h_d(c.tokens * c.r);
    unilora::launch_few(y_d.get(), x_d.get(), c.tokens, c.n, c.m, A_d.get(), B_d.get(), c.r, s, h_d.get(), nullptr);
    return Result{y_d.values(), h_d.values()};
  };
  const Result got = run(), again = run();
  check(same_bits(got.y, again.y) && same_bits(got.h, again.h), name + ": two launches differ");
  const Device<Acc> dots(c.tokens * c.r);
  unilora::launch_dot(x_d.get(), c.tokens, c.n, A_d.get(), kRankMajor, c.r, dots.get(), nullptr);
  check(same_bits(got.h, dots.values()), name + ": h differs from dot's");

  for (int64_t i = 0; i < c.tokens; ++i) {
    for (int64_t q = 0; q < c.r; ++q) {
      Sum sum;
      for (int64_t k = 0; k < c.n; ++k) sum.add(exact(x[i * c.n + k]) * exact(A[q * c.n + k]));
      const Acc h = got.h[i * c.r + q];
      compare(name + ", h", i, q, h, close<Acc, Acc>(h, sum, 1, c.values), sum.value);
    }
    for (int64_t k = 0; k < c.m; ++k) {
      Sum sum;
      sum.add(exact(y[i * c.m + k]));
      for (int64_t q = 0; q < c.r; ++q) sum.add(s * exact(got.h[i * c.r + q]) * exact(B[k * c.r + q]));
      compare(name + ", y", i, k, exact(got.y[i * c.m + k]), close<T, Acc>(got.y[i * c.m + k], sum, 1, c.values),
              sum.value);
    }
  }
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  // Widths of all rank tiles and more than one; y in one run and in more than there are blocks; 8-byte and element
  // alignment; nothing to sum, no column of y, no token.
  const FewCase cases[] = {
      {1, 64, 8, 1, 0, {}},      {2, 37, 130, 3, 0, {}},   {3, 200, 129, 4, 1, {}}, {8, 1032, 520, 16, 0, {}},
      {5, 1096, 131, 16, 4, {}}, {8, 520, 77, 33, 0, {}},  {3, 72, 650, 64, 0, {}}, {1, 45, 300, 64, 1, {}},
      {2, 96, 400, 65, 0, {}},   {8, 48, 129, 140, 4, {}}, {4, 0, 20, 3, 0, {}},    {8, 40, 0, 5, 0, {}},
      {0, 16, 16, 4, 0, {}},
  };
  for (FewCase c : cases) {
    for (const Values values : {Values::kReal, Values::kInteger}) {
      c.values = values;
      test_few<float, float>(generator, c);
      test_few<double, double>(generator, c);
      test_few<__half, float>(generator, c);
      test_few<__nv_bfloat16, float>(generator, c);
    }
  }
  return finish();
}

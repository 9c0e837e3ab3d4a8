// One launch of each kernel of lora_linear_dot.cuh and lora_linear_few.cuh a dtype, at a size that fills every tile,
// for counts of memory accesses. Nothing is checked.
#include "lora_linear/lora_linear_few.cuh"
#include "testing.h"

#ifndef PROFILE_TOKENS
#define PROFILE_TOKENS 256
#endif
#ifndef PROFILE_COLUMNS
#define PROFILE_COLUMNS 1024
#endif
#ifndef PROFILE_RANK
#define PROFILE_RANK 16
#endif

using unilora::FactorLayout;

constexpr int64_t kTokens = PROFILE_TOKENS, kColumns = PROFILE_COLUMNS, kRank = PROFILE_RANK;

template <typename T, typename Acc>
void profile() {
  std::mt19937_64 generator(1);
  const auto random = [&](int64_t n) { return testing::random_values<T>(generator, n, testing::Values::kReal); };
  const testing::Device<T> x(random(kTokens * kColumns)), factor(random(kRank * kColumns)), B(random(kRank * kColumns)),
      y(random(unilora::kFewTokens * kColumns));
  const testing::Device<Acc> out(kTokens * kRank);
  const auto dot = [&](auto layout) {
    unilora::with_dot<T, decltype(layout)::value, true>(x.get(), kColumns, factor.get(), kRank, kRank, [&](auto d) {
      using Dot = decltype(d);
      const int64_t tiles = unilora::ceil_div(kTokens, Dot::kRows) * unilora::ceil_div(kRank, Dot::kRanks);
      unilora::dot_kernel<Dot>
          <<<unilora::grid_size(tiles, 1), Dot::kThreads>>>(x.get(), kTokens, kColumns, factor.get(), kRank, out.get());
    });
  };
  dot(std::integral_constant<FactorLayout, FactorLayout::kRankMajor>{});
  dot(std::integral_constant<FactorLayout, FactorLayout::kRankMinor>{});
  unilora::launch_few(y.get(), x.get(), unilora::kFewTokens, kColumns, kColumns, factor.get(), B.get(), kRank, 0.5,
                      out.get(), nullptr);
  testing::synchronize();
}

int main() {
  profile<float, float>();
  profile<double, double>();
  profile<__half, float>();
  profile<__nv_bfloat16, float>();
  return 0;
}

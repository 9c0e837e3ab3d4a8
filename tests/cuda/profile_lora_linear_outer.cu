// Launches the kernels of `outer` and of `dot_and_outer` once a dtype, at sizes that fill their tiles, for a profiler.
#include "lora_linear/lora_linear_dot_outer.cuh"
#include "testing.h"

#ifndef PROFILE_TOKENS
#define PROFILE_TOKENS 512
#endif
#ifndef PROFILE_COLUMNS
#define PROFILE_COLUMNS 1024
#endif
#ifndef PROFILE_RANK
#define PROFILE_RANK 16
#endif

using namespace testing;

constexpr int64_t kTokens = PROFILE_TOKENS, kColumns = PROFILE_COLUMNS, kRank = PROFILE_RANK;

template <typename T, typename Acc>
void run(std::mt19937_64& generator) {
  const Device<T> g(random_values<T>(generator, kTokens * kColumns, Values::kReal));
  const Device<T> factor(random_values<T>(generator, kRank * kColumns, Values::kReal));
  const Device<Acc> h(random_values<Acc>(generator, kTokens * kRank, Values::kReal));
  const Device<T> out(static_cast<size_t>(kRank * kColumns));
  const Device<Acc> u(static_cast<size_t>(kTokens * kRank));
  const Device<Acc> scratch(static_cast<size_t>(unilora::dot_and_outer_scratch(kTokens, kColumns, kRank)));
  for (const auto layout : {unilora::FactorLayout::kRankMajor, unilora::FactorLayout::kRankMinor})
    unilora::launch_outer(g.get(), kTokens, kColumns, h.get(), kRank, 0.5, scratch.get(), out.get(), layout, nullptr);
  if constexpr (!std::is_same_v<T, Acc>)
    unilora::launch_dot_and_outer(g.get(), kTokens, kColumns, factor.get(), unilora::FactorLayout::kRankMinor, h.get(),
                                  kRank, 0.5, scratch.get(), u.get(), out.get(), nullptr);
  synchronize();
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  run<__half, float>(generator);
  run<__nv_bfloat16, float>(generator);
  run<float, float>(generator);
  run<double, double>(generator);
  return 0;
}

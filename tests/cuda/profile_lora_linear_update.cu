// For a profiler or an emulator that counts accesses: rank_update and rank_product once a dtype and factor layout.
// Compulsory bytes: y once (rank_product: written, rank_update: read and written), h, and the factor.
#include "lora_linear_cases.h"

using namespace testing;

#ifndef PROFILE_RANK
#define PROFILE_RANK 16
#endif
constexpr int64_t kTokens = 256, kColumns = 1024, kRank = PROFILE_RANK;

template <typename T, typename Acc>
void launch_both(FactorLayout layout) {
  const Device<T> y(std::vector<T>(kTokens * kColumns, rounded<T>(1))), bias(std::vector<T>(kColumns, rounded<T>(1))),
      factor(std::vector<T>(kRank * kColumns, rounded<T>(1)));
  const Device<Acc> h(std::vector<Acc>(kTokens * kRank, Acc(1)));
  unilora::launch_rank_update(y.get(), kTokens, kColumns, h.get(), kRank, factor.get(), layout, 1.0, nullptr);
  unilora::launch_rank_product(y.get(), kTokens, kColumns, bias.get(), h.get(), kRank, factor.get(), layout, 1.0,
                               nullptr);
  synchronize();
}

int main() {
  for (const FactorLayout layout : {kRankMajor, kRankMinor}) {
    launch_both<__nv_bfloat16, float>(layout);
    launch_both<__half, float>(layout);
    launch_both<float, float>(layout);
    launch_both<double, double>(layout);
  }
  return 0;
}

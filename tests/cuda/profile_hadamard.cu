// Launches each Walsh-Hadamard kernel once a dtype, for a profiler: rows that fill the tiles, and each width of a pass.
#include "hadamard/hadamard_kernels.cuh"
#include "testing.h"

#ifndef PROFILE_HADAMARD_TOTAL
#define PROFILE_HADAMARD_TOTAL (1 << 16)
#endif

using namespace testing;

namespace {

constexpr int64_t kTotal = PROFILE_HADAMARD_TOTAL;  // a power of two, at least 2^13

// One row of 2^bits elements: a tile pass, then the other bits in as few passes as registers allow.
template <typename T>
void profile_hadamard(std::mt19937_64& generator) {
  const Device<T> x(random_values<T>(generator, kTotal, Values::kReal)), out(kTotal);
  int bits = 0;
  while (INT64_C(1) << bits < kTotal) ++bits;
  unilora::launch_hadamard(x.get(), out.get(), kTotal, bits, nullptr);
  synchronize();
}

}  // namespace

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  profile_hadamard<float>(generator);
  profile_hadamard<double>(generator);
  return finish();
}

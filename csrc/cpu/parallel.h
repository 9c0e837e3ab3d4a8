// CPU kernels: one binary for every x86-64 generation, and PyTorch's own threads (torch.set_num_threads).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

// A function so marked is compiled once for each instruction set, and the machine's best is picked at load time.
// What it calls must be UNILORA_INLINE to be compiled along with it.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define UNILORA_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define UNILORA_MULTIVERSION
#endif
#define UNILORA_INLINE inline __attribute__((always_inline))

namespace unilora {

// body(begin, end) over [0, n) in parallel; a thread gets at least `work / cost` items, `cost` being the rough number
// of operations of one item. Nothing may be thrown inside: the text of an exception would be lost.
template <typename Body>
void parallel(int64_t n, int64_t cost, const Body& body) {
  constexpr int64_t kWork = 32768;
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(1, kWork / std::max<int64_t>(1, cost)), body);
}

}  // namespace unilora

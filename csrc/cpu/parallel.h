// PyTorch's own threads (torch.set_num_threads).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace unilora {

// body(begin, end) over [0, n) in parallel; a thread gets at least as many items as make some tens of microseconds,
// `cost` being the rough number of operations of one item. Nothing may be thrown inside: the text of an exception
// would be lost.
template <typename Body>
void parallel(int64_t n, int64_t cost, const Body& body) {
  constexpr int64_t kWork = 32768;
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(1, kWork / std::max<int64_t>(1, cost)), body);
}

}  // namespace unilora

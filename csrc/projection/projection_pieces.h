// How launchers and kernels are given parts of theta_D and of its gradient. Plain C++17, no torch.
#pragma once

#include <cstdint>

namespace unilora {

// Rows [start, stop) of D; several lie one after the other.
struct RowRange {
  int64_t start, stop;
};

// Some of the gradient's rows; several lie end to end.
template <typename T>
struct Piece {
  const T* data;  // [length]
  int64_t length;
};

}  // namespace unilora

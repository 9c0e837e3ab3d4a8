// The Walsh-Hadamard transform of rows of n = 2^bits numbers: contract.
//
//   y = H x,   y[i] = 1 / sqrt(n) sum_j (-1)^popcount(i & j) x[j]        x, y [rows, n], float or double
//
// H is orthonormal and symmetric, its own inverse and its own derivative. The factor comes first, so that no sum is
// larger than it must be; then for bit 0, 1, ..., bits - 1 each pair of elements whose places differ in that bit alone,
// (a, b), becomes (a + b, a - b): bits n additions and subtractions a row. A kernel may take several bits at a time,
// for as many elements as it holds, but each in this order: every result is rounded in one way, on all devices and with
// any number of threads, and is within (bits + 2) eps |x| of the exact one, in the norm of the row.
//
// Plain C++17: no torch, host and device.
#pragma once

#include <cmath>
#include <cstdint>

namespace unilora {

constexpr int kMostHadamardBits = 30;

// T(1 / sqrt(2^bits))
template <typename T>
inline T hadamard_scale(int bits) {
  return static_cast<T>(std::ldexp(bits % 2 == 0 ? 1.0 : 0.70710678118654752440, -(bits / 2)));
}

// A transform of more bits than `first`, which one pass takes, goes on by passes over the whole row; each takes
// bits [begin, begin + width), 1 <= width <= most. body(begin, width)
template <typename Body>
void for_hadamard_passes(int bits, int first, int most, const Body& body) {
  for (int begin = first; begin < bits;) {
    const int passes = (bits - begin + most - 1) / most, width = (bits - begin + passes - 1) / passes;
    body(begin, width);
    begin += width;
  }
}

}  // namespace unilora

// The Walsh-Hadamard transform's operator for any device: argument checks, and the operator as a template over Kernels,
// which is made from a tensor of the device (it holds guard and stream where there are any) and has
//   new_like(x)                            an uninitialised tensor of the shape and dtype of x, which is contiguous
//   transform(x, out, total, bits)         T: float or double, pointers; `total` numbers, rows of 2^bits of them
#pragma once

#include "checks.h"
#include "hadamard/hadamard.h"

namespace unilora {

template <typename Kernels>
Tensor hadamard(const Tensor& x) {
  constexpr auto op = "hadamard";
  const bool is_double = x.scalar_type() == ScalarType::Double;
  if (!is_double && x.scalar_type() != ScalarType::Float)
    fail(op, "x: expected dtype Float or Double, got ", torch::headeronly::toString(x.scalar_type()));
  const int64_t n = x.dim() > 0 ? x.size(x.dim() - 1) : 0;
  if (n < 1 || (n & (n - 1)) != 0 || n > INT64_C(1) << kMostHadamardBits)
    fail(op, "x: expected shape [..., n], n a power of two up to 2^", kMostHadamardBits, ", got ", shape_of(x));
  check_memory(op, "x", x);
  int bits = 0;
  while (INT64_C(1) << bits < n) ++bits;

  const Tensor rows = dense(x);
  const Kernels kernels(rows);
  const Tensor out = kernels.new_like(rows);
  if (is_double) {
    kernels.transform(const_data<double>(rows), data<double>(out), rows.numel(), bits);
  } else {
    kernels.transform(const_data<float>(rows), data<float>(out), rows.numel(), bits);
  }
  return out;
}

template <typename Kernels, typename Library>
void register_hadamard(Library& m) {
  m.impl("hadamard", TORCH_BOX(&hadamard<Kernels>));
}

}  // namespace unilora

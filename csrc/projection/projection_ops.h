// What the projection's operators share on all devices: argument checks, and index generation, for which Kernels is
// made from a tensor of the device (it holds guard and stream where there are any) and has
//   fill_uniform_index(int32_t* index, n, d, seed, start)       fill_balanced_index(int32_t* index, n, map, start)
#pragma once

#include "checks.h"
#include "projection/projection.h"

namespace unilora {

// An index to be written, its number of columns and its seed.
inline void check_fill(const char* op, const Tensor& index, int64_t d, int64_t seed) {
  check_dtype(op, "index", index, ScalarType::Int);
  check_shape(op, "index", index, {-1});
  check_memory(op, "index", index);
  if (!index.is_contiguous()) fail(op, "index: expected a contiguous tensor");
  check_range(op, "d", d, 1, kMaxElements);
  check_range(op, "seed", seed, 0, INT64_MAX);
}

template <typename Kernels>
void fill_uniform_index(const Tensor& index, int64_t d, int64_t seed, int64_t start) {
  constexpr auto op = "fill_uniform_index";
  check_fill(op, index, d, seed);
  check_range(op, "start", start, 0, INT64_MAX - index.numel());
  Kernels(index).fill_uniform_index(data<int32_t>(index), index.numel(), static_cast<uint32_t>(d),
                                    static_cast<uint64_t>(seed), static_cast<uint64_t>(start));
}

template <typename Kernels>
void fill_balanced_index(const Tensor& index, int64_t version, int64_t D, int64_t d, int64_t seed, int64_t start) {
  constexpr auto op = "fill_balanced_index";
  check_fill(op, index, d, seed);
  check_range(op, "version", version, 1, kBalancedVersion);
  check_range(op, "D", D, 1, kMaxElements);
  check_range(op, "start", start, 0, D);  // before the sum, which could overflow
  check_range(op, "start + len(index)", start + index.numel(), 0, D);
  const BalancedMap map(version, static_cast<uint32_t>(D), static_cast<uint32_t>(d), static_cast<uint64_t>(seed));
  Kernels(index).fill_balanced_index(data<int32_t>(index), index.numel(), map, static_cast<uint32_t>(start));
}

inline void check_theta_d(const char* op, const Tensor& theta_d, const Tensor& scale, ScalarType dtype) {
  if (theta_d.scalar_type() != ScalarType::Double) check_dtype(op, "theta_d", theta_d, ScalarType::Float);
  check_shape(op, "theta_d", theta_d, {-1});
  check_dtype(op, "scale", scale, theta_d.scalar_type());
  check_shape(op, "scale", scale, {theta_d.numel()});
  check_floating(op, "dtype", dtype);
  check_range(op, "len(theta_d)", theta_d.numel(), 1, kMaxElements);
  check_same_device(op, "scale", scale, "theta_d", theta_d);
  check_memory(op, "theta_d", theta_d);
  check_memory(op, "scale", scale);
}

inline void check_grad(const char* op, const Tensor& grad_theta_D, const Tensor& scale) {
  check_floating(op, "grad_theta_D", grad_theta_D.scalar_type());
  if (scale.scalar_type() != ScalarType::Double) check_dtype(op, "scale", scale, ScalarType::Float);
  check_shape(op, "scale", scale, {-1});
  check_range(op, "len(scale)", scale.numel(), 1, kMaxElements);
  check_range(op, "len(grad_theta_D)", grad_theta_D.numel(), 0, kMaxElements);
  check_same_device(op, "scale", scale, "grad_theta_D", grad_theta_D);
  check_memory(op, "grad_theta_D", grad_theta_D);
  check_memory(op, "scale", scale);
}

inline void check_index(const char* op, const char* name, const Tensor& index, const char* other_name,
                        const Tensor& other) {
  check_dtype(op, name, index, ScalarType::Int);
  check_shape(op, name, index, {-1});
  check_range(op, "len(index)", index.numel(), 0, kMaxElements);
  check_same_device(op, name, index, other_name, other);
  check_memory(op, name, index);
}

}  // namespace unilora

// Registers index generation, which every device has in the same way.
#define UNILORA_IMPL_INDEX(m, Kernels)                                            \
  m.impl("fill_uniform_index", TORCH_BOX(&unilora::fill_uniform_index<Kernels>)); \
  m.impl("fill_balanced_index", TORCH_BOX(&unilora::fill_balanced_index<Kernels>))

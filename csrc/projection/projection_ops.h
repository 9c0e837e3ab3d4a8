// The projection's operators, for any device: checks, allocation, then the device's kernels.
//
// Kernels is made from a tensor of the device (it holds guard and stream where there are any) and has
//   fill_uniform_index(int32_t* index, n, d, seed, start)       fill_balanced_index(int32_t* index, n, map, start)
//   gather(const Acc* theta_d, const Acc* scale, d, const int32_t* index, T* out, n)
//   segment_sum(const T* grad, n, const Acc* scale, d, const int32_t* order, const int32_t* offsets, Acc* out)
#pragma once

#include "checks.h"
#include "projection/projection.h"

namespace unilora {

template <typename Kernels>
void fill_uniform_index(const Tensor& index, int64_t d, int64_t seed, int64_t start) {
  constexpr auto op = "fill_uniform_index";
  check_dtype(op, "index", index, ScalarType::Int);
  check_shape(op, "index", index, {-1});
  if (!index.is_contiguous()) fail(op, "index: expected a contiguous tensor");
  check_range(op, "d", d, 1, kMaxElements);
  check_range(op, "seed", seed, 0, INT64_MAX);
  check_range(op, "start", start, 0, INT64_MAX - index.numel());
  Kernels(index).fill_uniform_index(data<int32_t>(index), index.numel(), static_cast<uint32_t>(d),
                                    static_cast<uint64_t>(seed), static_cast<uint64_t>(start));
}

template <typename Kernels>
void fill_balanced_index(const Tensor& index, int64_t D, int64_t d, int64_t seed, int64_t start) {
  constexpr auto op = "fill_balanced_index";
  check_dtype(op, "index", index, ScalarType::Int);
  check_shape(op, "index", index, {-1});
  if (!index.is_contiguous()) fail(op, "index: expected a contiguous tensor");
  check_range(op, "D", D, 1, kMaxElements);
  check_range(op, "d", d, 1, kMaxElements);
  check_range(op, "seed", seed, 0, INT64_MAX);
  check_range(op, "start + len(index)", start + index.numel(), 0, D);
  check_range(op, "start", start, 0, D);
  const BalancedMap map(static_cast<uint32_t>(D), static_cast<uint32_t>(d), static_cast<uint64_t>(seed));
  Kernels(index).fill_balanced_index(data<int32_t>(index), index.numel(), map, static_cast<uint32_t>(start));
}

template <typename Kernels>
Tensor project(const Tensor& theta_d, const Tensor& scale, const Tensor& index, ScalarType dtype) {
  constexpr auto op = "project";
  if (theta_d.scalar_type() != ScalarType::Double) check_dtype(op, "theta_d", theta_d, ScalarType::Float);
  check_shape(op, "theta_d", theta_d, {-1});
  check_dtype(op, "scale", scale, theta_d.scalar_type());
  check_shape(op, "scale", scale, {theta_d.numel()});
  check_dtype(op, "index", index, ScalarType::Int);
  check_shape(op, "index", index, {-1});
  check_floating(op, "dtype", dtype);
  check_range(op, "len(theta_d)", theta_d.numel(), 1, kMaxElements);
  check_range(op, "len(index)", index.numel(), 0, kMaxElements);
  check_same_device(op, "scale", scale, "theta_d", theta_d);
  check_same_device(op, "index", index, "theta_d", theta_d);

  const Tensor theta = torch::stable::contiguous(theta_d), factor = torch::stable::contiguous(scale);
  const Tensor columns = torch::stable::contiguous(index);
  const Tensor out = torch::stable::new_empty(theta, {index.numel()}, dtype);
  Kernels kernels(theta);
  dispatch_floating(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto acc) {
      using Acc = typename decltype(acc)::type;
      kernels.gather(const_data<Acc>(theta), const_data<Acc>(factor), theta.numel(), const_data<int32_t>(columns),
                     data<T>(out), columns.numel());
    };
    if (theta.scalar_type() == ScalarType::Double) {
      run(TypeTag<double>{});
    } else {
      run(TypeTag<float>{});
    }
  });
  return out;
}

template <typename Kernels>
Tensor project_transpose(const Tensor& grad_theta_D, const Tensor& scale, const Tensor& order, const Tensor& offsets) {
  constexpr auto op = "project_transpose";
  check_floating(op, "grad_theta_D", grad_theta_D.scalar_type());
  check_shape(op, "grad_theta_D", grad_theta_D, {-1});
  if (scale.scalar_type() != ScalarType::Double) check_dtype(op, "scale", scale, ScalarType::Float);
  check_shape(op, "scale", scale, {-1});
  check_dtype(op, "order", order, ScalarType::Int);
  check_shape(op, "order", order, {grad_theta_D.numel()});
  check_dtype(op, "offsets", offsets, ScalarType::Int);
  check_shape(op, "offsets", offsets, {scale.numel() + 1});
  check_range(op, "len(scale)", scale.numel(), 1, kMaxElements);
  check_range(op, "len(order)", order.numel(), 0, kMaxElements);
  check_same_device(op, "scale", scale, "grad_theta_D", grad_theta_D);
  check_same_device(op, "order", order, "grad_theta_D", grad_theta_D);
  check_same_device(op, "offsets", offsets, "grad_theta_D", grad_theta_D);

  const Tensor grad = torch::stable::contiguous(grad_theta_D), factor = torch::stable::contiguous(scale);
  const Tensor members = torch::stable::contiguous(order), bounds = torch::stable::contiguous(offsets);
  const Tensor out = torch::stable::new_empty(factor, {scale.numel()});
  Kernels kernels(grad);
  dispatch_floating(grad.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = [&](auto acc) {
      using Acc = typename decltype(acc)::type;
      kernels.segment_sum(const_data<T>(grad), grad.numel(), const_data<Acc>(factor), factor.numel(),
                          const_data<int32_t>(members), const_data<int32_t>(bounds), data<Acc>(out));
    };
    if (scale.scalar_type() == ScalarType::Double) {
      run(TypeTag<double>{});
    } else {
      run(TypeTag<float>{});
    }
  });
  return out;
}

}  // namespace unilora

// Registers the operators that every device has.
#define UNILORA_IMPL_PROJECTION(m, Kernels)                                         \
  m.impl("fill_uniform_index", TORCH_BOX(&unilora::fill_uniform_index<Kernels>));   \
  m.impl("fill_balanced_index", TORCH_BOX(&unilora::fill_balanced_index<Kernels>)); \
  m.impl("project", TORCH_BOX(&unilora::project<Kernels>));                         \
  m.impl("project_transpose", TORCH_BOX(&unilora::project_transpose<Kernels>))

// The projection's operators on CUDA: torch's tensors, guard and stream joined to projection_kernels.cuh.
#include "cuda/device.h"
#include "projection/projection_kernels.cuh"
#include "projection/projection_ops.h"

namespace unilora {
namespace {

struct CudaProjection {
  CudaLaunch cuda;

  explicit CudaProjection(const Tensor& like) : cuda(like) {}

  void fill_uniform_index(int32_t* index, int64_t n, uint32_t d, uint64_t seed, uint64_t start) const {
    launch_uniform_index(index, n, d, seed, start, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void fill_balanced_index(int32_t* index, int64_t n, const BalancedMap& map, uint32_t start) const {
    launch_balanced_index(index, n, map, start, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename Acc, typename T>
  void gather(const Acc* theta_d, const Acc* scale, int64_t d, const int32_t* index, T* out, int64_t n) const {
    const Tensor scaled = cuda.scratch(d * static_cast<int64_t>(sizeof(T)), ScalarType::Byte);
    launch_gather(theta_d, scale, cuda_pointer(data<T>(scaled)), d, index, cuda_pointer(out), n, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void segment_sum(const T* grad, int64_t n, const Acc* scale, int64_t d, const int32_t* order, const int32_t* offsets,
                   Acc* out) const {
    launch_segment_sum(cuda_pointer(grad), n, scale, d, order, offsets, out, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

Tensor project(const Tensor& theta_d, const Tensor& scale, const Tensor& index, ScalarType dtype,
               const std::optional<Tensor>& /*order*/, const std::optional<Tensor>& /*offsets*/) {
  constexpr auto op = "project";
  check_theta_d(op, theta_d, scale, dtype);
  check_index(op, "index", index, "theta_d", theta_d);

  const Tensor theta = torch::stable::contiguous(theta_d), factor = torch::stable::contiguous(scale);
  const Tensor columns = torch::stable::contiguous(index);
  const Tensor out = torch::stable::new_empty(theta, {index.numel()}, dtype);
  const CudaProjection kernels(theta);
  dispatch_floating_pair(dtype, theta.scalar_type(), [&](auto tag, auto acc) {
    using T = typename decltype(tag)::type;
    using Acc = typename decltype(acc)::type;
    kernels.gather(const_data<Acc>(theta), const_data<Acc>(factor), theta.numel(), const_data<int32_t>(columns),
                   data<T>(out), columns.numel());
  });
  return out;
}

// CUDA sums over each column's members: a scatter would need atomics, whose order is not fixed.
Tensor project_segment_sum(const Tensor& grad_theta_D, const Tensor& scale, const Tensor& order,
                           const Tensor& offsets) {
  constexpr auto op = "project_segment_sum";
  check_grad(op, grad_theta_D, scale);
  check_shape(op, "grad_theta_D", grad_theta_D, {-1});
  check_index(op, "order", order, "grad_theta_D", grad_theta_D);
  check_shape(op, "order", order, {grad_theta_D.numel()});
  check_index(op, "offsets", offsets, "grad_theta_D", grad_theta_D);
  check_shape(op, "offsets", offsets, {scale.numel() + 1});

  const Tensor grad = torch::stable::contiguous(grad_theta_D), factor = torch::stable::contiguous(scale);
  const Tensor members = torch::stable::contiguous(order), bounds = torch::stable::contiguous(offsets);
  const Tensor out = torch::stable::new_empty(factor, {scale.numel()});
  const CudaProjection kernels(grad);
  dispatch_floating_pair(grad.scalar_type(), scale.scalar_type(), [&](auto tag, auto acc) {
    using T = typename decltype(tag)::type;
    using Acc = typename decltype(acc)::type;
    kernels.segment_sum(const_data<T>(grad), grad.numel(), const_data<Acc>(factor), factor.numel(),
                        const_data<int32_t>(members), const_data<int32_t>(bounds), data<Acc>(out));
  });
  return out;
}

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) {
  UNILORA_IMPL_INDEX(m, unilora::CudaProjection);
  m.impl("project", TORCH_BOX(&unilora::project));
  m.impl("project_segment_sum", TORCH_BOX(&unilora::project_segment_sum));
}

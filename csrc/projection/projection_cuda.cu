// The projection's operators on CUDA: torch's tensors, guard and stream joined to projection_kernels.cuh.
#include "cuda/device.h"
#include "projection/projection_kernels.cuh"
#include "projection/projection_ops.h"

namespace unilora {
namespace {

struct CudaProjection {
  CudaLaunch cuda;

  explicit CudaProjection(const Tensor& like) : cuda(like) {}

  Tensor new_vector(int64_t n, ScalarType dtype) const { return cuda.scratch(n, dtype); }

  template <typename Map>
  void fill_index(int32_t* index, int64_t n, const Map& map, uint64_t start) const {
    launch_index(index, n, map, start, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void gather(const char* /*op*/, const Acc* theta_d, const Acc* scale, int64_t d, const int32_t* index,
              const Acc* value, T* out, int64_t n) const {
    const Tensor scratch = cuda.scratch(gather_scratch<T, Acc>(d, value != nullptr), ScalarType::Byte);
    launch_gather(theta_d, scale, data<void>(scratch), d, index, value, cuda_pointer(out), n, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void segment_sum(const T* grad, const Acc* value, int64_t n, const Acc* scale, int64_t d, const int32_t* order,
                   const int32_t* offsets, Acc* out) const {
    launch_segment_sum(cuda_pointer(grad), value, n, scale, d, order, offsets, out, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// CUDA sums over each column's members: a scatter would need atomics, whose order is not fixed.
Tensor project_segment_sum(const Tensor& grad_theta_D, const Tensor& scale, const Tensor& order, const Tensor& offsets,
                           const std::optional<Tensor>& value) {
  constexpr auto op = "project_segment_sum";
  check_grad(op, grad_theta_D, scale);
  check_shape(op, "grad_theta_D", grad_theta_D, {-1});
  check_index(op, "order", order, "grad_theta_D", grad_theta_D);
  check_shape(op, "order", order, {grad_theta_D.numel()});
  check_index(op, "offsets", offsets, "grad_theta_D", grad_theta_D);
  check_shape(op, "offsets", offsets, {scale.numel() + 1});
  check_value(op, value, scale, grad_theta_D.numel());

  const Tensor grad = dense(grad_theta_D), scales = dense(scale);
  const Tensor members = dense(order), bounds = dense(offsets);
  const Tensor out = torch::stable::new_empty(scales, {scale.numel()});
  const Values values(value);
  const CudaProjection kernels(grad);
  dispatch_floating_pair(grad.scalar_type(), scale.scalar_type(), [&](auto tag, auto acc) {
    using T = typename decltype(tag)::type;
    using Acc = typename decltype(acc)::type;
    kernels.segment_sum(const_data<T>(grad), values.data<Acc>(), grad.numel(), const_data<Acc>(scales), scales.numel(),
                        const_data<int32_t>(members), const_data<int32_t>(bounds), data<Acc>(out));
  });
  return out;
}

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) {
  unilora::register_projection<unilora::CudaProjection>(m);
  m.impl("project_segment_sum", TORCH_BOX(&unilora::project_segment_sum));
}

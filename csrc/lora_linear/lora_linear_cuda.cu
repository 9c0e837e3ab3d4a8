// The LoRA matmul's low-rank part on CUDA: torch's tensors, guard and stream joined to
// lora_linear_kernels.cuh.
#include "cuda/device.h"
#include "lora_linear/lora_linear_kernels.cuh"
#include "lora_linear/lora_linear_ops.h"

namespace unilora {
namespace {

struct CudaLoraLinear {
  CudaLaunch cuda;

  explicit CudaLoraLinear(const Tensor& like) : cuda(like) {}

  template <typename T, typename Acc>
  void dot(const T* x, int64_t tokens, int64_t columns, const T* factor, FactorLayout layout, int64_t r,
           Acc* out) const {
    launch_dot(cuda_pointer(x), tokens, columns, cuda_pointer(factor), layout, r, out, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void rank_update(T* y, int64_t tokens, int64_t columns, const Acc* h, int64_t r, const T* factor, FactorLayout layout,
                   double scaling) const {
    launch_rank_update(cuda_pointer(y), tokens, columns, h, r, cuda_pointer(factor), layout, scaling, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void outer(const T* g, int64_t tokens, int64_t columns, const Acc* h, int64_t r, double scaling, T* out,
             FactorLayout layout) const {
    constexpr ScalarType dtype = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor partial = cuda.scratch(outer_scratch(tokens, columns, r), dtype);
    launch_outer(cuda_pointer(g), tokens, columns, h, r, scaling, data<Acc>(partial), cuda_pointer(out), layout,
                 cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void dot_and_outer(const T* g, int64_t tokens, int64_t columns, const T* factor, FactorLayout layout, const Acc* h,
                     int64_t r, double scaling, Acc* u, T* out) const {
    dot(g, tokens, columns, factor, layout, r, u);
    outer(g, tokens, columns, h, r, scaling, out, layout);
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { unilora::register_lora_linear<unilora::CudaLoraLinear>(m); }

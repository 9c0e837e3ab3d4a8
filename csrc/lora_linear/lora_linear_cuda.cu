// The LoRA matmul's low-rank part on CUDA: torch's tensors, guard and stream joined to
// lora_linear_kernels.cuh.
#include "cuda/device.h"
#include "lora_linear/lora_linear.h"
#include "lora_linear/lora_linear_kernels.cuh"

namespace unilora {
namespace {

struct CudaLoraLinear {
  CudaLaunch cuda;

  explicit CudaLoraLinear(const Tensor& like) : cuda(like) {}

  template <typename T, typename Acc>
  void dot(const T* x, int64_t N, int64_t K, const T* P, FactorLayout layout, int64_t r, Acc* out) const {
    launch_dot(cuda_pointer(x), N, K, cuda_pointer(P), layout == FactorLayout::kRankMajor, r, out, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void rank_update(T* y, int64_t N, int64_t M, const Acc* h, int64_t r, const T* P, FactorLayout layout,
                   double scaling) const {
    launch_rank_update(cuda_pointer(y), N, M, h, r, cuda_pointer(P), layout == FactorLayout::kRankMajor, scaling,
                       cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void outer(const T* g, int64_t N, int64_t M, const Acc* h, int64_t r, double scaling, T* out,
             FactorLayout layout) const {
    constexpr ScalarType dtype = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor partial = cuda.scratch(outer_scratch(N, M, r), dtype);
    launch_outer(cuda_pointer(g), N, M, h, r, scaling, data<Acc>(partial), cuda_pointer(out),
                 layout == FactorLayout::kRankMajor, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void dot_and_outer(const T* g, int64_t N, int64_t M, const T* P, FactorLayout layout, const Acc* h, int64_t r,
                     double scaling, Acc* u, T* out) const {
    dot(g, N, M, P, layout, r, u);
    outer(g, N, M, h, r, scaling, out, layout);
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { UNILORA_IMPL_LORA_LINEAR(m, unilora::CudaLoraLinear); }

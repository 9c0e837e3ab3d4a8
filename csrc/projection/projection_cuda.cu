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

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { UNILORA_IMPL_PROJECTION(m, unilora::CudaProjection); }

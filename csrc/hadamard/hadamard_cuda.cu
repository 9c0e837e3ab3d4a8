// The Walsh-Hadamard transform on CUDA: torch's tensors, guard and stream joined to hadamard_kernels.cuh.
#include "cuda/device.h"
#include "hadamard/hadamard_kernels.cuh"
#include "hadamard/hadamard_ops.h"

namespace unilora {
namespace {

struct CudaHadamard {
  CudaLaunch cuda;

  explicit CudaHadamard(const Tensor& like) : cuda(like) {}

  Tensor new_like(const Tensor& x) const { return torch::stable::empty_like(x); }

  template <typename T>
  void transform(const T* x, T* out, int64_t total, int bits) const {
    launch_hadamard(x, out, total, bits, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { unilora::register_hadamard<unilora::CudaHadamard>(m); }

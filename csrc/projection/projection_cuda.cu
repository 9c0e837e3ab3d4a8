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

  void column_members(const char* op, const int32_t*, int64_t, int64_t, const std::vector<int64_t>&, int32_t*,
                      int32_t*) const {
    fail(op, "not on CUDA");
  }

  template <typename T, typename Acc>
  void segment_sum(const char* op, const Pieces& grad, const Acc* value, const Acc* scale, int64_t d,
                   const int32_t* order, const int32_t* offsets, Acc* out) const {
    check_range(op, "number of pieces", grad.size(), 1, 1);
    launch_segment_sum(cuda_pointer(const_data<T>(grad[0])), value, grad.rows(), scale, d, order, offsets, out,
                       cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { unilora::register_projection<unilora::CudaProjection>(m); }

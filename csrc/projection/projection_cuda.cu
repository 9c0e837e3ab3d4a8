// The projection's operators on CUDA: torch's tensors, guard and stream joined to projection_kernels.cuh.
#include "cuda/device.h"
#include "projection/projection_kernels.cuh"
#include "projection/projection_ops.h"

namespace unilora {
namespace {

class CudaProjection {
 public:
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

  void column_members(const char* /*op*/, const int32_t* index, int64_t n, int64_t d,
                      const std::vector<int64_t>& lengths, int32_t* order, int32_t* offsets) const {
    const Tensor scratch = cuda.scratch(sorted_positions_scratch(n, d), ScalarType::Byte);
    launch_column_members(index, n, d, lengths, data<void>(scratch), order, offsets, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void segment_sum(const char* /*op*/, const Pieces& grad, const Acc* value, const Acc* scale, int64_t d,
                   const int32_t* order, const int32_t* offsets, Acc* out) const {
    launch_segment_sum(cuda_pieces<T>(grad), value, grad.rows(), scale, d, order, offsets, out, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc, typename Map>
  void seeded_gather(const char* /*op*/, const Acc* theta_d, const Acc* scale, int64_t d, const Map& map,
                     const std::vector<RowRange>& ranges, T* out, int64_t /*n*/) const {
    const Tensor scratch = cuda.scratch(gather_scratch<T, Acc>(d, false), ScalarType::Byte);
    launch_seeded_gather(theta_d, scale, data<void>(scratch), d, map, ranges, cuda_pointer(out), cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc, typename Map>
  void seeded_scatter(const char* op, const Pieces& grad, const Acc* scale, int64_t D, int64_t d, const Map& map,
                      const std::vector<RowRange>& ranges, Acc* out) const {
    if constexpr (std::is_same_v<Map, BalancedMap>) {
      std::vector<Segment<typename CudaType<T>::type>> segments;
      if (!make_segments(cuda_pieces<T>(grad), ranges, D, segments))
        fail(op, "ranges: expected ranges that do not overlap");
      check_range(op, "number of stretches that ranges and pieces cut D into", static_cast<int64_t>(segments.size()), 1,
                  kMaxSegments);
      launch_balanced_scatter(segments, map, D, scale, d, out, cuda.stream());
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    } else {
      fail(op, "algorithm: expected 'balanced' on CUDA, got 'uniform', whose columns list no members: ",
           "store them (column_members) and call project_segment_sum");
    }
  }

 private:
  CudaLaunch cuda;

  template <typename T>
  static auto cuda_pieces(const Pieces& grad) {
    std::vector<Piece<typename CudaType<T>::type>> pieces;
    for (const Piece<T>& piece : grad.list<T>()) pieces.push_back({cuda_pointer(piece.data), piece.length});
    return pieces;
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { unilora::register_projection<unilora::CudaProjection>(m); }

// The torch side of a CUDA operator: device guard, current stream, scratch memory, pointer types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "checks.h"

namespace unilora {

// While it lives, the device of `like` is the current one; its current stream is the one to launch on.
class CudaLaunch {
 public:
  explicit CudaLaunch(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  // Uninitialised memory from torch's allocator, which reuses it in stream order: it may be dropped after the
  // launch.
  Tensor scratch(int64_t elements, ScalarType dtype) const {
    return torch::stable::new_empty(like_, {elements}, dtype);
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// torch's 16-bit types and CUDA's have the same bits.
template <typename T>
struct CudaType {
  using type = T;
};
template <>
struct CudaType<torch::headeronly::Half> {
  using type = __half;
};
template <>
struct CudaType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};

template <typename T>
auto* cuda_pointer(T* p) {
  return reinterpret_cast<typename CudaType<T>::type*>(p);
}
template <typename T>
const auto* cuda_pointer(const T* p) {
  return reinterpret_cast<const typename CudaType<T>::type*>(p);
}

}  // namespace unilora

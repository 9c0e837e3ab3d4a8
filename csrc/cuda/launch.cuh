// What all CUDA kernels share: grid size, device checks, conversions, sums across lanes. No torch, so that
// kernels can be compiled and tested by themselves.
//
// Launch convention: a kernel walks its items with a stride of the whole grid, so that any number of blocks
// gives the same result; a launcher returns without a launch when there is nothing to do. Launchers do not
// ask for errors: the caller does, with cudaGetLastError() or STD_CUDA_KERNEL_LAUNCH_CHECK().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <type_traits>

// Most blocks of a grid. Tests make it small to send few items through the grid-stride loops.
#ifndef UNILORA_MAX_BLOCKS
#define UNILORA_MAX_BLOCKS (INT64_C(1) << 20)
#endif

// Stops the kernel, in release builds too (assert() does not): the next CUDA call reports a device-side assert. That
// the call does not return is said apart: else registers are kept for what would follow it.
#define UNILORA_DEVICE_CHECK(condition)                                     \
  do {                                                                      \
    if (!(condition)) {                                                     \
      __assert_fail(#condition, __FILE__, __LINE__, "unilora CUDA kernel"); \
      __builtin_unreachable();                                              \
    }                                                                       \
  } while (0)

namespace unilora {

constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid_size(int64_t items, int64_t items_per_block) {
  const int64_t blocks = ceil_div(items, items_per_block);
  return static_cast<unsigned>(blocks < UNILORA_MAX_BLOCKS ? blocks : UNILORA_MAX_BLOCKS);
}

// The first item of this thread, and the step to its next: for (i = grid_begin(); i < n; i += grid_step())
__device__ __forceinline__ int64_t grid_begin() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Acc <- T. The 16-bit types convert through float, which holds them exactly.
template <typename Acc, typename T>
__device__ __forceinline__ Acc widen(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<Acc>(value);
  } else {
    return static_cast<Acc>(static_cast<float>(value));
  }
}

// T <- Acc. The 16-bit types round through float, as on the CPU.
template <typename T, typename Acc>
__device__ __forceinline__ T narrow(Acc value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Sum over groups of `width` lanes, a power of two, by a fixed tree; the first lane of a group holds it. All
// lanes of the warp must call it.
template <typename Acc>
__device__ __forceinline__ Acc lane_sum(Acc value, int width) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step, width);
  return value;
}

}  // namespace unilora

// Tensor-core products of one warp, and what feeds them: sm_80 and later. No torch.
//
// A fragment is what one lane holds of a matrix (PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8"). With
// group = lane / 4 and t = lane % 4, two 16-bit numbers a register, the lower first:
//   a, 16 x 16   a[0]: row group,     columns 2 t, 2 t + 1        b, 16 x 8   b[0]: rows 2 t, 2 t + 1, column group
//                a[1]: row group + 8, columns 2 t, 2 t + 1                    b[1]: rows 2 t + 8, 2 t + 9
//                a[2], a[3]: columns 2 t + 8, 2 t + 9
//   c, 16 x 8    c[0], c[1]: row group, columns 2 t, 2 t + 1      c[2], c[3]: row group + 8
// and in float32, one number a register:
//   a, 16 x 8    a[0], a[1]: rows group, group + 8, column t      a[2], a[3]: column t + 4
//   b, 8 x 8     b[0], b[1]: rows t, t + 4, column group          c: as above
// A sum does not mind the order of its terms: any bijection of the summed index may be used, if it is the same for a
// and b. So 16 bytes that a lane has loaded are fragments as they are.
#pragma once

#include "cuda/launch.cuh"

namespace unilora {

// c += a b, products exact, sums in float32. T: __half or __nv_bfloat16.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same of float32 numbers that TF32 (8 bits of exponent, 11 of significand) holds: any 16-bit number, and the two
// parts of split_tf32.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// value = high + low, both held by TF32, but for a relative 2^-21: products with these two are float32's for a sum that
// is rounded to 16 bits.
struct Tf32Parts {
  uint32_t high, low;
};
__device__ __forceinline__ Tf32Parts split_tf32(float value) {
  constexpr uint32_t kHeld = 0xffffe000u;
  const uint32_t bits = __float_as_uint(value), high = bits & kHeld;
  if (bits == high) return {high, 0};  // infinity too: the difference below would be NaN
  return {high, __float_as_uint(value - __uint_as_float(high)) & kHeld};
}

// The two 16-bit numbers of a register as float32: .x the lower.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 numbers = reinterpret_cast<const __half2&>(pair);
    return {__low2float(numbers), __high2float(numbers)};
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 numbers = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(numbers);
  } else {
    const __nv_bfloat162 numbers = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(numbers);
  }
}

// ---- shared memory ------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, aligned; it
// gets columns 2 t and 2 t + 1 of row `group` of each, kTransposed: rows 2 t and 2 t + 1 of column `group`.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// Copies 16 bytes, both ends aligned, past the registers; not `inside`: zeros, and `global` is not read. It has
// happened after wait_copies() in this thread, and for the others after a barrier that follows.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// All but the `kLater` groups of copies committed last.
template <int kLater>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLater) : "memory");
}

}  // namespace unilora

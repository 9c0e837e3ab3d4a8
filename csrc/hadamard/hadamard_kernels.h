// CPU kernels of the Walsh-Hadamard transform (contract: hadamard.h). No torch.
//
// A block of 16 KiB is transformed in the L1 cache: bits 0 to 5 (double: 4) in eight vector registers, the others three
// at a time. Longer rows are then passed over in strips: up to 64 stretches of 256 bytes, at equal distances, are read
// into a buffer in L1, transformed across and written back, up to 6 bits for one read and write of the row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/multiversion.h"
#include "hadamard/hadamard.h"

namespace unilora {

// Vectors as wide as their lanes can be exchanged by an instruction of every machine of the last ten years.
#if defined(__x86_64__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename T>
struct Tiling {
  static constexpr int kLaneBits = (kVectorBytes == 32 ? 3 : 2) - (sizeof(T) == 8 ? 1 : 0);
  static constexpr int kUnitBits = kLaneBits + 3;  // of eight vectors
  static constexpr int kBlockBits = sizeof(T) == 8 ? 11 : 12;
  static constexpr int64_t kLanes = 1 << kLaneBits, kUnit = 1 << kUnitBits, kBlock = 1 << kBlockBits;
  static constexpr int64_t kColumns = 256 / sizeof(T);  // of one strip
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef Integer Places __attribute__((vector_size(kVectorBytes)));
};
constexpr int kMostStripBits = 6;

template <typename T>
using Vector = typename Tiling<T>::Vector;

// Lane l of the result is lane l ^ step of v, plus lane l of v or, where l & step, minus it.
template <int64_t step, typename T, size_t... lane>
UNILORA_INLINE void butterfly_lanes(Vector<T>& v, std::index_sequence<lane...>) {
  using Integer = typename Tiling<T>::Integer;
  const Vector<T> sign = {T(lane & step ? -1 : 1)...};
#if defined(__clang__)
  const Vector<T> other = {v[lane ^ step]...};
#else
  const Vector<T> other = __builtin_shuffle(v, typename Tiling<T>::Places{Integer(lane ^ step)...});
#endif
  v = other + v * sign;
}

// The butterflies of kBits bits, across 2^kBits vectors.
template <int kBits, typename T>
UNILORA_INLINE void butterflies(Vector<T>* v) {
  for (int step = 1; step < 1 << kBits; step *= 2) {
    for (int i = 0; i < 1 << kBits; ++i) {
      if ((i & step) != 0) continue;
      const Vector<T> a = v[i], b = v[i + step];
      v[i] = a + b;
      v[i + step] = a - b;
    }
  }
}

// Bits [0, kBits), of those that a unit of eight vectors has.
template <int kBits, typename T>
UNILORA_INLINE void transform_units(const T* in, T* out, int64_t n, T scale) {
  using S = Tiling<T>;
  constexpr auto lanes = std::make_index_sequence<S::kLanes>();
  for (int64_t at = 0; at < n; at += S::kUnit) {
    Vector<T> v[8];
    for (int i = 0; i < 8; ++i) {
      std::memcpy(&v[i], in + at + i * S::kLanes, kVectorBytes);
      v[i] *= scale;
      if constexpr (kBits >= 1) butterfly_lanes<1, T>(v[i], lanes);
      if constexpr (kBits >= 2 && S::kLaneBits >= 2) butterfly_lanes<2, T>(v[i], lanes);
      if constexpr (kBits >= 3 && S::kLaneBits >= 3) butterfly_lanes<4, T>(v[i], lanes);
    }
    constexpr int kAcross = std::clamp(kBits - S::kLaneBits, 0, 3);
    for (int i = 0; i < 8; i += 1 << kAcross) butterflies<kAcross, T>(v + i);
    for (int i = 0; i < 8; ++i) std::memcpy(out + at + i * S::kLanes, &v[i], kVectorBytes);
  }
}

// to[i, :] = the butterflies of kBits bits over from[i, :], i in [0, 2^kBits), each of `columns` numbers.
template <int kBits, typename T>
UNILORA_INLINE void transform_across(const T* from, int64_t from_pitch, T* to, int64_t to_pitch, int64_t columns) {
  for (int64_t c = 0; c < columns; c += Tiling<T>::kLanes) {
    Vector<T> v[1 << kBits];
    for (int i = 0; i < 1 << kBits; ++i) std::memcpy(&v[i], from + i * from_pitch + c, kVectorBytes);
    butterflies<kBits, T>(v);
    for (int i = 0; i < 1 << kBits; ++i) std::memcpy(to + i * to_pitch + c, &v[i], kVectorBytes);
  }
}
template <typename T>
UNILORA_INLINE void transform_across(int bits, const T* from, int64_t from_pitch, T* to, int64_t to_pitch,
                                     int64_t columns) {
  if (bits == 1) transform_across<1>(from, from_pitch, to, to_pitch, columns);
  if (bits == 2) transform_across<2>(from, from_pitch, to, to_pitch, columns);
  if (bits == 3) transform_across<3>(from, from_pitch, to, to_pitch, columns);
}

template <int kBits, typename T>
UNILORA_INLINE void transform_units(int bits, const T* in, T* out, int64_t n, T scale) {
  if constexpr (kBits < Tiling<T>::kUnitBits) {
    if (bits > kBits) return transform_units<kBits + 1>(bits, in, out, n, scale);
  }
  transform_units<kBits>(in, out, n, scale);
}

// out = in, rows of 2^bits numbers transformed; n: at most kBlock, a multiple of the row and of kUnit
template <typename T>
UNILORA_INLINE void transform_rows(const T* in, T* out, int64_t n, int bits, T scale) {
  transform_units<0>(bits, in, out, n, scale);
  for (int bit = Tiling<T>::kUnitBits; bit < bits; bit += 3) {
    const int width = std::min(3, bits - bit);
    const int64_t step = int64_t{1} << bit;
    for (int64_t at = 0; at < n; at += step << width) transform_across(width, out + at, step, out + at, step, step);
  }
}

// 2^bits stretches of `columns` numbers, `pitch` apart, transformed across; columns: a multiple of kColumns
template <typename T>
UNILORA_INLINE void transform_strips(T* data, int64_t pitch, int bits, int64_t columns) {
  constexpr int64_t kColumns = Tiling<T>::kColumns;
  if (bits <= 3) return transform_across(bits, data, pitch, data, pitch, columns);
  alignas(64) T buffer[kColumns << kMostStripBits];
  for (const T* end = data + columns; data < end; data += kColumns) {
    for (int64_t high = 0; high < 1 << bits; high += 8)
      transform_across<3>(data + high * pitch, pitch, buffer + high * kColumns, kColumns, kColumns);
    for (int64_t low = 0; low < 8; ++low)
      transform_across(bits - 3, buffer + low * kColumns, 8 * kColumns, data + low * pitch, 8 * pitch, kColumns);
  }
}

// Multiversioning works on plain functions only: one set for each dtype.
#define UNILORA_HADAMARD_KERNELS(T)                                                                     \
  UNILORA_MULTIVERSION inline void hadamard_rows(const T* in, T* out, int64_t n, int bits, T scale) {   \
    transform_rows(in, out, n, bits, scale);                                                            \
  }                                                                                                     \
  UNILORA_MULTIVERSION inline void hadamard_strips(T* data, int64_t pitch, int bits, int64_t columns) { \
    transform_strips(data, pitch, bits, columns);                                                       \
  }
UNILORA_HADAMARD_KERNELS(float)
UNILORA_HADAMARD_KERNELS(double)
#undef UNILORA_HADAMARD_KERNELS

}  // namespace unilora

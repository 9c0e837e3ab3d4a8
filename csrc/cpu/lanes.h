// Short vectors in plain GCC/Clang C++: as many lanes as a 64-byte register holds, split by the compiler where
// registers are shorter. 16-bit types are widened on load and rounded to nearest even on store.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#include "cpu/multiversion.h"

namespace unilora {

template <typename Acc>
struct LanesOf {
  static constexpr int64_t kLanes = 64 / sizeof(Acc);
  typedef Acc type __attribute__((vector_size(64)));
};
template <typename Acc>
using Lanes = typename LanesOf<Acc>::type;

// Acc: float, or double for double.
template <typename Acc, typename T>
UNILORA_INLINE void load_lanes(const T* from, Lanes<Acc>& to) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    std::memcpy(&to, from, sizeof(to));
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Narrow bits;
    std::memcpy(&bits, from, sizeof(bits));
    const Wide wide = __builtin_convertvector(bits, Wide) << 16;
    std::memcpy(&to, &wide, sizeof(to));
  } else {
    Acc lanes[LanesOf<Acc>::kLanes];
    for (int64_t l = 0; l < LanesOf<Acc>::kLanes; ++l) lanes[l] = static_cast<Acc>(from[l]);
    std::memcpy(&to, lanes, sizeof(to));
  }
}

template <typename Acc, typename T>
UNILORA_INLINE void store_lanes(T* to, const Lanes<Acc>& from) {
  if constexpr (sizeof(T) == sizeof(Acc)) {
    std::memcpy(to, &from, sizeof(from));
  } else if constexpr (std::is_same_v<T, torch::headeronly::BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(32)));
    typedef uint32_t Wide __attribute__((vector_size(64)));
    Wide bits;
    std::memcpy(&bits, &from, sizeof(bits));
    const Wide rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Wide is_nan = reinterpret_cast<const Wide&>(bits) << 1 > Wide{} + 0xFF000000u;
    const Narrow narrow = __builtin_convertvector(is_nan ? Wide{} + 0x7FC0 : rounded, Narrow);
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    for (int64_t l = 0; l < LanesOf<Acc>::kLanes; ++l) to[l] = static_cast<T>(from[l]);
  }
}

}  // namespace unilora

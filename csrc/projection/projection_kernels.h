// CPU kernels of the projection, on blocks of rows that stay in the L1 cache. Plain C++17, no torch.
// T: float, double or a 16-bit type that converts to float, the dtype of theta_D; Acc: float or double.
//
// Both directions are one sequential pass over theta_D and index, with random access to a table of d numbers:
//   gather    reads 4 n (index), writes n sizeof(T); reads the table at random
//   scatter   reads 4 n (index) and n sizeof(T); adds to the table at random
// A value a row is n sizeof(Acc) more.
// They are bound by the latency of the table (L2 for d to some 100,000), so each keeps many accesses in flight: the
// gather by itself, the scatter by prefetching.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/multiversion.h"
#include "projection/projection.h"

namespace unilora {

constexpr int64_t kBlock = 4096;  // rows: 16 KiB of columns

// ---- where the columns of a block of rows come from --------------------------------------------------------------

UNILORA_INLINE void fill_uniform_pairs(int32_t* index, int64_t pairs, const UniformMap& map, uint64_t first_pair) {
  for (int64_t k = 0; k < pairs; ++k) {
    const ColumnPair columns = uniform_columns(map, first_pair + static_cast<uint64_t>(k));
    index[2 * k] = static_cast<int32_t>(columns.even);
    index[2 * k + 1] = static_cast<int32_t>(columns.odd);
  }
}

// `map` by value here and below: a local copy that the writes to index cannot change.
UNILORA_MULTIVERSION inline void fill_block(int32_t* index,  // [n]
                                            int64_t n, const UniformMap map, uint64_t start) {
  if (n > 0 && start % 2 == 1) {  // an odd start takes the second half of its pair
    *index++ = static_cast<int32_t>(uniform_columns(map, start / 2).odd);
    ++start;
    --n;
  }
  fill_uniform_pairs(index, n / 2, map, start / 2);
  if (n % 2 == 1) {
    index[n - 1] = static_cast<int32_t>(uniform_columns(map, (start + static_cast<uint64_t>(n)) / 2).even);
  }
}

UNILORA_MULTIVERSION inline void fill_block(int32_t* index,  // [n]
                                            int64_t n, const BalancedMap map, uint64_t first) {
  const uint32_t start = static_cast<uint32_t>(first);
  if (map.ranked()) {
    for (int64_t k = 0; k < n; ++k) index[k] = static_cast<int32_t>(map.column(start + static_cast<uint32_t>(k)));
    return;
  }
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    index[k] = static_cast<int32_t>(map.column_at_once(start + static_cast<uint32_t>(k)));
  }
  for (int64_t k = 0; k < n; ++k) {
    if (index[k] < 0) index[k] = static_cast<int32_t>(map.column(start + static_cast<uint32_t>(k)));
  }
}

// Copies stored columns and returns the largest of the copies, a negative one counting as very large. What is used is
// then what was checked: another thread may write to the tensor.
UNILORA_MULTIVERSION inline uint32_t copy_columns(const int32_t* __restrict index,  // [n]
                                                  int32_t* __restrict columns,      // [n]
                                                  int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t column = index[i];
    columns[i] = column;
    largest = std::max(largest, static_cast<uint32_t>(column));
  }
  return largest;
}

// A source gives columns(first, n, buffer): writes the columns of rows [first, first + n), n <= kBlock, to `buffer`;
// false: one of them is not in [0, d).
struct StoredColumns {
  const int32_t* index;  // [D]
  int64_t d;
  bool columns(int64_t first, int64_t n, int32_t* buffer) const { return copy_columns(index + first, buffer, n) < d; }
};

// ---- gather and scatter --------------------------------------------------------------------------------------------

// out[i] = table[index[i]]
template <typename T>
inline void gather_block(const T* __restrict table,        // [d]
                         const int32_t* __restrict index,  // [n], in [0, d)
                         T* __restrict out,                // [n]
                         int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = table[index[i]];
}

// out[i] = table[index[i]] value[i]
template <typename Acc, typename T>
inline void gather_block(const Acc* __restrict table,      // [d]
                         const int32_t* __restrict index,  // [n], in [0, d)
                         const Acc* __restrict value,      // [n]
                         T* __restrict out,                // [n]
                         int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(table[index[i]] * value[i]);
}

// table[index[i]] += value[i] grad[i], in ascending i; kWeighted: whether there are values
template <bool kWeighted, typename T, typename Acc>
inline void scatter_block(const T* __restrict grad,                      // [n]
                          const int32_t* __restrict index,               // [n], in [0, d)
                          [[maybe_unused]] const Acc* __restrict value,  // [n]
                          Acc* __restrict table,                         // [d]
                          int64_t n) {
  constexpr int64_t kAhead = 64, kGroup = 8;
  const auto add = [&](int64_t i) {
    if constexpr (kWeighted) {
      table[index[i]] += value[i] * static_cast<Acc>(grad[i]);
    } else {
      table[index[i]] += static_cast<Acc>(grad[i]);
    }
  };
  int64_t i = 0;
  for (; i + kAhead + kGroup <= n; i += kGroup) {
    for (int64_t k = i; k < i + kGroup; ++k) __builtin_prefetch(table + index[k + kAhead], 1);
    for (int64_t k = i; k < i + kGroup; ++k) add(k);
  }
  for (; i < n; ++i) add(i);
}

// Rows are added in `parts` equal runs, each into a table of its own, and the tables in order: the number of parts,
// and so every rounding, follows from the sizes and not from the threads. With four rows or more to a column of each
// table, clearing and adding the tables is a small part of the work.
inline int64_t scatter_parts(int64_t n, int64_t d) { return std::clamp<int64_t>(n / (4 * d), 1, 8); }

}  // namespace unilora

// Where the gather takes the columns of its rows from: a stored index, or the arithmetic of projection.h. A source has
//   Table, fill(table)           what a block keeps in shared memory, and the call that makes it
//   four(table, row, column)     the columns of rows [row, row + 4), row a multiple of 4
//   one(table, row)              that of one row
//   check(column)                stops the kernel at a column that is not in [0, d)
#pragma once

#include "projection/projection_common.cuh"

namespace unilora {

// Four consecutive items by accesses of up to 16 bytes, for which p must be aligned: see aligned_for_four().
template <typename T>
using FourWord = std::conditional_t<sizeof(T) == 2, uint2, uint4>;

template <typename T>
__device__ __forceinline__ void load_four(const T* __restrict__ p, T (&item)[4]) {
  constexpr int words = 4 * sizeof(T) / sizeof(FourWord<T>);
  FourWord<T> word[words];
#pragma unroll
  for (int k = 0; k < words; ++k) word[k] = reinterpret_cast<const FourWord<T>*>(p)[k];
  memcpy(item, word, sizeof(word));
}

template <typename T>
__device__ __forceinline__ void store_four(T* p, const T (&item)[4]) {
  constexpr int words = 4 * sizeof(T) / sizeof(FourWord<T>);
  FourWord<T> word[words];
  memcpy(word, item, sizeof(word));
#pragma unroll
  for (int k = 0; k < words; ++k) reinterpret_cast<FourWord<T>*>(p)[k] = word[k];
}

template <typename T>
bool aligned_for_four(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(FourWord<T>) == 0;
}

// ---- stored ------------------------------------------------------------------------------------------------------

struct StoredIndex {
  const int32_t* __restrict__ index;  // [n]
  uint32_t d;

  static constexpr int kAtOnce = 4;
  struct Table {};
  __device__ void fill(Table&) const {}

  __device__ __forceinline__ void four(const Table&, int64_t row, uint32_t (&column)[4]) const {
    int32_t item[4];
    load_four(index + row, item);
#pragma unroll
    for (int k = 0; k < 4; ++k) column[k] = static_cast<uint32_t>(item[k]);
  }
  __device__ __forceinline__ uint32_t one(const Table&, int64_t row) const { return static_cast<uint32_t>(index[row]); }

  // One check for all: a negative index counts as a very large one.
  template <int kCount>
  __device__ __forceinline__ void check(const uint32_t (&column)[kCount]) const {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) largest = max(largest, column[k]);
    UNILORA_DEVICE_CHECK(largest < d);
  }
};

// ---- computed ----------------------------------------------------------------------------------------------------

// Columns of four consecutive positions, and of one.
__device__ __forceinline__ void columns_of(const UniformMap& map, uint32_t position, uint32_t (&column)[4]) {
  const ColumnPair a = uniform_columns(map, position / 2), b = uniform_columns(map, position / 2 + 1);
  if (position % 2 == 0) {
    column[0] = a.even, column[1] = a.odd, column[2] = b.even, column[3] = b.odd;
  } else {  // every thread of a range, or none
    column[0] = a.odd, column[1] = b.even, column[2] = b.odd;
    column[3] = uniform_columns(map, position / 2 + 2).even;
  }
}
__device__ __forceinline__ uint32_t column_of(const UniformMap& map, uint32_t position) {
  const ColumnPair pair = uniform_columns(map, position / 2);
  return position % 2 == 0 ? pair.even : pair.odd;
}

__device__ __forceinline__ uint32_t column_of(const BalancedMap& map, uint32_t position) {
  return map.column(position);
}
__device__ __forceinline__ void columns_of(const BalancedMap& map, uint32_t position, uint32_t (&column)[4]) {
  uint32_t largest = BalancedMap::kWalkOn;
  if (!map.ranked()) {
    largest = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      column[k] = map.column_at_once(position + static_cast<uint32_t>(k));
      largest = max(largest, column[k]);
    }
  }
  if (largest != BalancedMap::kWalkOn) return;
#pragma unroll 1  // seldom: short code rather than fast
  for (uint32_t k = 0; k < 4; ++k) {
    const uint32_t mended = map.column(position + k);
#pragma unroll
    for (uint32_t to = 0; to < 4; ++to) column[to] = to == k ? mended : column[to];
  }
}

// Rows that are ranges of positions, one after the other. kMost = 1: one range.
template <int kMost>
struct RowRanges {
  int count;
  uint32_t row[kMost], position[kMost];  // of the first of each range; row[0] = 0, ascending
};

template <typename Map, int kMost>
struct ComputedColumns {
  Map map;
  RowRanges<kMost> ranges;

  static constexpr int kAtOnce = 1;
  struct Table {
    uint32_t row[kMost], position[kMost];
  };
  __device__ void fill(Table& table) const {
    if constexpr (kMost > 1) {
      for (int k = static_cast<int>(threadIdx.x); k < ranges.count; k += static_cast<int>(blockDim.x)) {
        table.row[k] = ranges.row[k];
        table.position[k] = ranges.position[k];
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void four(const Table& table, int64_t row, uint32_t (&column)[4]) const {
    const auto first = static_cast<uint32_t>(row);
    if constexpr (kMost == 1) {
      columns_of(map, ranges.position[0] + first, column);
    } else {
      const int k = last_at_most(table.row, 0, ranges.count - 1, first);
      if (k + 1 == ranges.count || first + 4 <= table.row[k + 1]) {
        columns_of(map, table.position[k] + (first - table.row[k]), column);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) column[i] = one(table, row + i);
      }
    }
  }
  __device__ __forceinline__ uint32_t one(const Table& table, int64_t row) const {
    const auto first = static_cast<uint32_t>(row);
    if constexpr (kMost == 1) {
      return column_of(map, ranges.position[0] + first);
    } else {
      const int k = last_at_most(table.row, 0, ranges.count - 1, first);
      return column_of(map, table.position[k] + (first - table.row[k]));
    }
  }

  template <int kCount>
  __device__ __forceinline__ void check(const uint32_t (&)[kCount]) const {}
};

}  // namespace unilora

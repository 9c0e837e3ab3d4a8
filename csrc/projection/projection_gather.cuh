// Gather: out[i] = (theta_d[j] * scale[j]) * value[i], j the column of row i.
//
// Work: the first product depends on the column alone, so d of them are made first: in the dtype of the result, which
// keeps the table small, or in Acc where a value comes on top. Then a block makes tiles of kGatherTile rows, a thread
// two groups of four consecutive rows: columns, values and results are whole 8- or 16-byte words of whole sectors, one
// check covers eight columns, and eight reads of the table are in flight. The last, partial tile, and pointers that are
// not aligned for such words, go one element at a time, as coalesced.
// Bytes: `index` and `out` stream, n (4 + sizeof(T)), and `value`, n sizeof(Acc), where it is; a computed index costs
// no bytes. The table is read at random, one sector an element, from L2 where it fits; making it reads 2 d sizeof(Acc)
// and writes d sizeof(Entry). Determinism: an element has one writer and one product; equal to the CPU's, bit for bit.
#pragma once

#include <vector>

#include "projection/projection_columns.cuh"
#include "projection/projection_pieces.h"

namespace unilora {

constexpr int kGatherGroups = 2;
constexpr int kGatherTile = kProjectionBlock * 4 * kGatherGroups;

template <typename Entry, typename Acc>
__global__ void __launch_bounds__(kProjectionBlock) scaled_theta_kernel(const Acc* __restrict__ theta_d,  // [d]
                                                                        const Acc* __restrict__ scale,    // [d]
                                                                        int64_t d,
                                                                        Entry* __restrict__ scaled) {  // [d]
  for (int64_t j = grid_begin(); j < d; j += grid_step()) scaled[j] = narrow<Entry>(theta_d[j] * scale[j]);
}

// kWeighted: whether there are values. Entry: Acc if so, else T. wide: whether all pointers are aligned_for_four().
template <bool kWeighted, typename Source, typename Entry, typename T>
__global__ void __launch_bounds__(kProjectionBlock) gather_kernel(const Entry* __restrict__ scaled,  // [d]
                                                                  const Source source,
                                                                  const Entry* __restrict__ value,  // [n] or null
                                                                  int64_t n, bool wide,
                                                                  T* __restrict__ out) {  // [n]
  __shared__ typename Source::Table table;
  source.fill(table);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kGatherTile; tile < n;
       tile += static_cast<int64_t>(gridDim.x) * kGatherTile) {
    if (wide && tile + kGatherTile <= n) {
      uint32_t column[4 * kGatherGroups];
#pragma unroll
      for (int g = 0; g < kGatherGroups; ++g) {
        uint32_t four[4];
        source.four(table, tile + 4 * (g * kProjectionBlock + thread), four);
#pragma unroll
        for (int k = 0; k < 4; ++k) column[4 * g + k] = four[k];
      }
      source.check(column);
      Entry entry[4 * kGatherGroups];
#pragma unroll
      for (int k = 0; k < 4 * kGatherGroups; ++k) entry[k] = scaled[column[k]];
#pragma unroll
      for (int g = 0; g < kGatherGroups; ++g) {
        const int64_t row = tile + 4 * (g * kProjectionBlock + thread);
        T four[4];
        if constexpr (kWeighted) {
          Entry factor[4];
          load_four(value + row, factor);
#pragma unroll
          for (int k = 0; k < 4; ++k) four[k] = narrow<T>(entry[4 * g + k] * factor[k]);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) four[k] = entry[4 * g + k];
        }
        store_four(out + row, four);
      }
    } else {
      constexpr int kAtOnce = Source::kAtOnce;
#pragma unroll 1
      for (int64_t first = tile + thread; first < n && first < tile + kGatherTile;
           first += kAtOnce * kProjectionBlock) {
        uint32_t column[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int64_t row = first + k * kProjectionBlock;
          column[k] = row < n ? source.one(table, row) : 0;
        }
        source.check(column);
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          const int64_t row = first + k * kProjectionBlock;
          if (row >= n) break;
          if constexpr (kWeighted) {
            out[row] = narrow<T>(scaled[column[k]] * value[row]);
          } else {
            out[row] = scaled[column[k]];
          }
        }
      }
    }
  }
}

// Bytes that the launchers want as scratch.
template <typename T, typename Acc>
int64_t gather_scratch(int64_t d, bool weighted) {
  return d * static_cast<int64_t>(weighted ? sizeof(Acc) : sizeof(T));
}

template <typename Entry, typename Acc>
void launch_scaled_theta(const Acc* theta_d,  // [d]
                         const Acc* scale,    // [d]
                         Entry* scaled,       // [d]
                         int64_t d, cudaStream_t stream) {
  scaled_theta_kernel<<<grid_size(d, kProjectionBlock), kProjectionBlock, 0, stream>>>(theta_d, scale, d, scaled);
}

template <typename T, typename Acc>
void launch_gather(const Acc* theta_d,    // [d]
                   const Acc* scale,      // [d]
                   void* scratch,         // [gather_scratch<T, Acc>(d, value is given)] bytes
                   int64_t d,             //
                   const int32_t* index,  // [n], in [0, d)
                   const Acc* value,      // [n] or null
                   T* out,                // [n]
                   int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const StoredIndex source{index, static_cast<uint32_t>(d)};
  const bool wide = aligned_for_four(index) && aligned_for_four(out) && (value == nullptr || aligned_for_four(value));
  const auto launch = [&](auto weighted, auto* scaled, auto* values) {
    launch_scaled_theta(theta_d, scale, scaled, d, stream);
    gather_kernel<decltype(weighted)::value>
        <<<grid_size(n, kGatherTile), kProjectionBlock, 0, stream>>>(scaled, source, values, n, wide, out);
  };
  if (value == nullptr) {
    launch(std::false_type{}, static_cast<T*>(scratch), static_cast<const T*>(nullptr));
  } else {
    launch(std::true_type{}, static_cast<Acc*>(scratch), value);
  }
}

// The same with the columns of `map`, UniformMap or BalancedMap, at the positions of `ranges`, one
// after the other. One launch, or one for each kRangesOfLaunch ranges.
constexpr int kRangesOfLaunch = 256;

template <typename T, typename Acc, typename Map>
void launch_seeded_gather(const Acc* theta_d,                   // [d]
                          const Acc* scale,                     // [d]
                          void* scratch,                        // [gather_scratch<T, Acc>(d, false)]
                          int64_t d,                            //
                          const Map& map,                       //
                          const std::vector<RowRange>& ranges,  //
                          T* out,                               // [sum of stop - start]
                          cudaStream_t stream) {
  const auto scaled = static_cast<T*>(scratch);
  bool made = false;
  const auto launch = [&](auto ranges_of_launch, size_t& k) {
    constexpr int kMost = decltype(ranges_of_launch)::value;
    ComputedColumns<Map, kMost> source{map, {}};
    int64_t n = 0;
    for (; k < ranges.size() && source.ranges.count < kMost; ++k) {
      const int64_t length = ranges[k].stop - ranges[k].start;
      if (length == 0) continue;
      if (n + length > kMaxElements) break;
      source.ranges.row[source.ranges.count] = static_cast<uint32_t>(n);
      source.ranges.position[source.ranges.count++] = static_cast<uint32_t>(ranges[k].start);
      n += length;
    }
    if (n == 0) return;
    if (!made) launch_scaled_theta(theta_d, scale, scaled, d, stream);
    made = true;
    gather_kernel<false><<<grid_size(n, kGatherTile), kProjectionBlock, 0, stream>>>(
        scaled, source, static_cast<const T*>(nullptr), n, aligned_for_four(out), out);
    out += n;
  };
  for (size_t k = 0; k < ranges.size();) {
    if (ranges.size() == 1) {
      launch(std::integral_constant<int, 1>{}, k);
    } else {
      launch(std::integral_constant<int, kRangesOfLaunch>{}, k);
    }
  }
}

}  // namespace unilora

// Segment-sum: out[j] = scale[j] * sum of value[i] * grad[i] over the members i of column j, which
// order[offsets[j]], ..., order[offsets[j + 1] - 1] list by ascending position (projection_order.cuh).
//
// Work: a group of `width` lanes owns a column. Lane l takes the members l, l + width, l + 2 width, ..., counted from
// where a sector of `order` begins, four at a time: their entries are loaded, then their gradients, then they are
// added; then the lanes are added by a fixed tree. A column with more than kLongColumn members a lane is left to the
// whole block, in the same way: one crowded column does not hold up the rest. The gradient comes in pieces: an entry of
// `order` is (piece, offset), and where the pieces are travels as a kernel argument, which each block copies to shared
// memory, since lanes look up different pieces. With one piece there is no table. Bytes: order 4 n, offsets 4 d, scale
// and out 2 d sizeof(Acc), and one random sector of `grad` an element, and of `value` where it is. Determinism: width
// follows from n and d; who adds what, and in which order, from these and the column's offsets. No atomics. A column
// without members gives 0.
#pragma once

#include <vector>

#include "projection/projection_pieces.h"
#include "projection/projection_sum.cuh"

namespace unilora {

constexpr int kLongColumn = 64;    // members a lane of a group takes at most
constexpr int kSectorEntries = 8;  // of `order`: a group of as many lanes reads whole sectors

// Where the pieces are. kMost: how many there may be.
template <typename T, int kMost>
struct PieceList {
  int count, shift;  // shift: that of PiecePacking
  const T* data[kMost];
  uint32_t start[kMost];  // first position, for the values
};

// The terms of one column (projection_sum.cuh): a place is an entry of `order`.
template <bool kWeighted, typename T, typename Acc, int kMost>
struct ListedTerms {
  const PieceList<T, kMost>& pieces;  // in shared memory
  const Acc* __restrict__ value;
  const int32_t* __restrict__ order;  // from the column's first member

  __device__ __forceinline__ uint32_t place(int k) const { return static_cast<uint32_t>(order[k]); }
  __device__ __forceinline__ void settle(uint32_t (&)[4]) const {}
  __device__ __forceinline__ Acc term(uint32_t entry, bool inside) const {
    uint32_t offset = entry, position = entry;
    const T* grad = pieces.data[0];
    if constexpr (kMost > 1) {
      const uint32_t piece = entry >> pieces.shift;  // of two pieces or more: shift < 32
      offset = entry & ((1u << pieces.shift) - 1);
      grad = pieces.data[piece];
      if constexpr (kWeighted) position = pieces.start[piece] + offset;
    }
    if constexpr (kWeighted) {
      return inside ? value[position] * widen<Acc>(__ldg(grad + offset)) : Acc(0);
    } else {
      return inside ? widen<Acc>(__ldg(grad + offset)) : Acc(0);
    }
  }
};

template <bool kWeighted, typename T, typename Acc, int kMost>
__global__ void __launch_bounds__(kSumBlock, (kSumBlocks<T, Acc>))
    segment_sum_kernel(const __grid_constant__ PieceList<T, kMost> list,
                       const Acc* __restrict__ value,  // [n] or null
                       uint32_t n,
                       const Acc* __restrict__ scale,  // [d]
                       uint32_t d,
                       const int32_t* __restrict__ order,    // [n], packed
                       const int32_t* __restrict__ offsets,  // [d + 1], ascending from 0 to n
                       int width,                            // lanes of a group: 1, 2, 4, 8, 16 or 32
                       Acc* __restrict__ out) {              // [d]
  __shared__ PieceList<T, kMost> pieces;
  if (threadIdx.x == 0) pieces.shift = list.shift;
  for (int k = static_cast<int>(threadIdx.x); k < list.count; k += kSumBlock) {
    pieces.data[k] = list.data[k];
    if constexpr (kWeighted) pieces.start[k] = list.start[k];
  }
  __syncthreads();

  const auto terms_from = [&](uint32_t first) {
    return ListedTerms<kWeighted, T, Acc, kMost>{pieces, value, order + first};
  };
  const auto in_range = [&](uint32_t begin, int size) { return size >= 0 && begin <= n && begin + size <= n; };
  const uint32_t columns = kSumBlock / width;  // that a block takes at a time
  const uint32_t group = threadIdx.x / width;
  const int lane = threadIdx.x % width, longest = kLongColumn * width;
  if (grid_begin() == 0) UNILORA_DEVICE_CHECK(offsets[0] == 0 && static_cast<uint32_t>(offsets[d]) == n);

  for (uint32_t first = blockIdx.x * columns; first < d; first += gridDim.x * columns) {  // below 2^32
    const uint32_t j = first + group;
    uint32_t begin = 0;
    int size = 0;
    if (j < d) {
      begin = offsets[j];
      size = offsets[j + 1] - static_cast<int>(begin);
      UNILORA_DEVICE_CHECK(in_range(begin, size));
    }
    const bool is_long = size > longest;
    const int lead = static_cast<int>(begin) & (min(width, kSectorEntries) - 1);
    const Acc sum = lane_sum(sum_terms<Acc>(terms_from(begin), is_long ? 0 : size, lane, width, lead), width);
    if (lane == 0 && j < d && !is_long) out[j] = scale[j] * sum;

    if (!__syncthreads_or(is_long)) continue;
    for (uint32_t c = first; c < d && c < first + columns; ++c) {
      const uint32_t c_begin = offsets[c];
      const int c_size = offsets[c + 1] - static_cast<int>(c_begin);
      if (c_size <= longest) continue;
      const Acc total =
          block_sum(sum_terms<Acc>(terms_from(c_begin), c_size, static_cast<int>(threadIdx.x), kSumBlock));
      if (threadIdx.x == 0) out[c] = scale[c] * total;
    }
  }
}

// Lanes for a column: about four members each on average.
inline int segment_width(int64_t n, int64_t d) {
  int width = 1;
  while (width < kWarp && width * 4 * d < n) width *= 2;
  return width;
}

template <typename T, typename Acc>
void launch_segment_sum(const std::vector<Piece<T>>& pieces,  // kMaxPieces at most, n elements in all
                        const Acc* value,                     // [n] or null
                        int64_t n,                            //
                        const Acc* scale,                     // [d]
                        int64_t d,                            //
                        const int32_t* order,                 // [n], packed for these pieces
                        const int32_t* offsets,               // [d + 1], ascending from 0 to n
                        Acc* out,                             // [d]
                        cudaStream_t stream) {
  if (d == 0) return;
  const int width = segment_width(n, d);
  const auto count = static_cast<int64_t>(pieces.size());
  const auto launch = [&](auto most) {
    constexpr int kMost = decltype(most)::value;
    PieceList<T, kMost> list;
    list.count = static_cast<int>(count);
    list.shift = PiecePacking(count).shift;
    uint32_t start = 0;
    for (int64_t k = 0; k < count; ++k) {
      list.data[k] = pieces[k].data;
      list.start[k] = start;
      start += static_cast<uint32_t>(pieces[k].length);
    }
    const auto kernel =
        value == nullptr ? segment_sum_kernel<false, T, Acc, kMost> : segment_sum_kernel<true, T, Acc, kMost>;
    const unsigned blocks =
        kMost == 1 ? grid_size(d, kSumBlock / width) : resident_grid_size(kernel, kSumBlock, d, kSumBlock / width);
    kernel<<<blocks, kSumBlock, 0, stream>>>(list, value, static_cast<uint32_t>(n), scale, static_cast<uint32_t>(d),
                                             order, offsets, width, out);
  };
  if (count <= 1) {
    launch(std::integral_constant<int, 1>{});
  } else if (count <= 64) {
    launch(std::integral_constant<int, 64>{});
  } else {
    launch(std::integral_constant<int, static_cast<int>(kMaxPieces)>{});
  }
}

}  // namespace unilora

// Segment-sum of `balanced` without a stored order: out[j] = scale[j] * sum of grad over column j, whose elements are
// j, j + d, j + 2 d, ... and whose positions the inverse of the keyed bijection gives.
//
// Work: a group of `width` lanes owns a column, or a whole block where columns are long. Lane l takes elements l,
// l + width, ... of the column, four at a time: four positions are computed, their gradients are looked up and loaded,
// then they are added; then the lanes are added by a fixed tree.
// The gradient is that of some ranges of positions, in pieces that lie end to end: segments, each of one range and one
// piece, ascending. Each block copies them to shared memory, with the segment at the start of each of kBuckets equal
// stretches of positions, so that few steps of a search are left.
// Bytes: scale and out, 2 d sizeof(Acc), and one random sector of `grad` an element. Arithmetic: some 60 instructions
// an element of D, whether or not a range has it.
// Determinism: as segment_sum_kernel; `width` follows from d and D.
#pragma once

#include <algorithm>
#include <vector>

#include "projection/projection_pieces.h"
#include "projection/projection_sum.cuh"

namespace unilora {

// Positions from `start` to the next segment's have their gradients at data[0], data[1], ...; null: no range has them.
template <typename T>
struct Segment {
  int64_t start;
  const T* data;
};

constexpr int kMaxSegments = 2048;
constexpr int kBuckets = 1024;

template <typename T, int kMost>
struct SegmentList {
  int count, bucket_shift;  // position >> bucket_shift < kBuckets
  const T* data[kMost];
  uint32_t start[kMost];  // start[0] = 0, ascending
};

template <typename T, int kMost>
struct SegmentTable {
  const T* data[kMost];
  uint32_t start[kMost];
  uint16_t first[kMost == 1 ? 1 : kBuckets + 1];  // the segment of a bucket's first position
  int bucket_shift;

  __device__ void fill(const SegmentList<T, kMost>& list) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread == 0) bucket_shift = list.bucket_shift;
    for (int k = thread; k < list.count; k += kSumBlock) {
      data[k] = list.data[k];
      start[k] = list.start[k];
    }
    __syncthreads();
    if constexpr (kMost > 1) {
      for (int bucket = thread; bucket <= kBuckets; bucket += kSumBlock) {
        const auto position = static_cast<uint32_t>(bucket) << list.bucket_shift;
        first[bucket] = static_cast<uint16_t>(last_at_most(start, 0, list.count - 1, position));
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ int find(uint32_t position) const {
    if constexpr (kMost == 1) return 0;
    const uint32_t bucket = position >> bucket_shift;
    return last_at_most(start, first[bucket], first[bucket + 1], position);
  }
};

// The terms of column j (projection_sum.cuh): a place is a position. kRanked: map.ranked().
template <bool kRanked, typename T, typename Acc, int kMost>
struct BalancedTerms {
  const BalancedMap& map;
  const SegmentTable<T, kMost>& segments;
  uint32_t j, d, D;

  __device__ __forceinline__ uint32_t place(int k) const {
    const uint32_t element = j + static_cast<uint32_t>(k) * d;
    return kRanked ? map.position(element) : map.step_back(element);
  }
  __device__ __forceinline__ void settle(uint32_t (&place)[4]) const {
    while (max(max(place[0], place[1]), max(place[2], place[3])) >= D) {
#pragma unroll
      for (int i = 0; i < 4; ++i) place[i] = place[i] < D ? place[i] : map.step_back(place[i]);
    }
  }
  __device__ __forceinline__ Acc term(uint32_t position, bool inside) const {
    const int k = segments.find(position);
    const T* const data = segments.data[k];
    return inside && data != nullptr ? widen<Acc>(__ldg(data + (position - segments.start[k]))) : Acc(0);
  }
};

template <bool kRanked, typename T, typename Acc, int kMost>
__global__ void __launch_bounds__(kSumBlock)
    balanced_scatter_kernel(const __grid_constant__ SegmentList<T, kMost> list, const BalancedMap map, uint32_t D,
                            const Acc* __restrict__ scale,  // [d]
                            uint32_t d,
                            int width,                // lanes of a column: 1, 2, 4, 8, 16, 32 or the block
                            Acc* __restrict__ out) {  // [d]
  __shared__ SegmentTable<T, kMost> segments;
  segments.fill(list);
  const uint32_t columns = kSumBlock / width;  // that a block takes at a time
  const uint32_t group = threadIdx.x / width;
  const int lane = threadIdx.x % width;
  for (uint32_t first = blockIdx.x * columns; first < d; first += gridDim.x * columns) {  // below 2^32
    const uint32_t j = first + group;
    const BalancedTerms<kRanked, T, Acc, kMost> terms{map, segments, j, d, D};
    const int size = j < d && j < D ? static_cast<int>((D - 1 - j) / d + 1) : 0;
    Acc sum = sum_terms<Acc>(terms, size, lane, width);
    sum = width <= kWarp ? lane_sum(sum, width) : block_sum(sum);
    if (lane == 0 && j < d) out[j] = scale[j] * sum;
  }
}

// Lanes of a column: enough columns and lanes to fill a GPU, but not more lanes than a quarter of the members.
inline int balanced_scatter_width(int64_t D, int64_t d) {
  constexpr int64_t kThreads = int64_t{1} << 18;
  if (D / d > 64 * kWarp) return kSumBlock;
  int width = 1;
  while (width < kWarp && width * d < kThreads && width * 4 * d < D) width *= 2;
  return width;
}

// segments: ascending from position 0, at most kMaxSegments.
template <typename T, typename Acc>
void launch_balanced_scatter(const std::vector<Segment<T>>& segments,  //
                             const BalancedMap& map, int64_t D,        //
                             const Acc* scale,                         // [d]
                             int64_t d,                                //
                             Acc* out,                                 // [d]
                             cudaStream_t stream) {
  const int width = balanced_scatter_width(D, d), columns = kSumBlock / width;
  const auto launch = [&](auto ranked, auto most) {
    constexpr int kMost = decltype(most)::value;
    SegmentList<T, kMost> list;
    list.count = static_cast<int>(segments.size());
    list.bucket_shift = 0;
    while ((D - 1) >> list.bucket_shift >= kBuckets) ++list.bucket_shift;
    for (size_t k = 0; k < segments.size(); ++k) {
      list.data[k] = segments[k].data;
      list.start[k] = static_cast<uint32_t>(segments[k].start);
    }
    const auto kernel = balanced_scatter_kernel<decltype(ranked)::value, T, Acc, kMost>;
    const unsigned blocks = kMost == 1 ? grid_size(d, columns) : resident_grid_size(kernel, kSumBlock, d, columns);
    kernel<<<blocks, kSumBlock, 0, stream>>>(list, map, static_cast<uint32_t>(D), scale, static_cast<uint32_t>(d),
                                             width, out);
  };
  if (map.ranked()) {  // few positions, so few segments
    launch(std::true_type{}, std::integral_constant<int, 512>{});
  } else if (segments.size() <= 1) {
    launch(std::false_type{}, std::integral_constant<int, 1>{});
  } else if (segments.size() <= 512) {
    launch(std::false_type{}, std::integral_constant<int, 512>{});
  } else {
    launch(std::false_type{}, std::integral_constant<int, kMaxSegments>{});
  }
}

// The segments of pieces that hold the rows of `ranges` of [0, D), end to end; false: ranges overlap.
template <typename T>
bool make_segments(const std::vector<Piece<T>>& pieces, const std::vector<RowRange>& ranges, int64_t D,
                   std::vector<Segment<T>>& segments) {
  struct Stretch {
    int64_t start, stop;
    const T* data;
  };
  std::vector<Stretch> stretches;
  size_t piece = 0;
  int64_t used = 0;  // of the piece
  for (const RowRange& range : ranges) {
    for (int64_t start = range.start; start < range.stop;) {
      if (used == pieces[piece].length) {
        ++piece;
        used = 0;
        continue;
      }
      const int64_t length = std::min(range.stop - start, pieces[piece].length - used);
      stretches.push_back({start, start + length, pieces[piece].data + used});
      start += length;
      used += length;
    }
  }
  std::sort(stretches.begin(), stretches.end(), [](const Stretch& a, const Stretch& b) { return a.start < b.start; });
  segments.clear();
  int64_t end = 0;
  for (const Stretch& stretch : stretches) {
    if (stretch.start < end) return false;
    if (stretch.start > end) segments.push_back({end, nullptr});
    segments.push_back({stretch.start, stretch.data});
    end = stretch.stop;
  }
  if (end < D) segments.push_back({end, nullptr});
  return true;
}

}  // namespace unilora

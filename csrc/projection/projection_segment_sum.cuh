// Segment-sum: out[j] = scale[j] * sum of value[i] * grad[i] over the members i of column j, which
// order[offsets[j]], ..., order[offsets[j + 1] - 1] list by ascending position (projection_order.cuh).
//
// Work: a block takes `columns` consecutive columns at a time. Their entries of `order` are one stretch, which it reads
// as a stream, a tile of four entries a thread at a time: the entries, then where they point, then the gradients; the
// terms go to shared memory. There a group of `width` lanes sums a column, four terms a lane at a time, or a whole warp
// where the tile has more than kLongColumn of them a lane, and then the lanes by a fixed tree; tiles are added one
// after the other. So a crowded column costs what its entries cost, and does not hold up its neighbours.
// The gradient comes in pieces: an entry is (piece, offset). Where the pieces are travels as a kernel argument, which
// each block copies to shared memory once, several times over (32 KB at most), so that lanes which look up different
// pieces seldom meet in a bank: never with up to 256 pieces, 2 at most with up to 512, else 4. With one piece there is
// no table.
// Bytes: order 4 n, offsets 4 d, scale and out 2 d sizeof(Acc), and one random sector of `grad` an element, and of
// `value` where it is. Instructions of a thread: some 60 an element with 18 a column.
// Determinism: columns and width follow from n and d; who adds what, and in which order, from these and the offsets. No
// atomics. A column without members gives 0.
#pragma once

#include <algorithm>
#include <vector>

#include "projection/projection_common.cuh"
#include "projection/projection_pieces.h"

namespace unilora {

constexpr int kLongColumn = 32;  // terms that a lane of a group takes from a tile at most

// Threads: as many as leave room in 48 KB for a tile and the largest table. Blocks of a multiprocessor: 64 registers a
// thread for float64, else 40.
template <typename Acc>
constexpr int kSegmentBlock = sizeof(Acc) == 8 ? 256 : 512;
template <typename T, typename Acc>
constexpr int kSegmentBlocks = (sizeof(T) == 8 || sizeof(Acc) == 8 ? 1024 : 1536) / kSegmentBlock<Acc>;

// Where the pieces are. kMost: how many there may be.
template <typename T, int kMost>
struct PieceList {
  int count, shift;  // shift: that of PiecePacking
  const T* data[kMost];
  uint32_t start[kMost];  // first position, for the values
};

// The same in shared memory: `copies` slots a piece, next to each other, each for the lanes of one residue. A slot with
// the pointer alone is read by half a warp at a time, one with the start too by a quarter.
template <bool kWeighted, typename T, int kMost>
struct PieceTable {
  using Slot = std::conditional_t<kWeighted, ulonglong2, unsigned long long>;
  static constexpr int kMostCopies = 128 / sizeof(Slot);  // one a lane that is read at a time
  static constexpr int kSlots = std::min(kMost, 256) * kMostCopies;
  Slot slots[kSlots];

  // Copies of each of so many pieces: a power of two, as its exponent. 2^(32 - shift) pieces can be told apart.
  __device__ static __forceinline__ int copy_bits(int shift) {
    int bits = 0;
    while ((2 << bits) <= kMostCopies && (static_cast<int64_t>(2 << bits) << (32 - shift)) <= kSlots) ++bits;
    return bits;
  }

  __device__ __forceinline__ void fill(const PieceList<T, kMost>& list, int bits) {
    for (int k = static_cast<int>(threadIdx.x); k < list.count << bits; k += static_cast<int>(blockDim.x)) {
      const auto data = reinterpret_cast<unsigned long long>(list.data[k >> bits]);
      if constexpr (kWeighted) {
        slots[k] = make_ulonglong2(data, list.start[k >> bits]);
      } else {
        slots[k] = data;
      }
    }
  }

  // Where an entry's gradient is; and its position, for its value.
  __device__ __forceinline__ const T* find(uint32_t entry, int shift, int bits, uint32_t& position) const {
    const uint32_t offset = entry & ((1u << shift) - 1);  // of two pieces or more: shift < 32
    const Slot slot = slots[((entry >> shift) << bits) + (threadIdx.x & ((1u << bits) - 1))];
    if constexpr (kWeighted) {
      position = static_cast<uint32_t>(slot.y) + offset;
      return reinterpret_cast<const T*>(slot.x) + offset;
    } else {
      return reinterpret_cast<const T*>(slot) + offset;
    }
  }
};
template <bool kWeighted, typename T>
struct PieceTable<kWeighted, T, 1> {};

// Terms in shared memory, by fours. Those of a thread, and of threads side by side, are written and read in accesses of
// 16 bytes without bank conflicts: the second half of each four of float64 lies apart.
template <typename Acc, int kFours>
struct TermTile {
  using Vector = std::conditional_t<sizeof(Acc) == 8, double2, float4>;
  static constexpr int kParts = 4 * sizeof(Acc) / sizeof(Vector);
  Vector parts[kParts][kFours];

  __device__ __forceinline__ void put(int four, const Acc (&terms)[4]) {
    if constexpr (kParts == 1) {
      parts[0][four] = make_float4(terms[0], terms[1], terms[2], terms[3]);
    } else {
      parts[0][four] = make_double2(terms[0], terms[1]);
      parts[1][four] = make_double2(terms[2], terms[3]);
    }
  }
  __device__ __forceinline__ void get(int four, Acc (&terms)[4]) const {
    if constexpr (kParts == 1) {
      const float4 v = parts[0][four];
      terms[0] = v.x, terms[1] = v.y, terms[2] = v.z, terms[3] = v.w;
    } else {
      const double2 v = parts[0][four], w = parts[1][four];
      terms[0] = v.x, terms[1] = v.y, terms[2] = w.x, terms[3] = w.y;
    }
  }

  // The sum of terms [low, high) over a group of `width` lanes; its first lane holds it.
  __device__ __forceinline__ Acc sum(int low, int high, int lane, int width) const {
    Acc sums[4] = {0, 0, 0, 0};
    for (int four = low / 4 + lane; 4 * four < high; four += width) {
      Acc terms[4];
      get(four, terms);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[i] += static_cast<unsigned>(4 * four + i - low) < static_cast<unsigned>(high - low) ? terms[i] : Acc(0);
    }
    return lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]), width);
  }
};

// entries[i] = order[at + i] where at + i < n.
__device__ __forceinline__ void load_entries(const int32_t* __restrict__ order, bool aligned, uint32_t n, uint32_t at,
                                             uint32_t (&entries)[4]) {
  if (aligned && at + 4 <= n) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(order + at));
    entries[0] = four.x, entries[1] = four.y, entries[2] = four.z, entries[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at + i < n) entries[i] = order[at + i];
  }
}

template <bool kWeighted, typename T, typename Acc, int kMost>
__global__ void __launch_bounds__(kSegmentBlock<Acc>, (kSegmentBlocks<T, Acc>))
    segment_sum_kernel(const __grid_constant__ PieceList<T, kMost> list,
                       const Acc* __restrict__ value,  // [n] or null
                       uint32_t n,
                       const Acc* __restrict__ scale,  // [d]
                       uint32_t d,
                       const int32_t* __restrict__ order,    // [n], packed
                       const int32_t* __restrict__ offsets,  // [d + 1], ascending from 0 to n
                       int columns,                          // of a block at a time: kSegmentBlock<Acc> at most
                       int width_bits,                       // of `width`, a power of two: 0 to 5
                       Acc* __restrict__ out) {              // [d]
  constexpr int kBlock = kSegmentBlock<Acc>, kTile = 4 * kBlock;
  __shared__ PieceTable<kWeighted, T, kMost> pieces;
  __shared__ TermTile<Acc, kBlock> tile;
  __shared__ Acc sums[kBlock];
  __shared__ uint32_t bounds[kBlock + 1];

  const int width = 1 << width_bits, groups = kBlock >> width_bits;
  const int thread = static_cast<int>(threadIdx.x), group = thread >> width_bits, lane = thread & (width - 1);
  const bool aligned = reinterpret_cast<uintptr_t>(order) % 16 == 0;
  int copy_bits = 0;
  if constexpr (kMost > 1) {
    copy_bits = pieces.copy_bits(list.shift);
    pieces.fill(list, copy_bits);
  }
  if (grid_begin() == 0) UNILORA_DEVICE_CHECK(offsets[0] == 0 && static_cast<uint32_t>(offsets[d]) == n);

  for (uint32_t first = blockIdx.x * columns; first < d; first += gridDim.x * columns) {  // below 2^32
    const int count = static_cast<int>(min(static_cast<uint32_t>(columns), d - first));
    for (int k = thread; k <= count; k += kBlock) bounds[k] = offsets[first + k];
    __syncthreads();  // bounds, and at first the pieces, are there
    const uint32_t begin = bounds[0], end = bounds[count];
    UNILORA_DEVICE_CHECK(begin <= end && end <= n);
    if (thread < count) UNILORA_DEVICE_CHECK(begin <= bounds[thread] && bounds[thread] <= bounds[thread + 1]);

    uint32_t start = begin / 8 * 8;  // of the tile: where a sector of `order` begins
    do {
      const uint32_t at = start + 4 * thread;
      bool inside[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) inside[i] = at + i - begin < end - begin;
      uint32_t entries[4] = {0, 0, 0, 0};
      if (inside[0] || inside[1] || inside[2] || inside[3]) load_entries(order, aligned, n, at, entries);
      const T* from[4];
      uint32_t position[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        position[i] = entries[i];
        if constexpr (kMost > 1) {
          from[i] = pieces.find(entries[i], list.shift, copy_bits, position[i]);
        } else {
          from[i] = list.data[0] + entries[i];
        }
      }
      Acc terms[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kWeighted) {
          terms[i] = inside[i] ? value[position[i]] * widen<Acc>(__ldg(from[i])) : Acc(0);
        } else {
          terms[i] = inside[i] ? widen<Acc>(__ldg(from[i])) : Acc(0);
        }
      }
      tile.put(thread, terms);
      __syncthreads();  // the tile is there

      const auto add = [&](int column, Acc sum) { sums[column] = start > begin ? sums[column] + sum : sum; };
      for (int c = group; c - group < count; c += groups) {
        int low = 0, high = 0;  // what the tile has of the column
        if (c < count) {
          low = max(static_cast<int>(bounds[c]) - static_cast<int>(start), 0);
          high = min(static_cast<int>(bounds[c + 1]) - static_cast<int>(start), kTile);
        }
        const bool is_long = width < kWarp && high - low > kLongColumn * width;
        const Acc sum = tile.sum(low, is_long ? low : high, lane, width);
        if (lane == 0 && c < count && !is_long) add(c, sum);
        unsigned longs = __ballot_sync(0xffffffffu, is_long && lane == 0);
        for (; longs != 0; longs &= longs - 1) {
          const int source = __ffs(longs) - 1;
          const int its_low = __shfl_sync(0xffffffffu, low, source), its_high = __shfl_sync(0xffffffffu, high, source);
          const int column = __shfl_sync(0xffffffffu, c, source);
          const Acc total = tile.sum(its_low, its_high, thread % kWarp, kWarp);
          if (thread % kWarp == 0) add(column, total);
        }
      }
      __syncthreads();  // the sums are there; the tile and bounds have been read
      start += kTile;
    } while (start < end);
    if (thread < count) out[first + thread] = scale[first + thread] * sums[thread];
  }
}

// Lanes for a column, as the exponent of 2: about four members each on average.
inline int segment_width_bits(int64_t n, int64_t d) {
  int bits = 0;
  while ((1 << bits) < kWarp && (d << bits) * 4 < n) ++bits;
  return bits;
}

// Columns of a block of so many threads at a time: seven eighths of a tile on average, so that few need a second one.
inline int segment_columns(int64_t n, int64_t d, int block) {
  const int64_t columns = n == 0 ? block : std::clamp<int64_t>(4 * block / 8 * 7 * d / n, 1, block);
  return static_cast<int>(columns < 8 ? columns : columns / 8 * 8);
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
  constexpr int kBlock = kSegmentBlock<Acc>;
  const int width_bits = segment_width_bits(n, d), columns = segment_columns(n, d, kBlock);
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
    const unsigned blocks = kMost == 1 ? grid_size(d, columns) : resident_grid_size(kernel, kBlock, d, columns);
    kernel<<<blocks, kBlock, 0, stream>>>(list, value, static_cast<uint32_t>(n), scale, static_cast<uint32_t>(d), order,
                                          offsets, columns, width_bits, out);
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

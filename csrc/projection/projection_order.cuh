// The members of each column: order[offsets[j]], ..., order[offsets[j + 1] - 1] are the positions i with index[i] = j,
// ascending, each packed as (piece, offset in the piece) by PiecePacking.
//
// Work: a stable sort of the positions by their column, digit by digit from the lowest, of up to kDigitBits bits each.
// The column of a position is read from `index` again in each pass, so that only positions are moved. A pass counts the
// digits of each tile of kSortTile positions, sums the counts along the tiles, and puts each position at its place: the
// positions with smaller digits, those of its digit in earlier tiles, and its rank in its own. Then a binary search for
// each column gives offsets, and where there are pieces, positions become entries.
// Bytes: a pass reads the index twice (4 n in the first pass; one random sector an element each time in later ones),
// the positions twice (8 n) and writes them (4 n, one random sector an element). Scratch: 4 n, n / 8 or less for the
// counts. Determinism: places are counted, not raced for: atomics add integers only.
#pragma once

#include <vector>

#include "projection/projection_common.cuh"

namespace unilora {

constexpr int kSortBlock = 512, kSortWarps = kSortBlock / kWarp;
constexpr int kSortItems = 16;  // of a thread in a tile
constexpr int kSortTile = kSortBlock * kSortItems;
constexpr int kDigitBits = 8, kMostDigits = 1 << kDigitBits;

// One pass: digit = column >> shift, of `digits` values, a power of two.
struct SortPass {
  const int32_t* index;      // [n]
  const int32_t* positions;  // [n], in the order so far; null: 0, 1, 2, ...
  int64_t n;
  uint32_t d;
  int shift, digits;
  int64_t tiles;  // of kSortTile positions

  __device__ __forceinline__ int32_t position(int64_t k) const {
    return positions == nullptr ? static_cast<int32_t>(k) : positions[k];
  }
  __device__ __forceinline__ int digit(uint32_t column) const {
    return static_cast<int>(column >> shift) & (digits - 1);
  }
};

// counts[digit][tile] = number of the tile's positions with this digit
static __global__ void __launch_bounds__(kSortBlock)
    count_digits_kernel(const SortPass pass, int32_t* __restrict__ counts) {
  __shared__ int count[kMostDigits];
  for (int64_t tile = blockIdx.x; tile < pass.tiles; tile += gridDim.x) {
    for (int digit = static_cast<int>(threadIdx.x); digit < pass.digits; digit += kSortBlock) count[digit] = 0;
    __syncthreads();
    const int64_t first = tile * kSortTile + threadIdx.x;
    uint32_t column[kSortItems];
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      const int64_t k = first + i * kSortBlock;
      column[i] = k < pass.n ? static_cast<uint32_t>(pass.index[pass.position(k)]) : 0;
    }
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      UNILORA_DEVICE_CHECK(column[i] < pass.d);
      if (first + i * kSortBlock < pass.n) atomicAdd(&count[pass.digit(column[i])], 1);
    }
    __syncthreads();
    for (int digit = static_cast<int>(threadIdx.x); digit < pass.digits; digit += kSortBlock)
      counts[digit * pass.tiles + tile] = count[digit];  // and cleared by the same thread
  }
}

// The sum of the values of earlier threads, and of all in `total`. blockDim.x = kSortBlock.
__device__ __forceinline__ int32_t block_exclusive_sum(int32_t value, int32_t& total) {
  __shared__ int32_t warp_sums[kSortWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  int32_t sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int32_t before = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int32_t start = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; ++w) {
    if (w == warp) start = total;
    total += warp_sums[w];
  }
  __syncthreads();  // before the next call writes
  return start + sum - value;
}

// A block sums a digit's counts: counts[digit][tile] = positions with this digit in earlier tiles, totals[digit] = in
// all.
static __global__ void __launch_bounds__(kSortBlock) sum_counts_kernel(int32_t* __restrict__ counts,  // [digits][tiles]
                                                                       int digits, int64_t tiles,
                                                                       int32_t* __restrict__ totals) {  // [digits]
  for (int digit = static_cast<int>(blockIdx.x); digit < digits; digit += static_cast<int>(gridDim.x)) {
    int32_t* const row = counts + digit * tiles;
    int32_t before = 0, total = 0;
    for (int64_t first = 0; first < tiles; first += kSortBlock) {
      const int64_t tile = first + threadIdx.x;
      const int32_t sum = block_exclusive_sum(tile < tiles ? row[tile] : 0, total);
      if (tile < tiles) row[tile] = before + sum;
      before += total;
    }
    if (threadIdx.x == 0) totals[digit] = before;
  }
}

// A warp takes kSortItems rows of 32 positions, in order; counter[warp][digit] is first how many of the digit it has
// had, then where its first one goes.
static __global__ void __launch_bounds__(kSortBlock)
    place_positions_kernel(const SortPass pass,
                           const int32_t* __restrict__ counts,  // [digits][tiles], summed
                           const int32_t* __restrict__ totals,  // [digits]
                           int32_t* __restrict__ out) {         // [n]
  __shared__ int32_t counter[kSortWarps][kMostDigits + 1];      // one more: of lanes beyond the end
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  int32_t all = 0;
  const int32_t digit_start = block_exclusive_sum(thread < pass.digits ? totals[thread] : 0, all);

  for (int64_t tile = blockIdx.x; tile < pass.tiles; tile += gridDim.x) {
    for (int digit = lane; digit <= pass.digits; digit += kWarp) counter[warp][digit] = 0;
    const int64_t first = tile * kSortTile + warp * (kSortItems * kWarp) + lane;
    int32_t position[kSortItems];
    int digit[kSortItems], rank[kSortItems];
#pragma unroll
    for (int i = 0; i < kSortItems; ++i)
      position[i] = first + i * kWarp < pass.n ? pass.position(first + i * kWarp) : -1;
#pragma unroll
    for (int i = 0; i < kSortItems; ++i)
      digit[i] = position[i] < 0 ? pass.digits : pass.digit(static_cast<uint32_t>(pass.index[position[i]]));
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSortItems; ++i) {
      const unsigned same = __match_any_sync(0xffffffffu, digit[i]);
      const int earlier = __popc(same & ((1u << lane) - 1));
      const int32_t before = counter[warp][digit[i]];
      __syncwarp();
      if (earlier == 0) counter[warp][digit[i]] = before + __popc(same);
      __syncwarp();
      rank[i] = before + earlier;
    }
    __syncthreads();
    if (thread < pass.digits) {
      int32_t place = digit_start + counts[thread * pass.tiles + tile];
#pragma unroll
      for (int w = 0; w < kSortWarps; ++w) {
        const int32_t count = counter[w][thread];
        counter[w][thread] = place;
        place += count;
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSortItems; ++i)
      if (position[i] >= 0) out[counter[warp][digit[i]] + rank[i]] = position[i];
    __syncwarp();  // before this warp's counters are cleared
  }
}

// offsets[j] = number of positions in columns before j
static __global__ void __launch_bounds__(kProjectionBlock)
    column_offsets_kernel(const int32_t* __restrict__ index,      // [n]
                          const int32_t* __restrict__ positions,  // [n], sorted by column
                          int64_t n, int64_t d,
                          int32_t* __restrict__ offsets) {  // [d + 1]
  for (int64_t j = grid_begin(); j <= d; j += grid_step()) {
    int64_t low = 0, high = n;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (index[positions[middle]] < j) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    offsets[j] = static_cast<int32_t>(low);
  }
}

struct PieceStarts {
  int count, shift;  // shift: that of PiecePacking
  uint32_t start[kMaxPieces];
};

// position -> (piece, offset), in place
static __global__ void __launch_bounds__(kSortBlock)
    pack_positions_kernel(const __grid_constant__ PieceStarts pieces, int64_t n,
                          int32_t* __restrict__ order) {  // [n]
  __shared__ uint32_t start[kMaxPieces];
  for (int k = static_cast<int>(threadIdx.x); k < pieces.count; k += kSortBlock) start[k] = pieces.start[k];
  __syncthreads();
  for (int64_t k = grid_begin(); k < n; k += grid_step()) {
    const auto position = static_cast<uint32_t>(order[k]);
    const int piece = last_at_most(start, 0, pieces.count - 1, position);
    order[k] = static_cast<int32_t>(static_cast<uint32_t>(piece) << pieces.shift | (position - start[piece]));
  }
}

// ---- launch ------------------------------------------------------------------------------------------------------

struct SortPlan {
  int passes, digit_bits;
  int64_t tiles;

  SortPlan(int64_t n, int64_t d) : passes(1), digit_bits(1), tiles(ceil_div(n, kSortTile)) {
    int bits = 1;
    while ((INT64_C(1) << bits) < d) ++bits;
    passes = static_cast<int>(ceil_div(bits, kDigitBits));
    digit_bits = static_cast<int>(ceil_div(bits, passes));
  }
  int64_t digits() const { return INT64_C(1) << digit_bits; }
};

// Bytes that launch_sorted_positions wants as scratch.
inline int64_t sorted_positions_scratch(int64_t n, int64_t d) {
  const SortPlan plan(n, d);
  return static_cast<int64_t>(sizeof(int32_t)) * ((plan.passes > 1 ? n : 0) + plan.digits() * (plan.tiles + 1));
}

inline void launch_sorted_positions(const int32_t* index,  // [n], in [0, d)
                                    int64_t n, int64_t d,  //
                                    void* scratch,         // [sorted_positions_scratch(n, d)] bytes
                                    int32_t* order,        // [n]
                                    cudaStream_t stream) {
  if (n == 0) return;
  const SortPlan plan(n, d);
  int32_t* const counts = static_cast<int32_t*>(scratch);
  int32_t* const totals = counts + plan.digits() * plan.tiles;
  int32_t* const other = totals + plan.digits();  // [n]; a single pass has none
  const int32_t* from = nullptr;
  for (int p = 0; p < plan.passes; ++p) {
    const SortPass pass{
        index, from, n, static_cast<uint32_t>(d), p * plan.digit_bits, static_cast<int>(plan.digits()), plan.tiles};
    int32_t* const to = (plan.passes - p) % 2 == 1 ? order : other;  // the last is order
    const unsigned blocks = grid_size(plan.tiles, 1);
    count_digits_kernel<<<blocks, kSortBlock, 0, stream>>>(pass, counts);
    sum_counts_kernel<<<grid_size(plan.digits(), 1), kSortBlock, 0, stream>>>(counts, pass.digits, plan.tiles, totals);
    place_positions_kernel<<<blocks, kSortBlock, 0, stream>>>(pass, counts, totals, to);
    from = to;
  }
}

inline void launch_column_members(const int32_t* index,                 // [n], in [0, d)
                                  int64_t n, int64_t d,                 //
                                  const std::vector<int64_t>& lengths,  // of the pieces, n in all
                                  void* scratch,                        // [sorted_positions_scratch(n, d)] bytes
                                  int32_t* order,                       // [n]
                                  int32_t* offsets,                     // [d + 1]
                                  cudaStream_t stream) {
  launch_sorted_positions(index, n, d, scratch, order, stream);
  column_offsets_kernel<<<grid_size(d + 1, kProjectionBlock), kProjectionBlock, 0, stream>>>(index, order, n, d,
                                                                                             offsets);
  if (n == 0 || lengths.size() < 2) return;
  PieceStarts pieces;
  pieces.count = static_cast<int>(lengths.size());
  pieces.shift = PiecePacking(pieces.count).shift;
  uint32_t start = 0;
  for (size_t k = 0; k < lengths.size(); ++k) {
    pieces.start[k] = start;
    start += static_cast<uint32_t>(lengths[k]);
  }
  const unsigned blocks = resident_grid_size(pack_positions_kernel, kSortBlock, n, kSortBlock);
  pack_positions_kernel<<<blocks, kSortBlock, 0, stream>>>(pieces, n, order);
}

}  // namespace unilora

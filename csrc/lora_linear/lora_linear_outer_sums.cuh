// What the kernels of `outer` share (lora_linear_outer.cuh): operands, chunks of rows, and sums on their way to out. No
// torch.
#pragma once

#include "cuda/launch.cuh"
#include "lora_linear/lora_linear.h"

namespace unilora {

constexpr int kOuterBlock = 256;
constexpr int kOuterWarps = kOuterBlock / kWarp;
constexpr int kOuterColumns = 64;      // of a warp: 128 bytes of a row of 16-bit numbers
constexpr int kOuterStep = 16;         // rows that a warp of the tensor-core kernel loads at a time
constexpr int64_t kOuterBlocks = 264;  // wanted: two an SM of the largest GPUs

// Columns of a block of the tensor-core kernel. Above 32 ranks h is the larger operand from L2, and two warps share it.
constexpr int64_t outer_block_columns(int64_t r) { return r <= 32 ? kOuterColumns : 2 * kOuterColumns; }

// Chunks of rows, none of them empty: `wanted` or fewer, of a multiple of kOuterStep rows, `least` or more.
inline int64_t row_chunks(int64_t tokens, int64_t wanted, int64_t least) {
  const int64_t even = ceil_div(ceil_div(tokens, wanted < 1 ? 1 : wanted), kOuterStep) * kOuterStep;
  const int64_t rows = even < least ? least : even;
  return tokens <= rows ? 1 : ceil_div(tokens, rows);
}
inline int64_t outer_chunks(int64_t tokens, int64_t columns, int64_t r) {
  const int64_t tiles = ceil_div(columns, outer_block_columns(r)) * ceil_div(r, 64);
  return row_chunks(tokens, tiles == 0 ? 1 : kOuterBlocks / tiles, kOuterStep * kOuterWarps);
}

// Row length of partial sums: even, so that two neighbours can be stored at once.
__host__ __device__ constexpr int64_t partial_pitch(int64_t columns) { return ceil_div(columns, 2) * 2; }

// Elements of Acc that launch_outer wants as scratch.
inline int64_t outer_scratch(int64_t tokens, int64_t columns, int64_t r) {
  const int64_t chunks = outer_chunks(tokens, columns, r);
  return chunks == 1 ? 0 : chunks * r * partial_pitch(columns);
}

// How many there are from `from` on, up to `most`.
__device__ __forceinline__ int left(int64_t end, int64_t from, int most) {
  return end - from < most ? static_cast<int>(end - from) : most;
}

// Neighbouring numbers in one access: `to` is aligned to all of them.
template <typename T, int kCount>
__device__ __forceinline__ void store_together(T* to, const T (&numbers)[kCount]) {
  using Whole = std::conditional_t<sizeof(numbers) == 16, uint4, uint2>;
  static_assert(sizeof(numbers) == sizeof(Whole));
  alignas(Whole) T copy[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) copy[k] = numbers[k];
  *reinterpret_cast<Whole*>(to) = reinterpret_cast<const Whole&>(copy);
}

// What every kernel of `outer` takes.
template <typename T, typename Acc>
struct Outer {
  const T* g;    // [tokens, columns]
  const Acc* h;  // [tokens, r]
  int64_t tokens, columns, r, chunks;
  Acc scaling;
  Acc* partial;  // [chunks, r, partial_pitch(columns)], scratch, if chunks > 1
  T* out;        // [r, columns] or [columns, r]
  FactorLayout layout;

  __host__ __device__ int64_t chunk_rows() const { return ceil_div(ceil_div(tokens, chunks), kOuterStep) * kOuterStep; }
  __device__ int64_t chunk_begin(int64_t chunk) const {
    const int64_t begin = chunk * chunk_rows();
    return begin < tokens ? begin : tokens;
  }

  // The element of out whose sum is given. Two TF32 parts of h, one of them zero, make NaN of a g that is not finite:
  // plain products then say what the equation gives.
  __device__ T result(int64_t q, int64_t c, Acc sum) const {
    if constexpr (!std::is_same_v<T, Acc>) {
      if (sum != sum) {
        sum = 0;
        for (int64_t i = 0; i < tokens; ++i) sum += h[i * r + q] * widen<Acc>(g[i * columns + c]);
      }
    }
    return narrow<T>(scaling * sum);
  }
};

// Stores the sums of a tile, sum(q, c) with q < kRanks, c < kColumns, of the ranks from q0 and the columns from c0, as
// partial sums of a chunk or, if there is no other, as out; coalesced in every layout. The whole block calls it.
template <int kRanks, int kColumns, typename T, typename Acc, typename Sum>
__device__ __forceinline__ void store_sums(const Outer<T, Acc>& p, int64_t chunk, bool last, int64_t q0, int64_t c0,
                                           const Sum& sum) {
  const bool rank_major = !last || p.layout == FactorLayout::kRankMajor;
  const int ranks = p.r - q0 < kRanks ? static_cast<int>(p.r - q0) : kRanks;
#pragma unroll 1
  for (int e = threadIdx.x; e < ranks * kColumns; e += kOuterBlock) {
    const int q = rank_major ? e / kColumns : e % ranks, c = rank_major ? e % kColumns : e / ranks;
    const int64_t rank = q0 + q, column = c0 + c;
    if (column >= p.columns) continue;
    if (last) {
      p.out[rank_major ? rank * p.columns + column : column * p.r + rank] = p.result(rank, column, sum(q, c));
    } else {
      p.partial[(chunk * p.r + rank) * partial_pitch(p.columns) + column] = sum(q, c);
    }
  }
}

// ---- the chunks added ---------------------------------------------------------------------------------------

constexpr int kFinishRanks = 16, kFinishColumns = 32;

__host__ __device__ constexpr int64_t finish_tiles(int64_t columns, int64_t r) {
  return ceil_div(columns, kFinishColumns) * ceil_div(r, kFinishRanks);
}

// A tile of out. The whole block calls it; through shared memory, as the order of reading is not that of storing.
template <typename T, typename Acc>
__device__ __forceinline__ void finish_tile(const Outer<T, Acc>& p, int64_t tile) {
  __shared__ Acc total[kFinishRanks][kFinishColumns + 1];
  const int64_t column_tiles = ceil_div(p.columns, kFinishColumns), pitch = partial_pitch(p.columns);
  const int64_t q0 = tile / column_tiles * kFinishRanks, c0 = tile % column_tiles * kFinishColumns;
  __syncthreads();
#pragma unroll
  for (int e = threadIdx.x; e < kFinishRanks * kFinishColumns; e += kOuterBlock) {
    const int q = e / kFinishColumns, c = e % kFinishColumns;
    if (q0 + q >= p.r || c0 + c >= p.columns) continue;
    const Acc* element = p.partial + (q0 + q) * pitch + c0 + c;
    Acc sum = 0;
#pragma unroll 8
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk) sum += element[chunk * p.r * pitch];
    total[q][c] = sum;
  }
  __syncthreads();
  store_sums<kFinishRanks, kFinishColumns>(p, 0, true, q0, c0, [&](int q, int c) { return total[q][c]; });
}

template <typename T, typename Acc>
__global__ void __launch_bounds__(kOuterBlock) outer_finish_kernel(Outer<T, Acc> p) {
  for (int64_t tile = blockIdx.x; tile < finish_tiles(p.columns, p.r); tile += gridDim.x) finish_tile(p, tile);
}

}  // namespace unilora

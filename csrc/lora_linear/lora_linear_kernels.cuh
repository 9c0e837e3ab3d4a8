// CUDA kernels of the LoRA matmul's low-rank part (contract: lora_linear.h). No torch.
// T: float, double, __half or __nv_bfloat16, the dtype of the matrices; Acc: float (double for double), that
// of h, u and all sums. Every matrix is dense and row-major; sizes may exceed 2^31 elements.
//
// A factor P [r, C] comes as it is stored: rank_major, A [r, C], or not, B [C, r]. Ranks are taken in tiles
// of Q = 4 (r <= 4) or 16, columns in tiles; a tile of P goes through shared memory, where its layout no
// longer matters and where what lies beyond r and C is zero. Each output element has one owner that adds in
// an order given by the sizes alone, without atomics: results are bit-equal run to run.
#pragma once

#include "cuda/launch.cuh"

namespace unilora {

// body(std::integral_constant<int, Q>) with the rank tile for r
template <typename Body>
void with_rank_tile(int64_t r, const Body& body) {
  if (r <= 4) {
    body(std::integral_constant<int, 4>{});
  } else {
    body(std::integral_constant<int, 16>{});
  }
}

// tile[q][c] = scaling * P[q0 + q, c0 + c], zero beyond r and C. The whole block calls it; threads follow the
// storage order of P, so that reads are coalesced in both layouts. Pitch >= Columns: row length of the tile.
template <int Q, int Columns, int Pitch, typename T, typename Acc>
__device__ __forceinline__ void load_factor(const T* __restrict__ P,  // [r, C] or [C, r]
                                            bool rank_major, int64_t r, int64_t C, int64_t q0, int64_t c0, Acc scaling,
                                            Acc (&tile)[Q][Pitch]) {
  for (int e = threadIdx.x; e < Q * Columns; e += blockDim.x) {
    const int q = rank_major ? e / Columns : e % Q, c = rank_major ? e % Columns : e / Q;
    const int64_t rank = q0 + q, column = c0 + c;
    const bool inside = rank < r && column < C;
    tile[q][c] = inside ? scaling * widen<Acc>(P[rank_major ? rank * C + column : column * r + rank]) : Acc(0);
  }
}

// ---- dot --------------------------------------------------------------------------------------------------
// out[i, q] = sum_c x[i, c] P[q, c]
//
// Work: a warp owns four rows and one rank tile; its lanes take neighbouring columns. The block's warps share each
// tile of P. Rank tiles are the fastest grid index: for r > 16 the blocks that read the same rows run together, and
// x comes from L2 after the first.
// Bytes: x N K sizeof(T) once, out N r sizeof(Acc); from L2, P r K sizeof(T) for every 16 rows.
// Determinism: a lane adds its columns in ascending order, then the lanes are added by a fixed tree. A row's result
// does not depend on N or on the other rows.

constexpr int kDotBlock = 128;
constexpr int kDotRows = 4;  // rows of a warp
constexpr int kDotBlockRows = kDotRows * kDotBlock / kWarp;
constexpr int kDotColumns = 128;

template <int Q, typename T, typename Acc>
__global__ void __launch_bounds__(kDotBlock) dot_kernel(const T* __restrict__ x,  // [N, K]
                                                        int64_t N, int64_t K,
                                                        const T* __restrict__ P,  // [r, K] or [K, r]
                                                        bool rank_major, int64_t r,
                                                        Acc* __restrict__ out) {  // [N, r]
  __shared__ Acc factor[Q][kDotColumns + 1];  // odd pitch: no bank conflict when filled from [K, r]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t rank_tiles = ceil_div(r, Q), tiles = ceil_div(N, kDotBlockRows) * rank_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t q0 = tile % rank_tiles * Q, row0 = tile / rank_tiles * kDotBlockRows + warp * kDotRows;
    Acc sum[kDotRows][Q] = {};
    for (int64_t c0 = 0; c0 < K; c0 += kDotColumns) {
      __syncthreads();
      load_factor<Q, kDotColumns>(P, rank_major, r, K, q0, c0, Acc(1), factor);
      __syncthreads();
#pragma unroll
      for (int c = lane; c < kDotColumns; c += kWarp) {
        Acc value[kDotRows];
#pragma unroll
        for (int i = 0; i < kDotRows; ++i)
          value[i] = row0 + i < N && c0 + c < K ? widen<Acc>(x[(row0 + i) * K + c0 + c]) : Acc(0);
#pragma unroll
        for (int q = 0; q < Q; ++q) {
          const Acc p = factor[q][c];
#pragma unroll
          for (int i = 0; i < kDotRows; ++i) sum[i][q] += value[i] * p;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDotRows; ++i) {
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        const Acc total = lane_sum(sum[i][q], kWarp);
        if (lane == 0 && row0 + i < N && q0 + q < r) out[(row0 + i) * r + q0 + q] = total;
      }
    }
  }
}

template <typename T, typename Acc>
void launch_dot(const T* x,  // [N, K]
                int64_t N, int64_t K,
                const T* P,  // [r, K] or [K, r]
                bool rank_major, int64_t r,
                Acc* out,  // [N, r]
                cudaStream_t stream) {
  if (N == 0) return;
  with_rank_tile(r, [&](auto rank_tile) {
    constexpr int Q = decltype(rank_tile)::value;
    const int64_t tiles = ceil_div(N, kDotBlockRows) * ceil_div(r, Q);
    dot_kernel<Q><<<grid_size(tiles, 1), kDotBlock, 0, stream>>>(x, N, K, P, rank_major, r, out);
  });
}

// ---- rank_update ------------------------------------------------------------------------------------------
// y[i, c] += s sum_q h[i, q] P[q, c], in place
//
// Work: a block owns a tile of 32 rows and 256 columns, a thread one column of it. The 32 sums stay in registers
// while all ranks are applied; then y is read and written once, coalesced along the row.
// Bytes: y 2 N M sizeof(T); from L2, h N r sizeof(Acc) for each column tile and P r M sizeof(T) for each row tile.
// Determinism: a thread adds the ranks of its elements in ascending order, then y; one rounding to T.

constexpr int kUpdateColumns = 256;  // one a thread
constexpr int kUpdateRows = 32;

template <int Q, typename T, typename Acc>
__global__ void __launch_bounds__(kUpdateColumns) rank_update_kernel(T* __restrict__ y,  // [N, M]
                                                                     int64_t N, int64_t M,
                                                                     const Acc* __restrict__ h,  // [N, r]
                                                                     int64_t r,
                                                                     const T* __restrict__ P,  // [r, M] or [M, r]
                                                                     bool rank_major, Acc scaling) {
  __shared__ __align__(16) Acc weight[kUpdateRows][Q];
  __shared__ Acc factor[Q][kUpdateColumns + 1];
  const int64_t column_tiles = ceil_div(M, kUpdateColumns), tiles = ceil_div(N, kUpdateRows) * column_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t row0 = tile / column_tiles * kUpdateRows, c0 = tile % column_tiles * kUpdateColumns;
    const int64_t column = c0 + threadIdx.x;
    Acc sum[kUpdateRows] = {};
    for (int64_t q0 = 0; q0 < r; q0 += Q) {
      __syncthreads();
      for (int e = threadIdx.x; e < kUpdateRows * Q; e += kUpdateColumns) {
        const int64_t row = row0 + e / Q, rank = q0 + e % Q;
        weight[e / Q][e % Q] = row < N && rank < r ? h[row * r + rank] : Acc(0);
      }
      load_factor<Q, kUpdateColumns>(P, rank_major, r, M, q0, c0, scaling, factor);
      __syncthreads();
      Acc p[Q];
#pragma unroll
      for (int q = 0; q < Q; ++q) p[q] = factor[q][threadIdx.x];
#pragma unroll
      for (int i = 0; i < kUpdateRows; ++i) {
#pragma unroll
        for (int q = 0; q < Q; ++q) sum[i] += weight[i][q] * p[q];
      }
    }
    if (column >= M) continue;
#pragma unroll
    for (int i = 0; i < kUpdateRows; ++i) {
      if (row0 + i >= N) break;
      T& element = y[(row0 + i) * M + column];
      element = narrow<T>(widen<Acc>(element) + sum[i]);
    }
  }
}

template <typename T, typename Acc>
void launch_rank_update(T* y,  // [N, M]
                        int64_t N, int64_t M,
                        const Acc* h,  // [N, r]
                        int64_t r,
                        const T* P,  // [r, M] or [M, r]
                        bool rank_major, double scaling, cudaStream_t stream) {
  if (N == 0 || M == 0) return;
  with_rank_tile(r, [&](auto rank_tile) {
    constexpr int Q = decltype(rank_tile)::value;
    const int64_t tiles = ceil_div(N, kUpdateRows) * ceil_div(M, kUpdateColumns);
    rank_update_kernel<Q>
        <<<grid_size(tiles, 1), kUpdateColumns, 0, stream>>>(y, N, M, h, r, P, rank_major, static_cast<Acc>(scaling));
  });
}

// ---- outer ------------------------------------------------------------------------------------------------
// out[q, c] = s sum_i h[i, q] g[i, c]
//
// Work: the rows are cut into chunks. A block owns a chunk, a rank tile and 256 columns, one a thread, and walks
// its rows with the sums in registers; h goes through shared memory. A second kernel adds the chunks.
// Bytes: g N M sizeof(T) once (for r > 16 the other rank tiles read it from L2), out r M sizeof(T), partial sums
// 2 chunks r M sizeof(Acc); from L2, h N r sizeof(Acc) for each column tile.
// Determinism: the number of chunks follows from the sizes alone (about kOuterBlocks blocks); rows are added in
// ascending order within a chunk, then the chunks in ascending order.

constexpr int kOuterColumns = 256;
constexpr int kOuterRows = 32;  // rows of h in shared memory at a time
constexpr int64_t kOuterBlocks = 512;

inline int64_t outer_chunks(int64_t N, int64_t M, int64_t r) {
  const int64_t tiles = ceil_div(M, kOuterColumns) * ceil_div(r, 16);
  const int64_t wanted = tiles < kOuterBlocks ? kOuterBlocks / (tiles > 0 ? tiles : 1) : 1;
  const int64_t possible = ceil_div(N, kOuterRows);
  return possible < 1 ? 1 : (wanted < possible ? wanted : possible);
}

// Elements of Acc that launch_outer wants as scratch.
inline int64_t outer_scratch(int64_t N, int64_t M, int64_t r) { return outer_chunks(N, M, r) * r * M; }

template <int Q, typename T, typename Acc>
__global__ void __launch_bounds__(kOuterColumns) outer_chunk_kernel(const T* __restrict__ g,  // [N, M]
                                                                    int64_t N, int64_t M,
                                                                    const Acc* __restrict__ h,  // [N, r]
                                                                    int64_t r, int64_t chunks,
                                                                    Acc* __restrict__ partial) {  // [chunks, r, M]
  __shared__ __align__(16) Acc weight[kOuterRows][Q];
  const int64_t rank_tiles = ceil_div(r, Q), column_tiles = ceil_div(M, kOuterColumns);
  const int64_t tiles = chunks * column_tiles * rank_tiles, chunk_rows = ceil_div(N, chunks);

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t q0 = tile % rank_tiles * Q, chunk = tile / rank_tiles / column_tiles;
    const int64_t column = tile / rank_tiles % column_tiles * kOuterColumns + threadIdx.x;
    const int64_t end = (chunk + 1) * chunk_rows < N ? (chunk + 1) * chunk_rows : N;
    Acc sum[Q] = {};
    for (int64_t row0 = chunk * chunk_rows; row0 < end; row0 += kOuterRows) {
      __syncthreads();
      for (int e = threadIdx.x; e < kOuterRows * Q; e += kOuterColumns) {
        const int64_t row = row0 + e / Q, rank = q0 + e % Q;
        weight[e / Q][e % Q] = row < end && rank < r ? h[row * r + rank] : Acc(0);
      }
      __syncthreads();
      if (column >= M) continue;
#pragma unroll 4
      for (int i = 0; i < kOuterRows; ++i) {
        if (row0 + i >= end) break;
        const Acc value = widen<Acc>(g[(row0 + i) * M + column]);
#pragma unroll
        for (int q = 0; q < Q; ++q) sum[q] += weight[i][q] * value;
      }
    }
    if (column >= M) continue;
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      if (q0 + q < r) partial[(chunk * r + q0 + q) * M + column] = sum[q];
    }
  }
}

template <typename T, typename Acc>
__global__ void __launch_bounds__(kOuterColumns) outer_finish_kernel(const Acc* __restrict__ partial,  // [chunks, r, M]
                                                                     int64_t chunks, int64_t M, int64_t r, Acc scaling,
                                                                     T* __restrict__ out,  // [r, M] or [M, r]
                                                                     bool rank_major) {
  for (int64_t e = grid_begin(); e < r * M; e += grid_step()) {
    Acc sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * r * M + e];
    out[rank_major ? e : e % M * r + e / M] = narrow<T>(scaling * sum);
  }
}

template <typename T, typename Acc>
void launch_outer(const T* g,  // [N, M]
                  int64_t N, int64_t M,
                  const Acc* h,  // [N, r]
                  int64_t r, double scaling,
                  Acc* partial,  // [outer_scratch(N, M, r)], scratch
                  T* out,        // [r, M] or [M, r]
                  bool rank_major, cudaStream_t stream) {
  if (M == 0) return;
  const int64_t chunks = outer_chunks(N, M, r);
  with_rank_tile(r, [&](auto rank_tile) {
    constexpr int Q = decltype(rank_tile)::value;
    const int64_t tiles = chunks * ceil_div(M, kOuterColumns) * ceil_div(r, Q);
    outer_chunk_kernel<Q><<<grid_size(tiles, 1), kOuterColumns, 0, stream>>>(g, N, M, h, r, chunks, partial);
  });
  outer_finish_kernel<<<grid_size(r * M, kOuterColumns), kOuterColumns, 0, stream>>>(
      partial, chunks, M, r, static_cast<Acc>(scaling), out, rank_major);
}

}  // namespace unilora

// h = x A^T and y += s h B^T in one launch, for few tokens (contract: lora_linear.h; conventions:
// lora_linear_kernels.cuh). No torch.
#pragma once

#include "lora_linear/lora_linear_dot.cuh"

namespace unilora {

// ---- few --------------------------------------------------------------------------------------------------------
// h[i, q] = sum_c x[i, c] A[q, c],   y[i, c] += s sum_q h[i, q] B[c, q], in place
//
// Work: every block computes all of h, as dot does, and adds the update to its runs of 128 columns of y. What it needs
// of y and B is on its way while h is summed. Block 0 writes h. r > kRanks: rank tiles in turn; then h is summed again
// for each run.
// Blocks: one for each run, at most 128. An SM reads all of A from L2 whatever their number, r n sizeof(T) at about
// 40 bytes a ns, 3 us at r = 16, n = 4096 in 16 bits; all of them, at most 128 r n sizeof(T), 17 MB, in the same time.
// Bytes: A, r n sizeof(T), and B, m r sizeof(T), once; x and h; y read and written once, 2 tokens m sizeof(T).
// Determinism: h by dot's order in every block, bit-equal to dot's; a thread adds the ranks of its elements in
// ascending order, then y; one rounding to T.

constexpr int64_t kFewTokens = 8;  // the most that launch_few takes
constexpr int kFewColumns = 128, kFewRanks = 16, kFewBlocks = 128;

// Elements p[0] to p[n - 1] into L2, by the whole block
template <int kBlock, typename T>
__device__ __forceinline__ void prefetch_l2(const T* p, int64_t n) {
  constexpr int kLine = 128 / sizeof(T);
  for (int64_t i = threadIdx.x * kLine; i < n; i += kBlock * kLine)
    asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p + i));
}

template <typename Dot>
__global__ void __launch_bounds__(Dot::kThreads, 1) few_kernel(typename Dot::T* __restrict__ y,        // [tokens, m]
                                                               const typename Dot::T* __restrict__ x,  // [tokens, n]
                                                               int64_t tokens, int64_t n, int64_t m,
                                                               const typename Dot::T* __restrict__ A,  // [r, n]
                                                               const typename Dot::T* __restrict__ B,  // [m, r]
                                                               int64_t r, typename Dot::Acc scaling,
                                                               typename Dot::Acc* __restrict__ h) {  // [tokens, r]
  using T = typename Dot::T;
  using Acc = typename Dot::Acc;
  static_assert(Dot::kRows >= kFewTokens && Dot::kRanks % kFewRanks == 0 && Dot::kThreads % kFewColumns == 0);
  constexpr int kThreadRows = Dot::kThreads / kFewColumns;  // a thread's tokens are as far apart
  constexpr int kThreadTokens = kFewTokens / kThreadRows;
  __shared__ Acc hidden[kFewTokens][Dot::kRanks];
  __shared__ Acc factor_tile[kFewRanks][kFewColumns + 1];  // odd pitch: writes from [m, r] are two a bank
  const int thread_column = threadIdx.x % kFewColumns, thread_row = threadIdx.x / kFewColumns;
  const int64_t runs = m > 0 ? ceil_div(m, kFewColumns) : 1;  // without y, h is still wanted

  for (int64_t run = blockIdx.x; run < runs; run += gridDim.x) {
    const int64_t c0 = run * kFewColumns, column = c0 + thread_column;
    const int64_t run_columns = m - c0 < kFewColumns ? m - c0 : kFewColumns;
    prefetch_l2<Dot::kThreads>(B + c0 * r, run_columns * r);
    const auto inside = [&](int i) { return thread_row + i * kThreadRows < tokens && column < m; };
    const auto element = [&](int i) -> T& { return y[(thread_row + i * kThreadRows) * m + column]; };
    T old[kThreadTokens];
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i)
      if (inside(i)) old[i] = element(i);

    Acc sum[kThreadTokens] = {};
    for (int64_t q0 = 0; q0 < r; q0 += Dot::kRanks) {
      const bool first = run == blockIdx.x;
      if (first || r > Dot::kRanks) {
        __syncthreads();
        Dot::run(x, tokens, n, A, r, 0, q0, [&](int64_t row, int64_t rank, Acc total) {
          hidden[row][rank - q0] = total;
          if (first && blockIdx.x == 0) h[row * r + rank] = total;
        });
      }
      const int64_t tile_end = r - q0 < Dot::kRanks ? r : q0 + Dot::kRanks;
      for (int64_t q1 = q0; q1 < tile_end; q1 += kFewRanks) {
        __syncthreads();
        stage_factor<kFewRanks, kFewColumns, Dot::kThreads>(
            B, FactorLayout::kRankMinor, r, m, q1, c0, [&](int q, int c, T p) { factor_tile[q][c] = widen<Acc>(p); });
        __syncthreads();
        const int ranks = tile_end - q1 < kFewRanks ? static_cast<int>(tile_end - q1) : kFewRanks,
                  tile_rank = static_cast<int>(q1 - q0);
#pragma unroll
        for (int i = 0; i < kThreadTokens; ++i) {
          if (!inside(i)) continue;
          for (int q = 0; q < ranks; ++q)
            sum[i] += hidden[thread_row + i * kThreadRows][tile_rank + q] * factor_tile[q][thread_column];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadTokens; ++i)
      if (inside(i)) element(i) = narrow<T>(widen<Acc>(old[i]) + scaling * sum[i]);
  }
}

template <typename T, typename Acc>
void launch_few(T* y,        // [tokens, m]
                const T* x,  // [tokens, n]
                int64_t tokens, int64_t n, int64_t m,
                const T* A,  // [r, n]
                const T* B,  // [m, r]
                int64_t r, double scaling,
                Acc* h,  // [tokens, r]
                cudaStream_t stream) {
  assert(tokens <= kFewTokens);
  if (tokens == 0) return;
  const int64_t runs = m > 0 ? ceil_div(m, kFewColumns) : 1;
  with_dot<T, FactorLayout::kRankMajor, false>(x, n, A, r, r < kFewRanks ? kFewRanks : r, [&](auto dot) {
    using Dot = decltype(dot);
    const unsigned grid = grid_size(runs < kFewBlocks ? runs : kFewBlocks, 1);
    if constexpr (Dot::kRanks >= kFewRanks)
      few_kernel<Dot><<<grid, Dot::kThreads, 0, stream>>>(y, x, tokens, n, m, A, B, r, static_cast<Acc>(scaling), h);
  });
}

}  // namespace unilora

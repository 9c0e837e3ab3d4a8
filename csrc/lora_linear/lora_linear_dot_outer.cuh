// u = g factor^T and out = s h^T g from one read of g (contract: lora_linear.h; conventions: lora_linear_kernels.cuh).
// No torch.
//
// u[i, q] = sum_c g[i, c] factor[q, c],   out[q, c] = s sum_i h[i, q] g[i, c]
//
// Work, 16-bit types, r <= 16: a block owns a chunk of rows and 512 columns, a warp 64 of them, which it copies 16 rows
// at a time, asynchronously and one step ahead, into a piece of shared memory of its own. It takes them from there as
// they are, for u, and transposed, for out. The factor's fragments and out's sums stay in registers; the warps' parts
// of u are added through shared memory at each step. A second kernel adds u over the tiles of columns and out over the
// chunks.
// Bytes: g once, h and u, tokens r sizeof(float) each, factor and out, and partial sums that stay in L2:
// written and read again, 4 r (1 / 512 + 1 / rows of a chunk) of g. Of 4096 x 4096: 32 chunks of 128 rows, 19 % at
// r = 4 (u's are held for 8 or 16 ranks), 63 % at r = 16; a second read of g would be 100 % of HBM's. At r = 64 they
// would be 250 %: above 16 ranks, and for float and double, whose matrices are twice and four times as long, the
// kernels of `dot` and `outer` run one after the other.
// Determinism: tiles and chunks follow from the sizes alone; a warp adds in ascending order, then the warps, the tiles
// and the chunks are added in ascending order.
#pragma once

#include "lora_linear/lora_linear_dot.cuh"
#include "lora_linear/lora_linear_outer.cuh"

namespace unilora {

constexpr int kDotOuterRanks = 16;
constexpr int kDotOuterColumns = kOuterWarps * kOuterColumns;
constexpr int64_t kDotOuterRows = 64;  // of a chunk, at least

inline bool fuses_dot_and_outer(int64_t tokens, int64_t columns, int64_t r) {
  return tokens > 0 && columns > 0 && r <= kDotOuterRanks;
}
inline int64_t dot_outer_chunks(int64_t tokens, int64_t columns) {
  return row_chunks(tokens, kOuterBlocks / ceil_div(columns, kDotOuterColumns), kDotOuterRows);
}

// Elements of Acc that launch_dot_and_outer wants as scratch.
inline int64_t dot_and_outer_scratch(int64_t tokens, int64_t columns, int64_t r) {
  const int64_t plain = outer_scratch(tokens, columns, r);
  if (!fuses_dot_and_outer(tokens, columns, r)) return plain;
  const int64_t fused = ceil_div(columns, kDotOuterColumns) * tokens * kDotOuterRanks +
                        dot_outer_chunks(tokens, columns) * r * partial_pitch(columns);
  return plain > fused ? plain : fused;
}

// What the fused kernels take: `outer` with partial sums in any case, and
template <typename T>
struct DotOuter {
  Outer<T, float> outer;
  const T* factor;   // [r, columns] or [columns, r], as outer.out
  float* u;          // [tokens, r]
  float* u_partial;  // [tiles of columns, tokens, 8 or 16], scratch

  __host__ __device__ int64_t column_tiles() const { return ceil_div(outer.columns, kDotOuterColumns); }
};

// Where the 8 numbers of a row are in a warp's 16 rows x 64 columns: the pieces of a row are exchanged so that eight
// rows of one column of pieces, or the pieces of one row, lie in different banks.
__device__ __forceinline__ int staged(int row, int piece) { return row * kOuterColumns + 8 * (piece ^ row % 8); }

// The factor's right-hand fragments for the warp's 64 columns, [columns / 16][ranks / 8][register], through `tile`,
// [ranks][block's columns]. The whole block calls it, and waits twice. Pairs of columns are exchanged so that
// neighbouring ranks, which are written together, and the 8 ranks x 4 pairs that a fragment reads, lie in different
// banks.
template <int kOctets, typename T>
__device__ __forceinline__ void load_factor_fragments(const DotOuter<T>& p, int64_t block_column, T* tile,
                                                      uint32_t (&fragment)[4][kOctets][2]) {
  const auto pair = [](int q, int c) { return q * kDotOuterColumns + 2 * (c / 2 ^ q % 8 * 4 ^ q / 8); };
  stage_factor<8 * kOctets, kDotOuterColumns, kOuterBlock>(
      p.factor, p.outer.layout, p.outer.r, p.outer.columns, 0, block_column,
      [&](int q, int c, T number) { tile[pair(q, c) + c % 2] = number; });
  __syncthreads();
  const int lane = threadIdx.x % kWarp, column = threadIdx.x / kWarp * kOuterColumns + 2 * (lane % 4);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        fragment[step][octet][i] =
            *reinterpret_cast<const uint32_t*>(tile + pair(8 * octet + lane / 4, column + 16 * step + 8 * i));
    }
  }
  __syncthreads();
}

template <int kOctets, bool kWide, typename T>
__global__ void __launch_bounds__(kOuterBlock, 2) dot_outer_kernel(DotOuter<T> p) {
  constexpr int kStages = 2, kRanks = 8 * kOctets;
  __shared__ __align__(16) T stage[kStages][kOuterWarps][kOuterStep * kOuterColumns];
  __shared__ __align__(16) float part[2][kOuterWarps][kOctets][kWarp][4];
  const Outer<T, float>& o = p.outer;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4, t = lane % 4;
  const int64_t column_tiles = p.column_tiles(), tiles = o.chunks * column_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t column_tile = tile % column_tiles, chunk = tile / column_tiles;
    const int64_t column = column_tile * kDotOuterColumns + warp * kOuterColumns;
    const int64_t begin = o.chunk_begin(chunk);
    const int rows = static_cast<int>(o.chunk_begin(chunk + 1) - begin), steps = (rows + kOuterStep - 1) / kOuterStep;

    // A lane's part of step `step`: the piece lane % 8 of every fourth row.
    const int piece = lane % 8, columns = left(o.columns, column + 8 * piece, 8), ranks = left(o.r, group, kRanks);
    const auto fill = [&](int step) {
#pragma unroll(kWide ? 4 : 1)
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * i + lane / 8, from_row = step * kOuterStep + row;
        const T* from = o.g + (begin + from_row) * o.columns + column + 8 * piece;
        T* to = &stage[step % kStages][warp][staged(row, piece)];
        if constexpr (kWide) {
          const bool inside = from_row < rows && columns > 0;
          copy_async(to, inside ? from : o.g, inside);
        } else {
          *reinterpret_cast<uint4*>(to) = load_eight<false>(from, from_row < rows, columns);
        }
      }
    };

    uint32_t factor[4][kOctets][2];
    float sum[8][4] = {};
    fill(0);
    commit_copies();
    load_factor_fragments<kOctets>(p, column_tile * kDotOuterColumns, stage[1][0], factor);
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) fill(step + 1);
      commit_copies();
      // Tokens 2 t and 2 t + 1 of eight are k = t and k = t + 4: so a transposed piece comes out of shared memory.
      float weight[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = step * kOuterStep + 8 * half + 2 * t;
        const float* h = o.h + (begin + row) * o.r + group;
        load_weights(h, row < rows, h + o.r, row + 1 < rows, ranks, weight[half]);
      }
      wait_copies<1>();
      __syncwarp();
      const T* own = stage[step % kStages][warp];

      float u[kOctets][4] = {};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        load_matrices<false>(a, own + staged(lane % 16, 2 * k + lane / 16));
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) mma<T>(u[octet], a, factor[k][octet][0], factor[k][octet][1]);
      }
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet) store_together(part[step % 2][warp][octet][lane], u[octet]);

#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const WeightFragment weights = split_weights(weight[half]);
#pragma unroll
        for (int quad = 0; quad < 2; ++quad) {
          uint32_t b[4];
          load_matrices<true>(b, own + staged(8 * half + lane % 8, 4 * quad + lane / 8));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 tokens = unpack<T>(b[j]);
            mma_weights(sum[4 * quad + j], weights, tokens.x, tokens.y);
          }
        }
      }

      // The parts of one step are read while those of the next are written to the other half: one barrier a step. It
      // also frees the stage that the next step fills.
      __syncthreads();
      const int e = threadIdx.x, holder = e / 4 % kWarp;
      if (e < kRanks * kOuterStep) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < kOuterWarps; ++w) total += part[step % 2][w][e / (4 * kWarp)][holder][e % 4];
        const int row = step * kOuterStep + holder / 4 + e % 4 / 2 * 8;
        const int q = e / (4 * kWarp) * 8 + holder % 4 * 2 + e % 2;
        if (row < rows) p.u_partial[(column_tile * o.tokens + begin + row) * kRanks + q] = total;
      }
    }

    const int64_t pitch = partial_pitch(o.columns);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int64_t c = column + 8 * j + 2 * t;
      float* to = o.partial + (chunk * o.r + group) * pitch + c;
      if (c < pitch && 0 < ranks) store_together(to, {sum[j][0], sum[j][1]});
      if (c < pitch && 8 < ranks) store_together(to + 8 * pitch, {sum[j][2], sum[j][3]});
    }
  }
}

// Adds both: first the tiles of out, then u, 256 numbers of its scratch at a time.
template <int kOctets, typename T>
__global__ void __launch_bounds__(kOuterBlock) dot_outer_finish_kernel(DotOuter<T> p) {
  constexpr int kRanks = 8 * kOctets;
  const Outer<T, float>& o = p.outer;
  const int64_t out_tiles = finish_tiles(o.columns, o.r), column_tiles = p.column_tiles();
  const int64_t held = o.tokens * kRanks, tiles = out_tiles + ceil_div(held, kOuterBlock);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    if (tile < out_tiles) {
      finish_tile(o, tile);
      continue;
    }
    const int64_t e = (tile - out_tiles) * kOuterBlock + threadIdx.x, i = e / kRanks, q = e % kRanks;
    if (e >= held || q >= o.r) continue;
    float sum = 0;
#pragma unroll 8
    for (int64_t k = 0; k < column_tiles; ++k) sum += p.u_partial[k * held + e];
    p.u[i * o.r + q] = sum;
  }
}

template <typename T, typename Acc>
void launch_dot_and_outer(const T* g,  // [tokens, columns]
                          int64_t tokens, int64_t columns,
                          const T* factor,  // [r, columns] or [columns, r]
                          FactorLayout layout,
                          const Acc* h,  // [tokens, r]
                          int64_t r, double scaling,
                          Acc* scratch,  // [dot_and_outer_scratch(tokens, columns, r)]
                          Acc* u,        // [tokens, r]
                          T* out,        // [r, columns] or [columns, r]
                          cudaStream_t stream) {
  if constexpr (!std::is_same_v<T, Acc>) {
    if (fuses_dot_and_outer(tokens, columns, r)) {
      const int64_t chunks = dot_outer_chunks(tokens, columns), column_tiles = ceil_div(columns, kDotOuterColumns);
      float* partial = scratch + column_tiles * tokens * kDotOuterRanks;
      const Outer<T, float> outer = {g,       h,   tokens, columns, r, chunks, static_cast<float>(scaling),
                                     partial, out, layout};
      const DotOuter<T> p = {outer, factor, u, scratch};
      const bool wide = reinterpret_cast<uintptr_t>(g) % 16 == 0 && columns % 8 == 0;
      const auto launch = [&](auto octets) {
        constexpr int kOctets = decltype(octets)::value;
        const auto kernel = wide ? dot_outer_kernel<kOctets, true, T> : dot_outer_kernel<kOctets, false, T>;
        kernel<<<grid_size(chunks * column_tiles, 1), kOuterBlock, 0, stream>>>(p);
        const int64_t tiles = finish_tiles(columns, r) + ceil_div(tokens * 8 * kOctets, kOuterBlock);
        dot_outer_finish_kernel<kOctets><<<grid_size(tiles, 1), kOuterBlock, 0, stream>>>(p);
      };
      if (r <= 8) {
        launch(std::integral_constant<int, 1>{});
      } else {
        launch(std::integral_constant<int, 2>{});
      }
      return;
    }
  }
  launch_dot(g, tokens, columns, factor, layout, r, u, stream);
  launch_outer(g, tokens, columns, h, r, scaling, scratch, out, layout, stream);
}

}  // namespace unilora

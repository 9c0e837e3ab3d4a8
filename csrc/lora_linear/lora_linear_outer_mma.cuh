// `outer` of the 16-bit types on tensor cores (lora_linear_outer.cuh). No torch.
//
// Products of 16 ranks, 8 tokens and 8 columns in TF32: g as it is, h in two parts, so that a product is exact but for
// a relative 2^-21. A lane's 16 bytes of a row are the right-hand fragments of 8 products as they are: with group and t
// of mma.cuh, columns 8 group .. 8 group + 7 of row t; product j takes the columns 8 n + j, n its own column. h comes
// from L2 and is split in registers.
// A block's warps: kRankWarps of 16 kTiles ranks, kColumnWarps of 64 columns, and the others share the rows, 16 at a
// time: four 16-byte loads in flight a lane. Warps that read the same g or h find it in L1.
#pragma once

#include "cuda/mma.cuh"
#include "lora_linear/lora_linear_outer_sums.cuh"

namespace unilora {

// h at two rows, k = t and k = t + 4 of the left-hand fragment, and at the ranks `rank` and rank + 8; zero beyond h.
__device__ __forceinline__ void load_weights(const float* first, bool has_first, const float* second, bool has_second,
                                             int ranks,  // that h has from `rank` on
                                             float (&weight)[4]) {
  weight[0] = has_first && 0 < ranks ? first[0] : 0.0f;
  weight[1] = has_first && 8 < ranks ? first[8] : 0.0f;
  weight[2] = has_second && 0 < ranks ? second[0] : 0.0f;
  weight[3] = has_second && 8 < ranks ? second[8] : 0.0f;
}

// The two parts of a left-hand fragment.
struct WeightFragment {
  uint32_t high[4], low[4];
};
__device__ __forceinline__ WeightFragment split_weights(const float (&weight)[4]) {
  WeightFragment out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Tf32Parts parts = split_tf32(weight[i]);
    out.high[i] = parts.high;
    out.low[i] = parts.low;
  }
  return out;
}
__device__ __forceinline__ void mma_weights(float (&c)[4], const WeightFragment& weights, float b0, float b1) {
  mma_tf32(c, weights.low, __float_as_uint(b0), __float_as_uint(b1));
  mma_tf32(c, weights.high, __float_as_uint(b0), __float_as_uint(b1));
}

// 8 numbers of a row, of which `columns` are within g: zero beyond. kWide: 16 aligned bytes, all within g or beyond it.
template <bool kWide, typename T>
__device__ __forceinline__ uint4 load_eight(const T* from, bool has_row, int columns) {
  if constexpr (kWide) {
    return has_row && columns > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
  } else {
    alignas(16) T numbers[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) numbers[k] = has_row && k < columns ? from[k] : narrow<T>(0.0f);
    return reinterpret_cast<const uint4&>(numbers);
  }
}

template <int kRankWarps, int kColumnWarps, int kTiles, bool kWide, typename T>
__global__ void __launch_bounds__(kOuterBlock, 2) outer_mma_kernel(Outer<T, float> p) {
  constexpr int kRowWarps = kOuterWarps / (kRankWarps * kColumnWarps), kRanks = 16 * kTiles * kRankWarps;
  constexpr int kPitch = kOuterColumns + 4;  // two ways of bank conflicts at most, in every layout of out
  __shared__ __align__(16) float part[kRankWarps][kColumnWarps][kRowWarps][16][kPitch];
  const int warp = threadIdx.x / kWarp, group = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int rank_warp = warp % kRankWarps, column_warp = warp / kRankWarps % kColumnWarps;
  const int row_warp = warp / (kRankWarps * kColumnWarps);
  const int64_t rank_tiles = ceil_div(p.r, kRanks), column_tiles = ceil_div(p.columns, kOuterColumns * kColumnWarps);
  const int64_t tiles = p.chunks * column_tiles * rank_tiles;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t block_q0 = tile % rank_tiles * kRanks, q0 = block_q0 + rank_warp * 16 * kTiles;
    const int64_t block_c0 = tile / rank_tiles % column_tiles * kOuterColumns * kColumnWarps;
    const int64_t column = block_c0 + column_warp * kOuterColumns + 8 * group, rank = q0 + group;
    const int columns = left(p.columns, column, 8), ranks = left(p.r, rank, 16 * kTiles);
    const int64_t chunk = tile / rank_tiles / column_tiles, begin = p.chunk_begin(chunk) + row_warp * kOuterStep + t;
    const T* g = p.g + begin * p.columns + column;
    const float* h = p.h + begin * p.r + rank;
    float sum[kTiles][8][4] = {};
    for (int rows = static_cast<int>(p.chunk_begin(chunk + 1) - begin); rows + t > 0; rows -= kRowWarps * kOuterStep) {
      uint4 value[4];
      float weight[kTiles][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = load_eight<kWide>(g + 4 * i * p.columns, 4 * i < rows, columns);
      const auto load_step = [&](int step) {
        const float *first = h + 8 * step * p.r, *second = first + 4 * p.r;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
          load_weights(first + 16 * m, 8 * step < rows, second + 16 * m, 8 * step + 4 < rows, ranks - 16 * m,
                       weight[m]);
      };
      load_step(0);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        WeightFragment weights[kTiles];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) weights[m] = split_weights(weight[m]);
        if (step == 0) load_step(1);
        const uint32_t first[4] = {value[2 * step].x, value[2 * step].y, value[2 * step].z, value[2 * step].w};
        const uint32_t second[4] = {value[2 * step + 1].x, value[2 * step + 1].y, value[2 * step + 1].z,
                                    value[2 * step + 1].w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float2 b0 = unpack<T>(first[pair]), b1 = unpack<T>(second[pair]);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            mma_weights(sum[m][2 * pair], weights[m], b0.x, b1.x);
            mma_weights(sum[m][2 * pair + 1], weights[m], b0.y, b1.y);
          }
        }
      }
      g += kRowWarps * kOuterStep * p.columns;
      h += kRowWarps * kOuterStep * p.r;
    }
    // A lane has columns 16 t .. 16 t + 15 of the ranks `group` and group + 8: n = 2 t, then n = 2 t + 1.
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int j = i % 8, n = i / 8;
        float* to = &part[rank_warp][column_warp][row_warp][group][16 * t + i];
        store_together(to, {sum[m][j][n], sum[m][j + 1][n], sum[m][j + 2][n], sum[m][j + 3][n]});
        store_together(to + 8 * kPitch,
                       {sum[m][j][n + 2], sum[m][j + 1][n + 2], sum[m][j + 2][n + 2], sum[m][j + 3][n + 2]});
      }
      __syncthreads();
#pragma unroll 1
      for (int w = 0; w < kRankWarps * kColumnWarps; ++w) {
        const int64_t tile_q0 = block_q0 + 16 * (w % kRankWarps * kTiles + m);
        if (tile_q0 >= p.r) continue;
        store_sums<16, kOuterColumns>(p, chunk, p.chunks == 1, tile_q0, block_c0 + w / kRankWarps * kOuterColumns,
                                      [&](int q, int c) {
                                        float total = 0;
#pragma unroll
                                        for (int k = 0; k < kRowWarps; ++k)
                                          total += part[w % kRankWarps][w / kRankWarps][k][q][c];
                                        return total;
                                      });
      }
    }
  }
}

}  // namespace unilora

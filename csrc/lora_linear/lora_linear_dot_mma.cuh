// A block's part of out = x factor^T for 16-bit x, on tensor cores (contract: lora_linear.h; kernel and launcher:
// lora_linear_dot.cuh). No torch.
#pragma once

#include "cuda/mma.cuh"
#include "lora_linear/lora_linear.h"

namespace unilora {

// out[i, q] = sum_c x[i, c] factor[q, c] for kRows rows and kRanks ranks
//
// Work: the columns in chunks of 32, dealt to the block's warps in turn. A warp multiplies its chunks by mma; the sums
// of the warps meet in shared memory. A chunk goes from global memory to registers, kStages chunks ahead of its
// products, and what a lane loads are its fragments (mma.cuh), because the columns of a chunk may be summed in any
// order: lane (group, t) has columns 8 t to 8 t + 7. Columns 8 t, 8 t + 1 stand for the first step's 2 t, 2 t + 1;
// 8 t + 2, 8 t + 3 for its 2 t + 8, 2 t + 9; the other four for those of the second step. A factor [r, columns] is
// loaded in the same way as x. Of a factor [columns, r], a lane loads kRankTiles neighbouring ranks of each of its
// columns: rank kRankTiles n + j is column n of the j-th product.
// Determinism: a warp adds its chunks in ascending order, then the warps are added in theirs. The order of a sum
// follows from the number of columns alone: not from the other rows, kRowTiles, kRankTiles or kWide.

// kWide: x, and the factor, can be read in 16 bytes (a factor [columns, r] in 2 kRankTiles). Otherwise element by
// element.
template <typename T_, FactorLayout kLayout, int kRowTiles, int kRankTiles, bool kWide>
struct DotMma {
  using T = T_;
  using Acc = float;
  static constexpr int kWarps = 16, kThreads = kWarps * kWarp;
  static constexpr int kRows = 16 * kRowTiles, kRanks = 8 * kRankTiles;
  static constexpr int kChunk = 32;
  static constexpr bool kRankMajor = kLayout == FactorLayout::kRankMajor;

  // What a lane holds of a chunk. Where sums, x and the whole factor are too much for 128 registers, the factor comes
  // in parts, each loaded ahead of its products only; otherwise as many chunks are under way as fit.
  static constexpr int kSums = 4 * kRowTiles * kRankTiles;
  static constexpr int kParts = !kWide ? (kRankTiles + 1) / 2 : kRankTiles < 8 ? 1 : kRankMajor ? 2 : 4;
  static constexpr int kPartTiles = kRankTiles / kParts;
  static constexpr int kPieces = kRankMajor ? kPartTiles : 8, kPieceWords = kRankMajor ? 4 : (kPartTiles + 1) / 2;
  struct Stage {
    uint32_t x[2 * kRowTiles][4];
    uint32_t factor[kPieces][kPieceWords];
  };
  static constexpr int kRegisters = kRankMajor && kRowTiles == 2 ? 96 : 80;  // for sums and chunks
  static constexpr int kStagesThatFit = (kRegisters - kSums) / (8 * kRowTiles + kPieces * kPieceWords);
  static constexpr int kStages = !kWide || kParts > 1 ? 1 : kStagesThatFit < 4 ? kStagesThatFit : 4;

  // Eight numbers of a row, two a register; zero from `left` on.
  static __device__ __forceinline__ void load_eight(uint32_t (&words)[4], const T* p, int left) {
    if constexpr (kWide) {
      const uint4 all = left > 0 ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    } else {
      const auto* bits = reinterpret_cast<const uint16_t*>(p);
      uint32_t value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = i < left ? bits[i] : 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) words[k] = value[2 * k] | value[2 * k + 1] << 16;
    }
  }

  // kPartTiles neighbouring ranks of a column of a factor [columns, r]; zero from `left` on.
  static __device__ __forceinline__ void load_ranks(uint32_t (&words)[kPieceWords], const T* p, int left) {
    const auto* bits = reinterpret_cast<const uint16_t*>(p);
    if constexpr (kPartTiles == 1) {
      words[0] = left > 0 ? bits[0] : 0;
    } else if constexpr (!kWide) {
#pragma unroll
      for (int k = 0; k < kPieceWords; ++k) {
        const uint32_t low = 2 * k < left ? bits[2 * k] : 0, high = 2 * k + 1 < left ? bits[2 * k + 1] : 0;
        words[k] = low | high << 16;
      }
    } else if constexpr (kPartTiles == 2) {
      words[0] = left > 0 ? *reinterpret_cast<const uint32_t*>(p) : 0;
    } else if constexpr (kPartTiles == 4) {
      const uint2 all = left > 0 ? *reinterpret_cast<const uint2*>(p) : uint2{0, 0};
      words[0] = all.x, words[1] = all.y;
    } else {
      const uint4 all = left > 0 ? *reinterpret_cast<const uint4*>(p) : uint4{0, 0, 0, 0};
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    }
  }

  // Register `half` of product j's b in `step`: columns 8 t + 4 step + 2 half and the next, of the lane's rank.
  static __device__ __forceinline__ uint32_t fragment(const Stage& stage, int step, int half, int j) {
    if constexpr (kRankMajor) {
      return stage.factor[j][2 * step + half];
    } else {
      const int column = 4 * step + 2 * half;
      const uint32_t first = stage.factor[column][j / 2], second = stage.factor[column + 1][j / 2];
      return j % 2 == 0 ? (first & 0xffffu) | second << 16 : first >> 16 | (second & 0xffff0000u);
    }
  }

  static __device__ __forceinline__ int at_most(int64_t a, int b) {
    return a < b ? static_cast<int>(a < 0 ? 0 : a) : b;
  }

  // store(row, rank, out[row, rank]) for the tile's elements that exist, once each, by any thread. The whole block
  // calls it.
  template <typename Store>
  static __device__ __forceinline__ void run(const T* __restrict__ x,  // [tokens, columns]
                                             int64_t tokens, int64_t columns,
                                             const T* __restrict__ factor,  // [r, columns] or [columns, r]
                                             int64_t r, int64_t row0, int64_t q0, const Store& store) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4, t = lane % 4;
    const int chunks = static_cast<int>(ceil_div(columns, kChunk));  // a row has less than 2^31 of them, 128 GiB
    const int rows_left = at_most(tokens - row0 - group, kRows),
              ranks_left = at_most(r - q0 - (kRankMajor ? group : kRankTiles * group), kRanks);
    const T* lane_x = x + (row0 + group) * columns + 8 * t;
    const T* lane_factor = factor + (kRankMajor ? (q0 + group) * columns + 8 * t : q0 + kRankTiles * group + 8 * t * r);

    // The compiler must not know the steps between loads and the bounds: it would keep an address and a predicate for
    // each load of each stage.
    const auto load_x = [&](Stage& stage, int chunk) {
      const int64_t c = static_cast<int64_t>(chunk) * kChunk;
      const int left = at_most(columns - c - 8 * t, 8);  // columns from the lane's first on
      int rows = left > 0 ? rows_left : 0;
      int64_t step = 8 * columns;
      asm volatile("" : "+r"(rows), "+l"(step));
      const T* p = lane_x + c;
#pragma unroll
      for (int k = 0; k < 2 * kRowTiles; ++k, p += step) load_eight(stage.x[k], p, 8 * k < rows ? left : 0);
    };
    const auto load_part = [&](Stage& stage, int chunk, int part) {
      const int64_t c = static_cast<int64_t>(chunk) * kChunk;
      const int left = at_most(columns - c - 8 * t, 8);
      int ranks = left > 0 ? ranks_left - part * kPartTiles * (kRankMajor ? 8 : 1) : 0;
      int64_t step = kRankMajor ? 8 * columns : r;
      asm volatile("" : "+r"(ranks), "+l"(step));
      const T* p = lane_factor + (kRankMajor ? c + part * kPartTiles * step : c * r + part * kPartTiles);
#pragma unroll
      for (int i = 0; i < kPieces; ++i, p += step) {
        if constexpr (kRankMajor) {
          load_eight(stage.factor[i], p, 8 * i < ranks ? left : 0);
        } else {
          load_ranks(stage.factor[i], p, i < left ? ranks : 0);
        }
      }
    };
    const auto load = [&](Stage& stage, int chunk) {
      load_x(stage, chunk);
      if constexpr (kParts == 1) load_part(stage, chunk, 0);
    };

    float sum[kRowTiles][kRankTiles][4] = {};
    Stage stages[kStages];
#pragma unroll
    for (int s = 0; s < kStages; ++s) load(stages[s], warp + s * kWarps);
    for (int first = warp; first < chunks; first += kStages * kWarps) {
#pragma unroll
      for (int s = 0; s < kStages; ++s) {
        const int chunk = first + s * kWarps;
        if (chunk >= chunks) break;
        Stage& stage = stages[s];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if constexpr (kParts > 1) load_part(stage, chunk, part);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
              const auto &top = stage.x[2 * i], &bottom = stage.x[2 * i + 1];
              const uint32_t a[4] = {top[2 * step], bottom[2 * step], top[2 * step + 1], bottom[2 * step + 1]};
#pragma unroll
              for (int j = 0; j < kPartTiles; ++j)
                mma<T>(sum[i][part * kPartTiles + j], a, fragment(stage, step, 0, j), fragment(stage, step, 1, j));
            }
          }
        }
        load(stage, chunk + kStages * kWarps);
      }
    }
    add_warps(sum, tokens, r, row0, q0, store);
  }

  // The sums of the warps, up to four products at a time; a thread adds an element of out, in the order of out.
  template <typename Store>
  static __device__ __forceinline__ void add_warps(const float (&sum)[kRowTiles][kRankTiles][4], int64_t tokens,
                                                   int64_t r, int64_t row0, int64_t q0, const Store& store) {
    constexpr int kAcross = kRankTiles < 4 ? kRankTiles : 4;  // products side by side
    constexpr int kDown = kRowTiles * kAcross > 4 ? 1 : kRowTiles;
    constexpr int kPitch = 128 + 16;  // of a product: half a turn of the banks apart
    __shared__ __align__(16) float partial[kWarps][kAcross * kDown * kPitch];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = threadIdx.x;
    const int row = e / (8 * kAcross), n = kRankMajor ? e % 8 : e % (8 * kAcross) / kAcross,
              across = kRankMajor ? e / 8 % kAcross : e % kAcross;
    // The element is number 2 (row / 8 % 2) + n % 2 of lane 4 (row % 8) + n / 2.
    const int element = (row / 16 * kAcross + across) * kPitch + (row % 8 * 4 + n / 2) * 4 + row / 8 % 2 * 2 + n % 2;
#pragma unroll
    for (int i = 0; i < kRowTiles; i += kDown) {
#pragma unroll
      for (int j = 0; j < kRankTiles; j += kAcross) {
        __syncthreads();
#pragma unroll
        for (int f = 0; f < kAcross * kDown; ++f) {
          const float (&c)[4] = sum[i + f / kAcross][j + f % kAcross];
          *reinterpret_cast<float4*>(&partial[warp][f * kPitch + lane * 4]) = make_float4(c[0], c[1], c[2], c[3]);
        }
        __syncthreads();
        const int64_t out_row = row0 + 16 * i + row,
                      rank = q0 + (kRankMajor ? 8 * (j + across) + n : kRankTiles * n + j + across);
        if (e < 128 * kAcross * kDown && out_row < tokens && rank < r) {
          float total = partial[0][element];
#pragma unroll
          for (int w = 1; w < kWarps; ++w) total += partial[w][element];
          store(out_row, rank, total);
        }
      }
    }
  }

  // Whether kWide may be set
  static bool wide(const T* x, int64_t columns, const T* factor, int64_t r) {
    const auto aligned = [](const T* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
    if (columns % 8 != 0 || !aligned(x, 16)) return false;
    return kRankMajor ? aligned(factor, 16) : r % kRankTiles == 0 && aligned(factor, 2 * kRankTiles);
  }
};

}  // namespace unilora

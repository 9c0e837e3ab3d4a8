// A tile of the factor, A or B, in shared memory, where its layout no longer matters, and 16-byte accesses of float and
// double (contract: lora_linear.h). No torch.
#pragma once

#include "cuda/launch.cuh"
#include "lora_linear/lora_linear.h"

namespace unilora {

// body(std::integral_constant<int, kRanks>) with the rank tile for r
template <typename Body>
void with_rank_tile(int64_t r, const Body& body) {
  if (r <= 4) {
    body(std::integral_constant<int, 4>{});
  } else {
    body(std::integral_constant<int, 16>{});
  }
}

// 16 bytes of a row
template <typename T>
struct alignas(16) Numbers {
  static constexpr int kCount = 16 / sizeof(T);
  T value[kCount];
};

// store(q, c, factor[q0 + q, c0 + c]) for kRanks ranks and kColumns columns, zero beyond the factor. The whole block of
// kBlock threads calls it; threads follow the storage order, so that reads are coalesced in both layouts and from any
// element on, and issue a batch of loads before they store it.
template <int kRanks, int kColumns, int kBlock, typename T, typename Store>
__device__ __forceinline__ void stage_factor(const T* __restrict__ factor,  // [r, columns] or [columns, r]
                                             FactorLayout layout, int64_t r, int64_t columns, int64_t q0, int64_t c0,
                                             const Store& store) {
  constexpr int kElements = kRanks * kColumns, kBatch = kElements / kBlock < 8 ? kElements / kBlock : 8;
  static_assert(kElements % (kBatch * kBlock) == 0);
  const bool rank_major = layout == FactorLayout::kRankMajor;
  for (int first = threadIdx.x; first < kElements; first += kBatch * kBlock) {
    T value[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + i * kBlock;
      const int64_t rank = q0 + (rank_major ? e / kColumns : e % kRanks);
      const int64_t column = c0 + (rank_major ? e % kColumns : e / kRanks);
      value[i] =
          rank < r && column < columns ? factor[rank_major ? rank * columns + column : column * r + rank] : T(0.0f);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + i * kBlock;
      store(rank_major ? e / kColumns : e % kRanks, rank_major ? e % kColumns : e / kRanks, value[i]);
    }
  }
}

// tile[q][c] = scaling * factor[q0 + q, c0 + c], zero beyond the factor. The whole block calls it; threads follow its
// storage order, so that reads are coalesced in both layouts. kPitch >= kTileColumns: row length of the tile.
template <int kRanks, int kTileColumns, int kPitch, typename T, typename Acc>
__device__ __forceinline__ void load_factor(const T* __restrict__ factor,  // [r, columns] or [columns, r]
                                            FactorLayout layout, int64_t r, int64_t columns, int64_t q0, int64_t c0,
                                            Acc scaling, Acc (&tile)[kRanks][kPitch]) {
  const bool rank_major = layout == FactorLayout::kRankMajor;
  for (int e = threadIdx.x; e < kRanks * kTileColumns; e += blockDim.x) {
    const int q = rank_major ? e / kTileColumns : e % kRanks, c = rank_major ? e % kTileColumns : e / kRanks;
    const int64_t rank = q0 + q, column = c0 + c;
    const bool inside = rank < r && column < columns;
    tile[q][c] =
        inside ? scaling * widen<Acc>(factor[rank_major ? rank * columns + column : column * r + rank]) : Acc(0);
  }
}

}  // namespace unilora

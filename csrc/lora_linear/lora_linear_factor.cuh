// A tile of the factor, A or B, in shared memory, where its layout no longer matters (contract: lora_linear.h). No
// torch.
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

// y = [y or bias] + s h factor for 16-bit y, on tensor cores (contract: lora_linear.h; launchers:
// lora_linear_update.cuh). No torch.
#pragma once

#include "cuda/mma.cuh"
#include "lora_linear/lora_linear_factor.cuh"

namespace unilora {

// ---- rank_update, 16 bits -----------------------------------------------------------------------------------
// kOnto:  y[i, c] += s sum_q h[i, q] factor[q, c]
// else:   y[i, c]  = bias[c] + s sum_q h[i, q] factor[q, c]
//
// Work: the product is formed transposed, columns x ranks times ranks x rows, so that a lane's sums are eight columns
// of four rows, 16 bytes each, and eight lanes have 128 bytes of a row. A warp owns 16 rows and 64 columns; a block is
// four warps of rows by two of columns. It walks down a run of row tiles in a strip of columns, whose factor stays in
// shared memory; a row tile's y is on its way while its products are formed. r > 64: rank tiles of 64, the factor
// staged anew for each.
//
// Products: in TF32, which holds the factor; s h is the sum of two parts, but for a relative 2^-21.
//
// Bytes: y read (kOnto) and written once, 4 or 2 tokens columns; from L2, h, 4 tokens r, for each strip of 128 columns,
// and the factor, 2 r columns, for each run.
//
// Determinism: an element adds its ranks eight at a time, with the high parts before the low, to zero or its bias; then
// y; one rounding to T.

constexpr int kUpdateBlock = 256;
constexpr int kUpdateRows = 64;      // of a row tile
constexpr int kUpdateColumns = 128;  // of a strip

// Eight numbers of a row, two a register.
struct alignas(16) Eight {
  uint32_t pair[4];
};

// They stand `kStride` apart from `first` on; none from `left` on.
template <int kStride, typename T>
__device__ __forceinline__ Eight load_eight(const T* first, int64_t left) {
  Eight out{};
  if constexpr (kStride == 1) {
    if (left > 0) out = *reinterpret_cast<const Eight*>(first);
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(first);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i * kStride < left) out.pair[i / 2] |= static_cast<uint32_t>(bits[i * kStride]) << i % 2 * 16;
  }
  return out;
}

template <int kStride, typename T>
__device__ __forceinline__ void store_eight(T* first, int64_t left, const Eight& numbers) {
  if constexpr (kStride == 1) {
    // In PTX: nvcc splits an assignment here into four stores.
    if (left > 0)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(first), "r"(numbers.pair[0]),
                   "r"(numbers.pair[1]), "r"(numbers.pair[2]), "r"(numbers.pair[3])
                   : "memory");
  } else {
    auto* bits = reinterpret_cast<uint16_t*>(first);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i * kStride < left) bits[i * kStride] = static_cast<uint16_t>(numbers.pair[i / 2] >> i % 2 * 16);
  }
}

// kWide: y and bias are 16-byte aligned, columns a multiple of 8. A lane's eight columns are neighbours; otherwise
// every eighth of the warp's 64, so that narrow accesses are neighbours across lanes.
template <int kRanks, bool kWide, bool kOnto, typename T>
__global__ void __launch_bounds__(kUpdateBlock, 2)
    rank_update_mma_kernel(T* __restrict__ y,  // [tokens, columns]
                           int64_t tokens, int64_t columns,
                           const T* __restrict__ bias,   // [columns] or null
                           const float* __restrict__ h,  // [tokens, r]
                           int64_t r,
                           const T* __restrict__ factor,  // [r, columns] or [columns, r]
                           FactorLayout layout, float scaling, int64_t run_tiles) {
  constexpr int kSteps = kRanks / 8, kStride = kWide ? 1 : 8, kPitch = kUpdateColumns + 2;
  constexpr uint32_t kInfinity = 0x7f800000u;
  // Rank 2 t of a step of 8 lies in row t, rank 2 t + 1 in row t + 4: a lane's two ranks are neighbours in h, and an
  // odd pitch in words makes reads by fragment and writes in the factor's order free of bank conflicts.
  __shared__ __align__(16) T factor_tile[kRanks][kPitch];
  const int warp = threadIdx.x / kWarp, group = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 64;
  const bool h_in_pairs = r % 2 == 0 && reinterpret_cast<uintptr_t>(h) % sizeof(float2) == 0;
  const int64_t strips = ceil_div(columns, kUpdateColumns), row_tiles = ceil_div(tokens, kUpdateRows),
                runs = ceil_div(row_tiles, run_tiles) * strips;

  for (int64_t run = blockIdx.x; run < runs; run += gridDim.x) {
    const int64_t c0 = run % strips * kUpdateColumns, first_tile = run / strips * run_tiles,
                  end_tile = first_tile + run_tiles < row_tiles ? first_tile + run_tiles : row_tiles;
    const int64_t column = c0 + warp_column + (kWide ? 8 * group : group), left = columns - column;
    float2 start[4] = {};
    if (!kOnto && bias != nullptr) {
      const Eight numbers = load_eight<kStride>(bias + column, left);
#pragma unroll
      for (int j = 0; j < 4; ++j) start[j] = unpack<T>(numbers.pair[j]);
    }

    // Row 2 t + e of the warp's n-tile p of 8 rows is the lane's row 2 p + e.
    Eight old[4];
    const auto row_of = [&](int64_t tile, int i) { return tile * kUpdateRows + warp_row + i / 2 * 8 + 2 * t + i % 2; };
    const auto load_y = [&](int64_t tile) {
      if constexpr (kOnto) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t row = row_of(tile, i);
          old[i] = load_eight<kStride>(y + row * columns + column, tile < end_tile && row < tokens ? left : 0);
        }
      }
    };

    load_y(first_tile);
    bool infinite = false;
    for (int64_t tile = first_tile; tile < end_tile; ++tile) {
      float sum[2][4][4];  // n-tile of 8 rows, m-tile of 16 columns
#pragma unroll
      for (int p = 0; p < 2; ++p) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[p][j][e] = e < 2 ? start[j].x : start[j].y;
        }
      }
      for (int64_t q0 = 0; q0 < r; q0 += kRanks) {
        if (tile == first_tile || r > kRanks) {
          __syncthreads();
          bool found = false;
          stage_factor<kRanks, kUpdateColumns, kUpdateBlock, 4>(
              factor, layout, r, columns, q0, c0, [&](int q, int c, T value) {
                const int slot = kWide ? c : c / 64 * 64 + c % 8 * 8 + c % 64 / 8;
                factor_tile[q / 8 * 8 + q % 8 / 2 + q % 2 * 4][slot] = value;
                found = found || (__float_as_uint(widen<float>(value)) & ~0x80000000u) == kInfinity;
              });
          infinite = __syncthreads_or(found);
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int64_t rank = q0 + step * 8 + 2 * t;
          if (q0 + step * 8 >= r) break;
          uint32_t a[4][4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const T* slot = &factor_tile[step * 8 + t][warp_column + 8 * group + 2 * j];
            const float2 even = unpack<T>(*reinterpret_cast<const uint32_t*>(slot)),
                         odd = unpack<T>(*reinterpret_cast<const uint32_t*>(slot + 4 * kPitch));
            a[j][0] = __float_as_uint(even.x), a[j][1] = __float_as_uint(even.y);
            a[j][2] = __float_as_uint(odd.x), a[j][3] = __float_as_uint(odd.y);
          }
          Tf32Parts weight[2][2];
#pragma unroll
          for (int p = 0; p < 2; ++p) {
            const int64_t row = tile * kUpdateRows + warp_row + p * 8 + group;
            const float* own = h + row * r + rank;
            float2 value{0, 0};
            if (row < tokens && h_in_pairs) {
              if (rank < r) value = *reinterpret_cast<const float2*>(own);
            } else if (row < tokens) {
              if (rank < r) value.x = own[0];
              if (rank + 1 < r) value.y = own[1];
            }
            weight[p][0] = split_tf32(scaling * value.x), weight[p][1] = split_tf32(scaling * value.y);
          }
#pragma unroll
          for (int p = 0; p < 2; ++p) {
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_tf32(sum[p][j], a[j], weight[p][0].high, weight[p][1].high);
          }
          if (infinite) {  // the high part's product has it; a low part that is zero would make it NaN
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
              for (uint32_t& number : a[j]) number = (number & ~0x80000000u) == kInfinity ? 0 : number;
            }
          }
#pragma unroll
          for (int p = 0; p < 2; ++p) {
#pragma unroll
            for (int j = 0; j < 4; ++j) mma_tf32(sum[p][j], a[j], weight[p][0].low, weight[p][1].low);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t row = row_of(tile, i);
        Eight result;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float2 value{sum[i / 2][j][i % 2], sum[i / 2][j][2 + i % 2]};
          if constexpr (kOnto) {
            const float2 before = unpack<T>(old[i].pair[j]);
            value = {before.x + value.x, before.y + value.y};
          }
          result.pair[j] = pack<T>(value.x, value.y);
        }
        store_eight<kStride>(y + row * columns + column, row < tokens ? left : 0, result);
      }
      load_y(tile + 1);
    }
  }
}

template <bool kOnto, typename T>
void launch_update_mma(T* y, int64_t tokens, int64_t columns, const T* bias, const float* h, int64_t r, const T* factor,
                       FactorLayout layout, float scaling, cudaStream_t stream) {
  const int64_t strips = ceil_div(columns, kUpdateColumns), row_tiles = ceil_div(tokens, kUpdateRows);
  // Enough runs to fill a device; beyond 8 tiles, staging the factor is a small part of a run.
  constexpr int64_t kRuns = UNILORA_MAX_BLOCKS < 512 ? UNILORA_MAX_BLOCKS : 512, kLongest = 8;
  const int64_t share = row_tiles * strips / kRuns, run_tiles = share < 1 ? 1 : share < kLongest ? share : kLongest;
  const unsigned grid = grid_size(ceil_div(row_tiles, run_tiles) * strips, 1);
  const auto launch = [&](auto ranks, auto wide) {
    rank_update_mma_kernel<decltype(ranks)::value, decltype(wide)::value, kOnto>
        <<<grid, kUpdateBlock, 0, stream>>>(y, tokens, columns, bias, h, r, factor, layout, scaling, run_tiles);
  };
  const auto launch_ranks = [&](auto wide) {
    if (r <= 8) {
      launch(std::integral_constant<int, 8>{}, wide);
    } else if (r <= 16) {
      launch(std::integral_constant<int, 16>{}, wide);
    } else {
      launch(std::integral_constant<int, 64>{}, wide);
    }
  };
  if (columns % 8 == 0 && (reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(bias)) % sizeof(Eight) == 0) {
    launch_ranks(std::true_type{});
  } else {
    launch_ranks(std::false_type{});
  }
}

}  // namespace unilora

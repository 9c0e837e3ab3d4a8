// CUDA kernels of the projection (contract and index arithmetic: projection.h). No torch.
// T: float, double, __half or __nv_bfloat16, the dtype of theta_D; Acc: float or double, that of theta_d.
#pragma once

#include "cuda/launch.cuh"
#include "projection/projection.h"

namespace unilora {

constexpr int kProjectionBlock = 256;

// ---- index generation -------------------------------------------------------------------------------------
// index[k] = column of position start + k
//
// One thread for a position or a pair of them, by the integer arithmetic of projection.h: the same columns as on
// the CPU, whatever the grid. Writes 4 n bytes; bound by arithmetic.

// A thread computes one Philox block and so both positions of a pair; the first and last pair may be cut.
static __global__ void __launch_bounds__(kProjectionBlock)
    uniform_index_kernel(int32_t* __restrict__ index,  // [n]
                         int64_t n, int64_t pairs, UniformMap map, uint64_t start) {
  const uint64_t first_pair = start / 2;
  const int64_t cut = static_cast<int64_t>(start % 2);  // positions of the first pair that lie before `start`
  for (int64_t p = grid_begin(); p < pairs; p += grid_step()) {
    const ColumnPair columns = uniform_columns(map, first_pair + static_cast<uint64_t>(p));
    const int64_t even = 2 * p - cut, odd = even + 1;
    if (even >= 0) index[even] = static_cast<int32_t>(columns.even);
    if (odd < n) index[odd] = static_cast<int32_t>(columns.odd);
  }
}

inline void launch_index(int32_t* index,  // [n]
                         int64_t n, const UniformMap& map, uint64_t start, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t pairs = ceil_div(static_cast<int64_t>(start % 2) + n, 2);
  uniform_index_kernel<<<grid_size(pairs, kProjectionBlock), kProjectionBlock, 0, stream>>>(index, n, pairs, map,
                                                                                            start);
}

static __global__ void __launch_bounds__(kProjectionBlock)
    balanced_index_kernel(int32_t* __restrict__ index,  // [n]
                          int64_t n, BalancedMap map, uint32_t start) {
  for (int64_t k = grid_begin(); k < n; k += grid_step())
    index[k] = static_cast<int32_t>(map.column(start + static_cast<uint32_t>(k)));
}

inline void launch_index(int32_t* index,  // [n]
                         int64_t n, const BalancedMap& map, uint64_t start, cudaStream_t stream) {
  if (n == 0) return;
  balanced_index_kernel<<<grid_size(n, kProjectionBlock), kProjectionBlock, 0, stream>>>(index, n, map,
                                                                                         static_cast<uint32_t>(start));
}

// ---- gather -----------------------------------------------------------------------------------------------
// out[i] = (theta_d[index[i]] * scale[index[i]]) * value[i]
//
// Work: the first product depends on the column alone, so d of them are made first: in the dtype of the result, which
// keeps the table small, or in Acc where a value comes on top. Then one thread makes one element.
// Bytes: `index` and `out` stream, n (4 + sizeof(T)), and `value`, n sizeof(Acc), where it is; the table is read at
// random, one sector an element, from L2 where it fits; making it reads 2 d sizeof(Acc) and writes d sizeof(Entry).
// Determinism: an element has one writer and one product; equal to the CPU's, bit for bit.

template <typename Entry, typename Acc>
__global__ void __launch_bounds__(kProjectionBlock) scaled_theta_kernel(const Acc* __restrict__ theta_d,  // [d]
                                                                        const Acc* __restrict__ scale,    // [d]
                                                                        int64_t d,
                                                                        Entry* __restrict__ scaled) {  // [d]
  for (int64_t j = grid_begin(); j < d; j += grid_step()) scaled[j] = narrow<Entry>(theta_d[j] * scale[j]);
}

// kWeighted: whether there are values. Entry: Acc if so, else T.
template <bool kWeighted, typename Entry, typename Acc, typename T>
__global__ void __launch_bounds__(kProjectionBlock) gather_kernel(const Entry* __restrict__ scaled,  // [d]
                                                                  int64_t d,
                                                                  const int32_t* __restrict__ index,  // [n], in [0, d)
                                                                  const Acc* __restrict__ value,      // [n] or null
                                                                  int64_t n,
                                                                  T* __restrict__ out) {  // [n]
  for (int64_t i = grid_begin(); i < n; i += grid_step()) {
    const int32_t column = index[i];
    UNILORA_DEVICE_CHECK(0 <= column && column < d);
    if constexpr (kWeighted) {
      out[i] = narrow<T>(scaled[column] * value[i]);
    } else {
      out[i] = scaled[column];
    }
  }
}

// Bytes that launch_gather wants as scratch.
template <typename T, typename Acc>
int64_t gather_scratch(int64_t d, bool weighted) {
  return d * static_cast<int64_t>(weighted ? sizeof(Acc) : sizeof(T));
}

template <typename T, typename Acc>
void launch_gather(const Acc* theta_d,    // [d]
                   const Acc* scale,      // [d]
                   void* scratch,         // [gather_scratch<T, Acc>(d, value is given)] bytes
                   int64_t d,             //
                   const int32_t* index,  // [n], in [0, d)
                   const Acc* value,      // [n] or null
                   T* out,                // [n]
                   int64_t n, cudaStream_t stream) {
  if (n == 0) return;
  const auto launch = [&](auto weighted, auto* scaled) {
    scaled_theta_kernel<<<grid_size(d, kProjectionBlock), kProjectionBlock, 0, stream>>>(theta_d, scale, d, scaled);
    gather_kernel<decltype(weighted)::value>
        <<<grid_size(n, kProjectionBlock), kProjectionBlock, 0, stream>>>(scaled, d, index, value, n, out);
  };
  if (value == nullptr) {
    launch(std::false_type{}, static_cast<T*>(scratch));
  } else {
    launch(std::true_type{}, static_cast<Acc*>(scratch));
  }
}

// ---- segment-sum ------------------------------------------------------------------------------------------
// out[j] = scale[j] * sum of value[order[k]] * grad[order[k]], k in [offsets[j], offsets[j + 1])
//
// Work: a group of `width` lanes owns a column. Lane l takes the members l, l + width, l + 2 width, ... (`order` is
// read in whole sectors), then the lanes are added by a fixed tree. A column with more than kLongColumn members a
// lane is left to the whole block, in the same way: one crowded column does not hold up the rest.
// Bytes: order 4 n, offsets 4 d, scale and out 2 d sizeof(Acc), and one random sector of `grad` an element, and of
// `value` where it is.
// Determinism: width and block size follow from n and d; who adds what, and in which order, from these and the
// length of the column. No atomics. A column without members gives 0.

constexpr int64_t kLongColumn = 64;  // members a lane of a group takes at most
constexpr int kMaxSegmentBlock = 1024;

// The sum of members lane, lane + lanes, lane + 2 lanes, ... Four sums in turn keep four loads in flight.
template <bool kWeighted, typename Acc, typename T>
__device__ __forceinline__ Acc sum_members(const T* __restrict__ grad, const Acc* __restrict__ value, int64_t n,
                                           const int32_t* __restrict__ members, int64_t size, int lane, int lanes) {
  Acc sum[4] = {0, 0, 0, 0};
  for (int64_t k = lane; k < size; k += 4 * lanes) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t member = k + i * lanes;
      if (member >= size) break;
      const int32_t position = members[member];
      UNILORA_DEVICE_CHECK(0 <= position && position < n);
      if constexpr (kWeighted) {
        sum[i] += value[position] * widen<Acc>(grad[position]);
      } else {
        sum[i] += widen<Acc>(grad[position]);
      }
    }
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Sum over the block in a fixed order; thread 0 holds it. blockDim.x: a multiple of 32.
template <typename Acc>
__device__ Acc block_sum(Acc value) {
  __shared__ Acc warp_sums[kMaxSegmentBlock / kWarp];
  value = lane_sum(value, kWarp);
  __syncthreads();  // an earlier call's sums have been read
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x < kWarp) value = lane_sum(threadIdx.x < blockDim.x / kWarp ? warp_sums[threadIdx.x] : Acc(0), kWarp);
  return value;
}

template <bool kWeighted, typename T, typename Acc>
__global__ void __launch_bounds__(kMaxSegmentBlock)
    segment_sum_kernel(const T* __restrict__ grad,     // [n]
                       const Acc* __restrict__ value,  // [n] or null
                       int64_t n,
                       const Acc* __restrict__ scale,  // [d]
                       int64_t d,
                       const int32_t* __restrict__ order,    // [n], in [0, n)
                       const int32_t* __restrict__ offsets,  // [d + 1], ascending from 0 to n
                       int width,                            // lanes of a group: 1, 2, 4, 8, 16 or 32
                       Acc* __restrict__ out) {              // [d]
  const int64_t columns = blockDim.x / width;                // that a block takes at a time
  const int group = threadIdx.x / width, lane = threadIdx.x % width;
  if (grid_begin() == 0) UNILORA_DEVICE_CHECK(offsets[0] == 0 && offsets[d] == n);

  for (int64_t first = blockIdx.x * columns; first < d; first += gridDim.x * columns) {
    const int64_t j = first + group;
    int64_t begin = 0, size = 0;
    if (j < d) {
      begin = offsets[j];
      size = offsets[j + 1] - begin;
      UNILORA_DEVICE_CHECK(0 <= begin && 0 <= size && begin + size <= n);
    }
    const bool is_long = size > kLongColumn * width;
    const Acc sum =
        lane_sum(sum_members<kWeighted>(grad, value, n, order + begin, is_long ? 0 : size, lane, width), width);
    if (lane == 0 && j < d && !is_long) out[j] = scale[j] * sum;

    if (!__syncthreads_or(is_long)) continue;
    for (int64_t c = first; c < d && c < first + columns; ++c) {
      const int64_t c_begin = offsets[c], c_size = offsets[c + 1] - c_begin;
      if (c_size <= kLongColumn * width) continue;
      UNILORA_DEVICE_CHECK(0 <= c_begin && c_begin + c_size <= n);  // read anew
      const Acc total = block_sum(sum_members<kWeighted>(grad, value, n, order + c_begin, c_size,
                                                         static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)));
      if (threadIdx.x == 0) out[c] = scale[c] * total;
    }
  }
}

// Lanes for a column: about four members each on average.
inline int segment_width(int64_t n, int64_t d) {
  int width = 1;
  while (width < kWarp && width * 4 * d < n) width *= 2;
  return width;
}

template <typename T, typename Acc>
void launch_segment_sum(const T* grad,           // [n]
                        const Acc* value,        // [n] or null
                        int64_t n,               //
                        const Acc* scale,        // [d]
                        int64_t d,               //
                        const int32_t* order,    // [n], in [0, n)
                        const int32_t* offsets,  // [d + 1], ascending from 0 to n
                        Acc* out,                // [d]
                        cudaStream_t stream) {
  if (d == 0) return;
  const int width = segment_width(n, d);
  const int block = n / d > kLongColumn * kWarp ? kMaxSegmentBlock : kProjectionBlock;
  const auto kernel = value == nullptr ? segment_sum_kernel<false, T, Acc> : segment_sum_kernel<true, T, Acc>;
  kernel<<<grid_size(d, block / width), block, 0, stream>>>(grad, value, n, scale, d, order, offsets, width, out);
}

}  // namespace unilora

// CUDA kernels of the Walsh-Hadamard transform (contract: hadamard.h). No torch. T: float or double.
//
// Determinism: the butterflies of an element come in the order of their bits, whatever thread makes them, without
// atomics; equal to the CPU's, bit for bit.
#pragma once

#include "cuda/launch.cuh"
#include "hadamard/hadamard.h"

namespace unilora {

// The butterflies of the first `bits` bits of the place in v.
template <int kBits, typename T>
__device__ __forceinline__ void butterflies(T (&v)[1 << kBits], int bits = kBits) {
#pragma unroll
  for (int bit = 0; bit < kBits; ++bit) {
    if (bit >= bits) break;
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) {
      if ((i >> bit & 1) != 0) continue;
      const T a = v[i], b = v[i + (1 << bit)];
      v[i] = a + b;
      v[i + (1 << bit)] = a - b;
    }
  }
}

// ---- tiles ------------------------------------------------------------------------------------------------
// out = the butterflies of bits 0 to 11 of scale * x
//
// Work: a block takes a tile of 4096 numbers, of one row or of several shorter ones, through shared memory; a thread
// makes the butterflies of three bits at a time in eight registers, four times.
// Bytes: x and out once, coalesced, 2 sizeof(T) an element; shared memory 8 sizeof(T).

constexpr int kTileBits = 12;
constexpr int kTile = 1 << kTileBits;
constexpr int kTileThreads = kTile / 8;

// Where element i of a tile lies in shared memory: so that the lanes of a warp (for double those of half a warp, which
// are served at a time) are on different banks for each of the four steps.
template <typename T>
__device__ __forceinline__ int tile_place(int i) {
  if constexpr (sizeof(T) == 4) {
    const int high = i >> 5;
    return i ^ ((high & 1) + (high & 6) * 5);
  } else {
    const int high = i >> 4;
    return i ^ ((high & 3) + (high & 4) * 3);
  }
}

template <typename T>
__global__ void __launch_bounds__(kTileThreads) hadamard_tile_kernel(const T* __restrict__ x,  // [total]
                                                                     T* __restrict__ out,      // [total]
                                                                     int64_t total, int bits, T scale) {
  __shared__ T tile[kTile];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile; begin < total;
       begin += static_cast<int64_t>(gridDim.x) * kTile) {
    const int size = static_cast<int>(total - begin < kTile ? total - begin : kTile);
    T v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = i * kTileThreads + thread;
      v[i] = at < size ? x[begin + at] * scale : T(0);
    }
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (int i = 0; i < 8; ++i) tile[tile_place<T>(i * kTileThreads + thread)] = v[i];
#pragma unroll
    for (int bit = 0; bit < kTileBits; bit += 3) {
      // element i of this thread: its place with i as bits [bit, bit + 3) and the thread's number as the others
      const int low = thread & ((1 << bit) - 1), first = (thread - low) * 8 + low;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = tile[tile_place<T>(first + (i << bit))];
      butterflies<3>(v, bits - bit);
      if (bit + 3 == kTileBits) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) tile[tile_place<T>(first + (i << bit))] = v[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = i * kTileThreads + thread;
      if (at < size) out[begin + at] = v[i];
    }
  }
}

// ---- passes -----------------------------------------------------------------------------------------------
// data = the butterflies of bits [bit, bit + kBits) of data, in place
//
// Work: a thread holds the 2^kBits elements of a row whose places differ in these bits alone; its neighbours hold
// their neighbours, so that all reads and writes are coalesced.
// Bytes: 2 sizeof(T) an element.

constexpr int kPassThreads = 256;
template <typename T>
constexpr int kMostPassBits = sizeof(T) == 4 ? 6 : 5;  // 64 registers

template <int kBits, typename T>
__global__ void __launch_bounds__(kPassThreads) hadamard_pass_kernel(T* __restrict__ data,  // [count << kBits]
                                                                     int64_t count, int bit) {
  for (int64_t k = grid_begin(); k < count; k += grid_step()) {
    const int64_t low = k & ((int64_t{1} << bit) - 1);
    T* const first = data + (((k - low) << kBits) + low);
    T v[1 << kBits];
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) v[i] = first[static_cast<int64_t>(i) << bit];
    butterflies<kBits>(v);
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) first[static_cast<int64_t>(i) << bit] = v[i];
  }
}

template <int kBits, typename T>
void launch_hadamard_pass(T* data, int64_t total, int bit, int width, cudaStream_t stream) {
  if constexpr (kBits > 0) {
    if (width < kBits) return launch_hadamard_pass<kBits - 1>(data, total, bit, width, stream);
    const int64_t count = total >> kBits;
    hadamard_pass_kernel<kBits><<<grid_size(count, kPassThreads), kPassThreads, 0, stream>>>(data, count, bit);
  }
}

template <typename T>
void launch_hadamard(const T* x,     // [total], rows of 2^bits
                     T* out,         // [total]
                     int64_t total,  //
                     int bits, cudaStream_t stream) {
  if (total == 0) return;
  hadamard_tile_kernel<<<grid_size(total, kTile), kTileThreads, 0, stream>>>(x, out, total, bits,
                                                                             hadamard_scale<T>(bits));
  for_hadamard_passes(bits, kTileBits, kMostPassBits<T>, [&](int bit, int width) {
    launch_hadamard_pass<kMostPassBits<T>>(out, total, bit, width, stream);
  });
}

}  // namespace unilora

// The LoRA matmul: contract.
//
//   forward    h  = x A^T                       x [tokens, n], A [r, n]      -> h [tokens, r]
//              y  = x W^T + b + s h B^T         W [m, n], b [m], B [m, r]    -> y [tokens, m]
//   update     y += s h B^T                     y given: the product of a layer that computes it in its own way
//   backward   u  = dy B                        dy [tokens, m]               -> u [tokens, r]
//              dx = dy W + s u A,   dA = s u^T x,   dB = s dy^T h            (W and b are frozen)
//
// tokens: all leading dimensions of x taken together. x, W, b, A, B and the results have one dtype; h and u, and all
// sums of the low-rank part, have its accumulator dtype (float, for double tensors double). The two dense products are
// ATen's. The low-rank part is memory-bound kernels, each of which reads its large operand, x, y or g of `columns`
// columns, once:
//   dot              out[i, q]  = sum_c x[i, c] factor[q, c]
//   rank_update      y[i, c]   += s sum_q h[i, q] factor[q, c]
//   rank_product     y[i, c]    = b[c] + s sum_q h[i, q] factor[q, c]      (CUDA; y is written only)
//   outer            out[q, c]  = s sum_i h[i, q] g[i, c]
//   dot_and_outer    u and out of these two, from one read of g
// The factor is A as it is stored, or B, which is stored transposed.
// Every output element is summed by one owner in a fixed order: results do not depend on threads or scheduling.
#pragma once

namespace unilora {

enum class FactorLayout { kRankMajor, kRankMinor };  // A: [r, columns], B: [columns, r]

}  // namespace unilora

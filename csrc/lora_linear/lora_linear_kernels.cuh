// CUDA kernels of the LoRA matmul's low-rank part (contract: lora_linear.h). No torch.
// T: float, double, __half or __nv_bfloat16, the dtype of the matrices; Acc: float (double for double), that
// of h, u and all sums. Every matrix is dense and row-major; sizes may exceed 2^31 elements.
//
// Ranks are taken in tiles of kRanks = 4 (r <= 4) or 16, columns in tiles; a tile of the factor goes through shared
// memory, where its layout no longer matters and where what lies beyond its sizes is zero. Each output element has one
// owner that adds in an order given by the sizes alone, without atomics: results are bit-equal run to run.
#pragma once

#include "lora_linear/lora_linear_dot.cuh"
#include "lora_linear/lora_linear_outer.cuh"
#include "lora_linear/lora_linear_update.cuh"

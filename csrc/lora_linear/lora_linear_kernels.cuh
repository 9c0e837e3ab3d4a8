// CUDA kernels of the LoRA matmul's low-rank part (contract: lora_linear.h). No torch.
// T: float, double, __half or __nv_bfloat16, the dtype of the matrices; Acc: float (double for double), that
// of h, u and all sums. Every matrix is dense and row-major; sizes may exceed 2^31 elements.
//
// 16-bit matrices are multiplied on tensor cores, with sums in float: exact products of x or g and the factor, and
// with h or u, which stay float32, as the sum of two TF32 parts. float and double take plain kernels. Accesses are 16
// bytes wide where pointers and row lengths allow; a matrix may begin at any element, as A and B do in theta_D.
// What lies beyond a matrix counts as zero and is not multiplied: what is infinite or NaN stays in its row or column.
// Each output element has one owner that adds in an order given by the sizes alone, without atomics: results are
// bit-equal run to run.
#pragma once

#include "lora_linear/lora_linear_dot.cuh"
#include "lora_linear/lora_linear_dot_outer.cuh"
#include "lora_linear/lora_linear_few.cuh"
#include "lora_linear/lora_linear_outer.cuh"
#include "lora_linear/lora_linear_update.cuh"

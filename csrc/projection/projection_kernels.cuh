// CUDA kernels of the projection (contract and index arithmetic: projection.h). No torch.
#pragma once

#include "projection/projection_gather.cuh"
#include "projection/projection_index.cuh"
#include "projection/projection_order.cuh"
#include "projection/projection_seeded_scatter.cuh"
#include "projection/projection_segment_sum.cuh"

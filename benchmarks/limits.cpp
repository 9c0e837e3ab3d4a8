// What no arrangement of the projection's passes avoids: the random accesses to the table of d numbers. The kernels
// themselves, with theta_D and its gradient shrunk to one block that stays in the L1 cache. A library for ctypes.
#include "projection/projection_kernels.h"

using namespace unilora;

// A read for each row.
extern "C" uint32_t read_table(const float* table,    // [d]
                               const int32_t* index,  // [n]
                               int64_t n) {
  float block[kBlock];
  alignas(64) int32_t columns[kBlock];
  uint32_t seen = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    seen |= copy_columns(index + first, columns, size);  // as the operator does
    gather_block(table, columns, block, size);
    asm volatile("" : : "r"(block) : "memory");
  }
  return seen;
}

// An addition for each row.
extern "C" uint32_t update_table(float* table,          // [d]
                                 const int32_t* index,  // [n]
                                 int64_t n) {
  float block[kBlock] = {};
  alignas(64) int32_t columns[kBlock];
  uint32_t seen = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    seen |= copy_columns(index + first, columns, size);
    scatter_block<false>(block, columns, static_cast<const float*>(nullptr), table, size);
  }
  return seen;
}

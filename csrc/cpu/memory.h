// Memory of large results on the CPU.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>

#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace unilora {

constexpr int64_t kHugePage = int64_t{1} << 21;

// Asks for huge pages under memory that was allocated and not yet touched: where the system grants them, writing it
// for the first time takes one page fault for 2 MiB instead of 512, which is most of the cost of a fresh buffer.
inline void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (bytes > 0 && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

// Keeps one released block for the next request of its size. theta_D is made and dropped once a step: the system would
// take its memory back and clear it page by page every time, a quarter of the projection's cost.
class Recycler {
 public:
  static constexpr int64_t kLeast = 4 * kHugePage, kMost = 128 * kHugePage;  // 8 to 256 MiB; others are not kept

  static Recycler& instance() {
    static Recycler* const recycler = new Recycler;  // never destroyed: tensors may outlive static objects
    return *recycler;
  }

  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (bytes == bytes_) {
        bytes_ = 0;
        return std::exchange(block_, nullptr);
      }
    }
    void* const block = std::aligned_alloc(kHugePage, (bytes + kHugePage - 1) / kHugePage * kHugePage);
    if (block == nullptr) throw std::bad_alloc();
    advise_huge_pages(block, bytes);
    return block;
  }

  void give_back(void* block, int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::swap(block, block_);
      bytes_ = bytes;
    }
    std::free(block);
  }

 private:
  std::mutex mutex_;
  void* block_ = nullptr;
  int64_t bytes_ = 0;
};

// An uninitialised vector of n numbers on the CPU.
inline Tensor new_result(const Tensor& like, int64_t n, ScalarType dtype) {
  const int64_t bytes =
      n * dispatch_floating(dtype, [](auto tag) -> int64_t { return sizeof(typename decltype(tag)::type); });
  if (bytes < Recycler::kLeast || bytes > Recycler::kMost) {
    const Tensor result = torch::stable::new_empty(like, {n}, dtype);
    advise_huge_pages(result.mutable_data_ptr(), bytes);
    return result;
  }
  const int64_t stride = 1;
  return torch::stable::from_blob(Recycler::instance().take(bytes), {&n, 1}, {&stride, 1}, like.device(), dtype,
                                  [bytes](void* block) { Recycler::instance().give_back(block, bytes); });
}

}  // namespace unilora

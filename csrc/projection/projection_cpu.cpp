// CPU kernels of the projection. One pass each, split over elements (gather, index) or columns (segment-sum): no two
// threads share a sum, so results do not depend on the number of threads.
#include <atomic>
#include <vector>

#include "cpu/parallel.h"
#include "projection/projection_ops.h"

namespace unilora {
namespace {

constexpr int64_t kBlock = 4096;  // indices checked, then used, while they are in the L1 cache

// The largest index of a block, a negative one counting as very large.
UNILORA_MULTIVERSION uint32_t largest(const int32_t* index, int64_t n) {
  uint32_t top = 0;
  for (int64_t i = 0; i < n; ++i) top = std::max(top, static_cast<uint32_t>(index[i]));
  return top;
}

template <typename Acc, typename T>
UNILORA_INLINE void gather_block(const Acc* scaled, const int32_t* index, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(scaled[index[i]]);
}

template <typename T, typename Acc>
UNILORA_INLINE Acc sum_members(const T* grad, const int32_t* order, int64_t n) {
  Acc sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += static_cast<Acc>(grad[order[k]]);
  return sum;
}

UNILORA_MULTIVERSION void fill_uniform_pairs(int32_t* index, int64_t pairs, uint32_t d, uint64_t seed,
                                             uint64_t first_pair) {
  for (int64_t k = 0; k < pairs; ++k) {
    const ColumnPair columns = uniform_columns(seed, first_pair + static_cast<uint64_t>(k), d);
    index[2 * k] = static_cast<int32_t>(columns.even);
    index[2 * k + 1] = static_cast<int32_t>(columns.odd);
  }
}

struct CpuProjection {
  explicit CpuProjection(const Tensor&) {}

  void fill_uniform_index(int32_t* index, int64_t n, uint32_t d, uint64_t seed, uint64_t start) const {
    if (n > 0 && start % 2 == 1) {  // an odd start takes the second half of its pair
      *index++ = static_cast<int32_t>(uniform_columns(seed, start / 2, d).odd);
      ++start;
      --n;
    }
    parallel(n / 2, 60, [=](int64_t begin, int64_t end) {
      fill_uniform_pairs(index + 2 * begin, end - begin, d, seed, start / 2 + static_cast<uint64_t>(begin));
    });
    if (n % 2 == 1) {
      index[n - 1] = static_cast<int32_t>(uniform_columns(seed, (start + static_cast<uint64_t>(n) - 1) / 2, d).even);
    }
  }

  void fill_balanced_index(int32_t* index, int64_t n, const BalancedMap& map, uint32_t start) const {
    parallel(n, 60, [=](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        index[k] = static_cast<int32_t>(map.column(start + static_cast<uint32_t>(k)));
      }
    });
  }

  template <typename Acc, typename T>
  void gather(const Acc* theta_d, const Acc* scale, int64_t d, const int32_t* index, T* out, int64_t n) const {
    std::vector<Acc> scaled(static_cast<size_t>(d));
    for (int64_t j = 0; j < d; ++j) scaled[j] = theta_d[j] * scale[j];
    std::atomic<int64_t> bad{0};  // an index out of range; 0 never is
    parallel(n, 2, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b += kBlock) {
        const int64_t size = std::min(kBlock, end - b);
        const uint32_t top = largest(index + b, size);
        if (top >= d) {
          bad = static_cast<int32_t>(top);
          return;
        }
        gather_block(scaled.data(), index + b, out + b, size);
      }
    });
    if (bad != 0) fail("project", "index: expected values in [0, ", d, "), got ", bad.load());
  }

  template <typename T, typename Acc>
  void segment_sum(const T* grad, int64_t n, const Acc* scale, int64_t d, const int32_t* order, const int32_t* offsets,
                   Acc* out) const {
    if (offsets[0] != 0 || offsets[d] != n)
      fail("project_transpose", "offsets: expected to run from 0 to ", n, ", got ", offsets[0], " to ", offsets[d]);
    std::atomic<bool> bad{false};
    parallel(d, 4 + n / d, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = offsets[j], size = offsets[j + 1] - first;
        if (first < 0 || size < 0 || first + size > n || (size > 0 && largest(order + first, size) >= n)) {
          bad = true;
          return;
        }
        out[j] = scale[j] * sum_members<T, Acc>(grad, order + first, size);
      }
    });
    if (bad) fail("project_transpose", "order, offsets: expected members in [0, ", n, ") in ascending segments");
  }
};

// Counting sort of positions by column, stable: members ascend.
std::tuple<Tensor, Tensor> segment_order(const Tensor& index, int64_t d) {
  constexpr auto op = "segment_order";
  check_dtype(op, "index", index, ScalarType::Int);
  check_shape(op, "index", index, {-1});
  check_range(op, "d", d, 1, kMaxElements);
  check_range(op, "len(index)", index.numel(), 0, kMaxElements);
  const Tensor columns = torch::stable::contiguous(index);
  const int32_t* column = const_data<int32_t>(columns);
  const int64_t n = columns.numel();
  if (n > 0 && largest(column, n) >= d) fail(op, "index: expected values in [0, ", d, ")");

  const Tensor order = torch::stable::new_empty(columns, {n});
  const Tensor offsets = torch::stable::new_empty(columns, {d + 1});
  int32_t* bound = data<int32_t>(offsets);
  std::fill(bound, bound + d + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++bound[column[i] + 1];
  for (int64_t j = 0; j < d; ++j) bound[j + 1] += bound[j];
  std::vector<int32_t> next(bound, bound + d);
  int32_t* member = data<int32_t>(order);
  for (int64_t i = 0; i < n; ++i) member[next[column[i]]++] = static_cast<int32_t>(i);
  return {order, offsets};
}

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CPU, m) {
  UNILORA_IMPL_PROJECTION(m, unilora::CpuProjection);
  m.impl("segment_order", TORCH_BOX(&unilora::segment_order));
}

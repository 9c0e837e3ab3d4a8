// The projection's operators on the CPU. Rows are split over threads where each has its own output (gather, index),
// and into a number of parts that the sizes alone decide where they are summed (scatter): results do not depend on
// the number of threads.
#include <atomic>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "projection/projection_kernels.h"
#include "projection/projection_ops.h"

namespace unilora {
namespace {

// Columns computed for rows that are several ranges of positions, one after the other.
template <typename Map>
class ComputedColumns {
 public:
  ComputedColumns(const Map& map, const std::vector<RowRange>& ranges) : map_(map) {
    int64_t rows = 0;
    for (const RowRange& range : ranges) {
      runs_.push_back({rows, rows + range.stop - range.start, range.start});
      rows += range.stop - range.start;
    }
  }

  bool columns(int64_t first, int64_t n, int32_t* buffer) const {
    for (const Run& run : runs_) {
      const int64_t begin = std::max(first, run.begin), end = std::min(first + n, run.end);
      if (begin < end)
        fill_block(buffer + begin - first, end - begin, map_, static_cast<uint64_t>(run.position + begin - run.begin));
    }
    return true;
  }

 private:
  struct Run {
    int64_t begin, end, position;  // rows [begin, end) are positions from `position`
  };
  Map map_;
  std::vector<Run> runs_;
};

// Calls body(first, n, columns) for the blocks of rows [begin, end); returns false, at once, at a column out of range.
template <typename Source, typename Body>
bool for_blocks(const Source& source, int64_t begin, int64_t end, const Body& body) {
  alignas(64) int32_t buffer[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = std::min(kBlock, end - first);
    if (!source.columns(first, n, buffer)) return false;
    body(first, n, buffer);
  }
  return true;
}

[[noreturn]] void fail_index(const char* op, int64_t d) { fail(op, "index: expected values in [0, ", d, ")"); }

// out[i] = T((theta_d[j] scale[j]) value[i]), j the column of row i: the first products are made once, d of them.
template <typename T, typename Acc, typename Source>
void gather_rows(const char* op, const Acc* theta_d, const Acc* scale, int64_t d, const Source& source,
                 const Acc* value, T* out, int64_t n) {
  std::atomic<bool> good{true};
  const auto rows = [&](auto entry, const auto& block) {
    using Entry = typename decltype(entry)::type;
    const std::unique_ptr<Entry[]> table(new Entry[static_cast<size_t>(d)]);
    parallel(d, 4, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) table[j] = static_cast<Entry>(theta_d[j] * scale[j]);
    });
    parallel(n, 2, [&](int64_t begin, int64_t end) {
      if (!for_blocks(source, begin, end, [&](int64_t first, int64_t size, const int32_t* columns) {
            block(table.get(), first, size, columns);
          }))
        good = false;
    });
  };
  if (value == nullptr) {
    rows(TypeTag<T>{}, [=](const T* table, int64_t first, int64_t size, const int32_t* columns) {
      gather_block(table, columns, out + first, size);
    });
  } else {
    rows(TypeTag<Acc>{}, [=](const Acc* table, int64_t first, int64_t size, const int32_t* columns) {
      gather_block(table, columns, value + first, out + first, size);
    });
  }
  if (!good) fail_index(op, d);
}

// out[j] = scale[j] * sum of value[i] grad[i] over the rows i of column j. value: null without any.
template <typename T, typename Acc, typename Source>
void scatter_rows(const char* op, const Pieces& grad, const Acc* value, const Acc* scale, int64_t d,
                  const Source& source, Acc* out) {
  const int64_t n = grad.rows(), parts = scatter_parts(n, d);
  const std::unique_ptr<Acc[]> tables(new Acc[static_cast<size_t>(parts * d)]);
  Acc* const table = tables.get();
  advise_huge_pages(table, parts * d * static_cast<int64_t>(sizeof(Acc)));
  std::atomic<bool> good{true};
  parallel(parts, 2 * n / parts + d, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Acc* own = table + part * d;
      std::fill(own, own + d, Acc(0));
      const auto add = [&](int64_t stretch, int64_t stretch_end, const T* grads) {
        return for_blocks(source, stretch, stretch_end, [&](int64_t first, int64_t size, const int32_t* columns) {
          if (value == nullptr) {
            scatter_block<false>(grads + (first - stretch), columns, value, own, size);
          } else {
            scatter_block<true>(grads + (first - stretch), columns, value + first, own, size);
          }
        });
      };
      if (!grad.each<T>(n * part / parts, n * (part + 1) / parts, add)) good = false;
    }
  });
  parallel(d, parts, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      Acc sum = table[j];
      for (int64_t part = 1; part < parts; ++part) sum += table[part * d + j];
      out[j] = scale[j] * sum;
    }
  });
  if (!good) fail_index(op, d);
}

struct CpuProjection {
  Tensor like;

  explicit CpuProjection(const Tensor& like_) : like(like_) {}

  Tensor new_vector(int64_t n, ScalarType dtype) const { return new_result(like, n, dtype); }

  template <typename Map>
  void fill_index(int32_t* index, int64_t n, const Map& map, uint64_t start) const {
    parallel(n, 30, [=](int64_t begin, int64_t end) {
      fill_block(index + begin, end - begin, map, start + static_cast<uint64_t>(begin));
    });
  }

  template <typename T, typename Acc>
  void gather(const char* op, const Acc* theta_d, const Acc* scale, int64_t d, const int32_t* index, const Acc* value,
              T* out, int64_t n) const {
    gather_rows(op, theta_d, scale, d, StoredColumns{index, d}, value, out, n);
  }

  template <typename T, typename Acc, typename Map>
  void seeded_gather(const char* op, const Acc* theta_d, const Acc* scale, int64_t d, const Map& map,
                     const std::vector<RowRange>& ranges, T* out, int64_t n) const {
    const Acc* no_value = nullptr;
    gather_rows(op, theta_d, scale, d, ComputedColumns(map, ranges), no_value, out, n);
  }

  template <typename T, typename Acc, typename Map>
  void seeded_scatter(const char* op, const Pieces& grad, const Acc* scale, int64_t /*D*/, int64_t d, const Map& map,
                      const std::vector<RowRange>& ranges, Acc* out) const {
    const Acc* no_value = nullptr;
    scatter_rows<T>(op, grad, no_value, scale, d, ComputedColumns(map, ranges), out);
  }

  // By counting: how many members each column has, where they start, then each position at the next place of its
  // column. Both readings of the index are checked: another thread may write to it.
  void column_members(const char* op, const int32_t* index, int64_t n, int64_t d, const std::vector<int64_t>& lengths,
                      int32_t* order, int32_t* offsets) const {
    std::fill(offsets, offsets + d + 1, 0);
    for (int64_t i = 0; i < n; ++i) {
      const int32_t column = index[i];
      if (column < 0 || column >= d) fail_index(op, d);
      ++offsets[column + 1];
    }
    for (int64_t j = 0; j < d; ++j) offsets[j + 1] += offsets[j];
    std::vector<int32_t> next(offsets, offsets + d);
    const PiecePacking packing(static_cast<int64_t>(lengths.size()));
    for (size_t piece = 0; piece < lengths.size(); ++piece) {
      for (int64_t k = 0; k < lengths[piece]; ++k) {
        const int32_t column = *index++;
        if (column < 0 || column >= d || next[column] == offsets[column + 1]) fail_index(op, d);
        order[next[column]++] =
            static_cast<int32_t>(packing.pack(static_cast<uint32_t>(piece), static_cast<uint32_t>(k)));
      }
    }
  }

  // A column has one thread, which adds its members one by one.
  template <typename T, typename Acc>
  void segment_sum(const char* op, const Pieces& grad, const Acc* value, const Acc* scale, int64_t d,
                   const int32_t* order, const int32_t* offsets, Acc* out) const {
    const int64_t n = grad.rows();
    const std::vector<Piece<T>> pieces = grad.list<T>();
    const PiecePacking packing(grad.size());
    std::atomic<bool> good{true};
    parallel(d, 1 + 4 * n / d, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t first = offsets[j], last = offsets[j + 1];
        Acc sum = 0;
        bool in_range = 0 <= first && first <= last && last <= n;
        for (int64_t k = first; in_range && k < last; ++k) {
          const auto entry = static_cast<uint32_t>(order[k]);
          const int64_t piece = packing.piece(entry), offset = packing.offset(entry);
          in_range = piece < grad.size() && offset < pieces[piece].length;
          if (!in_range) break;
          const Acc term = static_cast<Acc>(pieces[piece].data[offset]);
          sum += value == nullptr ? term : value[grad.start(piece) + offset] * term;
        }
        out[j] = scale[j] * sum;
        if (!in_range) good = false;
      }
    });
    if (!good) fail(op, "order, offsets: expected what column_members gives for pieces of these lengths");
  }
};

Tensor project_scatter(std::vector<Tensor> grad_theta_D, const Tensor& scale, const Tensor& index,
                       const std::optional<Tensor>& value) {
  constexpr auto op = "project_scatter";
  const Pieces grad = checked_pieces(op, grad_theta_D, scale);
  check_index(op, "index", index, "grad_theta_D", grad_theta_D[0]);
  check_shape(op, "index", index, {grad.rows()});
  check_value(op, value, scale, grad.rows());
  const Tensor columns = dense(index), scales = dense(scale);
  const Tensor out = torch::stable::new_empty(scales, {scales.numel()});
  const Values values(value);
  dispatch_floating_pair(grad_theta_D[0].scalar_type(), scales.scalar_type(), [&](auto tag, auto acc) {
    using T = typename decltype(tag)::type;
    using Acc = typename decltype(acc)::type;
    scatter_rows<T>(op, grad, values.data<Acc>(), const_data<Acc>(scales), scales.numel(),
                    StoredColumns{const_data<int32_t>(columns), scales.numel()}, data<Acc>(out));
  });
  return out;
}

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CPU, m) {
  unilora::register_projection<unilora::CpuProjection>(m);
  m.impl("project_scatter", TORCH_BOX(&unilora::project_scatter));
}

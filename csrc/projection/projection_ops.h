// The projection's operators for any device: argument checks, and what the devices share as templates over Kernels,
// which is made from a tensor of the device (it holds guard and stream where there are any) and has
//   fill_index(index, n, map, start)       index[k] = the column of position start + k; map: UniformMap or BalancedMap
//   new_vector(n, dtype)                   an uninitialised tensor of n numbers
//   gather(op, theta_d, scale, d, index, value, out, n)      T: that of out, Acc: that of theta_d; value may be null
//   column_members(op, index, n, d, lengths, order, offsets)
//   segment_sum<T>(op, pieces, value, scale, d, order, offsets, out)      Acc: that of scale and out
//   seeded_gather(op, theta_d, scale, d, map, ranges, out, n)             n rows in all ranges
//   seeded_scatter<T>(op, pieces, scale, D, d, map, ranges, out)
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "projection/projection.h"
#include "projection/projection_pieces.h"

namespace unilora {

// Checks which columns are meant, then returns body(map) with the map of the algorithm and version.
template <typename Body>
auto with_index_map(const char* op, const std::string& algorithm, int64_t version, int64_t D, int64_t d, int64_t seed,
                    const Body& body) {
  const bool uniform = algorithm == "uniform";
  if (!uniform && algorithm != "balanced")
    fail(op, "algorithm: expected 'uniform' or 'balanced', got '", algorithm, "'");
  check_range(op, "version", version, 1, uniform ? kUniformVersion : kBalancedVersion);
  check_range(op, "D", D, 1, kMaxElements);
  check_range(op, "d", d, 1, kMaxElements);
  check_range(op, "seed", seed, 0, INT64_MAX);
  const auto rows = static_cast<uint32_t>(D), columns = static_cast<uint32_t>(d);
  const auto key = static_cast<uint64_t>(seed);
  return uniform ? body(UniformMap{columns, key}) : body(BalancedMap(version, rows, columns, key));
}

template <typename Kernels>
void fill_index(const Tensor& index, const std::string& algorithm, int64_t version, int64_t D, int64_t d, int64_t seed,
                int64_t start) {
  constexpr auto op = "fill_index";
  check_dtype(op, "index", index, ScalarType::Int);
  check_shape(op, "index", index, {-1});
  check_memory(op, "index", index);
  if (!index.is_contiguous()) fail(op, "index: expected a contiguous tensor");
  with_index_map(op, algorithm, version, D, d, seed, [&](const auto& map) {
    if constexpr (std::is_same_v<decltype(map), const UniformMap&>) {  // of any positions, whatever D
      check_range(op, "start", start, 0, INT64_MAX - index.numel());
    } else {
      check_range(op, "start", start, 0, D);  // before the sum, which could overflow
      check_range(op, "start + len(index)", start + index.numel(), 0, D);
    }
    Kernels(index).fill_index(data<int32_t>(index), index.numel(), map, static_cast<uint64_t>(start));
  });
}

inline void check_theta_d(const char* op, const Tensor& theta_d, const Tensor& scale, ScalarType dtype) {
  if (theta_d.scalar_type() != ScalarType::Double) check_dtype(op, "theta_d", theta_d, ScalarType::Float);
  check_shape(op, "theta_d", theta_d, {-1});
  check_dtype(op, "scale", scale, theta_d.scalar_type());
  check_shape(op, "scale", scale, {theta_d.numel()});
  check_floating(op, "dtype", dtype);
  check_range(op, "len(theta_d)", theta_d.numel(), 1, kMaxElements);
  check_same_device(op, "scale", scale, "theta_d", theta_d);
  check_memory(op, "theta_d", theta_d);
  check_memory(op, "scale", scale);
}

inline void check_grad(const char* op, const Tensor& grad_theta_D, const Tensor& scale) {
  check_floating(op, "grad_theta_D", grad_theta_D.scalar_type());
  if (scale.scalar_type() != ScalarType::Double) check_dtype(op, "scale", scale, ScalarType::Float);
  check_shape(op, "scale", scale, {-1});
  check_range(op, "len(scale)", scale.numel(), 1, kMaxElements);
  check_range(op, "len(grad_theta_D)", grad_theta_D.numel(), 0, kMaxElements);
  check_same_device(op, "scale", scale, "grad_theta_D", grad_theta_D);
  check_memory(op, "grad_theta_D", grad_theta_D);
  check_memory(op, "scale", scale);
}

inline void check_index(const char* op, const char* name, const Tensor& index, const char* other_name,
                        const Tensor& other) {
  check_dtype(op, name, index, ScalarType::Int);
  check_shape(op, name, index, {-1});
  check_range(op, "len(index)", index.numel(), 0, kMaxElements);
  check_same_device(op, name, index, other_name, other);
  check_memory(op, name, index);
}

// A number for each of n rows, where it is given.
inline void check_value(const char* op, const std::optional<Tensor>& value, const Tensor& scale, int64_t n) {
  if (!value.has_value()) return;
  check_dtype(op, "value", *value, scale.scalar_type());
  check_shape(op, "value", *value, {n});
  check_same_device(op, "value", *value, "scale", scale);
  check_memory(op, "value", *value);
}

// The values as kernels take them: while it lives, dense and at data<Acc>(), null without any.
class Values {
 public:
  explicit Values(const std::optional<Tensor>& value) {
    if (value.has_value()) held_ = dense(*value);
  }
  template <typename Acc>
  const Acc* data() const {
    return held_.has_value() ? const_data<Acc>(*held_) : nullptr;
  }

 private:
  std::optional<Tensor> held_;
};

// Tensors of any shape and one dtype that lie end to end: rows [0, rows()).
class Pieces {
 public:
  explicit Pieces(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) {
      held_.push_back(dense(tensor));
      lengths_.push_back(tensor.numel());
      rows_ += tensor.numel();
      ends_.push_back(rows_);
    }
  }

  int64_t rows() const { return rows_; }
  const std::vector<int64_t>& lengths() const { return lengths_; }
  int64_t size() const { return static_cast<int64_t>(held_.size()); }
  int64_t start(int64_t piece) const { return ends_[piece] - lengths_[piece]; }

  template <typename T>
  std::vector<Piece<T>> list() const {
    std::vector<Piece<T>> pieces;
    for (int64_t k = 0; k < size(); ++k) pieces.push_back({const_data<T>(held_[k]), lengths_[k]});
    return pieces;
  }

  // body(begin, end, values) for each stretch of rows [first, last) in one tensor, until one returns false.
  template <typename T, typename Body>
  bool each(int64_t first, int64_t last, const Body& body) const {
    for (int64_t k = std::upper_bound(ends_.begin(), ends_.end(), first) - ends_.begin(); first < last; ++k) {
      const int64_t end = std::min(last, ends_[k]);
      if (first < end && !body(first, end, const_data<T>(held_[k]) + (first - start(k)))) return false;
      first = end;
    }
    return true;
  }

 private:
  std::vector<Tensor> held_;
  std::vector<int64_t> lengths_, ends_;
  int64_t rows_ = 0;
};

// The pieces of grad_theta_D, all of the first one's dtype.
inline Pieces checked_pieces(const char* op, const std::vector<Tensor>& grad_theta_D, const Tensor& scale) {
  check_range(op, "number of tensors in grad_theta_D", static_cast<int64_t>(grad_theta_D.size()), 1, INT64_MAX);
  for (const Tensor& piece : grad_theta_D) {
    check_grad(op, piece, scale);
    check_dtype(op, "grad_theta_D", piece, grad_theta_D[0].scalar_type());
  }
  Pieces pieces(grad_theta_D);
  check_range(op, "len(grad_theta_D)", pieces.rows(), 0, kMaxElements);
  return pieces;
}

// Whether pieces of these lengths can be packed.
inline void check_packing(const char* op, const std::vector<int64_t>& lengths) {
  const auto pieces = static_cast<int64_t>(lengths.size());
  check_range(op, "number of pieces", pieces, 1, kMaxPieces);
  const int64_t largest = std::min(PiecePacking(pieces).largest(), kMaxElements);
  for (const int64_t length : lengths) check_range(op, "length of a piece", length, 0, largest);
}

template <typename Kernels>
std::tuple<Tensor, Tensor> column_members(const Tensor& index, int64_t d, std::vector<int64_t> lengths) {
  constexpr auto op = "column_members";
  check_index(op, "index", index, "index", index);
  check_range(op, "d", d, 1, kMaxElements);
  check_packing(op, lengths);
  int64_t rows = 0;
  for (const int64_t length : lengths) rows += length;
  check_range(op, "sum(lengths)", rows, index.numel(), index.numel());
  const Tensor columns = dense(index);
  const Tensor order = torch::stable::new_empty(columns, {rows}), offsets = torch::stable::new_empty(columns, {d + 1});
  Kernels(columns).column_members(op, const_data<int32_t>(columns), rows, d, lengths, data<int32_t>(order),
                                  data<int32_t>(offsets));
  return {order, offsets};
}

template <typename Kernels>
Tensor project_segment_sum(std::vector<Tensor> grad_theta_D, const Tensor& scale, const Tensor& order,
                           const Tensor& offsets, const std::optional<Tensor>& value) {
  constexpr auto op = "project_segment_sum";
  const Pieces grad = checked_pieces(op, grad_theta_D, scale);
  check_packing(op, grad.lengths());
  check_index(op, "order", order, "grad_theta_D", grad_theta_D[0]);
  check_shape(op, "order", order, {grad.rows()});
  check_index(op, "offsets", offsets, "grad_theta_D", grad_theta_D[0]);
  check_shape(op, "offsets", offsets, {scale.numel() + 1});
  check_value(op, value, scale, grad.rows());
  const Tensor scales = dense(scale), members = dense(order), bounds = dense(offsets);
  const Values values(value);
  const Tensor out = torch::stable::new_empty(scales, {scales.numel()});
  const Kernels kernels(scales);
  dispatch_floating_pair(grad_theta_D[0].scalar_type(), scales.scalar_type(), [&](auto tag, auto acc) {
    using T = typename decltype(tag)::type;
    using Acc = typename decltype(acc)::type;
    kernels.template segment_sum<T>(op, grad, values.data<Acc>(), const_data<Acc>(scales), scales.numel(),
                                    const_data<int32_t>(members), const_data<int32_t>(bounds), data<Acc>(out));
  });
  return out;
}

template <typename Kernels>
Tensor project(const Tensor& theta_d, const Tensor& scale, const Tensor& index, const std::optional<Tensor>& value,
               ScalarType dtype) {
  constexpr auto op = "project";
  check_theta_d(op, theta_d, scale, dtype);
  check_index(op, "index", index, "theta_d", theta_d);
  check_value(op, value, scale, index.numel());
  const Tensor theta = dense(theta_d), scales = dense(scale), columns = dense(index);
  const Values values(value);
  const Kernels kernels(theta);
  const Tensor out = kernels.new_vector(columns.numel(), dtype);
  dispatch_floating_pair(dtype, theta.scalar_type(), [&](auto tag, auto acc) {
    using T = typename decltype(tag)::type;
    using Acc = typename decltype(acc)::type;
    kernels.gather(op, const_data<Acc>(theta), const_data<Acc>(scales), theta.numel(), const_data<int32_t>(columns),
                   values.data<Acc>(), data<T>(out), columns.numel());
  });
  return out;
}

// Checks the description of computed rows, then calls body(map, ranges, rows) with their number.
template <typename Body>
Tensor with_computed_rows(const char* op, const std::string& algorithm, int64_t version, int64_t D, int64_t d,
                          int64_t seed, const std::vector<int64_t>& bounds, const Body& body) {
  return with_index_map(op, algorithm, version, D, d, seed, [&](const auto& map) {
    check_range(op, "len(ranges) % 2", static_cast<int64_t>(bounds.size()) % 2, 0, 0);
    std::vector<RowRange> ranges;
    int64_t rows = 0;
    for (size_t k = 0; k + 1 < bounds.size(); k += 2) {
      check_range(op, "stop of a range", bounds[k + 1], 0, D);
      check_range(op, "start of a range", bounds[k], 0, bounds[k + 1]);
      ranges.push_back({bounds[k], bounds[k + 1]});
      rows += bounds[k + 1] - bounds[k];
    }
    return body(map, ranges, rows);
  });
}

template <typename Kernels>
Tensor project_seeded(const Tensor& theta_d, const Tensor& scale, std::string algorithm, int64_t version, int64_t D,
                      int64_t seed, std::vector<int64_t> ranges, ScalarType dtype) {
  constexpr auto op = "project_seeded";
  check_theta_d(op, theta_d, scale, dtype);
  const auto gather = [&](const auto& map, const std::vector<RowRange>& of_rows, int64_t rows) {
    const Tensor theta = dense(theta_d), scales = dense(scale);
    const Kernels kernels(theta);
    const Tensor out = kernels.new_vector(rows, dtype);
    dispatch_floating_pair(dtype, theta.scalar_type(), [&](auto tag, auto acc) {
      using T = typename decltype(tag)::type;
      using Acc = typename decltype(acc)::type;
      kernels.seeded_gather(op, const_data<Acc>(theta), const_data<Acc>(scales), theta.numel(), map, of_rows,
                            data<T>(out), rows);
    });
    return out;
  };
  return with_computed_rows(op, algorithm, version, D, theta_d.numel(), seed, ranges, gather);
}

template <typename Kernels>
Tensor project_seeded_scatter(std::vector<Tensor> grad_theta_D, const Tensor& scale, std::string algorithm,
                              int64_t version, int64_t D, int64_t seed, std::vector<int64_t> ranges) {
  constexpr auto op = "project_seeded_scatter";
  const Pieces grad = checked_pieces(op, grad_theta_D, scale);
  const auto scatter = [&](const auto& map, const std::vector<RowRange>& of_rows, int64_t rows) {
    check_range(op, "len(grad_theta_D)", grad.rows(), rows, rows);
    const Tensor scales = dense(scale);
    const Tensor out = torch::stable::new_empty(scales, {scales.numel()});
    const Kernels kernels(scales);
    dispatch_floating_pair(grad_theta_D[0].scalar_type(), scales.scalar_type(), [&](auto tag, auto acc) {
      using T = typename decltype(tag)::type;
      using Acc = typename decltype(acc)::type;
      kernels.template seeded_scatter<T>(op, grad, const_data<Acc>(scales), D, scales.numel(), map, of_rows,
                                         data<Acc>(out));
    });
    return out;
  };
  return with_computed_rows(op, algorithm, version, D, scale.numel(), seed, ranges, scatter);
}

// What every device registers.
template <typename Kernels, typename Library>
void register_projection(Library& m) {
  m.impl("fill_index", TORCH_BOX(&fill_index<Kernels>));
  m.impl("project", TORCH_BOX(&project<Kernels>));
  m.impl("column_members", TORCH_BOX(&column_members<Kernels>));
  m.impl("project_segment_sum", TORCH_BOX(&project_segment_sum<Kernels>));
  m.impl("project_seeded", TORCH_BOX(&project_seeded<Kernels>));
  m.impl("project_seeded_scatter", TORCH_BOX(&project_seeded_scatter<Kernels>));
}

}  // namespace unilora

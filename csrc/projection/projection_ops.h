// The projection's operators for any device: argument checks, and what the devices share as templates over Kernels,
// which is made from a tensor of the device (it holds guard and stream where there are any) and has
//   fill_index(index, n, map, start)       index[k] = the column of position start + k; map: UniformMap or BalancedMap
//   new_vector(n, dtype)                   an uninitialised tensor of n numbers
//   gather(op, theta_d, scale, d, index, value, out, n)      T: that of out, Acc: that of theta_d; value may be null
#pragma once

#include <string>

#include "checks.h"
#include "projection/projection.h"

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

// What every device registers.
template <typename Kernels, typename Library>
void register_projection(Library& m) {
  m.impl("fill_index", TORCH_BOX(&fill_index<Kernels>));
  m.impl("project", TORCH_BOX(&project<Kernels>));
}

}  // namespace unilora

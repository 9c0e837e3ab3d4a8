// Argument checks of the operators, dispatch on the floating dtype, and memory as kernels take it. Shared by the CPU
// and CUDA libraries. Every message reads: operator, argument, what was expected, what came. Checks run before any work
// is done.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace unilora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << "unilora::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  if (t.scalar_type() != expected)
    fail(op, name, ": expected dtype ", torch::headeronly::toString(expected), ", got ",
         torch::headeronly::toString(t.scalar_type()));
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline void check_floating(const char* op, const char* name, ScalarType dtype) {
  if (!is_floating(dtype))
    fail(op, name, ": expected dtype Float, Double, Half or BFloat16, got ", torch::headeronly::toString(dtype));
}

// shape: sizes, -1 for any
inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool good = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) {
    if (good && size >= 0) good = t.size(i) == size;
    ++i;
  }
  if (good) return;
  std::ostringstream expected;
  i = 0;
  for (const int64_t size : shape) {
    expected << (i++ ? ", " : "");
    if (size < 0) {
      expected << '*';
    } else {
      expected << size;
    }
  }
  fail(op, name, ": expected shape [", expected.str(), "], got ", shape_of(t));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                              const Tensor& other) {
  if (t.device() != other.device())
    fail(op, name, ": expected the device of ", other_name, " (",
         other.is_cuda() ? "cuda:" : "cpu:", other.get_device_index(), "), got ",
         t.is_cuda() ? "cuda:" : "cpu:", t.get_device_index());
}

// The memory that a tensor's sizes speak of: one whose storage was released or shrunk, or a fake one, lacks it.
inline void check_memory(const char* op, const char* name, const Tensor& t) {
  if (t.numel() == 0) return;
  int64_t needed = t.storage_offset() + 1, held = 0;
  for (int64_t i = 0; i < t.dim(); ++i) needed += (t.size(i) - 1) * t.stride(i);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_numel(t.get(), &held));
  if (held < needed || t.const_data_ptr() == nullptr)
    fail(op, name, ": expected a storage of ", needed, " elements, got ",
         held < needed ? std::to_string(held) : std::string("one without memory"));
}

// value in [low, high]
inline void check_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail(op, name, ": expected a value in [", low, ", ", high, "], got ", value);
}

// Sums run in float, for double tensors in double.
template <typename T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls body(TypeTag<T>{}) with the C++ type of a floating dtype that check_floating has passed.
template <typename Body>
auto dispatch_floating(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(TypeTag<double>{});
    case ScalarType::Half:
      return body(TypeTag<torch::headeronly::Half>{});
    case ScalarType::BFloat16:
      return body(TypeTag<torch::headeronly::BFloat16>{});
    default:
      return body(TypeTag<float>{});
  }
}

// Calls body(TypeTag<T>{}, TypeTag<Acc>{}) for a tensor of `dtype` beside one of `acc`, Float or Double.
template <typename Body>
void dispatch_floating_pair(ScalarType dtype, ScalarType acc, Body&& body) {
  dispatch_floating(dtype, [&](auto tag) {
    if (acc == ScalarType::Double) {
      body(tag, TypeTag<double>{});
    } else {
      body(tag, TypeTag<float>{});
    }
  });
}

// A call through the dispatcher costs microseconds, which count in a layer of few tokens: none for what is there.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace unilora

// The Python module unilora_ext._C: build facts, and index generation to NumPy arrays without torch. Importing it
// registers the operators of ops.cpp and their CPU kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "projection/projection.h"

namespace py = pybind11;

namespace {

void check(bool good, const std::string& message) {
  if (!good) throw py::value_error(message);
}

void check_sizes(int64_t d, int64_t start, int64_t stop, int64_t limit) {
  using std::to_string;
  check(d >= 1 && d <= unilora::kMaxElements,
        "d: expected a value in [1, " + to_string(unilora::kMaxElements) + "], got " + to_string(d));
  check(0 <= start && start <= stop && stop <= limit,
        "start, stop: expected 0 <= start <= stop <= " + to_string(limit) + ", got " + to_string(start) + ", " +
            to_string(stop));
}

py::array_t<int32_t> uniform_index(int64_t d, uint64_t seed, int64_t start, int64_t stop) {
  check_sizes(d, start, stop, INT64_MAX);
  py::array_t<int32_t> out(stop - start);
  int32_t* column = out.mutable_data();
  for (int64_t i = start; i < stop; ++i) {
    const unilora::ColumnPair pair =
        unilora::uniform_columns(seed, static_cast<uint64_t>(i) / 2, static_cast<uint32_t>(d));
    *column++ = static_cast<int32_t>(i % 2 == 0 ? pair.even : pair.odd);
  }
  return out;
}

py::array_t<int32_t> balanced_index(int64_t D, int64_t d, uint64_t seed, int64_t start, int64_t stop) {
  check(D >= 1 && D <= unilora::kMaxElements,
        "D: expected a value in [1, " + std::to_string(unilora::kMaxElements) + "], got " + std::to_string(D));
  check_sizes(d, start, stop, D);
  const unilora::BalancedMap map(static_cast<uint32_t>(D), static_cast<uint32_t>(d), seed);
  py::array_t<int32_t> out(stop - start);
  int32_t* column = out.mutable_data();
  for (int64_t i = start; i < stop; ++i) *column++ = static_cast<int32_t>(map.column(static_cast<uint32_t>(i)));
  return out;
}

py::array_t<int32_t> balanced_members(int64_t D, int64_t d, uint64_t seed, int64_t column) {
  check(D >= 1 && D <= unilora::kMaxElements,
        "D: expected a value in [1, " + std::to_string(unilora::kMaxElements) + "], got " + std::to_string(D));
  check_sizes(d, column, column + 1, d);
  const unilora::BalancedMap map(static_cast<uint32_t>(D), static_cast<uint32_t>(d), seed);
  py::array_t<int32_t> out(column < D ? (D - column + d - 1) / d : 0);
  int32_t* member = out.mutable_data();
  for (int64_t e = column; e < D; e += d) *member++ = static_cast<int32_t>(map.position(static_cast<uint32_t>(e)));
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of unilora_ext: build facts, index generation to NumPy, operator registration.";
  m.attr("version") = UNILORA_VERSION;
  m.attr("build_torch") = UNILORA_BUILD_TORCH;
  m.attr("build_compiler") = UNILORA_BUILD_COMPILER;
  m.attr("build_cuda") = UNILORA_BUILD_CUDA;
  m.attr("build_cuda_architectures") = UNILORA_BUILD_CUDA_ARCHITECTURES;
  m.attr("max_elements") = unilora::kMaxElements;
  m.def("uniform_index", &uniform_index, py::arg("d"), py::arg("seed"), py::arg("start"), py::arg("stop"),
        "Columns of positions [start, stop) in [0, d), int32: each drawn independently (uniform, version 1).");
  m.def("balanced_index", &balanced_index, py::arg("D"), py::arg("d"), py::arg("seed"), py::arg("start"),
        py::arg("stop"), "Columns of positions [start, stop) of [0, D), int32: balanced, version 1.");
  m.def("balanced_members", &balanced_members, py::arg("D"), py::arg("d"), py::arg("seed"), py::arg("column"),
        "Positions that balanced_index maps to `column`, int32, by the inverse bijection.");
}

// The Python module unilora_ext._C: build facts. Importing it registers the operators of ops.cpp and their CPU kernels.
#include <pybind11/pybind11.h>

#include "projection/projection.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of unilora_ext: build facts, operator registration.";
  m.attr("version") = UNILORA_VERSION;
  m.attr("build_torch") = UNILORA_BUILD_TORCH;
  m.attr("build_compiler") = UNILORA_BUILD_COMPILER;
  m.attr("build_cuda") = UNILORA_BUILD_CUDA;
  m.attr("build_cuda_architectures") = UNILORA_BUILD_CUDA_ARCHITECTURES;
  m.attr("max_elements") = unilora::kMaxElements;
}

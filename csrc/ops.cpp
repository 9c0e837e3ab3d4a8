// Schemas of all operators. CPU implementations are registered in _C, CUDA ones in _C_cuda, fake ones in _operators.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(unilora, m) {
  // Index generation (projection/projection.h): fills index[k] with the column of position start + k of D. `algorithm`,
  // here and below: "uniform" or "balanced", and its version.
  m.def("fill_index(Tensor(a!) index, str algorithm, int version, int D, int d, int seed, int start) -> ()");

  // theta_D[i] = theta_d[index[i]] * scale[index[i]] * value[i], in `dtype`; no value: 1.
  m.def("project(Tensor theta_d, Tensor scale, Tensor index, Tensor? value, ScalarType dtype) -> Tensor");
  // grad_theta_d[j] = scale[j] * sum of value[i] grad_theta_D[i] over column j; sums and result in the dtype of scale.
  // Its gradient may come in pieces that lie end to end, as the layers make them. By one pass over theta_D (CPU), or by
  // one over each column's members.
  m.def("project_scatter(Tensor[] grad_theta_D, Tensor scale, Tensor index, Tensor? value) -> Tensor");
  m.def(
      "project_segment_sum(Tensor[] grad_theta_D, Tensor scale, Tensor order, Tensor offsets, Tensor? value) -> "
      "Tensor");
  // The members of column j are order[offsets[j]], ..., order[offsets[j + 1] - 1], by ascending position, each as piece
  // and offset in it (PiecePacking), for pieces of these lengths.
  m.def("column_members(Tensor index, int d, int[] lengths) -> (Tensor order, Tensor offsets)");

  // The same with the index computed on the way, without values; on CUDA the transpose is of "balanced" alone.
  // `ranges`: (start, stop) pairs of the rows, of D, that theta_D holds, one after the other.
  m.def(
      "project_seeded(Tensor theta_d, Tensor scale, str algorithm, int version, int D, int seed, int[] ranges, "
      "ScalarType dtype) -> Tensor");
  m.def(
      "project_seeded_scatter(Tensor[] grad_theta_D, Tensor scale, str algorithm, int version, int D, int seed, "
      "int[] ranges) -> Tensor");

  // y = H x along the last dimension, H orthonormal, of 2^k numbers (hadamard/hadamard.h).
  m.def("hadamard(Tensor x) -> Tensor");

  // y = x W^T + b + scaling h B^T, h = x A^T (kept for the backward).
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scaling) "
      "-> (Tensor y, Tensor h)");
  // y + scaling h B^T: the update of a layer whose own product is computed elsewhere. lora_update_ in place, returns h.
  m.def("lora_update(Tensor y, Tensor x, Tensor A, Tensor B, float scaling) -> (Tensor updated, Tensor h)");
  m.def("lora_update_(Tensor(a!) y, Tensor x, Tensor A, Tensor B, float scaling) -> Tensor");
  // Of lora_linear; without a weight, of the update alone. A gradient that is not asked for comes back as an empty
  // tensor of shape [0].
  m.def(
      "lora_linear_backward(Tensor grad_y, Tensor x, Tensor h, Tensor? weight, Tensor A, Tensor B, float scaling, "
      "bool need_grad_x, bool need_grad_A, bool need_grad_B) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B)");
}

// The LoRA matmul's operators for any device: argument checks, and the operators as templates over Kernels, which is
// made from a tensor of the device (it holds guard and stream where there are any) and has the kernels of the contract.
// T: the dtype of the matrices, Acc: its accumulator; all pointers to dense memory.
//   dot(x, tokens, columns, factor, layout, r, out)
//   rank_update(y, tokens, columns, h, r, factor, layout, s)
//   outer(g, tokens, columns, h, r, s, out, layout)
//   dot_and_outer(g, tokens, columns, factor, layout, h, r, s, u, out)
// and what a device may order in its own way (linear_then_update and matmul_then_update are for one that does not):
//   linear_with_update<T>(forward, weight, bias)   h, and y = x W^T + b + s h B^T
//   add_update<T>(forward, y)                      h, and y += s h B^T
//   grad_x<T>(backward)                            dx = dy W + s u A; without W, s u A
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "checks.h"
#include "lora_linear/lora_linear.h"

namespace unilora {

inline Tensor call_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

struct LoraLinearSizes {
  int64_t tokens, n, m, r;
  std::vector<int64_t> leading;  // x.shape[:-1]
};

inline LoraLinearSizes check_lora_linear(const char* op, const Tensor& x, const std::optional<Tensor>& weight,
                                         const Tensor& A, const Tensor& B) {
  check_floating(op, "x", x.scalar_type());
  if (weight.has_value()) check_shape(op, "weight", *weight, {-1, -1});
  check_shape(op, "A", A, {-1, weight.has_value() ? weight->size(1) : -1});
  check_shape(op, "B", B, {weight.has_value() ? weight->size(0) : -1, A.size(0)});
  const int64_t n = A.size(1), m = B.size(0), r = A.size(0);
  if (r < 1) fail(op, "A: expected rank r >= 1, got shape ", shape_of(A));
  if (x.dim() < 1 || x.size(x.dim() - 1) != n) fail(op, "x: expected shape [..., ", n, "], got ", shape_of(x));
  if (weight.has_value()) {
    check_dtype(op, "weight", *weight, x.scalar_type());
    check_same_device(op, "weight", *weight, "x", x);
    check_memory(op, "weight", *weight);
  }
  check_dtype(op, "A", A, x.scalar_type());
  check_dtype(op, "B", B, x.scalar_type());
  check_same_device(op, "A", A, "x", x);
  check_same_device(op, "B", B, "x", x);
  check_memory(op, "x", x);
  check_memory(op, "A", A);
  check_memory(op, "B", B);

  LoraLinearSizes sizes{1, n, m, r, {}};
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    sizes.tokens *= x.size(i);
    sizes.leading.push_back(x.size(i));
  }
  return sizes;
}

// A gradient or an output beside x: its leading shape and m columns, its dtype and device.
inline void check_beside_x(const char* op, const char* name, const Tensor& t, const Tensor& x,
                           const LoraLinearSizes& s) {
  check_dtype(op, name, t, x.scalar_type());
  check_same_device(op, name, t, "x", x);
  check_memory(op, name, t);
  if (t.dim() != x.dim() || t.size(t.dim() - 1) != s.m || t.numel() != s.tokens * s.m)
    fail(op, name, ": expected the leading shape of x and ", s.m, " columns, got ", shape_of(t));
}

inline Tensor with_leading(const Tensor& t, std::vector<int64_t> leading, int64_t last) {
  if (leading.size() == 1) return t;
  leading.push_back(last);
  return torch::stable::view(t, leading);
}

inline Tensor rows_of(const Tensor& t, int64_t tokens, int64_t last) {
  const Tensor rows = dense(t);
  return rows.dim() == 2 ? rows : torch::stable::view(rows, {tokens, last});
}

// A kernel writes into what ATen made, which must be what was asked for: a row of `last` numbers for each token.
inline void check_product(const char* op, const char* product, const Tensor& t, ScalarType dtype, int64_t tokens,
                          int64_t last) {
  check_dtype(op, product, t, dtype);
  if (t.numel() != tokens * last || !t.is_contiguous())
    fail(op, product, ": expected a contiguous result of ", tokens, " rows and ", last, " columns, got ", shape_of(t));
}

inline std::vector<int64_t> beside(std::vector<int64_t> leading, int64_t last) {
  leading.push_back(last);
  return leading;
}

// What a forward works on: checked, dense.
struct LoraForward {
  const char* op;
  LoraLinearSizes sizes;
  Tensor x;     // [..., n]
  Tensor A, B;  // [r, n], [m, r]
  double scaling;
  Tensor h;  // [..., r], to be written
};

// What dx is made of: checked, dense.
struct LoraBackward {
  const char* op;
  LoraLinearSizes sizes;
  Tensor dy;  // [tokens, m]
  std::optional<Tensor> weight;
  Tensor A;  // [r, n]
  double scaling;
  Tensor u;  // [tokens, r]
};

template <typename T, typename Kernels>
void dot_x(const Kernels& kernels, const LoraForward& f) {
  kernels.dot(const_data<T>(f.x), f.sizes.tokens, f.sizes.n, const_data<T>(f.A), FactorLayout::kRankMajor, f.sizes.r,
              data<accumulator<T>>(f.h));
}

template <typename T, typename Kernels>
void update_y(const Kernels& kernels, const LoraForward& f, const Tensor& y) {
  kernels.rank_update(data<T>(y), f.sizes.tokens, f.sizes.m, const_data<accumulator<T>>(f.h), f.sizes.r,
                      const_data<T>(f.B), FactorLayout::kRankMinor, f.scaling);
}

inline Tensor linear_product(const LoraForward& f, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor y = call_linear(f.x, weight, bias);
  check_product(f.op, "aten::linear", y, f.x.scalar_type(), f.sizes.tokens, f.sizes.m);
  return y;
}

template <typename T, typename Kernels>
void dot_then_update(const Kernels& kernels, const LoraForward& f, const Tensor& y) {
  dot_x<T>(kernels, f);
  update_y<T>(kernels, f, y);
}

// Around the dense product: it finds x in the cache, and the update finds y there.
template <typename T, typename Kernels>
Tensor linear_then_update(const Kernels& kernels, const LoraForward& f, const Tensor& weight,
                          const std::optional<Tensor>& bias) {
  dot_x<T>(kernels, f);
  const Tensor y = linear_product(f, weight, bias);
  update_y<T>(kernels, f, y);
  return y;
}

template <typename T, typename Kernels>
Tensor matmul_then_update(const Kernels& kernels, const LoraBackward& b) {
  const auto& [tokens, n, m, r, leading] = b.sizes;
  Tensor dx;
  if (b.weight.has_value()) {
    dx = torch::stable::matmul(b.dy, *b.weight);
    check_product(b.op, "aten::matmul", dx, b.dy.scalar_type(), tokens, n);
  } else {
    dx = torch::stable::new_zeros(b.dy, {tokens, n});
  }
  kernels.rank_update(data<T>(dx), tokens, n, const_data<accumulator<T>>(b.u), r, const_data<T>(b.A),
                      FactorLayout::kRankMajor, b.scaling);
  return dx;
}

template <typename Kernels>
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                       const Tensor& A, const Tensor& B, double scaling) {
  constexpr auto op = "lora_linear";
  const LoraLinearSizes s = check_lora_linear(op, x, weight, A, B);
  if (bias.has_value()) {
    check_shape(op, "bias", *bias, {s.m});
    check_dtype(op, "bias", *bias, x.scalar_type());
    check_same_device(op, "bias", *bias, "x", x);
    check_memory(op, "bias", *bias);
  }
  const LoraForward f{op,
                      s,
                      dense(x),
                      dense(A),
                      dense(B),
                      scaling,
                      torch::stable::new_empty(x, beside(s.leading, s.r), accumulator_dtype(x.scalar_type()))};
  const Kernels kernels(f.x);
  const Tensor y = dispatch_floating(x.scalar_type(), [&](auto tag) {
    return kernels.template linear_with_update<typename decltype(tag)::type>(f, weight, bias);
  });
  return {y, f.h};
}

template <typename Kernels>
Tensor lora_update_in_place(const char* op, const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                            double scaling) {
  const LoraLinearSizes s = check_lora_linear(op, x, std::nullopt, A, B);
  check_beside_x(op, "y", y, x, s);
  if (!y.is_contiguous()) fail(op, "y: expected a contiguous tensor");
  const LoraForward f{op,
                      s,
                      rows_of(x, s.tokens, s.n),
                      dense(A),
                      dense(B),
                      scaling,
                      torch::stable::new_empty(x, {s.tokens, s.r}, accumulator_dtype(x.scalar_type()))};
  const Kernels kernels(f.x);
  dispatch_floating(x.scalar_type(),
                    [&](auto tag) { kernels.template add_update<typename decltype(tag)::type>(f, y); });
  return with_leading(f.h, s.leading, s.r);
}

template <typename Kernels>
Tensor lora_update_(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B, double scaling) {
  return lora_update_in_place<Kernels>("lora_update_", y, x, A, B, scaling);
}

template <typename Kernels>
std::tuple<Tensor, Tensor> lora_update(const Tensor& y, const Tensor& x, const Tensor& A, const Tensor& B,
                                       double scaling) {
  check_memory("lora_update", "y", y);
  const Tensor sum = y.is_contiguous() ? torch::stable::clone(y) : torch::stable::contiguous(y);
  const Tensor h = lora_update_in_place<Kernels>("lora_update", sum, x, A, B, scaling);
  return {sum, h};
}

template <typename Kernels>
std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(const Tensor& grad_y, const Tensor& x, const Tensor& h,
                                                        const std::optional<Tensor>& weight, const Tensor& A,
                                                        const Tensor& B, double scaling, bool need_grad_x,
                                                        bool need_grad_A, bool need_grad_B) {
  constexpr auto op = "lora_linear_backward";
  const LoraLinearSizes s = check_lora_linear(op, x, weight, A, B);
  const ScalarType acc_dtype = accumulator_dtype(x.scalar_type());
  check_beside_x(op, "grad_y", grad_y, x, s);
  check_dtype(op, "h", h, acc_dtype);
  check_same_device(op, "h", h, "x", x);
  check_memory(op, "h", h);
  if (h.numel() != s.tokens * s.r) fail(op, "h: expected ", s.tokens * s.r, " elements, got shape ", shape_of(h));

  const Tensor dy = rows_of(grad_y, s.tokens, s.m);
  const Tensor dense_A = dense(A), dense_B = dense(B);
  // An operator's outputs must not alias: each missing gradient is an empty tensor of its own.
  Tensor grad_x;
  const Tensor grad_A =
      torch::stable::new_empty(dense_A, need_grad_A ? std::vector<int64_t>{s.r, s.n} : std::vector<int64_t>{0});
  const Tensor grad_B =
      torch::stable::new_empty(dense_B, need_grad_B ? std::vector<int64_t>{s.m, s.r} : std::vector<int64_t>{0});
  const Kernels kernels(dy);
  dispatch_floating(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = accumulator<T>;
    const bool need_u = need_grad_x || need_grad_A;
    const Tensor hidden = dense(h);
    const Tensor u = torch::stable::new_empty(dy, {need_u ? s.tokens : 0, s.r}, acc_dtype);
    const T *g = const_data<T>(dy), *factor = const_data<T>(dense_B);
    if (need_u && need_grad_B) {
      kernels.dot_and_outer(g, s.tokens, s.m, factor, FactorLayout::kRankMinor, const_data<Acc>(hidden), s.r, scaling,
                            data<Acc>(u), data<T>(grad_B));
    } else if (need_u) {
      kernels.dot(g, s.tokens, s.m, factor, FactorLayout::kRankMinor, s.r, data<Acc>(u));
    } else if (need_grad_B) {
      kernels.outer(g, s.tokens, s.m, const_data<Acc>(hidden), s.r, scaling, data<T>(grad_B), FactorLayout::kRankMinor);
    }
    if (need_grad_x) {
      grad_x = kernels.template grad_x<T>(LoraBackward{op, s, dy, weight, dense_A, scaling, u});
    } else {
      grad_x = torch::stable::new_empty(dy, {0});
    }
    if (need_grad_A) {
      const Tensor rows = rows_of(x, s.tokens, s.n);
      kernels.outer(const_data<T>(rows), s.tokens, s.n, const_data<Acc>(u), s.r, scaling, data<T>(grad_A),
                    FactorLayout::kRankMajor);
    }
  });
  if (need_grad_x) grad_x = with_leading(grad_x, s.leading, s.n);
  return {grad_x, grad_A, grad_B};
}

template <typename Kernels, typename Library>
void register_lora_linear(Library& m) {
  m.impl("lora_linear", TORCH_BOX(&lora_linear<Kernels>));
  m.impl("lora_update", TORCH_BOX(&lora_update<Kernels>));
  m.impl("lora_update_", TORCH_BOX(&lora_update_<Kernels>));
  m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward<Kernels>));
}

}  // namespace unilora

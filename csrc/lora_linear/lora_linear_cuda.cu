// The LoRA matmul on CUDA: torch's tensors, guard and stream joined to lora_linear_kernels.cuh, and the plan of
// lora_linear_plan.h carried out.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "cuda/device.h"
#include "lora_linear/lora_linear_kernels.cuh"
#include "lora_linear/lora_linear_ops.h"
#include "lora_linear/lora_linear_plan.h"

namespace unilora {
namespace {

// y += x factor. `out` and `self` are one tensor, which ATen does not copy: its product is accumulated onto y (beta =
// 1). The dispatcher's stable interface has no scalar arguments, ATen's C shim does.
void add_product(const Tensor& y, const Tensor& x, const Tensor& factor) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(y.get(), y.get(), x.get(), factor.get(), 1.0, 1.0));
}

static_assert(kPlanFewTokens <= kFewTokens);

template <typename Acc>
constexpr ScalarType kScratch = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;

struct CudaLoraLinear {
  CudaLaunch cuda;

  explicit CudaLoraLinear(const Tensor& like) : cuda(like) {}

  template <typename T>
  Tensor linear_with_update(const LoraForward& f, const Tensor& weight, const std::optional<Tensor>& bias) const {
    const auto& s = f.sizes;
    switch (forward_plan({sizeof(T), s.tokens, s.n, s.r, true}, forced_plan())) {
      case LoraPlan::kFew: {
        const Tensor y = linear_product(f, weight, bias);
        few<T>(f, y);
        return y;
      }
      case LoraPlan::kUpdateFirst: {
        const std::optional<Tensor> dense_bias = bias.has_value() ? std::optional(dense(*bias)) : std::nullopt;
        const Tensor y = torch::stable::new_empty(f.x, {s.tokens, s.m});
        dot_x<T>(*this, f);
        rank_product(data<T>(y), s.tokens, s.m, dense_bias.has_value() ? const_data<T>(*dense_bias) : nullptr,
                     const_data<accumulator<T>>(f.h), s.r, const_data<T>(f.B), FactorLayout::kRankMinor, f.scaling);
        add_product(y, rows_of(f.x, s.tokens, s.n), torch::stable::transpose(weight, 0, 1));
        return with_leading(y, s.leading, s.m);
      }
      default:
        return linear_then_update<T>(*this, f, weight, bias);
    }
  }

  template <typename T>
  void add_update(const LoraForward& f, const Tensor& y) const {
    const auto& s = f.sizes;
    if (forward_plan({sizeof(T), s.tokens, s.n, s.r, false}, forced_plan()) == LoraPlan::kFew) {
      few<T>(f, y);
    } else {
      dot_then_update<T>(*this, f, y);
    }
  }

  template <typename T>
  Tensor grad_x(const LoraBackward& b) const {
    const auto& s = b.sizes;
    if (grad_x_plan({sizeof(T), s.tokens, s.n, s.r, b.weight.has_value()}, forced_plan()) != LoraPlan::kUpdateFirst)
      return matmul_then_update<T>(*this, b);
    const Tensor dx = torch::stable::new_empty(b.dy, {s.tokens, s.n});
    rank_product<T>(data<T>(dx), s.tokens, s.n, nullptr, const_data<accumulator<T>>(b.u), s.r, const_data<T>(b.A),
                    FactorLayout::kRankMajor, b.scaling);
    if (b.weight.has_value()) add_product(dx, b.dy, *b.weight);
    return dx;
  }

  template <typename T, typename Acc>
  void dot(const T* x, int64_t tokens, int64_t columns, const T* factor, FactorLayout layout, int64_t r,
           Acc* out) const {
    launch_dot(cuda_pointer(x), tokens, columns, cuda_pointer(factor), layout, r, out, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void rank_update(T* y, int64_t tokens, int64_t columns, const Acc* h, int64_t r, const T* factor, FactorLayout layout,
                   double scaling) const {
    launch_rank_update(cuda_pointer(y), tokens, columns, h, r, cuda_pointer(factor), layout, scaling, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void rank_product(T* y, int64_t tokens, int64_t columns, const T* bias, const Acc* h, int64_t r, const T* factor,
                    FactorLayout layout, double scaling) const {
    launch_rank_product(cuda_pointer(y), tokens, columns, cuda_pointer(bias), h, r, cuda_pointer(factor), layout,
                        scaling, cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void outer(const T* g, int64_t tokens, int64_t columns, const Acc* h, int64_t r, double scaling, T* out,
             FactorLayout layout) const {
    const Tensor partial = cuda.scratch(outer_scratch(tokens, columns, r), kScratch<Acc>);
    launch_outer(cuda_pointer(g), tokens, columns, h, r, scaling, data<Acc>(partial), cuda_pointer(out), layout,
                 cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <typename T, typename Acc>
  void dot_and_outer(const T* g, int64_t tokens, int64_t columns, const T* factor, FactorLayout layout, const Acc* h,
                     int64_t r, double scaling, Acc* u, T* out) const {
    const Tensor partial = cuda.scratch(dot_and_outer_scratch(tokens, columns, r), kScratch<Acc>);
    launch_dot_and_outer(cuda_pointer(g), tokens, columns, cuda_pointer(factor), layout, h, r, scaling,
                         data<Acc>(partial), u, cuda_pointer(out), cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  // h, and y += s h B^T
  template <typename T>
  void few(const LoraForward& f, const Tensor& y) const {
    launch_few(cuda_pointer(data<T>(y)), cuda_pointer(const_data<T>(f.x)), f.sizes.tokens, f.sizes.n, f.sizes.m,
               cuda_pointer(const_data<T>(f.A)), cuda_pointer(const_data<T>(f.B)), f.sizes.r, f.scaling,
               data<accumulator<T>>(f.h), cuda.stream());
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace unilora

STABLE_TORCH_LIBRARY_IMPL(unilora, CUDA, m) { unilora::register_lora_linear<unilora::CudaLoraLinear>(m); }

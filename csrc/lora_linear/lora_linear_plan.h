// In which order the CUDA operators of the LoRA matmul form the dense product and the update. Plain C++.
//
//   few            the dense product; then h, and y += s h B^T, in one kernel
//   update_first   h; y = b + s h B^T, written; then the dense product is added to it (cuBLAS, beta = 1)
//   update_after   h; the dense product; then y += s h B^T, a kernel that reads and writes y once more
// and of dx likewise, whose dense product is dy W and whose update is s u A.
//
// UNILORA_CUDA_PLAN=few|update_first|update_after takes that plan wherever it is possible: to measure.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

namespace unilora {

enum class LoraPlan { kFew, kUpdateFirst, kUpdateAfter };

struct LoraShape {
  int64_t element_size;  // bytes, of x, W, A and B
  int64_t tokens, n, r;  // x [tokens, n], A [r, n]
  bool product;          // whether the dense product is the operator's: else y is given, and dx = s u A
};

// For `few`: its kernel reads A in every block, at about 40 bytes a ns (modelled): 6 us of one that is this large, and
// no more than h takes in a kernel of its own.
constexpr int64_t kPlanFewTokens = 8, kPlanFewBytes = 256 * 1024;

inline std::optional<LoraPlan> parse_plan(const char* text) {
  const std::string name = text == nullptr ? "" : text;
  if (name.empty()) return std::nullopt;
  if (name == "few") return LoraPlan::kFew;
  if (name == "update_first") return LoraPlan::kUpdateFirst;
  if (name == "update_after") return LoraPlan::kUpdateAfter;
  throw std::runtime_error("unilora: UNILORA_CUDA_PLAN: expected few, update_first or update_after, got " + name);
}

inline std::optional<LoraPlan> forced_plan() {
  static const std::optional<LoraPlan> plan = parse_plan(std::getenv("UNILORA_CUDA_PLAN"));
  return plan;
}

// The figures are times over the frozen layer's, H100, bf16, r = 16, for W 4096 x 4096 at 4,096 and 16,384 tokens, then
// 11008 x 4096 at the same: modelled, not measured.
inline LoraPlan forward_plan(const LoraShape& s, std::optional<LoraPlan> forced) {
  const bool few = s.tokens <= kPlanFewTokens, small = s.r * s.n * s.element_size <= kPlanFewBytes;
  if (forced == LoraPlan::kFew && few) return *forced;
  if (forced == LoraPlan::kUpdateFirst && s.product) return *forced;
  if (forced == LoraPlan::kUpdateAfter) return *forced;

  if (few && small) return LoraPlan::kFew;                // modelled: 2 launches a layer, each other plan 3
  if (!s.product) return LoraPlan::kUpdateAfter;          // y is given
  if (s.element_size > 2) return LoraPlan::kUpdateAfter;  // as on the CPU: b and x W^T are added before the update
  return LoraPlan::kUpdateFirst;  // modelled: 1.14 1.15 1.11 1.11; update_after 1.17 1.18 1.14 1.15
}

inline LoraPlan grad_x_plan(const LoraShape& s, std::optional<LoraPlan> forced) {
  if (forced.has_value() && forced != LoraPlan::kFew) return *forced;

  if (!s.product) return LoraPlan::kUpdateFirst;          // modelled: dx = s u A written, 1 launch; else zeros, then 1
  if (s.element_size > 2) return LoraPlan::kUpdateAfter;  // as on the CPU
  return LoraPlan::kUpdateFirst;  // modelled, backward: 1.20 1.21 1.11 1.12; after 1.23 1.24 1.13 1.13
}

}  // namespace unilora

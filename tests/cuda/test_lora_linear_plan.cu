// Tests of lora_linear_plan.h: which plan each shape takes, and what the environment variable may change.
#include "lora_linear/lora_linear_plan.h"

#include "testing.h"

using namespace testing;
using unilora::LoraPlan;
using unilora::LoraShape;

constexpr LoraPlan kFew = LoraPlan::kFew, kFirst = LoraPlan::kUpdateFirst, kAfter = LoraPlan::kUpdateAfter;

LoraShape shape(int64_t element_size, int64_t tokens, bool product) { return {element_size, tokens, 4096, 4, product}; }

void expect(const char* what, LoraPlan got, LoraPlan wanted) {
  const char* names[] = {"few", "update_first", "update_after"};
  check(got == wanted,
        std::string(what) + ": expected " + names[static_cast<int>(wanted)] + ", got " + names[static_cast<int>(got)]);
}

void test_tables() {
  using unilora::forward_plan;
  using unilora::grad_x_plan;
  for (const int64_t size : {2, 4, 8}) {
    for (const bool product : {false, true}) {
      for (const int64_t tokens : {0, 1, 8}) {
        expect("few tokens", forward_plan(shape(size, tokens, product), std::nullopt), kFew);
        expect("few tokens, forced", forward_plan(shape(size, tokens, product), kAfter), kAfter);
      }
    }
    expect("y given", forward_plan(shape(size, 4096, false), std::nullopt), kAfter);
    expect("y given, forced", forward_plan(shape(size, 4096, false), kFirst), kAfter);
    expect("dx of the update alone", grad_x_plan(shape(size, 4096, false), std::nullopt), kFirst);
  }
  // A of 256 KiB, and of more
  expect("few tokens, a small A", forward_plan({2, 8, 4096, 32, true}, std::nullopt), kFew);
  expect("few tokens, a large A", forward_plan({2, 8, 4096, 33, true}, std::nullopt), kFirst);
  expect("few tokens, a large A in float", forward_plan({4, 8, 4096, 33, true}, std::nullopt), kAfter);
  expect("few tokens, a large A, forced", forward_plan({2, 8, 4096, 33, true}, kFew), kFew);
  for (const int64_t tokens : {9, 4096, 1 << 20}) {
    expect("16 bits", forward_plan(shape(2, tokens, true), std::nullopt), kFirst);
    expect("32 or 64 bits", forward_plan(shape(4, tokens, true), std::nullopt), kAfter);
    expect("dx, 16 bits", grad_x_plan(shape(2, tokens, true), std::nullopt), kFirst);
    expect("dx, 32 or 64 bits", grad_x_plan(shape(4, tokens, true), std::nullopt), kAfter);
    expect("forced after", forward_plan(shape(2, tokens, true), kAfter), kAfter);
    expect("forced first", forward_plan(shape(4, tokens, true), kFirst), kFirst);
    expect("forced few, many tokens", forward_plan(shape(2, tokens, true), kFew), kFirst);
    expect("dx, forced after", grad_x_plan(shape(2, tokens, true), kAfter), kAfter);
    expect("dx, forced first", grad_x_plan(shape(4, tokens, true), kFirst), kFirst);
    expect("dx, forced few", grad_x_plan(shape(4, tokens, true), kFew), kAfter);
  }
}

void test_names() {
  using unilora::parse_plan;
  check(!parse_plan(nullptr).has_value() && !parse_plan("").has_value(), "no name, no plan");
  check(parse_plan("few") == kFew && parse_plan("update_first") == kFirst && parse_plan("update_after") == kAfter,
        "a plan for each name");
  std::string message;
  try {
    parse_plan("update-first");
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  check(message.find("update-first") != std::string::npos, "a wrong name is refused, and named");
}

int main() {
  test_tables();
  test_names();
  return finish();
}

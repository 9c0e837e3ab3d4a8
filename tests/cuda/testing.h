// Common parts of the kernel tests: device memory, random inputs, comparison, checks that name what failed.
// The tests are ordinary CUDA programs; argv[1] is the seed of their inputs; 0 is returned if all checks pass.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.cuh"

namespace testing {

inline long checks = 0, failures = 0;

inline void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("FAIL %s\n", what.c_str());
}

inline void cuda_check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("FAIL %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CUDA_CHECK(call) ::testing::cuda_check((call), #call)

inline void synchronize() {
  CUDA_CHECK(cudaGetLastError());
  CUDA_CHECK(cudaDeviceSynchronize());
}

// Where nothing watches memory accesses, a margin after the elements is checked for stray writes.
#ifdef CUDAHOST
constexpr size_t kMargin = 0;
#else
constexpr size_t kMargin = 256;
#endif

#ifdef CUDAHOST
// An emulator may watch shared memory only in blocks that are no larger than the first one launched.
static __global__ void widest_block_kernel() {}
inline void launch_widest_block() {
  static const bool launched = [] {
    widest_block_kernel<<<1, 1024>>>();
    return true;
  }();
  (void)launched;
}
#else
inline void launch_widest_block() {}
#endif

// Device copy of a vector, or n elements of garbage (NaN, -1). T: any trivially copyable type.
template <typename T>
class Device {
 public:
  explicit Device(size_t n) : n_(n) {
    launch_widest_block();
    CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&p_), bytes() + kMargin));
    CUDA_CHECK(cudaMemset(p_, 0xFF, bytes() + kMargin));
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    CUDA_CHECK(cudaMemcpy(p_, values.data(), bytes(), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(p_); }

  T* get() const { return p_; }

  std::vector<T> values() const {
    synchronize();
    std::vector<T> out(n_);
    CUDA_CHECK(cudaMemcpy(out.data(), p_, bytes(), cudaMemcpyDeviceToHost));
    std::vector<unsigned char> margin(kMargin);
    CUDA_CHECK(cudaMemcpy(margin.data(), reinterpret_cast<const char*>(p_) + bytes(), kMargin, cudaMemcpyDeviceToHost));
    for (const unsigned char byte : margin) {
      if (byte != 0xFF) {
        check(false, "write past the end of an array");
        break;
      }
    }
    return out;
  }

 private:
  T* p_ = nullptr;
  size_t n_;
  size_t bytes() const { return n_ * sizeof(T); }
};

// ---- dtypes -----------------------------------------------------------------------------------------------

// unit: largest relative error of a rounding; tiny: largest absolute one among subnormals
template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr const char* name = "float";
  static constexpr double unit = 0x1p-24, tiny = 0x1p-150;
};
template <>
struct Type<double> {
  static constexpr const char* name = "double";
  static constexpr double unit = 0x1p-53, tiny = 0;
};
template <>
struct Type<__half> {
  static constexpr const char* name = "half";
  static constexpr double unit = 0x1p-11, tiny = 0x1p-25;
};
template <>
struct Type<__nv_bfloat16> {
  static constexpr const char* name = "bfloat16";
  static constexpr double unit = 0x1p-8, tiny = 0x1p-134;
};

template <typename T>
T rounded(double value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}
template <typename T>
double exact(T value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return static_cast<double>(value);
  } else {
    return static_cast<double>(static_cast<float>(value));
  }
}

// ---- inputs -----------------------------------------------------------------------------------------------

// kReal: values in [-1, 1). kInteger: whole numbers in [-3, 3], of which every sum in these tests is exact in
// float, so that results must be equal and a single lost or doubled term shows.
enum class Values { kReal, kInteger };

template <typename T>
std::vector<T> random_values(std::mt19937_64& generator, size_t n, Values values) {
  std::vector<T> out(n);
  for (T& value : out) {
    const double u = static_cast<double>(generator() >> 11) * 0x1p-53;
    value = rounded<T>(values == Values::kReal ? 2 * u - 1 : std::floor(7 * u) - 3);
  }
  return out;
}

// ---- comparison -------------------------------------------------------------------------------------------

// A sum in the oracle's double precision: its value, and the sum of its terms' magnitudes.
struct Sum {
  double value = 0, magnitude = 0;
  long terms = 0;
  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
    ++terms;
  }
};

// |got - factor * sum|: each of the terms, and the few products around them, rounds once in Acc, the result
// once in T. `relative`: error of each term before it is added.
template <typename T, typename Acc>
bool close(T got, const Sum& sum, double factor, Values values, double relative = 0) {
  const double wanted = factor * sum.value;
  if (values == Values::kInteger) return exact(got) == exact(rounded<T>(wanted));
  const double units = static_cast<double>(sum.terms + 4) * Type<Acc>::unit + relative;
  const double bound =
      units * std::fabs(factor) * sum.magnitude + 1.01 * Type<T>::unit * std::fabs(wanted) + Type<T>::tiny;
  return std::fabs(exact(got) - wanted) <= bound;  // false for NaN
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline unsigned long long seed_of(int argc, char** argv) {
  const unsigned long long seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20250600799ULL;
  std::printf("seed %llu\n", seed);
  return seed;
}

inline int finish() {
  std::printf("%ld checks, %ld failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace testing

// Tests of hadamard_kernels.cuh: every number of bits, rows that fill no tile, against the butterflies on the host, bit
// for bit, and against the definition in double precision; on a GPU also more than 2^31 elements.
#include "hadamard/hadamard_kernels.cuh"
#include "testing.h"

using namespace testing;
using std::to_string;

// As the contract says it.
template <typename T>
std::vector<T> on_host(std::vector<T> x, int bits) {
  const T scale = unilora::hadamard_scale<T>(bits);
  for (T& value : x) value = value * scale;
  for (int bit = 0; bit < bits; ++bit) {
    for (size_t i = 0; i < x.size(); ++i) {
      if ((i >> bit & 1) != 0) continue;
      const T a = x[i], b = x[i + (size_t{1} << bit)];
      x[i] = a + b;
      x[i + (size_t{1} << bit)] = a - b;
    }
  }
  return x;
}

template <typename T>
void test_rows(std::mt19937_64& generator, int64_t rows, int bits) {
  const std::string name =
      std::string("hadamard<") + Type<T>::name + ">: rows " + to_string(rows) + ", 2^" + to_string(bits);
  const int64_t n = int64_t{1} << bits;
  const auto x = random_values<T>(generator, static_cast<size_t>(rows * n), Values::kReal);
  const Device<T> x_d(x);
  const auto run = [&] {
    const Device<T> out(x.size());
    unilora::launch_hadamard(x_d.get(), out.get(), rows * n, bits, nullptr);
    return out.values();
  };
  const std::vector<T> got = run();
  check(same_bits(got, run()), name + ": two launches differ");
  check(same_bits(got, on_host(x, bits)), name + ": differs from the host");
  if (bits > 8) return;
  for (int64_t row = 0; row < rows; ++row) {
    long double error = 0, norm = 0;
    for (int64_t i = 0; i < n; ++i) {
      long double wanted = 0;
      for (int64_t j = 0; j < n; ++j) {
        int parity = 0;
        for (int64_t common = i & j; common != 0; common &= common - 1) parity ^= 1;
        wanted += (parity ? -1 : 1) * exact(x[row * n + j]);
      }
      const long double difference = exact(got[row * n + i]) - wanted / std::sqrt(static_cast<long double>(n));
      error += difference * difference;
      norm += exact(x[row * n + i]) * exact(x[row * n + i]);
    }
    check(std::sqrt(error) <= 1.01 * (bits + 2) * Type<T>::unit * std::sqrt(norm),
          name + ", row " + to_string(row) + ": off by " +
              to_string(static_cast<double>(std::sqrt(error / norm) / Type<T>::unit)) + " roundings");
  }
}

template <typename T>
void test_dtype(std::mt19937_64& generator) {
  for (int bits = 0; bits <= 18; ++bits) {
    test_rows<T>(generator, 1, bits);
    if (bits <= 14) test_rows<T>(generator, 3, bits);
  }
  test_rows<T>(generator, 0, 5);
  test_rows<T>(generator, 5001, 0);
  test_rows<T>(generator, 2049, 1);
  test_rows<T>(generator, 777, 4);
  test_rows<T>(generator, 65, 7);
}

// Offsets beyond 2^31 elements: the last element of each row alone is not zero, and comes back.
void test_large() {
#ifndef CUDAHOST
  const int bits = 30;
  const int64_t rows = 3, n = int64_t{1} << bits;
  size_t available = 0, total = 0;
  CUDA_CHECK(cudaMemGetInfo(&available, &total));
  if (available < static_cast<size_t>(rows * n) * 9) {
    std::printf("skipped: 2 times %lld elements do not fit in device memory\n", static_cast<long long>(rows * n));
    return;
  }
  const Device<float> x(static_cast<size_t>(rows * n)), out(static_cast<size_t>(rows * n));
  CUDA_CHECK(cudaMemset(x.get(), 0, static_cast<size_t>(rows * n) * sizeof(float)));
  const float one = 1;
  for (int64_t row = 0; row < rows; ++row)
    CUDA_CHECK(cudaMemcpy(x.get() + row * n + n - 1, &one, sizeof(one), cudaMemcpyHostToDevice));
  unilora::launch_hadamard(x.get(), out.get(), rows * n, bits, nullptr);
  unilora::launch_hadamard(out.get(), x.get(), rows * n, bits, nullptr);
  synchronize();
  for (int64_t row = 0; row < rows; ++row) {
    float last[2];
    CUDA_CHECK(cudaMemcpy(last, x.get() + row * n + n - 2, sizeof(last), cudaMemcpyDeviceToHost));
    check(last[0] == 0 && last[1] == 1, "hadamard: twice is not the identity in row " + to_string(row));
  }
#endif
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_dtype<float>(generator);
  test_dtype<double>(generator);
  test_large();
  return finish();
}

// Tests of projection_kernels.cuh: Philox against Random123's known answers, index generation bit for bit
// against the host functions of projection.h, gather and segment-sum against sums in double precision.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>

#include "projection/projection_kernels.cuh"
#include "testing.h"

using namespace testing;
using std::to_string;

// ---- Philox -----------------------------------------------------------------------------------------------

struct KnownAnswer {
  uint32_t counter[4], key[2], word[4];
};
// The lines "philox4x32 10" of Random123's tests/kat_vectors.
const KnownAnswer kKnownAnswers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

uint64_t joined(const uint32_t* words) { return words[0] | static_cast<uint64_t>(words[1]) << 32; }

__global__ void philox_kernel(uint64_t seed, uint64_t counter, uint64_t stream, unilora::PhiloxBlock* out) {
  *out = unilora::philox4x32_10(seed, counter, stream);
}

void test_philox() {
  for (const KnownAnswer& known : kKnownAnswers) {
    const uint64_t seed = joined(known.key), counter = joined(known.counter), stream = joined(known.counter + 2);
    const unilora::PhiloxBlock host = unilora::philox4x32_10(seed, counter, stream);
    check(std::equal(host.word, host.word + 4, known.word), "philox4x32_10: host differs from Random123");
    const Device<unilora::PhiloxBlock> device(1);
    philox_kernel<<<1, 1>>>(seed, counter, stream, device.get());
    const unilora::PhiloxBlock got = device.values()[0];
    check(std::equal(got.word, got.word + 4, known.word), "philox4x32_10: device differs from Random123");
  }
}

// ---- index generation -------------------------------------------------------------------------------------

void test_uniform_index(std::mt19937_64& generator) {
  const uint64_t starts[] = {0, 1, 2, 7, 12345678901ULL, (UINT64_C(1) << 62) + 3};
  const uint32_t sizes[] = {1, 3, 1000, 524288, static_cast<uint32_t>(unilora::kMaxElements)};
  for (const uint64_t start : starts) {
    for (const int64_t n : {0, 1, 2, 17, 1026}) {
      const uint32_t d = sizes[generator() % 5];
      const uint64_t seed = generator() >> 1;
      const Device<int32_t> device(static_cast<size_t>(n));
      const unilora::UniformMap map{d, seed};
      unilora::launch_index(device.get(), n, map, start, nullptr);
      std::vector<int32_t> wanted(static_cast<size_t>(n));
      for (int64_t k = 0; k < n; ++k) {
        const uint64_t position = start + static_cast<uint64_t>(k);
        const unilora::ColumnPair pair = unilora::uniform_columns(map, position / 2);
        wanted[k] = static_cast<int32_t>(position % 2 == 0 ? pair.even : pair.odd);
      }
      check(device.values() == wanted, "uniform_index: start " + to_string(start) + ", n " + to_string(n) + ", d " +
                                           to_string(d) + ", seed " + to_string(seed));
    }
  }
}

void test_balanced_index(std::mt19937_64& generator) {
  struct Case {
    uint32_t D, d, start;
    int64_t n;
  };
  const Case cases[] = {{1, 1, 0, 1},
                        {10, 3, 0, 10},
                        {10, 3, 3, 7},
                        {256, 256, 0, 256},
                        {257, 16, 0, 257},
                        {1021, 7, 0, 1021},
                        {1021, 5000, 1, 9},
                        {9994240, 524288, 777, 1030},
                        {0x7fff0000u, 1, 5, 17},
                        {0x7fff0000u, 1u << 20, 0x7ffefff0u, 16},
                        {40, 8, 4, 0}};
  for (int64_t version = 1; version <= unilora::kBalancedVersion; ++version) {
    for (const Case& c : cases) {
      const uint64_t seed = generator() >> 1;
      const unilora::BalancedMap map(version, c.D, c.d, seed);
      const Device<int32_t> device(static_cast<size_t>(c.n));
      unilora::launch_index(device.get(), c.n, map, c.start, nullptr);
      std::vector<int32_t> wanted(static_cast<size_t>(c.n));
      for (int64_t k = 0; k < c.n; ++k)
        wanted[k] = static_cast<int32_t>(map.column(c.start + static_cast<uint32_t>(k)));
      const std::vector<int32_t> got = device.values();
      const std::string name = "balanced_index: version " + to_string(version) + ", D " + to_string(c.D) + ", d " +
                               to_string(c.d) + ", seed " + to_string(seed);
      check(got == wanted, name);
      if (c.n != c.D) continue;
      std::vector<int64_t> uses(c.d);
      for (const int32_t column : got) ++uses[column];
      for (uint32_t j = 0; j < c.d; ++j)
        check(uses[j] == c.D / c.d + (j < c.D % c.d ? 1 : 0), name + ": uses of column " + to_string(j));
    }
  }
}

// ---- gather and segment-sum -------------------------------------------------------------------------------

struct Shape {
  int64_t D, d;
  bool crowded = false;  // half of all positions in column d / 2
};

std::vector<int32_t> random_index(std::mt19937_64& generator, const Shape& shape) {
  std::vector<int32_t> index(static_cast<size_t>(shape.D));
  for (int32_t& column : index) {
    column = static_cast<int32_t>(generator() % static_cast<uint64_t>(shape.d));
    if (shape.crowded && generator() % 2 == 0) column = static_cast<int32_t>(shape.d / 2);
  }
  return index;
}

template <typename T, typename Acc>
void test_gather(std::mt19937_64& generator, const Shape& shape, bool weighted) {
  const std::string name = std::string("gather<") + Type<T>::name + ", " + Type<Acc>::name + ">: D " +
                           to_string(shape.D) + ", d " + to_string(shape.d) + (weighted ? ", values" : "");
  const auto value = random_values<Acc>(generator, shape.D, Values::kReal);
  const auto theta = random_values<Acc>(generator, shape.d, Values::kReal);
  const auto scale = random_values<Acc>(generator, shape.d, Values::kReal);
  const auto index = random_index(generator, shape);
  const Device<Acc> theta_d(theta), scale_d(scale), value_d(value);
  const Device<int32_t> index_d(index);
  const auto run = [&] {
    const Device<char> scratch(static_cast<size_t>(unilora::gather_scratch<T, Acc>(shape.d, weighted)));
    const Device<T> out(shape.D);
    unilora::launch_gather(theta_d.get(), scale_d.get(), scratch.get(), shape.d, index_d.get(),
                           weighted ? value_d.get() : nullptr, out.get(), shape.D, nullptr);
    return out.values();
  };
  const std::vector<T> got = run();
  check(same_bits(got, run()), name + ": two launches differ");
  for (int64_t i = 0; i < shape.D; ++i) {
    const Acc scaled = theta[index[i]] * scale[index[i]];
    const T wanted = rounded<T>(exact(weighted ? scaled * value[i] : scaled));
    check(exact(got[i]) == exact(wanted), name + ", i " + to_string(i) + ": expected " + to_string(exact(wanted)) +
                                              ", got " + to_string(exact(got[i])));
  }
}

template <typename T, typename Acc>
void test_segment_sum(std::mt19937_64& generator, const Shape& shape, Values values, bool weighted) {
  const std::string name = std::string("segment_sum<") + Type<T>::name + ", " + Type<Acc>::name + ">: D " +
                           to_string(shape.D) + ", d " + to_string(shape.d) + (weighted ? ", values" : "");
  const auto value = random_values<Acc>(generator, shape.D, values);
  const auto grad = random_values<T>(generator, shape.D, values);
  const auto scale = random_values<Acc>(generator, shape.d, values);
  const auto index = random_index(generator, shape);
  std::vector<int32_t> order(index.size()), offsets(static_cast<size_t>(shape.d) + 1);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return index[a] < index[b]; });
  for (const int32_t column : index) ++offsets[column + 1];
  for (int64_t j = 0; j < shape.d; ++j) offsets[j + 1] += offsets[j];

  const Device<T> grad_d(grad);
  const Device<Acc> scale_d(scale), value_d(value);
  const Device<int32_t> order_d(order), offsets_d(offsets);
  const auto run = [&] {
    const Device<Acc> out(shape.d);
    unilora::launch_segment_sum(grad_d.get(), weighted ? value_d.get() : nullptr, shape.D, scale_d.get(), shape.d,
                                order_d.get(), offsets_d.get(), out.get(), nullptr);
    return out.values();
  };
  const std::vector<Acc> got = run();
  check(same_bits(got, run()), name + ": two launches differ");
  std::vector<Sum> sums(static_cast<size_t>(shape.d));
  for (int64_t i = 0; i < shape.D; ++i) sums[index[i]].add(exact(grad[i]) * (weighted ? exact(value[i]) : 1));
  for (int64_t j = 0; j < shape.d; ++j)
    check(close<Acc, Acc>(got[j], sums[j], exact(scale[j]), values),
          name + ", column " + to_string(j) + " of " + to_string(sums[j].terms) + " members: expected " +
              to_string(exact(scale[j]) * sums[j].value) + ", got " + to_string(exact(got[j])));
}

template <typename T, typename Acc>
void test_projection(std::mt19937_64& generator) {
  // D = 0; one element; d = 1; d > D; few and many members a column; a column that a whole block sums
  const Shape shapes[] = {{0, 5}, {1, 1}, {701, 1}, {17, 301}, {1021, 333}, {999, 101}, {801, 9}, {777, 300, true}};
  for (const Shape& shape : shapes) {
    for (const bool weighted : {false, true}) {
      test_gather<T, Acc>(generator, shape, weighted);
      test_segment_sum<T, Acc>(generator, shape, Values::kReal, weighted);
      test_segment_sum<T, Acc>(generator, shape, Values::kInteger, weighted);
    }
  }
}

// ---- indices out of range ---------------------------------------------------------------------------------

// Whether a device check stops a launch, tried in a child process. Only before the first use of the device.
template <typename Body>
bool stops(const Body& body) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    body();
    _exit(cudaDeviceSynchronize() == cudaSuccess ? 0 : 3);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) return WTERMSIG(status) == SIGABRT;
  return WEXITSTATUS(status) == 3 || WEXITSTATUS(status) == 128 + SIGABRT;
}

void test_out_of_range() {
  const auto gather = [](int32_t column) {
    const Device<float> theta(std::vector<float>{1, 2, 3}), scaled(3), out(2);
    const Device<int32_t> index(std::vector<int32_t>{1, column});
    const float* no_value = nullptr;
    unilora::launch_gather(theta.get(), theta.get(), scaled.get(), 3, index.get(), no_value, out.get(), 2, nullptr);
  };
  const auto segment_sum = [](int32_t member, int32_t last_offset) {
    const Device<float> grad(std::vector<float>{1, 2}), scale(std::vector<float>{1, 1}), out(2);
    const Device<int32_t> order(std::vector<int32_t>{0, member}), offsets(std::vector<int32_t>{0, 1, last_offset});
    const float* no_value = nullptr;
    unilora::launch_segment_sum(grad.get(), no_value, 2, scale.get(), 2, order.get(), offsets.get(), out.get(),
                                nullptr);
  };
  check(!stops([&] { gather(2); }), "gather: index 2 of d = 3 was refused");
  check(stops([&] { gather(3); }), "gather: index 3 of d = 3 was not refused");
  check(stops([&] { gather(-1); }), "gather: index -1 was not refused");
  check(!stops([&] { segment_sum(1, 2); }), "segment_sum: a good order was refused");
  check(stops([&] { segment_sum(2, 2); }), "segment_sum: member 2 of 2 was not refused");
  check(stops([&] { segment_sum(-1, 2); }), "segment_sum: member -1 was not refused");
  check(stops([&] { segment_sum(1, 3); }), "segment_sum: offsets beyond the end were not refused");
  check(stops([&] { segment_sum(1, 1); }), "segment_sum: offsets short of the end were not refused");
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_out_of_range();
  test_philox();
  test_uniform_index(generator);
  test_balanced_index(generator);
  test_projection<float, float>(generator);
  test_projection<double, double>(generator);
  test_projection<__half, float>(generator);
  test_projection<__nv_bfloat16, float>(generator);
  test_projection<float, double>(generator);
  test_projection<double, float>(generator);
  test_projection<__half, double>(generator);
  test_projection<__nv_bfloat16, double>(generator);
  return finish();
}

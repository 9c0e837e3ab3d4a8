// Tests of projection.h on the device: Philox against Random123's known answers, index generation bit for bit against
// the host's functions, the inverse of the balanced map, and the packing of positions.
#include <algorithm>

#include "projection/projection_index.cuh"
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

// ---- inverse and packing ------------------------------------------------------------------------------------

__global__ void inverse_kernel(const unilora::BalancedMap map, uint32_t n, uint32_t first, uint32_t* out) {  // [n]
  for (uint32_t k = threadIdx.x; k < n; k += blockDim.x) out[k] = map.position(map.element(first + k));
}

void test_inverse(std::mt19937_64& generator) {
  struct Case {
    uint32_t D, first, n;
  };
  const Case cases[] = {{1, 0, 1},
                        {2, 0, 2},
                        {3, 0, 3},
                        {255, 0, 255},
                        {256, 0, 256},
                        {257, 0, 257},
                        {1021, 0, 1021},
                        {1024, 0, 1024},
                        {1025, 0, 1025},
                        {9994240, 77, 1000},
                        {0x7fff0000u, 0x7fff0000u - 500, 500}};
  for (int64_t version = 1; version <= unilora::kBalancedVersion; ++version) {
    for (const Case& c : cases) {
      const uint64_t seed = generator() >> 1;
      const unilora::BalancedMap map(version, c.D, 1, seed);
      const std::string name =
          "inverse: version " + to_string(version) + ", D " + to_string(c.D) + ", seed " + to_string(seed);
      for (uint32_t x = c.first; x < c.first + c.n; ++x) {
        check(map.position(map.element(x)) == x, name + ": position(element(" + to_string(x) + "))");
        check(map.element(map.position(x)) == x, name + ": element(position(" + to_string(x) + "))");
      }
      if (map.ranked() && c.D > 16) continue;  // slow on an emulator, and as on the host
      const Device<uint32_t> device(c.n);
      inverse_kernel<<<1, 64>>>(map, c.n, c.first, device.get());
      std::vector<uint32_t> wanted(c.n);
      for (uint32_t k = 0; k < c.n; ++k) wanted[k] = c.first + k;
      check(device.values() == wanted, name + ": on the device");
    }
  }
}

void test_packing() {
  for (const int64_t pieces : {1, 2, 3, 4, 5, 64, 65, 1023, 1024}) {
    const unilora::PiecePacking packing(pieces);
    const std::string name = to_string(pieces) + " pieces";
    check((INT64_C(1) << (32 - packing.shift)) >= pieces, name + ": too few bits");
    check(pieces == 1 || (INT64_C(1) << (31 - packing.shift)) < pieces, name + ": too many bits");
    for (const int64_t piece : {INT64_C(0), pieces / 2, pieces - 1}) {
      for (const int64_t offset : {INT64_C(0), INT64_C(1), packing.largest() - 1}) {
        const uint32_t entry = packing.pack(static_cast<uint32_t>(piece), static_cast<uint32_t>(offset));
        check(packing.piece(entry) == piece && packing.offset(entry) == offset,
              name + ": piece " + to_string(piece) + ", offset " + to_string(offset));
      }
    }
  }
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_philox();
  test_uniform_index(generator);
  test_balanced_index(generator);
  test_inverse(generator);
  test_packing();
  return finish();
}

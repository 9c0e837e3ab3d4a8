// Tests of projection_seeded_scatter.cuh against sums in double precision.
#include "projection/projection_seeded_scatter.cuh"
#include "projection_cases.h"

using namespace testing;
using std::to_string;

template <typename T, typename Acc>
void test_seeded(std::mt19937_64& generator, int64_t version, int64_t D, int64_t d,
                 const std::vector<unilora::RowRange>& ranges, int64_t pieces, Values values) {
  const std::string name = std::string("balanced_scatter<") + Type<T>::name + ", " + Type<Acc>::name + ">: version " +
                           to_string(version) + ", D " + to_string(D) + ", d " + to_string(d) + ", ranges " +
                           to_string(ranges.size()) + ", pieces " + to_string(pieces);
  const unilora::BalancedMap map(version, static_cast<uint32_t>(D), static_cast<uint32_t>(d), generator() >> 1);
  std::vector<int64_t> positions;
  for (const unilora::RowRange& range : ranges)
    for (int64_t position = range.start; position < range.stop; ++position) positions.push_back(position);
  const auto n = static_cast<int64_t>(positions.size());
  const auto grad = random_values<T>(generator, n, values);
  const auto scale = random_values<Acc>(generator, d, values);
  const DevicePieces<T> grads(grad, random_lengths(generator, n, pieces));
  std::vector<unilora::Segment<T>> segments;
  check(unilora::make_segments(grads.list, ranges, D, segments), name + ": ranges were refused");
  const Device<Acc> scale_d(scale);
  const auto run = [&] {
    const Device<Acc> out(d);
    unilora::launch_balanced_scatter(segments, map, D, scale_d.get(), d, out.get(), nullptr);
    return out.values();
  };
  const std::vector<Acc> got = run();
  check(same_bits(got, run()), name + ": two launches differ");
  std::vector<Sum> sums(static_cast<size_t>(d));
  for (int64_t i = 0; i < n; ++i) sums[map.column(static_cast<uint32_t>(positions[i]))].add(exact(grad[i]));
  expect_sums(got, sums, scale, values, name);
}

template <typename T, typename Acc>
void test_balanced(std::mt19937_64& generator) {
  struct Size {
    int64_t D, d;
  };
  // d = 1, which a whole block sums; d > D; ranked up to D = 256; D just above a square, where most steps are repeated
  const Size sizes[] = {{1, 1}, {10, 3}, {40, 7}, {257, 16}, {1021, 5000}, {1025, 11}, {3000, 1}, {3001, 300}};
  for (const Size& size : sizes) {
    for (const Values values : {Values::kReal, Values::kInteger}) {
      const int64_t version = 1 + static_cast<int64_t>(generator() % 2), D = size.D;
      test_seeded<T, Acc>(generator, version, D, size.d, {{0, D}}, 1, values);
      test_seeded<T, Acc>(generator, version, D, size.d, {{0, D}}, 1 + static_cast<int64_t>(generator() % 9), values);
      test_seeded<T, Acc>(generator, version, D, size.d, {{D / 2, D}, {0, D / 5}, {D / 3, D / 3}}, 3, values);
    }
  }
  test_seeded<T, Acc>(generator, 1, 8300, 4, {{0, 8300}}, 2, Values::kInteger);  // two columns a block
  test_seeded<T, Acc>(generator, 1, 3001, 300, {{1, 3001}}, 700, Values::kInteger);
  test_seeded<T, Acc>(generator, 2, 3001, 300, {{1, 3000}}, 500, Values::kInteger);
}

void test_segments() {
  const float* const data = nullptr;
  std::vector<unilora::Segment<float>> segments;
  const std::vector<unilora::Piece<float>> pieces{{data, 20}};
  check(!unilora::make_segments(pieces, {{0, 10}, {9, 19}}, 20, segments), "overlapping ranges were not refused");
  check(unilora::make_segments(pieces, {{10, 20}, {0, 10}}, 20, segments) && segments.size() == 2,
        "ranges in descending order were refused");
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_segments();
  test_balanced<float, float>(generator);
  test_balanced<double, double>(generator);
  test_balanced<__half, float>(generator);
  test_balanced<__nv_bfloat16, float>(generator);
  return finish();
}

// Tests of projection_gather.cuh, of a stored index and of a computed one: equal to products on the host.
#include "projection/projection_gather.cuh"
#include "projection_cases.h"

using namespace testing;
using std::to_string;

int64_t host_column(const unilora::UniformMap& map, uint32_t position) {
  const unilora::ColumnPair pair = unilora::uniform_columns(map, position / 2);
  return position % 2 == 0 ? pair.even : pair.odd;
}
int64_t host_column(const unilora::BalancedMap& map, uint32_t position) { return map.column(position); }

// theta_D as the host computes it.
template <typename T, typename Acc>
std::vector<T> gathered(const std::vector<Acc>& theta, const std::vector<Acc>& scale, const std::vector<int32_t>& index,
                        const std::vector<Acc>* value) {
  std::vector<T> out;
  for (size_t i = 0; i < index.size(); ++i) {
    const Acc scaled = theta[index[i]] * scale[index[i]];
    out.push_back(rounded<T>(exact(value == nullptr ? scaled : scaled * (*value)[i])));
  }
  return out;
}

// `offset` elements of garbage, then the values.
template <typename T>
std::vector<T> shifted(const std::vector<T>& values, size_t offset) {
  std::vector<T> out(offset);
  out.insert(out.end(), values.begin(), values.end());
  return out;
}

template <typename T>
void expect_equal(const std::vector<T>& got, const std::vector<T>& wanted, const std::string& name) {
  for (size_t i = 0; i < wanted.size(); ++i)
    check(exact(got[i]) == exact(wanted[i]) || (exact(got[i]) != exact(got[i]) && exact(wanted[i]) != exact(wanted[i])),
          name + ", i " + to_string(i) + ": expected " + to_string(exact(wanted[i])) + ", got " +
              to_string(exact(got[i])));
}

// offset: elements before index, value and out in their memory.
template <typename T, typename Acc>
void test_gather(std::mt19937_64& generator, const Shape& shape, bool weighted, size_t offset) {
  const std::string name = std::string("gather<") + Type<T>::name + ", " + Type<Acc>::name + ">: D " +
                           to_string(shape.D) + ", d " + to_string(shape.d) + (weighted ? ", values" : "") +
                           ", offset " + to_string(offset);
  const auto value = random_values<Acc>(generator, shape.D, Values::kReal);
  auto theta = random_values<Acc>(generator, shape.d, Values::kReal);
  const auto scale = random_values<Acc>(generator, shape.d, Values::kReal);
  theta[0] = std::numeric_limits<Acc>::infinity();
  if (shape.d > 9) theta[9] = std::numeric_limits<Acc>::quiet_NaN();
  const auto index = random_index(generator, shape);
  const Device<Acc> theta_d(theta), scale_d(scale), value_d(shifted(value, offset));
  const Device<int32_t> index_d(shifted(index, offset));
  const auto run = [&] {
    const Device<char> scratch(static_cast<size_t>(unilora::gather_scratch<T, Acc>(shape.d, weighted)));
    const Device<T> out(shape.D + offset);
    unilora::launch_gather(theta_d.get(), scale_d.get(), scratch.get(), shape.d, index_d.get() + offset,
                           weighted ? value_d.get() + offset : nullptr, out.get() + offset, shape.D, nullptr);
    return out.values();
  };
  const std::vector<T> got = run();
  check(same_bits(got, run()), name + ": two launches differ");
  for (size_t k = 0; k < offset; ++k) check(exact(got[k]) != exact(got[k]), name + ": write before out");
  expect_equal<T>({got.begin() + static_cast<int64_t>(offset), got.end()},
                  gathered<T>(theta, scale, index, weighted ? &value : nullptr), name);
}

template <typename T, typename Acc, typename Map>
void test_seeded(std::mt19937_64& generator, const char* algorithm, const Map& map, int64_t d,
                 const std::vector<unilora::RowRange>& ranges) {
  const std::string name = std::string("seeded_gather<") + Type<T>::name + ", " + Type<Acc>::name + ">: " + algorithm +
                           ", d " + to_string(d) + ", ranges " + to_string(ranges.size());
  const auto theta = random_values<Acc>(generator, d, Values::kReal);
  const auto scale = random_values<Acc>(generator, d, Values::kReal);
  std::vector<int32_t> index;
  for (const unilora::RowRange& range : ranges)
    for (int64_t position = range.start; position < range.stop; ++position)
      index.push_back(static_cast<int32_t>(host_column(map, static_cast<uint32_t>(position))));
  const Device<Acc> theta_d(theta), scale_d(scale);
  const Device<char> scratch(static_cast<size_t>(unilora::gather_scratch<T, Acc>(d, false)));
  const Device<T> out(index.size());
  unilora::launch_seeded_gather(theta_d.get(), scale_d.get(), scratch.get(), d, map, ranges, out.get(), nullptr);
  expect_equal(out.values(), gathered<T, Acc>(theta, scale, index, nullptr), name);
}

template <typename T, typename Acc>
void test_projection(std::mt19937_64& generator) {
  // D = 0; one element; d = 1; d > D; whole tiles, one element more and less; more tiles than blocks
  const Shape shapes[] = {{0, 5}, {1, 1}, {701, 1}, {17, 301}, {2047, 333}, {2048, 99}, {2049, 10}, {8500, 777, true}};
  for (const Shape& shape : shapes) {
    for (const bool weighted : {false, true}) test_gather<T, Acc>(generator, shape, weighted, shape.D > 8000 ? 4 : 0);
  }
  for (const size_t offset : {1, 2, 4, 8}) {
    for (const bool weighted : {false, true}) test_gather<T, Acc>(generator, {4100, 123}, weighted, offset);
  }
}

template <typename T, typename Acc>
void test_computed(std::mt19937_64& generator) {
  const uint64_t seed = generator() >> 1;
  const std::vector<std::vector<unilora::RowRange>> cases{
      {}, {{3, 3}}, {{0, 4096}}, {{5, 4110}}, {{4, 2053}}, {{7, 1000}, {1003, 1005}, {10, 10}, {0, 3}, {2000, 4111}}};
  std::vector<unilora::RowRange> many;  // more than a launch takes, of 0 to 31 rows
  for (int64_t start = 0; many.size() < 300; start += 13)
    many.push_back({start, start + static_cast<int64_t>(generator() % 32)});
  const auto test = [&](const std::vector<unilora::RowRange>& ranges, int64_t D) {
    test_seeded<T, Acc>(generator, "uniform", unilora::UniformMap{300, seed}, 300, ranges);
    test_seeded<T, Acc>(generator, "balanced", unilora::BalancedMap(1, static_cast<uint32_t>(D), 100, seed), 100,
                        ranges);
  };
  for (const auto& ranges : cases) test(ranges, 4111);
  test(many, 4111);
  for (const int64_t D : {1, 10, 33})  // ranked
    test_seeded<T, Acc>(generator, "balanced, version 2", unilora::BalancedMap(2, static_cast<uint32_t>(D), 3, seed), 3,
                        {{0, D}});
}

// ---- indices out of range ---------------------------------------------------------------------------------

void test_out_of_range() {
  const auto gather = [](size_t n, size_t bad, int32_t column) {
    const Device<float> theta(std::vector<float>{1, 2, 3}), scaled(3), out(n);
    std::vector<int32_t> columns(n, 1);
    columns[bad] = column;
    const Device<int32_t> index(columns);
    const float* no_value = nullptr;
    unilora::launch_gather(theta.get(), theta.get(), scaled.get(), 3, index.get(), no_value, out.get(),
                           static_cast<int64_t>(n), nullptr);
  };
  for (const size_t n : {size_t{9}, size_t{unilora::kGatherTile}}) {
    check(!stops([&] { gather(n, 7, 2); }), "gather: index 2 of d = 3 was refused");
    for (const size_t bad : {size_t{0}, size_t{1}, size_t{6}, n - 1}) {
      check(stops([&] { gather(n, bad, 3); }), "gather: index 3 of d = 3 was not refused");
      check(stops([&] { gather(n, bad, -1); }), "gather: index -1 was not refused");
    }
  }
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_out_of_range();
  test_projection<float, float>(generator);
  test_projection<double, double>(generator);
  test_projection<__half, float>(generator);
  test_projection<__nv_bfloat16, float>(generator);
  test_projection<float, double>(generator);
  test_projection<__nv_bfloat16, double>(generator);
  test_computed<float, float>(generator);
  test_computed<double, float>(generator);
  test_computed<__nv_bfloat16, float>(generator);
  return finish();
}

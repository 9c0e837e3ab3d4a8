// Tests of projection_order.cuh: equal to the standard library's stable sort.
#include "projection/projection_order.cuh"
#include "projection_cases.h"

using namespace testing;
using std::to_string;

void test_order(std::mt19937_64& generator, const Shape& shape, int64_t pieces) {
  const std::string name = "column_members: n " + to_string(shape.D) + ", d " + to_string(shape.d) + ", pieces " +
                           to_string(pieces) + (shape.crowded ? ", crowded" : "");
  const auto index = random_index(generator, shape);
  const auto lengths = random_lengths(generator, shape.D, pieces);
  const Members wanted(index, shape.d, lengths);
  const Device<int32_t> index_d(index);
  for (int launch = 0; launch < 2; ++launch) {
    const Device<char> scratch(static_cast<size_t>(unilora::sorted_positions_scratch(shape.D, shape.d)));
    const Device<int32_t> order(index.size()), offsets(static_cast<size_t>(shape.d) + 1);
    unilora::launch_column_members(index_d.get(), shape.D, shape.d, lengths, scratch.get(), order.get(), offsets.get(),
                                   nullptr);
    check(order.values() == wanted.order, name + ": order");
    check(offsets.values() == wanted.offsets, name + ": offsets");
    scratch.values();  // checks its margin
  }
}

// As many columns as there may be: four passes.
void test_many_columns(std::mt19937_64& generator) {
  const Shape shape{3000, unilora::kMaxElements};
  auto index = random_index(generator, shape);
  for (size_t k = 0; k < index.size(); k += 3) index[k] = static_cast<int32_t>(shape.d - 1 - index[k] % 2);
  std::vector<int32_t> wanted(index.size());
  std::iota(wanted.begin(), wanted.end(), 0);
  std::stable_sort(wanted.begin(), wanted.end(), [&](int32_t a, int32_t b) { return index[a] < index[b]; });
  const Device<int32_t> index_d(index), order(index.size());
  const Device<char> scratch(static_cast<size_t>(unilora::sorted_positions_scratch(shape.D, shape.d)));
  unilora::launch_sorted_positions(index_d.get(), shape.D, shape.d, scratch.get(), order.get(), nullptr);
  check(order.values() == wanted, "sorted_positions: d " + to_string(shape.d));
}

void test_out_of_range() {
  const auto sort = [](int32_t column) {
    const Device<int32_t> index(std::vector<int32_t>{1, column}), order(2);
    const Device<char> scratch(static_cast<size_t>(unilora::sorted_positions_scratch(2, 3)));
    unilora::launch_sorted_positions(index.get(), 2, 3, scratch.get(), order.get(), nullptr);
  };
  check(!stops([&] { sort(2); }), "index 2 of d = 3 was refused");
  check(stops([&] { sort(3); }), "index 3 of d = 3 was not refused");
  check(stops([&] { sort(-1); }), "index -1 was not refused");
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_out_of_range();
  // d = 1; one, two, three passes; whole tiles, one element more and less; more tiles than blocks
  const Shape shapes[] = {{0, 5},       {1, 1},        {31, 2},           {1000, 256}, {1000, 257}, {8191, 300},
                          {8192, 4000}, {8193, 70000}, {8193, 300, true}, {40000, 9},  {40000, 333}};
  for (const Shape& shape : shapes) test_order(generator, shape, 1 + static_cast<int64_t>(generator() % 9));
  for (const int64_t pieces : {1, 2, 3, 64, 65, 1024}) test_order(generator, {3001, 500}, pieces);
  test_many_columns(generator);
  return finish();
}

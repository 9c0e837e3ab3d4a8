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
  const Shape shape{1000, unilora::kMaxElements};
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

// More tiles than a block has threads.
void test_sum_counts(std::mt19937_64& generator) {
  constexpr int64_t digits = 5, tiles = 2 * unilora::kSortBlock + 77;
  std::vector<int32_t> counts(digits * tiles), wanted(digits * tiles), wanted_totals(digits);
  for (int64_t k = 0; k < digits * tiles; ++k) {
    counts[k] = static_cast<int32_t>(generator() % 1000);
    wanted[k] = wanted_totals[k / tiles];
    wanted_totals[k / tiles] += counts[k];
  }
  const Device<int32_t> counts_d(counts), totals(digits);
  unilora::sum_counts_kernel<<<2, unilora::kSortBlock>>>(counts_d.get(), digits, tiles, totals.get());
  check(counts_d.values() == wanted && totals.values() == wanted_totals, "sum_counts");
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
  // d = 1; one, two, three passes; a whole tile, and one element more; more tiles than blocks
  const Shape shapes[] = {{0, 5},      {1, 1},        {31, 2},           {1000, 256}, {1000, 257},
                          {8192, 300}, {8193, 70000}, {3000, 300, true}, {24600, 333}};
  for (const Shape& shape : shapes) test_order(generator, shape, 1 + static_cast<int64_t>(generator() % 9));
  for (const int64_t pieces : {1, 2, 3, 64, 65, 1024}) test_order(generator, {1501, 500}, pieces);
  test_many_columns(generator);
  test_sum_counts(generator);
  return finish();
}

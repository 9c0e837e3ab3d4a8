// Tests of projection_segment_sum.cuh against sums in double precision.
#include "projection/projection_segment_sum.cuh"
#include "projection_cases.h"

using namespace testing;
using std::to_string;

template <typename T, typename Acc>
void test_segment_sum(std::mt19937_64& generator, const Shape& shape, Values values, bool weighted, int64_t pieces) {
  const std::string name = std::string("segment_sum<") + Type<T>::name + ", " + Type<Acc>::name + ">: D " +
                           to_string(shape.D) + ", d " + to_string(shape.d) + (weighted ? ", values" : "") +
                           ", pieces " + to_string(pieces);
  const auto value = random_values<Acc>(generator, shape.D, values);
  const auto grad = random_values<T>(generator, shape.D, values);
  const auto scale = random_values<Acc>(generator, shape.d, values);
  const auto index = random_index(generator, shape);
  const Device<Acc> scale_d(scale), value_d(value);
  // `lead` elements before the order: where it does not begin at a multiple of 16 bytes
  const auto run = [&](const std::vector<int64_t>& lengths, int64_t lead = 0) {
    const Members members(index, shape.d, lengths);
    const DevicePieces<T> grads(grad, lengths);
    std::vector<int32_t> order(static_cast<size_t>(lead), -1);
    order.insert(order.end(), members.order.begin(), members.order.end());
    const Device<int32_t> order_d(order), offsets_d(members.offsets);
    const Device<Acc> out(shape.d);
    unilora::launch_segment_sum(grads.list, weighted ? value_d.get() : nullptr, shape.D, scale_d.get(), shape.d,
                                order_d.get() + lead, offsets_d.get(), out.get(), nullptr);
    return out.values();
  };
  const auto lengths = random_lengths(generator, shape.D, pieces);
  const std::vector<Acc> got = run(lengths);
  check(same_bits(got, run(lengths)), name + ": two launches differ");
  check(same_bits(got, run(lengths, 1 + shape.D % 3)), name + ": an order that is not aligned differs");
  if (pieces > 1) check(same_bits(got, run({shape.D})), name + ": one piece differs");
  std::vector<Sum> sums(static_cast<size_t>(shape.d));
  for (int64_t i = 0; i < shape.D; ++i) sums[index[i]].add(exact(grad[i]) * (weighted ? exact(value[i]) : 1));
  expect_sums(got, sums, scale, values, name);
}

template <typename T, typename Acc>
void test_stored(std::mt19937_64& generator) {
  // D = 0; one element; d = 1 and 2, whose columns are longer than a tile; d > D; few and many members a column; widths
  // 1 to 32
  const Shape shapes[] = {{0, 5},     {1, 1},   {2701, 1},        {17, 301}, {1021, 333},
                          {999, 101}, {801, 9}, {777, 300, true}, {5000, 2}};
  for (const Shape& shape : shapes) {
    for (const bool weighted : {false, true}) {
      const int64_t pieces[] = {1, 2, 7, 64, 65, 200};
      test_segment_sum<T, Acc>(generator, shape, Values::kReal, weighted, pieces[generator() % 6]);
      test_segment_sum<T, Acc>(generator, shape, Values::kInteger, weighted, pieces[generator() % 6]);
    }
  }
  // sixteen copies of each piece's pointer to four; with values, eight to two
  for (const int64_t pieces : {1, 2, 5, 64, 65, 128, 129, 256, 257, 512, 513, 1024})
    for (const bool weighted : {false, true})
      test_segment_sum<T, Acc>(generator, {1501, 77}, Values::kInteger, weighted, pieces);
  // more columns than the blocks take at once, also with a column of several tiles among short ones
  for (const Shape& shape : {Shape{9001, 500}, Shape{7003, 1333}, Shape{9001, 1333, true}, Shape{9001, 300, true}})
    test_segment_sum<T, Acc>(generator, shape, Values::kInteger, shape.crowded, 65);
}

// Columns without members at both ends, before and behind one of less than a tile or of several: nothing is read for
// them.
void test_empty_columns(std::mt19937_64& generator) {
  for (const int32_t full : {0, 3, 6}) {
    for (const int64_t n : {37, 61, 4001}) {
      const auto grad = random_values<float>(generator, n, Values::kInteger);
      const Members members(std::vector<int32_t>(static_cast<size_t>(n), full), 7, {n});
      const DevicePieces<float> grads(grad, {n});
      const Device<float> scale(std::vector<float>(7, 1.0f)), out(7);
      const Device<int32_t> order(members.order), offsets(members.offsets);
      const float* no_value = nullptr;
      unilora::launch_segment_sum(grads.list, no_value, n, scale.get(), 7, order.get(), offsets.get(), out.get(),
                                  nullptr);
      std::vector<float> wanted(7);
      for (const float g : grad) wanted[full] += g;
      check(out.values() == wanted, "segment_sum: " + to_string(n) + " members, all in column " + to_string(full));
    }
  }
}

// inf and NaN reach the sums of their columns, and no other.
void test_not_finite() {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<int32_t> index{0, 1, 2, 3, 0, 1, 2, 3};
  const Members members(index, 4, {8});
  const DevicePieces<float> grads({1, inf, inf, nan, 2, 1, -inf, 1}, {8});
  const Device<float> scale(std::vector<float>{1, -1, 1, 1}), out(4);
  const Device<int32_t> order(members.order), offsets(members.offsets);
  const float* no_value = nullptr;
  unilora::launch_segment_sum(grads.list, no_value, 8, scale.get(), 4, order.get(), offsets.get(), out.get(), nullptr);
  const std::vector<float> got = out.values();
  check(got[0] == 3 && got[1] == -inf && got[2] != got[2] && got[3] != got[3], "segment_sum: inf and NaN");
}

// The last offset of the last of most pieces: all bits of an entry.
void test_largest_entry() {
  const unilora::PiecePacking packing(unilora::kMaxPieces);
  const auto length = static_cast<size_t>(packing.largest());
  std::vector<__nv_bfloat16> values(length, rounded<__nv_bfloat16>(0));
  values.front() = rounded<__nv_bfloat16>(1);
  values.back() = rounded<__nv_bfloat16>(2);
  const Device<__nv_bfloat16> grad(values);
  std::vector<unilora::Piece<__nv_bfloat16>> pieces(unilora::kMaxPieces, {grad.get(), 0});
  pieces.back().length = packing.largest();
  const auto last = static_cast<uint32_t>(unilora::kMaxPieces - 1), end = static_cast<uint32_t>(length - 1);
  const Device<int32_t> order(
      std::vector<int32_t>{static_cast<int32_t>(packing.pack(last, 0)), static_cast<int32_t>(packing.pack(last, end))});
  const Device<int32_t> offsets(std::vector<int32_t>{0, 1, 2});
  const Device<float> scale(std::vector<float>{1, 1}), out(2);
  const float* no_value = nullptr;
  unilora::launch_segment_sum(pieces, no_value, 2, scale.get(), 2, order.get(), offsets.get(), out.get(), nullptr);
  check(out.values() == std::vector<float>{1, 2}, "segment_sum: the largest entry");
}

// ---- offsets out of range -----------------------------------------------------------------------------------

void test_out_of_range() {
  const auto segment_sum = [](int32_t first_offset, int32_t middle_offset, int32_t last_offset) {
    const DevicePieces<float> grads({1, 2}, {2});
    const Device<float> scale(std::vector<float>{1, 1}), out(2);
    const Device<int32_t> order(std::vector<int32_t>{0, 1}),
        offsets(std::vector<int32_t>{first_offset, middle_offset, last_offset});
    const float* no_value = nullptr;
    unilora::launch_segment_sum(grads.list, no_value, 2, scale.get(), 2, order.get(), offsets.get(), out.get(),
                                nullptr);
  };
  check(!stops([&] { segment_sum(0, 1, 2); }), "segment_sum: good offsets were refused");
  check(stops([&] { segment_sum(0, 1, 3); }), "segment_sum: offsets beyond the end were not refused");
  check(stops([&] { segment_sum(0, 1, 1); }), "segment_sum: offsets short of the end were not refused");
  check(stops([&] { segment_sum(-1, 1, 2); }), "segment_sum: a negative offset was not refused");
  check(stops([&] { segment_sum(0, 3, 2); }), "segment_sum: an offset beyond the next was not refused");
  check(stops([&] { segment_sum(0, -1, 2); }), "segment_sum: a negative offset in the middle was not refused");
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_out_of_range();
  test_empty_columns(generator);
  test_not_finite();
  test_largest_entry();
  test_stored<float, float>(generator);
  test_stored<double, double>(generator);
  test_stored<__half, float>(generator);
  test_stored<__nv_bfloat16, float>(generator);
  test_stored<__nv_bfloat16, double>(generator);
  return finish();
}

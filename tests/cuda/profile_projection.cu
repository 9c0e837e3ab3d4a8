// Launches each kernel of the projection once, for a profiler of memory accesses or of a GPU.
#include "projection/projection_kernels.cuh"
#include "projection_cases.h"

#ifndef PROFILE_D
#define PROFILE_D 303104
#endif
#ifndef PROFILE_COLUMNS
#define PROFILE_COLUMNS 16384
#endif
constexpr int64_t D = PROFILE_D, d = PROFILE_COLUMNS;  // a multiple of the gather's tile
constexpr int64_t kPieces = 448;                       // A and B of each layer of Llama2-7B

using namespace testing;

// As a model's layers: pieces of two lengths, each a multiple of eight.
std::vector<int64_t> lengths_of(int64_t pieces) {
  std::vector<int64_t> lengths;
  for (int64_t k = 0, start = 0; k < pieces; ++k) {
    const int64_t stop = k + 1 == pieces ? D : (D * (k + 1) / pieces) / 8 * 8;
    lengths.push_back(stop - start);
    start = stop;
  }
  return lengths;
}

template <typename T>
std::vector<unilora::Piece<T>> cut(const Device<T>& theta_D, const std::vector<int64_t>& lengths) {
  std::vector<unilora::Piece<T>> pieces;
  int64_t start = 0;
  for (const int64_t length : lengths) {
    pieces.push_back({theta_D.get() + start, length});
    start += length;
  }
  return pieces;
}

// With values or without.
template <typename T>
void run_segment_sum(std::mt19937_64& generator, const std::vector<int32_t>& index, bool weighted) {
  const auto lengths = lengths_of(kPieces);
  const Members members(index, d, lengths);
  const Device<int32_t> order(members.order), offsets(members.offsets);
  const Device<T> scale(random_values<T>(generator, d, Values::kReal)), out(d), theta_D(D), value(D);
  unilora::launch_segment_sum(cut(theta_D, lengths), weighted ? value.get() : nullptr, D, scale.get(), d, order.get(),
                              offsets.get(), out.get(), nullptr);
  synchronize();
}

template <typename T>
void run(std::mt19937_64& generator, const std::vector<int32_t>& index, const unilora::BalancedMap& map) {
  const Device<float> theta(random_values<float>(generator, d, Values::kReal)), out(d);
  const Device<int32_t> index_d(index);
  const Device<T> theta_D(D);
  const Device<char> scratch(static_cast<size_t>(unilora::gather_scratch<T, float>(d, false)));
  const float* no_value = nullptr;
  unilora::launch_gather(theta.get(), theta.get(), scratch.get(), d, index_d.get(), no_value, theta_D.get(), D,
                         nullptr);
  synchronize();
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    for (const int64_t pieces : {int64_t{1}, kPieces}) {
      const auto lengths = lengths_of(pieces);
      const Members members(index, d, lengths);
      const Device<int32_t> order(members.order), offsets(members.offsets);
      const auto list = cut(theta_D, lengths);
      unilora::launch_segment_sum(list, no_value, D, theta.get(), d, order.get(), offsets.get(), out.get(), nullptr);
      synchronize();
      std::vector<unilora::Segment<T>> segments;
      unilora::make_segments(list, {{0, D}}, D, segments);
      unilora::launch_balanced_scatter(segments, map, D, theta.get(), d, out.get(), nullptr);
      synchronize();
    }
    unilora::launch_seeded_gather(theta.get(), theta.get(), scratch.get(), d, unilora::UniformMap{d, 7}, {{0, D}},
                                  theta_D.get(), nullptr);
    unilora::launch_seeded_gather(theta.get(), theta.get(), scratch.get(), d, map, {{0, D}}, theta_D.get(), nullptr);
    synchronize();
  }
}

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  const unilora::BalancedMap map(unilora::kBalancedVersion, D, d, 5);
  std::vector<int32_t> index(D);
  for (int64_t i = 0; i < D; ++i) index[i] = static_cast<int32_t>(map.column(static_cast<uint32_t>(i)));
  run<__nv_bfloat16>(generator, index, map);
  run<__half>(generator, index, map);
  run<float>(generator, index, map);
  run_segment_sum<float>(generator, index, true);
  run_segment_sum<double>(generator, index, false);

  const Device<int32_t> index_d(index), made(D), order(D), offsets(d + 1);
  unilora::launch_index(made.get(), D, unilora::UniformMap{d, 7}, 0, nullptr);
  unilora::launch_index(made.get(), D, map, 0, nullptr);
  const Device<char> scratch(static_cast<size_t>(unilora::sorted_positions_scratch(D, d)));
  unilora::launch_column_members(index_d.get(), D, d, lengths_of(kPieces), scratch.get(), order.get(), offsets.get(),
                                 nullptr);
  synchronize();
  return finish();
}

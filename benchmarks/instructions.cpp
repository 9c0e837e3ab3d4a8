// A program for an instruction counter: the projection's kernels, as they are and in their plainest form. Each function
// that is counted runs once over D rows; the last argument names it, the counter is switched on inside it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "projection/projection_kernels.h"

using namespace unilora;

constexpr int64_t kRows = 9'994'240 / 16, kColumns = 524'288 / 16;  // a sixteenth of Llama2-7B: counts scale with D

#define COUNTED extern "C" __attribute__((noinline)) void

COUNTED plain_gather(const float* theta_d, const float* scale, const int64_t* index, float* out) {
  for (int64_t i = 0; i < kRows; ++i) out[i] = theta_d[index[i]] * scale[index[i]];
}
COUNTED plain_segment_sum(const float* g, const float* scale, const int32_t* order, const int32_t* offsets,
                          float* out) {
  for (int64_t j = 0; j < kColumns; ++j) {
    float sum = 0;
    for (int32_t k = offsets[j]; k < offsets[j + 1]; ++k) sum += g[order[k]];
    out[j] = scale[j] * sum;
  }
}
template <typename Map>
struct Computed {
  Map map;
  bool columns(int64_t first, int64_t n, int32_t* buffer) const {
    fill_block(buffer, n, map, static_cast<uint64_t>(first));
    return true;
  }
};
template <typename Source>
void gather_rows(const Source& source, const float* table, float* out) {
  alignas(64) int32_t buffer[kBlock];
  for (int64_t first = 0; first < kRows; first += kBlock) {
    const int64_t n = std::min(kBlock, kRows - first);
    if (!source.columns(first, n, buffer)) std::abort();
    gather_block(table, buffer, out + first, n);
  }
}
template <typename Source>
void scatter_rows(const Source& source, const float* g, float* table) {
  alignas(64) int32_t buffer[kBlock];
  for (int64_t first = 0; first < kRows; first += kBlock) {
    const int64_t n = std::min(kBlock, kRows - first);
    if (!source.columns(first, n, buffer)) std::abort();
    scatter_block<false>(g + first, buffer, static_cast<const float*>(nullptr), table, n);
  }
}
COUNTED stored_gather(const int32_t* index, const float* table, float* out) {
  gather_rows(StoredColumns{index, kColumns}, table, out);
}
COUNTED stored_scatter(const int32_t* index, const float* g, float* table) {
  scatter_rows(StoredColumns{index, kColumns}, g, table);
}
COUNTED uniform_gather(const float* table, float* out) { gather_rows(Computed<UniformMap>{{kColumns, 1}}, table, out); }
COUNTED balanced_gather(const float* table, float* out) {
  gather_rows(Computed<BalancedMap>{BalancedMap(kBalancedVersion, kRows, kColumns, 1)}, table, out);
}

int main(int argc, char** argv) {
  const char* name = argc > 1 ? argv[1] : "";
  std::vector<int32_t> index(kRows), order(kRows), offsets(kColumns + 1, 0);
  fill_block(index.data(), kRows, UniformMap{kColumns, 1}, 0);
  const std::vector<int64_t> wide(index.begin(), index.end());
  for (const int32_t j : index) ++offsets[j + 1];
  for (int64_t j = 0; j < kColumns; ++j) offsets[j + 1] += offsets[j];
  std::vector<int32_t> next = offsets;
  for (int64_t i = 0; i < kRows; ++i) order[next[index[i]]++] = static_cast<int32_t>(i);
  std::vector<float> rows(kRows, 1), columns(kColumns, 1), table(kColumns, 1), scale(kColumns, 1);

  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("plain_gather"))
    plain_gather(table.data(), scale.data(), wide.data(), rows.data());
  else if (is("plain_segment_sum"))
    plain_segment_sum(rows.data(), scale.data(), order.data(), offsets.data(), columns.data());
  else if (is("stored_gather"))
    stored_gather(index.data(), table.data(), rows.data());
  else if (is("stored_scatter"))
    stored_scatter(index.data(), rows.data(), columns.data());
  else if (is("uniform_gather"))
    uniform_gather(table.data(), rows.data());
  else if (is("balanced_gather"))
    balanced_gather(table.data(), rows.data());
  else
    return 2;
  std::printf("%lld\n", static_cast<long long>(kRows));
  return 0;
}

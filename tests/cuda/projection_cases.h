// Inputs and oracles that the tests of the projection share.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <numeric>

#include "projection/projection.h"
#include "projection/projection_pieces.h"
#include "testing.h"

namespace testing {

struct Shape {
  int64_t D, d;
  bool crowded = false;  // half of all positions in column d / 2
};

inline std::vector<int32_t> random_index(std::mt19937_64& generator, const Shape& shape) {
  std::vector<int32_t> index(static_cast<size_t>(shape.D));
  for (int32_t& column : index) {
    column = static_cast<int32_t>(generator() % static_cast<uint64_t>(shape.d));
    if (shape.crowded && generator() % 2 == 0) column = static_cast<int32_t>(shape.d / 2);
  }
  return index;
}

// n cut at random into so many lengths, some of which are 0.
inline std::vector<int64_t> random_lengths(std::mt19937_64& generator, int64_t n, int64_t pieces) {
  std::vector<int64_t> cuts{0, n};
  while (static_cast<int64_t>(cuts.size()) <= pieces)
    cuts.push_back(static_cast<int64_t>(generator() % static_cast<uint64_t>(n + 1)));
  std::sort(cuts.begin(), cuts.end());
  std::vector<int64_t> lengths;
  for (size_t k = 0; k + 1 < cuts.size(); ++k) lengths.push_back(cuts[k + 1] - cuts[k]);
  return lengths;
}

// What column_members gives, by the standard library's sort.
struct Members {
  std::vector<int32_t> order, offsets;

  Members(const std::vector<int32_t>& index, int64_t d, const std::vector<int64_t>& lengths)
      : order(index.size()), offsets(static_cast<size_t>(d) + 1) {
    std::vector<int32_t> positions(index.size()), entries;
    std::iota(positions.begin(), positions.end(), 0);
    std::stable_sort(positions.begin(), positions.end(), [&](int32_t a, int32_t b) { return index[a] < index[b]; });
    int bits = 0;
    while ((size_t{1} << bits) < lengths.size()) ++bits;
    for (size_t piece = 0; piece < lengths.size(); ++piece)
      for (int64_t k = 0; k < lengths[piece]; ++k)
        entries.push_back(static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint64_t>(piece) << (32 - bits)) |
                                               static_cast<uint32_t>(k)));
    for (size_t k = 0; k < order.size(); ++k) order[k] = entries[positions[k]];
    for (const int32_t column : index) ++offsets[column + 1];
    for (int64_t j = 0; j < d; ++j) offsets[j + 1] += offsets[j];
  }
};

// Values in pieces of these lengths, on the device, each at an odd element, with NaN between them.
template <typename T>
class DevicePieces {
 public:
  DevicePieces(const std::vector<T>& values, const std::vector<int64_t>& lengths) : memory_(apart(values, lengths)) {
    int64_t start = 1;
    for (const int64_t length : lengths) {
      list.push_back({memory_.get() + start, length});
      start += length + 2 - length % 2;
    }
  }
  std::vector<unilora::Piece<T>> list;

 private:
  Device<T> memory_;

  static std::vector<T> apart(const std::vector<T>& values, const std::vector<int64_t>& lengths) {
    std::vector<T> out(1);
    std::memset(static_cast<void*>(out.data()), 0xFF, sizeof(T));
    const T gap = out[0];
    auto from = values.begin();
    for (const int64_t length : lengths) {
      out.insert(out.end(), from, from + length);
      from += length;
      out.insert(out.end(), static_cast<size_t>(2 - length % 2), gap);
    }
    return out;
  }
};

template <typename Acc>
void expect_sums(const std::vector<Acc>& got, const std::vector<Sum>& sums, const std::vector<Acc>& scale,
                 Values values, const std::string& name) {
  for (size_t j = 0; j < sums.size(); ++j)
    check(close<Acc, Acc>(got[j], sums[j], exact(scale[j]), values),
          name + ", column " + std::to_string(j) + " of " + std::to_string(sums[j].terms) + " members: expected " +
              std::to_string(exact(scale[j]) * sums[j].value) + ", got " + std::to_string(exact(got[j])));
}

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
  if (WIFEXITED(status) && WEXITSTATUS(status) == 3) return true;
  // An emulator may exit with 128 and the signal; one that switches threads in the middle of abort() may crash there.
  const int signal = WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status) - 128;
  return signal == SIGABRT || signal == SIGSEGV;
}

}  // namespace testing

// The projection theta_D = P theta_d of Uni-LoRA (arXiv 2506.00799, section 3): contract and index arithmetic.
//
//   forward    theta_D[i]      = (theta_d[index[i]] * scale[index[i]]) * value[i]               i in [0, D)
//   backward   grad_theta_d[j] = scale[j] * sum_{i : index[i] = j} value[i] * grad_theta_D[i]   j in [0, d)
//
// P has one non-zero in a row: scale[j] value[i]. Without `value` all are 1, and scale[j] = 1 / sqrt(n_j), n_j members
// in column j, so that P^T P = I. Products and sums are made in the dtype of theta_d and scale, float or double, which
// `value` has too, and rounded once.
//
// Below: the functions position -> column. They are part of the adapter file format, are integer arithmetic only, and
// give the same column on every device. Each depends on (seed, position) and the sizes alone, so any range of
// positions can be computed by itself. A version once published stays. Plain C++17: no torch, host and device.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(CUDAHOST)
#define UNILORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define UNILORA_HOST_DEVICE inline
#endif

namespace unilora {

// Largest D and d: indices and orders are stored as int32, and the arithmetic below stays under 2^31.
constexpr int64_t kMaxElements = INT64_C(0x7fff0000);

// ---- Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) ------------

struct PhiloxBlock {
  uint32_t word[4];
};

// key: (low, high) word of `seed`; counter: (low, high) word of `counter`, then of `stream`.
UNILORA_HOST_DEVICE PhiloxBlock philox4x32_10(uint64_t seed, uint64_t counter, uint64_t stream) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = static_cast<uint32_t>(stream >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = UINT64_C(0xD2511F53) * c0, p1 = UINT64_C(0xCD9E8D57) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

constexpr uint64_t kUniformStream = 0;   // columns of `uniform`
constexpr uint64_t kBalancedStream = 1;  // round keys of `balanced`
constexpr uint64_t kRankedStream = 2;    // draws of `balanced` for few positions

// ---- uniform, version 1: each column drawn independently ---------------------------------------------------------
// Position i takes half i % 2 of the Philox block with counter i / 2: 64 random bits u, then floor(u d / 2^64).

constexpr int64_t kUniformVersion = 1;  // the newest

struct UniformMap {
  uint32_t d;
  uint64_t seed;
};

// floor(u * d / 2^64) for d < 2^31, without 128-bit arithmetic.
UNILORA_HOST_DEVICE uint32_t scale_to_range(uint32_t low, uint32_t high, uint32_t d) {
  const uint64_t carry = (static_cast<uint64_t>(low) * d) >> 32;
  return static_cast<uint32_t>((static_cast<uint64_t>(high) * d + carry) >> 32);
}

// The columns of positions 2 * pair and 2 * pair + 1: one Philox block serves two positions.
struct ColumnPair {
  uint32_t even, odd;
};
UNILORA_HOST_DEVICE ColumnPair uniform_columns(const UniformMap& map, uint64_t pair) {
  const PhiloxBlock bits = philox4x32_10(map.seed, pair, kUniformStream);
  return {scale_to_range(bits.word[0], bits.word[1], map.d), scale_to_range(bits.word[2], bits.word[3], map.d)};
}

// ---- balanced, versions 1 and 2: every column used floor(D / d) or ceil(D / d) times ------------------------------
// position -> element by a keyed bijection of [0, D), then column = element mod d. So column j holds the elements
// j, j + d, j + 2 d, ...
//
// The bijection is a Feistel network with modular addition (Black and Rogaway, "Ciphers with arbitrary finite
// domains", CT-RSA 2002) over [0, rows) x [0, width), rows = ceil(sqrt(D)), width = ceil(D / rows); the few values
// that land at or beyond D (fewer than rows of rows * width) are sent through again (cycle-walking).
//
// Over few positions the network favours some permutations (two million seeds show it up to D = 128). Version 2 gives
// a position of D <= 256 the rank of its draw, 64 bits of Philox, among the draws of all positions, equal ones in the
// order of their positions: every permutation is as likely. For larger D it is version 1.

// n / divisor for n < 2^31 and 1 <= divisor < 2^31: one multiplication and a shift (Granlund and Montgomery, 1994).
struct Divider {
  uint32_t divisor, multiplier;
  int shift;

  UNILORA_HOST_DEVICE explicit Divider(uint32_t divisor_) : divisor(divisor_), multiplier(0), shift(31) {
    while ((UINT64_C(1) << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((UINT64_C(1) << shift) + divisor - 1) / divisor);
  }
  UNILORA_HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> shift);
  }
  UNILORA_HOST_DEVICE uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

constexpr int64_t kBalancedVersion = 2;  // the newest

class BalancedMap {
 public:
  static constexpr int kRounds = 6;
  static constexpr uint32_t kMostRanked = 256;

  UNILORA_HOST_DEVICE BalancedMap(int64_t version, uint32_t D, uint32_t d, uint64_t seed)
      : seed_(seed),
        ranked_(version >= 2 && D <= kMostRanked),
        D_(D),
        rows_(ceil_sqrt(D)),
        by_width_((D + rows_ - 1) / rows_),
        by_d_(d) {
    const PhiloxBlock first = philox4x32_10(seed, 0, kBalancedStream);
    const PhiloxBlock second = philox4x32_10(seed, 1, kBalancedStream);
    for (int i = 0; i < 4; ++i) key_[i] = first.word[i];
    for (int i = 0; i < 2; ++i) key_[4 + i] = second.word[i];
  }

  // position in [0, D) -> element in [0, D)
  UNILORA_HOST_DEVICE uint32_t element(uint32_t position) const {
    if (ranked_) return rank(position);
    uint32_t value = position;
    do {
      value = pass(value);
    } while (value >= D_);
    return value;
  }

  // Whether element() is a rank. If not, column_at_once() gives the column of a position that one pass settles, kWalkOn
  // for the few that must be passed through again: without a loop of unknown length, so that a compiler can vectorise
  // it.
  UNILORA_HOST_DEVICE bool ranked() const { return ranked_; }
  static constexpr uint32_t kWalkOn = 0xFFFFFFFFu;
  UNILORA_HOST_DEVICE uint32_t column_at_once(uint32_t position) const {
    const uint32_t value = pass(position);
    const uint32_t column = by_d_.remainder(value);
    return value < D_ ? column : kWalkOn;
  }

  UNILORA_HOST_DEVICE uint32_t column(uint32_t position) const { return by_d_.remainder(element(position)); }

  // The inverse of element(). Where it is not a rank, it is step_back(), again where that gives D or more.
  UNILORA_HOST_DEVICE uint32_t position(uint32_t element) const {
    if (ranked_) return ranked_position(element);
    uint32_t value = element;
    do {
      value = step_back(value);
    } while (value >= D_);
    return value;
  }
  UNILORA_HOST_DEVICE uint32_t step_back(uint32_t value) const {
    uint32_t row = by_width_.quotient(value), col = value - row * width();
    for (int i = kRounds - 2; i >= 0; i -= 2) {
      col = subtract(col, draw(row, key_[i + 1], width()), width());
      row = subtract(row, draw(col, key_[i], rows_), rows_);
    }
    return row * width() + col;
  }

 private:
  uint64_t seed_;
  bool ranked_;
  uint32_t D_, rows_;
  Divider by_width_, by_d_;
  uint32_t key_[kRounds];

  UNILORA_HOST_DEVICE uint32_t width() const { return by_width_.divisor; }

  // The number of positions with a smaller draw, or with an equal one and before this.
  UNILORA_HOST_DEVICE uint32_t rank(uint32_t position) const {
    const uint64_t own = position_bits(position);
    uint32_t smaller = 0;
    for (uint32_t other = 0; other < D_; ++other) {
      const uint64_t bits = position_bits(other);
      smaller += bits < own || (bits == own && other < position);
    }
    return smaller;
  }
  // The position of this rank: a draw that is known to be too small or too large rules out those beyond it.
  UNILORA_HOST_DEVICE uint32_t ranked_position(uint32_t wanted) const {
    uint64_t low = 0, high = UINT64_MAX;
    uint32_t position = 0;
    for (;; ++position) {
      const uint64_t bits = position_bits(position);
      if (bits < low || bits > high) continue;
      const uint32_t found = rank(position);
      if (found == wanted) return position;
      if (found < wanted) {
        low = bits;
      } else {
        high = bits;
      }
    }
  }
  UNILORA_HOST_DEVICE uint64_t position_bits(uint32_t position) const {
    const PhiloxBlock block = philox4x32_10(seed_, position / 2, kRankedStream);
    const uint32_t low = position % 2 == 0 ? block.word[0] : block.word[2];
    const uint32_t high = position % 2 == 0 ? block.word[1] : block.word[3];
    return static_cast<uint64_t>(high) << 32 | low;
  }

  // One pass through the network: a bijection of [0, rows * width).
  UNILORA_HOST_DEVICE uint32_t pass(uint32_t value) const {
    uint32_t row = by_width_.quotient(value), col = value - row * width();
    for (int i = 0; i < kRounds; i += 2) {
      row = add(row, draw(col, key_[i], rows_), rows_);
      col = add(col, draw(row, key_[i + 1], width()), width());
    }
    return row * width() + col;
  }

  UNILORA_HOST_DEVICE static uint32_t ceil_sqrt(uint32_t n) {
    uint32_t root = 1;
    while (static_cast<uint64_t>(root) * root < n) ++root;
    return root;
  }
  // A keyed hash of x, scaled to [0, range) by its high bits.
  UNILORA_HOST_DEVICE static uint32_t draw(uint32_t x, uint32_t key, uint32_t range) {
    x = (x ^ key) * 0x85EBCA6Bu;
    x = (x ^ (x >> 15)) * 0xC2B2AE35u;
    return static_cast<uint32_t>((static_cast<uint64_t>(x) * range) >> 32);
  }
  UNILORA_HOST_DEVICE static uint32_t add(uint32_t a, uint32_t b, uint32_t modulus) {
    const uint32_t sum = a + b, wrapped = sum - modulus;  // wrapped is huge where sum < modulus
    return sum < wrapped ? sum : wrapped;
  }
  UNILORA_HOST_DEVICE static uint32_t subtract(uint32_t a, uint32_t b, uint32_t modulus) {
    const uint32_t difference = a - b, wrapped = difference + modulus;  // difference is huge where a < b
    return difference < wrapped ? difference : wrapped;
  }
};

// ---- the members of each column ------------------------------------------------------------------------------------
// theta_D's gradient may come in pieces that lie end to end, as the layers make them. A position of it is then stored
// as (piece, offset in the piece) in 32 bits: the piece in the highest ones, as many as the number of pieces needs.
// With one piece it is the position itself.

constexpr int64_t kMaxPieces = 1024;

struct PiecePacking {
  int shift;  // 22 to 32: bits of an offset

  UNILORA_HOST_DEVICE explicit PiecePacking(int64_t pieces) : shift(32) {
    while ((INT64_C(1) << (32 - shift)) < pieces) --shift;
  }
  UNILORA_HOST_DEVICE int64_t largest() const { return INT64_C(1) << shift; }  // elements of a piece
  UNILORA_HOST_DEVICE uint32_t pack(uint32_t piece, uint32_t offset) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(piece) << shift) | offset;
  }
  UNILORA_HOST_DEVICE uint32_t piece(uint32_t entry) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(entry) >> shift);
  }
  UNILORA_HOST_DEVICE uint32_t offset(uint32_t entry) const {
    return entry & static_cast<uint32_t>((UINT64_C(1) << shift) - 1);
  }
};

}  // namespace unilora

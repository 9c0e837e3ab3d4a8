// Tests of lora_linear_update.cuh against sums in double precision, every dtype; on a GPU also more than 2^31 elements.
#include "lora_linear_cases.h"

using namespace testing;

// What y is before: read and added to, or only written, with a bias or without.
enum class Before { kY, kBias, kNothing };

struct UpdateCase : LoraCase {
  Before before;
  size_t y_offset, h_offset, factor_offset;  // elements past an aligned address

  template <typename T>
  std::string title() const {
    const char* kernel = before == Before::kY ? "rank_update" : "rank_product";
    return name<T>(kernel) + (before == Before::kBias ? ", bias" : "") + ", offsets " + to_string(y_offset) + ", " +
           to_string(h_offset) + ", " + to_string(factor_offset);
  }
};

template <typename T, typename Acc>
struct Update {
  UpdateCase c;
  std::vector<T> y, bias, factor;  // [tokens, columns], [columns], [r, columns] or [columns, r]
  std::vector<Acc> h;              // [tokens, r]

  Update(std::mt19937_64& generator, const UpdateCase& update)
      : c(update),
        y(random_values<T>(generator, c.tokens * c.columns, c.values)),
        bias(random_values<T>(generator, c.columns, c.values)),
        factor(random_values<T>(generator, c.r * c.columns, c.values)),
        h(random_values<Acc>(generator, c.tokens * c.r, c.values)) {}

  std::vector<T> run() const {
    const Displaced<T> y_d(y, c.y_offset), bias_d(bias, c.factor_offset), factor_d(factor, c.factor_offset);
    const Displaced<Acc> h_d(h, c.h_offset);
    if (c.before == Before::kY) {
      unilora::launch_rank_update(y_d.get(), c.tokens, c.columns, h_d.get(), c.r, factor_d.get(), c.layout, c.scaling(),
                                  nullptr);
    } else {
      unilora::launch_rank_product(y_d.get(), c.tokens, c.columns, c.before == Before::kBias ? bias_d.get() : nullptr,
                                   h_d.get(), c.r, factor_d.get(), c.layout, c.scaling(), nullptr);
    }
    return y_d.values();
  }

  double before(int64_t i, int64_t k) const {
    if (c.before == Before::kNothing) return 0;
    return exact(c.before == Before::kY ? y[i * c.columns + k] : bias[k]);
  }
  Sum sum(int64_t i, int64_t k) const {
    Sum out;
    out.add(before(i, k));
    for (int64_t q = 0; q < c.r; ++q) out.add(c.scaling() * exact(h[i * c.r + q]) * exact(factor[c.at(q, k)]));
    if (sizeof(T) == 2) allow_split(out);
    return out;
  }

  void check_all() const {
    const std::vector<T> got = run();
    const std::string title = c.title<T>();
    if (c.tokens % 2 != 0) check(same_bits(got, run()), title + ": two launches differ");
    for (int64_t i = 0; i < c.tokens; ++i) {
      for (int64_t k = 0; k < c.columns; ++k) {
        const Sum wanted = sum(i, k);
        const T value = got[i * c.columns + k];
        compare(title, i, k, exact(value), close<T, Acc>(value, wanted, 1, c.values), wanted.value);
      }
    }
  }
};

template <typename Body>
void for_dtypes(const Body& body) {
  body(float{}, float{});
  body(double{}, double{});
  body(__half{}, float{});
  body(__nv_bfloat16{}, float{});
}

// Sizes that fill tiles and rows of 16 bytes, and that do not; ranks within each rank tile and beyond the largest;
// every matrix at any element.
void test_sizes(std::mt19937_64& generator) {
  struct Size {
    int64_t tokens, columns, r;
  };
  const Size sizes[] = {{0, 40, 3},    {17, 0, 3},   {1, 1, 1},     {1, 136, 4},   {17, 37, 3},
                        {3, 38, 2},    {66, 131, 9}, {20, 264, 16}, {330, 136, 4}, {65, 36, 33},
                        {70, 128, 64}, {66, 200, 1}, {321, 8, 8},   {321, 8, 65},  {17, 21, 130}};
  const size_t offsets[][3] = {{0, 0, 0}, {1, 0, 0}, {0, 1, 3}, {4, 2, 4}, {0, 2, 1}, {8, 4, 8}};
  const Before befores[] = {Before::kY, Before::kBias, Before::kNothing};
  size_t turn = generator() % 6;
  for (const Size& size : sizes) {
    for (const FactorLayout layout : {kRankMajor, kRankMinor}) {
      if (size.r > 64 && (layout == kRankMajor) != (size.r == 65)) continue;  // rank tiles take long
      for_dtypes([&](auto t, auto acc) {
        const auto& offset = offsets[turn++ % 6];
        const Before before = befores[generator() % 3];
        const Values values = generator() % 2 == 0 ? Values::kInteger : Values::kReal;
        Update<decltype(t), decltype(acc)>(
            generator, {{size.tokens, size.columns, size.r, layout, values}, before, offset[0], offset[1], offset[2]})
            .check_all();
      });
    }
  }
}

// One matrix off its alignment at a time.
void test_offsets(std::mt19937_64& generator) {
  for_dtypes([&](auto t, auto acc) {
    for (const size_t offset : {1, 2, 4}) {
      for (const Before before : {Before::kY, Before::kBias}) {
        const LoraCase sizes = {18, 72, 4, offset == 2 ? kRankMajor : kRankMinor, Values::kReal};
        Update<decltype(t), decltype(acc)>(generator, {sizes, before, offset, 0, 0}).check_all();
        Update<decltype(t), decltype(acc)>(generator, {sizes, before, 0, offset, 0}).check_all();
        Update<decltype(t), decltype(acc)>(generator, {sizes, before, 0, 0, offset}).check_all();
      }
    }
  });
}

// y = -(s h factor), rounded: what is left after the update is as small as the products' errors.
void test_cancelling(std::mt19937_64& generator) {
  for_dtypes([&](auto t, auto acc) {
    using T = decltype(t);
    for (const int64_t r : {4, 33}) {
      Update<T, decltype(acc)> update(
          generator, {{17, 72, r, r == 4 ? kRankMinor : kRankMajor, Values::kReal}, Before::kNothing, 0, 0, 0});
      for (int64_t i = 0; i < update.c.tokens; ++i)
        for (int64_t k = 0; k < update.c.columns; ++k)
          update.y[i * update.c.columns + k] = rounded<T>(-update.sum(i, k).value);
      update.c.before = Before::kY;
      update.check_all();
    }
  });
}

// What is infinite or NaN in the equation, and nothing else; hidden states beyond float16's range.
void test_not_finite(std::mt19937_64& generator) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for_dtypes([&](auto t, auto acc) {
    using T = decltype(t);
    using Acc = decltype(acc);
    for (const int64_t r : {3, 8, 18}) {
      Update<T, Acc> update(generator,
                            {{66, 40, r, r == 8 ? kRankMinor : kRankMajor, Values::kInteger}, Before::kY, 0, 0, 0});
      const LoraCase& c = update.c;
      const double values[] = {infinity, -infinity, nan};
      for (int n = 0; n < 3; ++n) {
        const auto row = [&] { return static_cast<int64_t>(generator() % c.tokens); };
        const auto column = [&] { return static_cast<int64_t>(generator() % c.columns); };
        update.y[row() * c.columns + column()] = rounded<T>(values[n]);
        update.h[row() * c.r + n] = static_cast<Acc>(values[n]);
        update.factor[c.at(n, column())] = rounded<T>(values[n]);
      }
      update.h[2] = 0x1p18;  // times -2: with a factor of 1 or more, beyond float16
      const std::vector<T> got = update.run();
      const std::string title = update.c.template title<T>() + ", not finite";
      for (int64_t i = 0; i < c.tokens; ++i) {
        for (int64_t k = 0; k < c.columns; ++k) {
          const double wanted = exact(rounded<T>(update.sum(i, k).value)), value = exact(got[i * c.columns + k]);
          compare(title, i, k, value, std::isnan(wanted) ? std::isnan(value) : value == wanted, wanted);
        }
      }
    }
  });
}

#ifndef CUDAHOST
void test_large(std::mt19937_64& generator) {
  const LargeCase c(generator);
  if (!c.fits()) return;
  const Device<__half> y(static_cast<size_t>(c.tokens * c.columns)), factor(c.factor);
  const Device<float> h(c.hidden());
  c.fill(y);
  unilora::launch_rank_update(y.get(), c.tokens, c.columns, h.get(), c.r, factor.get(), kRankMajor, 1.0, nullptr);
  synchronize();
  std::vector<__half> updated(static_cast<size_t>(c.columns));
  CUDA_CHECK(cudaMemcpy(updated.data(), y.get() + (c.tokens - 1) * c.columns, updated.size() * sizeof(__half),
                        cudaMemcpyDeviceToHost));
  bool good = true;
  for (int64_t k = 0; k < c.columns; ++k) {
    double sum = exact(c.row[k]);
    for (int64_t q = 0; q < c.r; ++q) sum += exact(c.weights[q]) * exact(c.factor[q * c.columns + k]);
    good = good && exact(updated[k]) == sum;
  }
  check(good, "rank_update: more than 2^31 elements");
}
#endif

int main(int argc, char** argv) {
  std::mt19937_64 generator(seed_of(argc, argv));
  test_sizes(generator);
  test_offsets(generator);
  test_cancelling(generator);
  test_not_finite(generator);
#ifndef CUDAHOST
  test_large(generator);
#endif
  return finish();
}

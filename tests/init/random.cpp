// SPDX-License-Identifier: Apache-2.0
// The initialisers that look at no data: kaiming, gaussian, orthogonal.
#include <doctest/doctest.h>

#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "lowrank/init/gaussian.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/lora_xs.hpp"
#include "lowrank/init/orthogonal.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {
struct Moments {
  double mean = 0, variance = 0, min = 0, max = 0;
};
template <class T>
Moments moments(const Matrix<T>& m) {
  Moments out;
  for (Index i = 0; i < m.size(); ++i) {
    const double x = double(m.data()[i]);
    out.mean += x / double(m.size());
    out.min = std::min(out.min, x);
    out.max = std::max(out.max, x);
  }
  for (Index i = 0; i < m.size(); ++i) {
    const double d = double(m.data()[i]) - out.mean;
    out.variance += d * d / double(m.size());
  }
  return out;
}
template <class T>
bool all_zero(const Matrix<T>& m) {
  return std::all_of(m.data(), m.data() + m.size(), [](T x) { return x == T(0); });
}
}  // namespace

TEST_CASE_TEMPLATE("kaiming: A uniform in ±1/sqrt(in), B zero", T, float, double) {
  const auto init = kaiming<T>(300, 400, {.rank = 64, .alpha = 24, .seed = 5});
  CHECK_FALSE(init.base_changed);
  CHECK(init.base.empty());
  CHECK(init.report.method == "kaiming");
  CHECK(init.factors.scale == T(24.0 / 64));
  CHECK(init.factors.A.rows() == 64);
  CHECK(init.factors.A.cols() == 400);
  CHECK(init.factors.B.rows() == 300);
  CHECK(init.factors.B.cols() == 64);
  CHECK(all_zero(init.factors.B));
  const Moments a = moments(init.factors.A);
  const double bound = 1 / std::sqrt(400.0), n = 64 * 400;
  // The extremes of n draws lie within a few (2·bound/n) of the bounds; mean and variance within 5 standard errors.
  CHECK(a.max <= bound);
  CHECK(a.min >= -bound);
  CHECK(a.max > bound * (1 - 40 / n));
  CHECK(a.min < -bound * (1 - 40 / n));
  CHECK(std::abs(a.mean) < 5 * bound / std::sqrt(3 * n));
  CHECK(std::abs(a.variance / (bound * bound / 3) - 1) < 5 * std::sqrt(0.8 / n));
}

TEST_CASE_TEMPLATE("gaussian: A normal of deviation 1/r, B zero", T, float, double) {
  const auto init = gaussian<T>(100, 500, {.rank = 32, .alpha = 8, .rank_stabilised = true, .seed = 6});
  CHECK(init.factors.scale == T(8 / std::sqrt(32.0)));
  CHECK(all_zero(init.factors.B));
  const Moments a = moments(init.factors.A);
  const double n = 32 * 500;
  CHECK(std::abs(a.mean) < 5 / 32.0 / std::sqrt(n));
  CHECK(std::abs(a.variance * 32 * 32 - 1) < 5 * std::sqrt(2 / n));
}

TEST_CASE("gaussian_embedding: A zero, B standard normal") {
  const auto init = gaussian_embedding<float>(64, 1000, {.rank = 16, .alpha = 4, .seed = 6});
  CHECK(all_zero(init.factors.A));
  CHECK(init.factors.A.cols() == 1000);
  CHECK(init.factors.B.rows() == 64);
  CHECK(std::abs(moments(init.factors.B).variance - 1) < 5 * std::sqrt(2.0 / 1024));
}

TEST_CASE_TEMPLATE("orthogonal: factors are random, their product is zero", T, float, double) {
  for (const Index r : {2, 3, 8, 17}) {
    CAPTURE(r);
    const auto init = orthogonal<T>(90, 120, {.rank = r, .alpha = 3, .seed = 7});
    const Matrix<T> product = multiply<T>(init.factors.B.view(), init.factors.A.view());
    const double eps = std::numeric_limits<T>::epsilon();
    double largest = 0;
    for (Index i = 0; i < product.size(); ++i) largest = std::max(largest, std::abs(double(product.data()[i])));
    // Entries are sums of r products of numbers of size 0.1·5 at most.
    CHECK(largest < 20 * double(r) * eps * 0.25);
    const Moments a = moments(init.factors.A), b = moments(init.factors.B);
    // Row norms of A are spread over r directions by half as many Gaussians: E‖A‖_F² = std²·in·⌈r/2⌉.
    CHECK(a.variance == doctest::Approx(0.01 * double((r + 1) / 2) / double(r)).epsilon(0.4));
    CHECK(b.variance == doctest::Approx(0.01 * double(r / 2) / double(r)).epsilon(0.4));
  }
}

TEST_CASE("same seed, same bits; another seed, other numbers") {
  const auto bits = [](auto make) {
    CHECK(test::same_bits(make(1).factors.A, make(1).factors.A));
    CHECK(test::same_bits(make(1).factors.B, make(1).factors.B));
    CHECK_FALSE(test::same_bits(make(1).factors.A, make(2).factors.A));
  };
  bits([](std::uint64_t s) { return kaiming<float>(20, 30, {.rank = 8, .seed = s}); });
  bits([](std::uint64_t s) { return gaussian<float>(20, 30, {.rank = 8, .seed = s}); });
  bits([](std::uint64_t s) { return orthogonal<float>(20, 30, {.rank = 8, .seed = s}); });
}

TEST_CASE("layers that are given no seed start differently, and the same in every run") {
  const auto three = [](auto make) {
    std::vector<Matrix<float>> made;
    for (int i = 0; i < 3; ++i) made.push_back(make(std::optional<std::uint64_t>()));
    return made;
  };
  const auto check = [&](auto make) {
    seed_everything(17);
    const auto first = three(make);
    CHECK_FALSE(test::same_bits(first[0], first[1]));
    CHECK_FALSE(test::same_bits(first[1], first[2]));
    seed_everything(17);
    const auto again = three(make);
    for (std::size_t i = 0; i < 3; ++i) CHECK(test::same_bits(first[i], again[i]));
    seed_everything(18);
    CHECK_FALSE(test::same_bits(first[0], make(std::nullopt)));
    // A seed that is given is all that counts, 0 too, and takes nothing from the sequence.
    seed_everything(17);
    const auto zero = make(0);
    CHECK(test::same_bits(first[0], make(std::nullopt)));
    CHECK(test::same_bits(zero, make(0)));
  };
  using Seed = std::optional<std::uint64_t>;
  check([](Seed s) { return kaiming<float>(9, 30, {.rank = 4, .seed = s}).factors.A; });
  check([](Seed s) { return gaussian<float>(9, 30, {.rank = 4, .seed = s}).factors.A; });
  check([](Seed s) { return gaussian_embedding<float>(9, 30, {.rank = 4, .seed = s}).factors.B; });
  check([](Seed s) { return orthogonal<float>(9, 30, {.rank = 5, .seed = s}).factors.A; });
  check([](Seed s) { return orthogonal<float>(9, 30, {.rank = 5, .seed = s}).factors.B; });
  const Matrix<float> W = test::random_matrix<float>(12, 10, 1);
  check([&](Seed s) { return lora_xs(W, {.rank = 3, .seed = s}).core; });
}

TEST_CASE("the report names the seed that gives the same bits again") {
  const auto first = kaiming<float>(40, 30);
  const auto second = kaiming<float>(40, 30);
  CHECK(first.factors.rank() == 16);
  CHECK(first.report.seed != second.report.seed);
  CHECK(test::same_bits(second.factors.A, kaiming<float>(40, 30, {.seed = second.report.seed}).factors.A));
  CHECK(kaiming<float>(40, 30, {.seed = 5}).report.seed == 5);
  const Matrix<float> W = test::random_matrix<float>(40, 30, 1);
  const auto core = lora_xs(W);
  CHECK(test::same_bits(core.core, lora_xs(W, {.seed = core.report.seed}).core));
  // What is refused takes no seed.
  seed_everything(3);
  const std::uint64_t next = kaiming<float>(40, 30).report.seed;
  seed_everything(3);
  CHECK_THROWS_AS((void)kaiming<float>(4, 30), ArgumentError);
  CHECK(kaiming<float>(40, 30).report.seed == next);
}

TEST_CASE("fresh seeds: SplitMix64, none twice, also from several threads") {
  // The first numbers of the published generator from the state that is the mix of 0.
  seed_everything(0);
  std::uint64_t state = detail::first_seed_state(0);
  for (int i = 0; i < 4; ++i) {
    std::uint64_t z = state += 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    CHECK(fresh_seed() == (z ^ (z >> 31)));
  }
  // From the state 0 the generator's published numbers: the first of them is the state seed 0 starts from.
  CHECK(detail::first_seed_state(0) == 0xe220a8397b1dcdafU);
  std::vector<std::vector<std::uint64_t>> drawn(4, std::vector<std::uint64_t>(1000));
  std::vector<std::thread> threads;
  for (auto& seeds : drawn)
    threads.emplace_back([&seeds] {
      for (auto& s : seeds) s = fresh_seed();
    });
  for (auto& t : threads) t.join();
  std::set<std::uint64_t> all;
  for (const auto& seeds : drawn) all.insert(seeds.begin(), seeds.end());
  CHECK(all.size() == 4000);
}

TEST_CASE("bad rank and alpha are refused with what was expected and what came") {
  CHECK_THROWS_WITH_AS((void)kaiming<float>(10, 20, {.rank = 0}), "kaiming: rank must lie in [1, min(10, 20)], got 0",
                       ArgumentError);
  CHECK_THROWS_AS((void)kaiming<float>(10, 20, {.rank = 11}), ArgumentError);
  CHECK_THROWS_AS((void)kaiming<float>(0, 20, {.rank = 1}), ArgumentError);
  CHECK_NOTHROW((void)kaiming<float>(10, 20, {.rank = 10}));
  CHECK_THROWS_AS((void)kaiming<float>(10, 20, {.rank = 4, .alpha = 0}), ArgumentError);
  CHECK_THROWS_AS((void)gaussian<float>(10, 20, {.rank = 4, .alpha = -1}), ArgumentError);
  CHECK_THROWS_AS((void)gaussian<float>(10, 20, {.rank = 4, .alpha = INFINITY}), ArgumentError);
  CHECK_THROWS_AS((void)gaussian<float>(10, 20, {.rank = 4, .alpha = NAN, .rank_stabilised = true}), ArgumentError);
  CHECK_THROWS_AS((void)orthogonal<float>(10, 20, {.rank = 1}), ArgumentError);
  CHECK_THROWS_AS((void)orthogonal<float>(10, 20, {.rank = 4, .std = -1}), ArgumentError);
}

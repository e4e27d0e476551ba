// SPDX-License-Identifier: Apache-2.0
// The counter-based generator: known answers, moments, and that order, threads and parts do not matter.
#include "lowrank/core/rng.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <set>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/threads.hpp"

using lowrank::CounterRng;
using lowrank::Index;
using lowrank::Order;
using lowrank::view_of;

TEST_CASE("Philox4x32-10 gives the known answers of its authors") {
  using Words = std::array<std::uint32_t, 4>;
  using lowrank::detail::philox4x32;
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("bits are the words of the block (index / 2, stream) under the seed") {
  static_assert(CounterRng(0).bits(0) == 0x6627e8d5e169c58dULL);
  static_assert(CounterRng(0).bits(1) == 0xbc57ac4c9b00dbd8ULL);
  const std::uint64_t seed = 0x0123456789abcdefULL, stream = 0xfedcba9876543210ULL, index = 0x1122334455667789ULL;
  const std::uint64_t counter = index / 2;
  const auto block = lowrank::detail::philox4x32(
      {std::uint32_t(counter), std::uint32_t(counter >> 32), std::uint32_t(stream), std::uint32_t(stream >> 32)},
      {std::uint32_t(seed), std::uint32_t(seed >> 32)});
  CHECK(CounterRng(seed, stream).bits(index) == (std::uint64_t(block[2]) << 32 | block[3]));
  std::set<std::uint64_t> seen;
  for (std::uint64_t i = 0; i < 10000; ++i) seen.insert(CounterRng(1).bits(i));
  for (std::uint64_t i = 0; i < 10000; ++i) seen.insert(CounterRng(1, 1).bits(i));
  for (std::uint64_t i = 0; i < 10000; ++i) seen.insert(CounterRng(2).bits(i));
  CHECK(seen.size() == 30000);
}

TEST_CASE("uniform is (k + 1/2)·2^-52 with k the upper 52 bits; below scales the bits") {
  const CounterRng rng(7, 3);
  for (std::uint64_t i = 0; i < 1000; ++i) {
    const double u = rng.uniform(i);
    CHECK(u == (double(rng.bits(i) >> 12) + 0.5) / 4503599627370496.0);
    CHECK((u > 0 && u < 1));
    for (const std::uint64_t n : {1ULL, 2ULL, 7ULL, 1000003ULL, 1ULL << 40, 0xffffffffffffffffULL}) {
      const auto product = static_cast<long double>(rng.bits(i)) * static_cast<long double>(n);
      const auto expected = static_cast<long double>(rng.below(i, n));
      CHECK(rng.below(i, n) < n);
      // 64 bits of significand: the product is off by at most 2^-64 of itself, the quotient by one at a boundary.
      CHECK(std::abs(std::floor(product / 18446744073709551616.0L) - expected) <= 1.0L);
    }
  }
  CHECK(rng.below(0, 0) == 0);
  // Each of n values about equally often: chi-square with n - 1 degrees of freedom, mean n - 1, variance 2(n - 1).
  constexpr int n = 37, draws = 100000;
  std::array<int, n> count{};
  for (std::uint64_t i = 0; i < draws; ++i) ++count[std::size_t(rng.below(i, n))];
  double chi = 0;
  for (const int c : count) chi += std::pow(c - double(draws) / n, 2) / (double(draws) / n);
  CHECK(std::abs(chi - (n - 1)) < 5 * std::sqrt(2.0 * (n - 1)));
}

TEST_CASE("the normal quantile agrees with 20 digits of an arbitrary-precision computation") {
  // Φ⁻¹ of these very doubles, by mpmath at 700 digits.
  constexpr double table[][2] = {{1e-300, -37.047096299361199237},
                                 {1e-100, -21.273453560965324294},
                                 {1e-20, -9.2623400897984075796},
                                 {1e-10, -6.3613409024040561991},
                                 {1e-05, -4.2648907939228246102},
                                 {0.001, -3.0902323061678135354},
                                 {0.01, -2.3263478740408410931},
                                 {0.05, -1.644853626951472688},
                                 {0.074999, -1.4395385353452306883},
                                 {0.075, -1.4395314709384559349},
                                 {0.0751, -1.4388253927525399824},
                                 {0.1, -1.2815515655446004353},
                                 {0.25, -0.6744897501960817432},
                                 {0.4, -0.25334710313579974132},
                                 {0.499999999, -2.5066283428845326712e-9},
                                 {0.6, 0.25334710313579974132},
                                 {0.75, 0.6744897501960817432},
                                 {0.9, 1.2815515655446005935},
                                 {0.925, 1.4395314709384562291},
                                 {0.95, 1.6448536269514722843},
                                 {0.99, 2.3263478740408407676},
                                 {0.999999, 4.7534243088170877657},
                                 {0.9999999999999999, 8.2095361516013868556}};
  // The formula is good to 1e-16; a dozen roundings come on top.
  for (const auto& row : table) {
    const double p = row[0], x = row[1];  // names of their own: Clang 14 captures no structured bindings
    CAPTURE(p);
    CHECK(std::abs(lowrank::normal_quantile(p) - x) <= 12 * 1.2e-16 * std::abs(x));
  }
  CHECK(lowrank::normal_quantile(0.5) == 0);
  CHECK(lowrank::normal_quantile(0) == -INFINITY);
  CHECK(lowrank::normal_quantile(1) == INFINITY);
  // Inverse of the distribution function, over the whole range where that is well conditioned.
  for (int k = 1; k < 4096; ++k) {
    const double p = k / 4096.0, back = 0.5 * std::erfc(-lowrank::normal_quantile(p) / std::sqrt(2.0));
    CHECK(std::abs(back - p) < 4e-15);
  }
}

TEST_CASE("normals have the moments of the standard normal, streams are uncorrelated") {
  constexpr int n = 1 << 19;
  double m1 = 0, m2 = 0, m3 = 0, m4 = 0, cross = 0, lag = 0, previous = 0;
  const CounterRng a(42), b(42, 1);
  for (std::uint64_t i = 0; i < n; ++i) {
    const double x = a.normal(i);
    m1 += x, m2 += x * x, m3 += x * x * x, m4 += x * x * x * x;
    cross += x * b.normal(i);
    lag += x * previous;
    previous = x;
  }
  // Standard deviations of the sample moments: √(var(x^k)/n) with var = 1, 2, 15, 96. Five of them.
  const double unit = 5 / std::sqrt(double(n));
  CHECK(std::abs(m1 / n) < unit);
  CHECK(std::abs(m2 / n - 1) < unit * std::sqrt(2.0));
  CHECK(std::abs(m3 / n) < unit * std::sqrt(15.0));
  CHECK(std::abs(m4 / n - 3) < unit * std::sqrt(96.0));
  CHECK(std::abs(cross / n) < unit);
  CHECK(std::abs(lag / n) < unit);
}

TEST_CASE_TEMPLATE("a filled matrix does not depend on order, part or thread", T, float, double) {
  constexpr Index m = 13, n = 17;
  const CounterRng rng(5, 9);
  std::vector<T> row(m * n), col(m * 20, T(-7));
  rng.fill_normal(view_of(row.data(), m, n), 2.0, 3.0);
  const auto c = view_of(col.data(), m, n, Order::col_major, Index(15));
  rng.fill_normal(c, 2.0, 3.0);
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      CHECK(row[std::size_t(i * n + j)] == c(i, j));
      CHECK(c(i, j) == T(2.0 + 3.0 * rng.normal(std::uint64_t(i * n + j))));
    }
  for (Index j = 0; j < n; ++j)
    CHECK((col[std::size_t(15 * j + 13)] == T(-7) && col[std::size_t(15 * j + 14)] == T(-7)));

  // Rows filled one by one from their own first index, on as many threads as there are.
  std::vector<T> parts(m * n);
  lowrank::parallel_ranges(m, 1, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      rng.fill_normal(view_of(parts.data() + i * n, 1, n), 2.0, 3.0, std::uint64_t(i * n));
  });
  CHECK(parts == row);

  std::vector<T> uniform(m * n);
  rng.fill_uniform(view_of(uniform.data(), m, n), -0.5, 0.25, 100);
  for (Index i = 0; i < m * n; ++i) {
    CHECK((uniform[std::size_t(i)] >= T(-0.5) && uniform[std::size_t(i)] <= T(0.25)));
    CHECK(uniform[std::size_t(i)] == T(-0.5 + 0.75 * rng.uniform(100 + std::uint64_t(i))));
  }
}

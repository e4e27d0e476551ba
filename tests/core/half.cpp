// SPDX-License-Identifier: Apache-2.0
// bf16 and f16 against a conversion written from the formats' definitions: every pattern widened, every rounding
// boundary.
#include "lowrank/core/half.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/core/scalar.hpp"
#include "lowrank/linalg/detail/simd.hpp"

using lowrank::bf16;
using lowrank::f16;

namespace {

template <class H>
struct Format;
template <>
struct Format<bf16> {
  static constexpr int mantissa = 7, bias = 127, exponents = 256;
};
template <>
struct Format<f16> {
  static constexpr int mantissa = 10, bias = 15, exponents = 32;
};

/// The value of a finite, non-negative pattern by the definition: (1 + m/2^M)·2^(e - bias), or m/2^M·2^(1 - bias).
template <class H>
double decode(unsigned bits) {
  using F = Format<H>;
  const int m = int(bits & ((1U << F::mantissa) - 1)), e = int(bits >> F::mantissa);
  return e == 0 ? std::ldexp(m, 1 - F::bias - F::mantissa)
                : std::ldexp((1 << F::mantissa) + m, e - F::bias - F::mantissa);
}
template <class H>
constexpr unsigned infinity_bits = unsigned(Format<H>::exponents - 1) << Format<H>::mantissa;

/// The values of all finite non-negative patterns; ascending, as patterns are.
template <class H>
const std::vector<double>& values() {
  static const std::vector<double> all = [] {
    std::vector<double> v;
    for (unsigned b = 0; b < infinity_bits<H>; ++b) v.push_back(decode<H>(b));
    return v;
  }();
  return all;
}

/// The pattern nearest to x, ties to the even one, by search.
template <class H>
unsigned nearest(double x) {
  const auto& v = values<H>();
  const double a = std::abs(x), largest = v.back(), step = largest - v[v.size() - 2];
  unsigned bits;
  if (a >= largest + step / 2) {
    bits = infinity_bits<H>;
  } else {
    const auto above = std::lower_bound(v.begin(), v.end(), a);
    bits = unsigned(above - v.begin());
    if (above == v.end()) bits = unsigned(v.size()) - 1;
    if (bits > 0 && above != v.end() && *above != a) {
      const double down = a - v[bits - 1], up = v[bits] - a;  // exact: all of these are multiples of a small power of 2
      if (down < up || (down == up && bits % 2 == 1)) --bits;
    }
  }
  return bits | (std::signbit(x) ? 0x8000U : 0U);
}

}  // namespace

TEST_CASE_TEMPLATE("every pattern widens to its value and narrows back to itself", H, bf16, f16) {
  for (unsigned b = 0; b < 65536; ++b) {
    const H h = H::from_bits(std::uint16_t(b));
    const float x = h;
    const unsigned magnitude = b & 0x7fffU;
    CAPTURE(b);
    if (magnitude > infinity_bits<H>) {
      REQUIRE(std::isnan(x));
      REQUIRE(std::isnan(float(H(x))));
    } else if (magnitude == infinity_bits<H>) {
      REQUIRE(std::isinf(x));
      REQUIRE(H(x).bits == b);
    } else {
      REQUIRE(double(std::abs(x)) == decode<H>(magnitude));
      REQUIRE(H(x).bits == b);
      REQUIRE(H(double(x)).bits == b);
    }
    REQUIRE(std::signbit(x) == (b >= 0x8000U));
  }
}

TEST_CASE_TEMPLATE("narrowing rounds to nearest, ties to even, at every boundary", H, bf16, f16) {
  const auto& v = values<H>();
  for (std::size_t i = 0; i + 1 < v.size(); ++i) {
    const double middle = (v[i] + v[i + 1]) / 2;  // exact, in float too
    for (const double sign : {1.0, -1.0}) {
      const float tie = float(sign * middle);
      for (const float x : {tie, std::nextafter(tie, 0.0F), std::nextafter(tie, float(sign) * INFINITY)}) {
        CAPTURE(x);
        REQUIRE(H(x).bits == nearest<H>(double(x)));
      }
      // In double the neighbours of a tie are closer than a float can tell: rounding twice would get them wrong.
      for (const double x : {sign * middle, std::nextafter(sign * middle, 0.0),
                             std::nextafter(sign * middle, sign * double(INFINITY))}) {
        CAPTURE(x);
        REQUIRE(H(x).bits == nearest<H>(x));
      }
    }
  }
  const float largest = float(v.back()), step = float(v.back() - v[v.size() - 2]);
  REQUIRE(H(std::nextafter(largest + step / 2, 0.0F)).bits == infinity_bits<H> - 1);
  REQUIRE(H(double(largest) + double(step) / 2).bits == infinity_bits<H>);
  REQUIRE(H(std::numeric_limits<float>::max()).bits == infinity_bits<H>);
  REQUIRE(H(1e300).bits == infinity_bits<H>);
  REQUIRE(H(-1e300).bits == (infinity_bits<H> | 0x8000U));
  REQUIRE(H(1e-300).bits == 0);
  REQUIRE(H(-1e-300).bits == 0x8000U);
  REQUIRE(std::isnan(float(H(std::nan("")))));
}

TEST_CASE_TEMPLATE("random floats and doubles of every magnitude narrow to the nearest", H, bf16, f16) {
  const lowrank::CounterRng rng(11);
  for (std::uint64_t i = 0; i < 200000; ++i) {
    const float x = std::bit_cast<float>(std::uint32_t(rng.bits(i)));
    if (!std::isfinite(x)) continue;
    CAPTURE(x);
    REQUIRE(H(x).bits == nearest<H>(double(x)));
    const double y = std::ldexp(rng.uniform(i), int(rng.below(i + 1000000, 60)) - 40);
    REQUIRE(H(-y).bits == nearest<H>(-y));
  }
}

TEST_CASE_TEMPLATE("a vector of storage widens to the same bits as one element does", H, bf16, f16) {
  constexpr int n = lowrank::detail::lanes<float>;
  std::vector<H> stored(65536);
  for (unsigned b = 0; b < 65536; ++b) stored[b] = H::from_bits(std::uint16_t(b));
  for (unsigned b = 0; b < 65536; b += n) {
    const auto v = lowrank::detail::load_as<float, n>(stored.data() + b);
    for (int l = 0; l < n; ++l) {
      const auto vector = std::bit_cast<std::uint32_t>(float(v[l]));
      const auto scalar = std::bit_cast<std::uint32_t>(float(stored[b + unsigned(l)]));
      CAPTURE(b + unsigned(l));
      REQUIRE(vector == scalar);
    }
  }
}

TEST_CASE("the concepts tell arithmetic from storage") {
  static_assert(lowrank::Real<float> && lowrank::Real<double> && !lowrank::Real<bf16> && !lowrank::Real<int>);
  static_assert(lowrank::StorageOf<bf16, float> && lowrank::StorageOf<f16, float> &&
                lowrank::StorageOf<double, double>);
  static_assert(!lowrank::StorageOf<bf16, double> && !lowrank::StorageOf<float, double>);
  static_assert(float(bf16(1.0F)) == 1.0F && float(f16(-2.5)) == -2.5F);  // usable in constant expressions
}

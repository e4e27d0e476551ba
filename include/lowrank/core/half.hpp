// SPDX-License-Identifier: Apache-2.0
// bf16 and f16 as storage: two bytes that widen to float exactly and narrow with round-to-nearest-even.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lowrank {

namespace detail {

/// x as a float whose last bit is 1 unless x is exactly representable. Rounding that once more, to fewer bits, gives
/// what rounding x at once would have given; going through the nearest float would round ties twice.
constexpr float float_rounded_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  const auto u = std::bit_cast<std::uint32_t>(nearest);
  if (back == x || !(back == back) || (u & 1U) != 0) return nearest;
  if ((u & 0x7fffffffU) == 0x7f800000U) return nearest;  // beyond every float, and beyond the narrow types too
  // The neighbour on the other side of x has the odd last bit; the bits of a float count its magnitude.
  const bool too_large = x < 0 ? back < x : back > x;
  return std::bit_cast<float>(too_large ? u - 1 : u + 1);
}

}  // namespace detail

/// bfloat16: the upper half of a float. Storage only; arithmetic happens in float.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  /// Rounds to nearest, ties to even; overflow becomes infinity; a NaN stays a (quiet) NaN.
  explicit constexpr bf16(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    bits = (u & 0x7fffffffU) > 0x7f800000U ? std::uint16_t((u >> 16) | 0x40U)
                                           : std::uint16_t((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
  explicit constexpr bf16(double x) : bf16(detail::float_rounded_to_odd(x)) {}
  constexpr operator float() const {  // NOLINT(google-explicit-constructor): widening is exact
    return std::bit_cast<float>(std::uint32_t(bits) << 16);
  }
  static constexpr bf16 from_bits(std::uint16_t b) {
    bf16 r;
    r.bits = b;
    return r;
  }
};

/// IEEE binary16. Storage only; arithmetic happens in float.
struct f16 {
  std::uint16_t bits = 0;

  f16() = default;
  /// Rounds to nearest, ties to even; above 65504 becomes infinity; a NaN stays a (quiet) NaN.
  explicit constexpr f16(float x) : bits(narrow(x)) {}
  explicit constexpr f16(double x) : f16(detail::float_rounded_to_odd(x)) {}
  constexpr operator float() const { return widen(bits); }  // NOLINT(google-explicit-constructor): widening is exact
  static constexpr f16 from_bits(std::uint16_t b) {
    f16 r;
    r.bits = b;
    return r;
  }

 private:
  static constexpr std::uint16_t narrow(float x) {
    const auto u = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (u >> 16) & 0x8000U, magnitude = u & 0x7fffffffU;
    if (magnitude > 0x7f800000U) return std::uint16_t(sign | 0x7e00U | ((magnitude >> 13) & 0x3ffU));
    if (magnitude >= 0x477ff000U) return std::uint16_t(sign | 0x7c00U);  // rounds to 65536 or more
    if (magnitude < 0x38800000U) {                                       // subnormal in f16, or zero
      // Adding 0.5 aligns the significand so that the float adder does the rounding: the unit of 0.5 is 2^-24.
      const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
      return std::uint16_t(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U));
    }
    const std::uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    return std::uint16_t(sign | ((rounded - 0x38000000U) >> 13));
  }
  static constexpr float widen(std::uint16_t h) {
    const std::uint32_t sign = std::uint32_t(h & 0x8000U) << 16, exponent = (h >> 10) & 0x1fU, mantissa = h & 0x3ffU;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000U | (mantissa << 13));
    if (exponent != 0) return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (mantissa << 13));
    // Subnormal: mantissa · 2^-24, exact in float.
    const float m = float(mantissa) * 0x1p-24F;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(m) | sign);
  }
};

static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2);

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// The rounding edge: how much of a difference of two 16-bit checkpoints is rounding and nothing else.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "lowrank/core/half.hpp"
#include "lowrank/core/view_of.hpp"
#include "lowrank/spectrum/noise.hpp"

namespace lowrank {

/// Rounding noise of a weight kept in a 16-bit type.
struct RoundingNoise {
  double std = 0;   ///< root mean square of the rounding error of one entry
  double edge = 0;  ///< singular values of a difference below this are rounding
};

namespace detail {

/// The numbers of a 16-bit type: below 2^smallest they lie 2^(smallest − significand) apart, above it the spacing of x
/// is 2^(⌊log₂|x|⌋ − significand).
template <class S>
struct RoundingGrid {
  static_assert(std::same_as<S, bf16> || std::same_as<S, f16>);
  static constexpr int significand = std::is_same_v<S, bf16> ? 7 : 10;   ///< explicit bits
  static constexpr int smallest = std::is_same_v<S, bf16> ? -126 : -14;  ///< exponent of the smallest normal number
  static constexpr int largest = std::is_same_v<S, bf16> ? 127 : 15;     ///< of the largest one

  static double subnormal_spacing() { return std::ldexp(1.0, smallest - significand); }
  /// What rounds to infinity, and everything above it.
  static double overflow() { return std::ldexp(2 - std::ldexp(1.0, -significand - 1), largest); }
};

/// The root mean square of x − S(x) for a normal x of standard deviation `rms`, values beyond S's range not counted.
template <class S>
double normal_rounding(double rms) {
  using Grid = RoundingGrid<S>;
  const double u = Grid::subnormal_spacing();
  if (!(rms > u / 16)) return rms;  // to 1e-15 everything rounds to 0
  const auto beyond = [&](int exponent) { return std::erfc(std::ldexp(1.0, exponent) / (rms * std::numbers::sqrt2)); };
  const int scale = std::ilogb(rms);
  // Below 2^-40 of the scale and above 2^6 of it no double notices what is missing.
  const int first = std::max(Grid::smallest, scale - 40), last = std::min(Grid::largest, scale + 6);
  double variance = 0;
  for (int k = first; k <= last; ++k)
    variance += std::ldexp((beyond(k) - beyond(k + 1)) / 12, 2 * (k - Grid::significand));
  if (first > Grid::smallest) return std::sqrt(variance);
  variance += (1 - beyond(Grid::smallest)) * u * u / 12;
  // A grid as coarse as the distribution: the error is no longer uniform over a spacing.
  for (int k = 1; k <= 64; ++k) {
    const double term = std::exp(-2 * std::pow(std::numbers::pi * k * rms / u, 2)) / (double(k) * double(k));
    if (term < 1e-18) break;
    variance += (k % 2 == 0 ? term : -term) * u * u / (std::numbers::pi * std::numbers::pi);
  }
  return std::sqrt(variance);
}

}  // namespace detail

/// The rounding edge from the root mean square of the weight alone: ρ·(√m + √n), ρ the root mean square of the rounding
/// error of a normal variable of that size; times √2 when both sides of the difference were rounded.
///
/// In the normal range of S ρ is 1.66e-3·rms for bf16 and 2.07e-4·rms for f16, within 1 %. Below it, for f16 from 6e-5
/// down, ρ stays at the 1.7e-8 of the subnormal numbers' spacing until everything rounds to zero and ρ = rms.
/// **Throws** as noise_edge. **Numerics** ρ to 1e-4 for normal entries of one scale; ∞ when one of m·n such entries is
/// more likely than not to leave S's range. A matrix with rows or columns of outliers has a higher edge, which
/// `rounding_noise` reads from the matrix itself.
/// **Source** derived: a rounding error is uniform over the spacing of S's numbers where that is fine, so its variance
/// is ulp²/12. Where it is coarse: Sripad and Snyder, IEEE Trans. ASSP 25 (1977), the error of a uniform quantiser.
template <class S>
requires std::same_as<S, bf16> || std::same_as<S, f16> RoundingNoise rounding_noise(Index rows, Index cols, double rms,
                                                                                    bool both_rounded) {
  detail::check_noise("rounding_noise", rows, cols, rms);
  const double out_of_range = std::erfc(detail::RoundingGrid<S>::overflow() / (rms * std::numbers::sqrt2));
  if (rms > 0 && double(rows) * double(cols) * out_of_range > 0.5)
    return {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()};
  const double s = detail::normal_rounding<S>(rms) * (both_rounded ? std::numbers::sqrt2 : 1);
  return {s, noise_edge(rows, cols, s)};
}

namespace detail {

/// ulp², the squared spacing of S's numbers at x, such that ulp²/12 is the variance of x's rounding error.
///
/// Below the normal range: a number that is not S's own shows its error e, and 12·e² stands for ulp²; one that is, 0
/// among them, was rounded from somewhere within half a spacing.
template <class S, class T>
double squared_spacing(T x, std::uint32_t exponent_bits) {
  using Grid = RoundingGrid<S>;
  if (std::abs(double(x)) >= Grid::overflow()) return std::numeric_limits<double>::infinity();
  const double u = Grid::subnormal_spacing();
  if (exponent_bits < std::uint32_t(127 + Grid::smallest) << 23) {
    const double error = double(x) - double(float(S(x)));
    return error != 0 ? 12 * error * error : u * u;
  }
  const double power = double(std::bit_cast<float>(exponent_bits));  // 2^⌊log₂|x|⌋
  return std::ldexp(power * power, -2 * Grid::significand);
}

}  // namespace detail

/// The rounding noise of this very matrix, kept or about to be kept in S: entry (i, j) has variance ulp_ij²/12, and
/// edge = max_i √Σ_j var_ij + max_j √Σ_i var_ij, which is s·(√m + √n) when all variances are equal.
///
/// **Shapes** any. **Scale** `both_rounded` multiplies by √2: two roundings of entries of the same size.
/// **Throws** NonFiniteError when an entry is NaN or infinite. **Cost** one pass over W, O(n) scratch.
/// **Numerics** ulp is the spacing of S's numbers, also of the subnormal ones. Where an entry lies below the normal
/// range (f16: 6.1e-5) and is not a number of S, its very error counts; where it is one, the spacing, for a zero too: a
/// stored matrix whose entries were far smaller than the spacing gets a higher edge than it need have. A matrix of
/// zeros has none. An entry beyond S's range makes both numbers infinite.
/// **Source** Bandeira & van Handel, Ann. Probab. 44 (2016), theorem 1.1 and its sharp leading constant.
template <class S, class T>
requires(std::same_as<S, bf16> || std::same_as<S, f16>) RoundingNoise
    rounding_noise(MatrixView<const T> W, bool both_rounded) {
  if (W.empty()) return {};
  const auto v = W.is_row_major() ? W : W.transposed();
  std::vector<double> column(static_cast<std::size_t>(v.cols()));
  double total = 0, widest_row = 0;
  constexpr std::uint32_t normal = std::uint32_t(127 + detail::RoundingGrid<S>::smallest) << 23,
                          largest = std::uint32_t(127 + detail::RoundingGrid<S>::largest) << 23;
  const double ulp = std::ldexp(1.0, -2 * detail::RoundingGrid<S>::significand);
  bool any = false;
  for (Index i = 0; i < v.rows(); ++i) {
    double row = 0;
    for (Index j = 0; j < v.cols(); ++j) {
      const T x = v(i, j);
      const std::uint32_t exponent = std::bit_cast<std::uint32_t>(static_cast<float>(x)) & 0x7f800000U;
      if (exponent == 0x7f800000U && !std::isfinite(double(x))) [[unlikely]]
        throw NonFiniteError(detail::text("rounding_noise: W holds a value that is not finite, in row ",
                                          W.is_row_major() ? i : j, ", column ", W.is_row_major() ? j : i));
      const double power = double(std::bit_cast<float>(exponent));  // 2^⌊log₂|x|⌋
      // The first and the last binade and what lies beyond them take the long way.
      const double square =
          exponent >= normal && exponent < largest ? power * power * ulp : detail::squared_spacing<S>(x, exponent);
      any = any || x != T(0);
      row += square;
      column[std::size_t(j)] += square;
    }
    total += row;
    widest_row = std::max(widest_row, row);
  }
  if (!any) return {};
  const double widest_column = *std::max_element(column.begin(), column.end());
  const double factor = std::sqrt((both_rounded ? 2.0 : 1.0) / 12);
  return {factor * std::sqrt(total / double(v.size())), factor * (std::sqrt(widest_row) + std::sqrt(widest_column))};
}
/// As above for a matrix-like W.
template <class S, class X>
requires(std::same_as<S, bf16> || std::same_as<S, f16>) && MatrixLike<const X&> RoundingNoise
    rounding_noise(const X& W, bool both_rounded) {
  return rounding_noise<S, scalar_of<const X&>>(detail::const_view_of(W), both_rounded);
}

}  // namespace lowrank

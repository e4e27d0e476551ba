// SPDX-License-Identifier: Apache-2.0
// The rounding edge: how much of a difference of two 16-bit checkpoints is rounding and nothing else.
#pragma once

#include <bit>
#include <cstdint>
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
/// Explicit significand bits; the unit in the last place of x is 2^(⌊log₂|x|⌋ − bits).
template <class S>
inline constexpr int significand_bits = std::is_same_v<S, bf16> ? 7 : 10;

/// √(E[ulp²]/12)/rms over a smooth distribution of magnitudes: 2^(2⌊log₂x⌋)/x² averages to 3/(8·ln 2) when log₂ x is
/// uniform modulo 1, and is within 1 % of that for a normal distribution.
inline double relative_rounding(int bits) { return std::ldexp(std::sqrt(3 / (8 * std::numbers::ln2) / 12), -bits); }
}  // namespace detail

/// The rounding edge from the root mean square of the weight alone: c·rms(W)·(√m + √n), c = 1.66e-3 for bf16, 2.07e-4
/// for f16; times √2 when both sides of the difference were rounded.
///
/// **Throws** as noise_edge. **Numerics** for entries of one scale; a matrix with rows or columns of outliers has a
/// higher edge, which `rounding_noise` reads from the matrix itself.
/// **Source** derived: a rounding error is uniform over one unit in the last place, so its variance is ulp²/12.
template <class S>
requires std::same_as<S, bf16> || std::same_as<S, f16> RoundingNoise rounding_noise(Index rows, Index cols, double rms,
                                                                                    bool both_rounded) {
  detail::check_noise("rounding_noise", rows, cols, rms);
  const double s =
      detail::relative_rounding(detail::significand_bits<S>) * rms * (both_rounded ? std::numbers::sqrt2 : 1);
  return {s, noise_edge(rows, cols, s)};
}

/// The rounding noise of this very matrix, kept or about to be kept in S: entry (i, j) has variance ulp_ij²/12, and
/// edge = max_i √Σ_j var_ij + max_j √Σ_i var_ij, which is s·(√m + √n) when all variances are equal.
///
/// **Shapes** any. **Scale** `both_rounded` multiplies by √2: two roundings of entries of the same size.
/// **Throws** NonFiniteError when an entry is NaN or infinite. **Cost** one pass over W, O(n) scratch.
/// **Numerics** S's subnormal range is treated as normal, which can only lower the edge by less than 1e-38 (bf16).
/// **Source** Bandeira & van Handel, Ann. Probab. 44 (2016), theorem 1.1 and its sharp leading constant.
template <class S, class T>
requires(std::same_as<S, bf16> || std::same_as<S, f16>) RoundingNoise
    rounding_noise(MatrixView<const T> W, bool both_rounded) {
  if (W.empty()) return {};
  const auto v = W.is_row_major() ? W : W.transposed();
  std::vector<double> column(static_cast<std::size_t>(v.cols()));
  double total = 0, widest_row = 0;
  for (Index i = 0; i < v.rows(); ++i) {
    double row = 0;
    for (Index j = 0; j < v.cols(); ++j) {
      const std::uint32_t bits = std::bit_cast<std::uint32_t>(static_cast<float>(v(i, j)));
      if ((bits & 0x7f800000U) == 0x7f800000U) [[unlikely]]
        throw NonFiniteError(detail::text("rounding_noise: W holds a value that is not finite, in row ",
                                          W.is_row_major() ? i : j, ", column ", W.is_row_major() ? j : i));
      const float power = std::bit_cast<float>(bits & 0x7f800000U);  // 2^⌊log₂|x|⌋, or 0
      const double square = double(power) * double(power);
      row += square;
      column[std::size_t(j)] += square;
    }
    total += row;
    widest_row = std::max(widest_row, row);
  }
  const double widest_column = *std::max_element(column.begin(), column.end());
  const double ulp =
      std::ldexp((both_rounded ? std::numbers::sqrt2 : 1) / std::sqrt(12.0), -detail::significand_bits<S>);
  return {ulp * std::sqrt(total / double(v.size())), ulp * (std::sqrt(widest_row) + std::sqrt(widest_column))};
}
/// As above for a matrix-like W.
template <class S, class X>
requires(std::same_as<S, bf16> || std::same_as<S, f16>) && MatrixLike<const X&> RoundingNoise
    rounding_noise(const X& W, bool both_rounded) {
  return rounding_noise<S, scalar_of<const X&>>(detail::const_view_of(W), both_rounded);
}

}  // namespace lowrank

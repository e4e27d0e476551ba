// SPDX-License-Identifier: Apache-2.0
// Noise floors: what iid noise of a shape would show, where its spectrum ends, and what to keep above it.
#pragma once

#include <limits>
#include <numbers>
#include <span>
#include <string>
#include <vector>

#include "lowrank/spectrum/marchenko_pastur.hpp"
#include "lowrank/spectrum/metrics.hpp"

namespace lowrank {

// s: standard deviation of one entry of the noise. N = min(m, n), M = max(m, n), β = N/M.

namespace detail {
inline void check_noise(const char* where, Index rows, Index cols, double std) {
  if (rows < 1 || cols < 1)
    throw ShapeError(text(where, ": needs at least one row and one column, got ", shape_text(rows, cols)));
  if (!(std >= 0) || !std::isfinite(std))
    throw ArgumentError(text(where, ": the standard deviation must be finite and not negative, got ", std));
}
}  // namespace detail

/// Where the spectrum of iid noise ends as the matrix grows: s·(√m + √n).
///
/// **Scale** s is the standard deviation of one entry. **Throws** ShapeError on an empty shape, ArgumentError on a bad
/// s.
/// **Numerics** a finite matrix' σ₁ lies below it on average and above it in one case of six, by some N^(−2/3) of its
/// value; use noise_spectral_norm when a false alarm matters. **Source** the upper Marchenko–Pastur edge.
inline double noise_edge(Index rows, Index cols, double std) {
  detail::check_noise("noise_edge", rows, cols, std);
  return std * (std::sqrt(double(rows)) + std::sqrt(double(cols)));
}

/// Of the Tracy–Widom law for real matrices: the mean, and the value exceeded once in a hundred draws.
inline constexpr double tracy_widom_mean = -1.2065335745820;
inline constexpr double tracy_widom_99 = 2.02345;

/// σ₁ of an m×n matrix of iid noise: its typical value, or the value exceeded with a given small probability.
///
/// σ₁² ≈ s²·[μ + t·w], μ = (a + b)², w = (a + b)·(1/a + 1/b)^⅓, a = √(m−½), b = √(n−½), t a number of the Tracy–Widom
/// law.
/// **Throws** as noise_edge. **Numerics** within 1 % from 4×4 on, exact in the limit; 1×n is within 1/n.
/// **Source** Johnstone, Ann. Statist. 29 (2001), with the centring of Ma, Bernoulli 18 (2012).
inline double noise_spectral_norm(Index rows, Index cols, double std, double tracy_widom = tracy_widom_mean) {
  detail::check_noise("noise_spectral_norm", rows, cols, std);
  const double a = std::sqrt(double(rows) - 0.5), b = std::sqrt(double(cols) - 0.5);
  return std * std::sqrt((a + b) * (a + b) + tracy_widom * (a + b) * std::cbrt(1 / a + 1 / b));
}

/// The min(m, n) singular values that iid noise of this shape has on average, descending: σ_i = s·√(M·x_i), x_i the
/// Marchenko–Pastur quantile with a share (i − ½)/N above it.
///
/// **Throws** as noise_edge. **Cost** O(N) with some 5 Newton steps each. **Numerics** eigenvalues of noise are rigid:
/// inside the spectrum they leave these places by O(1/N); the outermost few by O(N^(−2/3)) relatively.
inline std::vector<double> noise_spectrum(Index rows, Index cols, double std) {
  detail::check_noise("noise_spectrum", rows, cols, std);
  const auto law = MarchenkoPastur::of_shape(double(rows), double(cols));
  const Index N = std::min(rows, cols);
  std::vector<double> sigma(static_cast<std::size_t>(N));
  for (Index i = 0; i < N; ++i)
    sigma[std::size_t(i)] =
        std * std::sqrt(double(std::max(rows, cols)) * law.upper_quantile((double(i) + 0.5) / double(N)));
  return sigma;
}

/// Every metric of noise.hpp's null: what SpectrumMetrics iid noise of this shape and standard deviation would have.
///
/// Pass std = ‖W‖_F/√(mn) to give the noise the energy of W. Norms scale with std, everything else is free of it.
/// **Throws** as noise_edge. **Cost** as noise_spectrum.
/// **Numerics** r₉₀ and its kin: within ±1 of the mean over draws from N = 32 on (linear statistics of a Wishart
/// spectrum fluctuate by O(1) whatever N); effective rank and participation ratio: relative error below 1/N; σ₁ and
/// stable rank: from noise_spectral_norm; the condition number of a square matrix has no mean, and what stands here is
/// of its typical size.
inline SpectrumMetrics noise_metrics(Index rows, Index cols, double std = 1) {
  auto m = spectrum_metrics(noise_spectrum(rows, cols, std), rows, cols);
  m.spectral_norm = noise_spectral_norm(rows, cols, std);
  m.frobenius_norm = std * std::sqrt(double(rows) * double(cols));
  m.stable_rank = std > 0 ? m.frobenius_norm * m.frobenius_norm / (m.spectral_norm * m.spectral_norm) : 0;
  return m;
}

/// The optimal hard threshold for a known noise level, in units of s·√M: λ(β) = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))).
///
/// λ(1) = 4/√3. **Throws** ArgumentError unless 0 < β ≤ 1.
/// **Source** Gavish & Donoho, "The optimal hard threshold for singular values is 4/√3", arXiv 1305.5870, eq. 11.
inline double gavish_donoho_lambda(double beta) {
  if (!(beta > 0 && beta <= 1))
    throw ArgumentError(detail::text("gavish_donoho_lambda: beta must lie in (0, 1], got ", beta));
  return std::sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + std::sqrt(beta * beta + 14 * beta + 1)));
}

/// The optimal hard threshold for an unknown noise level, in units of the median singular value: ω(β) = λ(β)/√μ_β.
///
/// ω(1) = 2.858. μ_β is the median of the Marchenko–Pastur law, from its closed-form distribution instead of
/// quadrature.
/// **Throws** as gavish_donoho_lambda. **Numerics** error about 1e-14; the paper's table IV carries quadrature errors
/// of up to 7e-4 in its fourth digit. **Source** arXiv 1305.5870, eqs. 4 and 5.
inline double gavish_donoho_omega(double beta) {
  return gavish_donoho_lambda(beta) / std::sqrt(MarchenkoPastur(beta).median());
}

/// Singular values above this are worth keeping when the noise has standard deviation s: λ(β)·s·√M.
/// **Throws** as noise_edge. **Source** see gavish_donoho_lambda.
inline double optimal_threshold(Index rows, Index cols, double std) {
  detail::check_noise("optimal_threshold", rows, cols, std);
  return gavish_donoho_lambda(double(std::min(rows, cols)) / double(std::max(rows, cols))) * std *
         std::sqrt(double(std::max(rows, cols)));
}

/// What the median says about the noise in a matrix that is noise plus something of low rank.
struct NoiseEstimate {
  /// Whether the median lies in the noise, as far as the values below it tell. When not, the numbers are NaN, the
  /// counts −1, and `reason` says why.
  bool determined = true;
  std::string reason = {};
  double std = 0;          ///< standard deviation of one entry
  double edge = 0;         ///< noise_edge at that std
  double threshold = 0;    ///< optimal_threshold at that std
  Index above_edge = 0;    ///< singular values above the edge
  Index optimal_rank = 0;  ///< singular values above the threshold
};

namespace detail {

/// Why the median of these singular values does not tell the noise; nullptr when nothing speaks against it.
///
/// Noise of one level puts each value below the median where the law has it. Each therefore shows a level of its own,
/// and these must agree to within what lies between the median and the edge of the noise: when the median is beyond the
/// edge that a lower value shows, more than half of the values are no noise; when the edge of the median's level is so
/// low that a lower value, where the law has it, would be beyond its own, the values do not thin out as noise does.
template <class S>
const char* median_objection(std::span<const S> sigma, const MarchenkoPastur& law, double scale, double median_level) {
  const auto n = Index(sigma.size());
  if (n < 10) return "fewer than 10 singular values: too few below the median to check it";
  const double slack = (1 + std::sqrt(law.beta())) / std::sqrt(law.median());  // edge over median, of noise
  for (const double share : {0.05, 0.1, 0.25}) {
    // The smallest three of a square matrix scatter by as much as they measure.
    const Index from_below = std::max<Index>(4, Index(std::ceil(share * double(n))));
    const double value = double(sigma[std::size_t(n - from_below)]);
    const double level = value / (scale * std::sqrt(law.quantile((double(from_below) - 0.5) / double(n))));
    if (level * slack < median_level) return "more than half of the singular values lie above the noise";
    if (level > slack * median_level) return "the lower half of the singular values is not that of noise";
  }
  return nullptr;
}

}  // namespace detail

/// Estimates the noise level from the median singular value, s = median(σ)/√(M·μ_β), and counts what rises above it.
///
/// **Shapes** sigma holds all min(m, n) singular values. **Throws** see SingularValueList; ShapeError on another count.
/// **Numerics** a signal of rank N/10 raises s by some 6 % for a square matrix, 3 % for one of 1:10; one of rank 3N/10
/// by 24 % and 8 %. Beyond N/2 the median is a signal itself: `determined` is then false, as long as the values
/// below the median show it. For signals from twice the edge on they do while a fifth of all values is noise; where
/// almost none is, the rest may be spread like noise.
/// **Source** arXiv 1305.5870, §III-E.
template <SingularValueList S>
NoiseEstimate estimate_noise(const S& sigma, Index rows, Index cols) {
  const auto s = detail::sigma_span(sigma);
  detail::check_noise("estimate_noise", rows, cols, 1);
  detail::check_sigma("estimate_noise", s);
  if (Index(s.size()) != std::min(rows, cols))
    throw ShapeError(
        detail::text("estimate_noise: needs all ", std::min(rows, cols), " singular values, got ", s.size()));
  const std::size_t n = s.size();
  const double median = (double(s[(n - 1) / 2]) + double(s[n / 2])) / 2;
  const auto law = MarchenkoPastur::of_shape(double(rows), double(cols));
  const double scale = std::sqrt(double(std::max(rows, cols)));
  NoiseEstimate e;
  e.std = median / (scale * std::sqrt(law.median()));
  if (const char* objection = detail::median_objection(s, law, scale, e.std)) {
    e.determined = false;
    e.reason = objection;
    e.std = e.edge = e.threshold = std::numeric_limits<double>::quiet_NaN();
    e.above_edge = e.optimal_rank = -1;
    return e;
  }
  e.edge = noise_edge(rows, cols, e.std);
  e.threshold = optimal_threshold(rows, cols, e.std);
  e.above_edge = detail::count_above(s, e.edge);
  e.optimal_rank = detail::count_above(s, e.threshold);
  return e;
}

}  // namespace lowrank

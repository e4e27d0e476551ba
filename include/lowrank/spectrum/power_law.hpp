// SPDX-License-Identifier: Apache-2.0
// Power-law tails of a spectrum: maximum likelihood with a chosen cut-off, and the Hill estimator.
#pragma once

#include <vector>

#include "lowrank/spectrum/metrics.hpp"

namespace lowrank {

/// A fit of p(λ) ∝ λ^(−α) to the eigenvalues λ = σ² at or above x_min.
struct PowerLawFit {
  double alpha = 0;           ///< the exponent; 0 when nothing could be fitted
  double alpha_error = 0;     ///< its standard error, (α − 1)/√n
  double x_min = 0;           ///< where the tail begins, in units of λ
  double ks_distance = 1;     ///< sup |empirical − fitted distribution| over the tail
  Index tail_count = 0;       ///< eigenvalues in the tail, n
  double weighted_alpha = 0;  ///< α·log₁₀ λ_max
};

/// How the cut-off is searched for.
struct PowerLawOptions {
  /// Fewer eigenvalues than this are no tail: their KS distance means nothing.
  Index min_tail = 10;
  /// At most so many cut-offs are tried, evenly over the ranks; 0 tries every eigenvalue, which costs n²/2
  /// exponentials.
  Index max_candidates = 512;
};

namespace detail {

/// ln λ of the positive singular values, descending.
template <class T>
std::vector<double> log_eigenvalues(std::span<const T> s) {
  std::vector<double> l;
  l.reserve(s.size());
  for (const T x : s)
    if (x > T(0)) l.push_back(2 * std::log(double(x)));
  return l;
}

}  // namespace detail

/// Fits a continuous power law to the eigenvalues by maximum likelihood, α = 1 + n/Σ ln(λ_i/x_min), at the cut-off
/// x_min that makes the Kolmogorov–Smirnov distance smallest.
///
/// **Scale** λ = σ², unnormalised, as WeightWatcher has it; α is free of scale, weighted_alpha is not.
/// **Throws** see SingularValueList; ArgumentError when min_tail < 2. **Cost** O(candidates·n) exponentials.
/// **Numerics** zeros are left out; fewer than min_tail positive values, or all equal ones, give alpha = 0 and
/// distance 1.
/// **Source** Clauset, Shalizi & Newman, "Power-law distributions in empirical data", SIAM Review 51 (2009), §3;
/// Martin & Mahoney, arXiv 1901.08278, for its use on weights.
template <SingularValueList S>
PowerLawFit fit_power_law(const S& sigma, const PowerLawOptions& options = {}) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("fit_power_law", s);
  if (options.min_tail < 2 || options.max_candidates < 0)
    throw ArgumentError(detail::text("fit_power_law: min_tail must be at least 2 and max_candidates not negative, got ",
                                     options.min_tail, " and ", options.max_candidates));
  const auto l = detail::log_eigenvalues(s);
  const Index n = Index(l.size());
  PowerLawFit best;
  if (n < options.min_tail) return best;
  std::vector<double> sum(l.size() + 1, 0.0);
  for (std::size_t i = 0; i < l.size(); ++i) sum[i + 1] = sum[i] + (l[i] - l[0]);
  const Index choices = n - options.min_tail + 1;
  const Index tried = options.max_candidates > 0 ? std::min(options.max_candidates, choices) : choices;
  Index previous = -1;
  for (Index c = 0; c < tried; ++c) {
    // A tail of `count` values: the c-th of evenly spaced sizes, grown over ties of its smallest value.
    Index count = options.min_tail + (tried > 1 ? c * (choices - 1) / (tried - 1) : choices - 1);
    while (count < n && l[std::size_t(count)] == l[std::size_t(count - 1)]) ++count;
    if (count == previous) continue;
    previous = count;
    const double log_min = l[std::size_t(count - 1)];
    const double excess = sum[std::size_t(count)] + double(count) * (l[0] - log_min);
    if (!(excess > 1e-14 * double(count))) continue;
    const double exponent = double(count) / excess;  // α − 1
    double distance = 0;
    for (Index i = 0; i < count;
         ++i) {  // value i has i larger ones: the empirical tail steps from (i+1)/n to i/n there
      const double tail = std::exp(-exponent * (l[std::size_t(i)] - log_min));
      distance = std::max(
          {distance, std::abs(tail - double(i) / double(count)), std::abs(tail - double(i + 1) / double(count))});
    }
    if (distance < best.ks_distance)
      best = {1 + exponent, exponent / std::sqrt(double(count)), std::exp(log_min), distance, count, 0};
  }
  best.weighted_alpha = best.alpha * l[0] / std::log(10.0);
  return best;
}

/// The Hill estimate of the density exponent from the k largest eigenvalues: α = 1 + k/Σ_{i≤k} ln(λ_i/λ_{k+1}).
///
/// **Scale** free; the same α as fit_power_law's. **Throws** see SingularValueList; ArgumentError unless 1 ≤ k and
/// λ_{k+1} > 0 exists. **Cost** O(k). **Numerics** infinity when the k + 1 largest are all equal; standard error (α −
/// 1)/√k.
/// **Source** Hill, Ann. Statist. 3 (1975).
template <SingularValueList S>
double hill_estimator(const S& sigma, Index k) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("hill_estimator", s);
  if (k < 1 || k + 1 > Index(s.size()) || !(s[std::size_t(k)] > 0))
    throw ArgumentError(detail::text("hill_estimator: needs k + 1 positive singular values and k >= 1, got k = ", k,
                                     " and ", s.size(), " values"));
  double excess = 0;
  for (Index i = 0; i < k; ++i) excess += 2 * std::log(double(s[std::size_t(i)]) / double(s[std::size_t(k)]));
  return excess > 0 ? 1 + double(k) / excess : std::numeric_limits<double>::infinity();
}

}  // namespace lowrank

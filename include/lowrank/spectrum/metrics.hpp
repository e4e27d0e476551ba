// SPDX-License-Identifier: Apache-2.0
// Rank metrics: plain functions of a list of singular values, and all of them at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <iterator>
#include <limits>
#include <span>
#include <type_traits>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/core/scalar.hpp"

namespace lowrank {

// σ: singular values, descending. λ = σ². p = σ/Σσ. m×n: the shape of the matrix they belong to.

/// Singular values as every function of this page takes them: contiguous floats or doubles (std::vector, std::span,
/// std::array, lowrank::Buffer, an Eigen vector, ...; a matrix is none), **descending**, finite, not negative. Fewer
/// than min(m, n) of them mean that the others are zero. Each function checks this in one pass and throws ArgumentError
/// (NonFiniteError for NaN and infinity) with the index of the first value that breaks it; it never sorts.
template <class S>
concept SingularValueList = requires(const S& s) {
  { std::data(s) } -> std::convertible_to<const void*>;
  { std::size(s) } -> std::convertible_to<std::size_t>;
}
&&Real<std::remove_cvref_t<decltype(*std::data(std::declval<const S&>()))>> &&
    (
        !requires(const S& s) { s.rows(), s.cols(); } || requires { requires bool(S::IsVectorAtCompileTime); });

namespace detail {

template <SingularValueList S>
auto sigma_span(const S& s) {
  using T = std::remove_cvref_t<decltype(*std::data(s))>;
  return std::span<const T>(std::data(s), std::size(s));
}

template <class T>
void check_sigma(const char* where, std::span<const T> s) {
  for (std::size_t i = 0; i < s.size(); ++i) {
    if (!std::isfinite(s[i])) [[unlikely]]
      throw NonFiniteError(text(where, ": singular value ", i, " is not finite"));
    if (s[i] < T(0)) [[unlikely]]
      throw ArgumentError(text(where, ": singular value ", i, " is negative: ", double(s[i])));
    if (i > 0 && s[i] > s[i - 1]) [[unlikely]]
      throw ArgumentError(text(where, ": singular values must descend, but value ", i, " = ", double(s[i]), " follows ",
                               double(s[i - 1])));
  }
}

/// Σ (σ/σ₁)^p for p = 1, 2, 4: relative to σ₁ no sum can overflow or lose a small matrix to underflow.
struct PowerSums {
  double top = 0, one = 0, two = 0, four = 0;
};
template <class T>
PowerSums power_sums(std::span<const T> s) {
  PowerSums r;
  if (s.empty() || s[0] == T(0)) return r;
  r.top = double(s[0]);
  for (const T x : s) {
    const double q = double(x) / r.top, q2 = q * q;
    r.one += q;
    r.two += q2;
    r.four += q2 * q2;
  }
  return r;
}

inline void check_share(const char* where, double tau) {
  if (!(tau > 0 && tau <= 1)) [[unlikely]]
    throw ArgumentError(text(where, ": the energy share must lie in (0, 1], got ", tau));
}

template <class T>
Index energy_rank(std::span<const T> s, double tau, const PowerSums& sums) {
  if (sums.top == 0) return 0;
  double energy = 0;  // summed in the order of the total, so that the last partial sum equals the total bit for bit
  for (std::size_t i = 0; i < s.size(); ++i) {
    const double q = double(s[i]) / sums.top;
    energy += q * q;
    if (energy >= tau * sums.two) return Index(i) + 1;
  }
  return Index(s.size());
}

template <class T>
double effective_rank(std::span<const T> s, const PowerSums& sums) {
  if (sums.top == 0) return 0;
  double entropy = 0;
  for (const T x : s) {
    const double p = double(x) / sums.top / sums.one;
    if (p > 0) entropy -= p * std::log(p);
  }
  return std::exp(entropy);
}

template <class T>
Index count_above(std::span<const T> s, double tolerance) {
  return Index(std::partition_point(s.begin(), s.end(), [=](T x) { return double(x) > tolerance; }) - s.begin());
}

}  // namespace detail

/// The largest singular value, σ₁ = ‖W‖₂; 0 for none. **Throws** see SingularValueList. **Cost** O(n).
template <SingularValueList S>
double spectral_norm(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("spectral_norm", s);
  return s.empty() ? 0 : double(s[0]);
}

/// ‖W‖_F = √Σσ². **Throws** see SingularValueList. **Cost** O(n). **Numerics** sums in double relative to σ₁.
template <SingularValueList S>
double frobenius_norm(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("frobenius_norm", s);
  const auto sums = detail::power_sums(s);
  return sums.top * std::sqrt(sums.two);
}

/// ‖W‖_* = Σσ. **Throws** see SingularValueList. **Cost** O(n).
template <SingularValueList S>
double nuclear_norm(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("nuclear_norm", s);
  const auto sums = detail::power_sums(s);
  return sums.top * sums.one;
}

/// How many directions hold a share τ of the energy: r_τ = min k with Σ_{i≤k} σ_i² ≥ τ·Σσ²; 0 for a zero matrix.
///
/// **Scale** free. **Throws** see SingularValueList; ArgumentError unless 0 < τ ≤ 1. **Cost** O(n).
/// **Numerics** double sums of (σ/σ₁)²; a tie at τ that is exact in the reals may fall either way within n·2⁻⁵³ of it,
/// but for a flat spectrum the sums are whole numbers and the tie is exact. For how far the result can move when the
/// singular values carry an error, see spectrum_bounds.
/// **Source** the measure of Biderman et al., "LoRA Learns Less and Forgets Less", arXiv 2405.09673, §6 (τ = 0.9).
template <SingularValueList S>
Index energy_rank(const S& sigma, double tau = 0.9) {
  const auto s = detail::sigma_span(sigma);
  detail::check_share("energy_rank", tau);
  detail::check_sigma("energy_rank", s);
  return detail::energy_rank(s, tau, detail::power_sums(s));
}

/// The exponential of the entropy of the singular values: exp(−Σ p·ln p), p = σ/Σσ; between 1 and n, 0 for a zero
/// matrix.
///
/// **Scale** free. **Throws** see SingularValueList. **Cost** O(n) logarithms.
/// **Source** Roy & Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
template <SingularValueList S>
double effective_rank(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("effective_rank", s);
  return detail::effective_rank(s, detail::power_sums(s));
}

/// ‖W‖_F² / σ₁²; between 1 and n, 0 for a zero matrix. **Scale** free. **Throws** see SingularValueList. **Cost** O(n).
/// **Source** Rudelson & Vershynin, "Sampling from large matrices", J. ACM 54 (2007), where it is the numerical rank.
template <SingularValueList S>
double stable_rank(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("stable_rank", s);
  return detail::power_sums(s).two;
}

/// (Σλ)² / Σλ², λ = σ²; between 1 and n, 0 for a zero matrix. **Scale** free. **Throws** see SingularValueList.
/// **Cost** O(n).
template <SingularValueList S>
double participation_ratio(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("participation_ratio", s);
  const auto sums = detail::power_sums(s);
  return sums.top == 0 ? 0 : sums.two * sums.two / sums.four;
}

/// How many singular values exceed σ₁·max(m, n)·eps, as numpy's and MATLAB's rank do.
///
/// **Scale** `eps` is the relative precision the matrix was *computed or stored* in; the default is float's, because a
/// weight that passed through float has noise at that level whatever the singular values are held in.
/// **Throws** see SingularValueList; ArgumentError on a negative eps; ShapeError when there are more values than min(m,
/// n).
/// **Cost** O(n).
template <SingularValueList S>
Index numerical_rank(const S& sigma, Index rows, Index cols, double eps = std::numeric_limits<float>::epsilon()) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("numerical_rank", s);
  if (!(eps >= 0)) throw ArgumentError(detail::text("numerical_rank: eps must not be negative, got ", eps));
  if (rows < 0 || cols < 0 || Index(s.size()) > std::min(rows, cols))
    throw ShapeError(detail::text("numerical_rank: a ", detail::shape_text(rows, cols), " matrix cannot have ",
                                  s.size(), " singular values"));
  return s.empty() ? 0 : detail::count_above(s, double(s[0]) * double(std::max(rows, cols)) * eps);
}

/// σ₁ / σ_last of the values given; infinity when the last is 0, 0 for none. **Scale** free.
/// **Throws** see SingularValueList. **Cost** O(n). For the r values of a product B·A this is the condition number on
/// its range, not that of the m×n matrix.
template <SingularValueList S>
double condition_number(const S& sigma) {
  const auto s = detail::sigma_span(sigma);
  detail::check_sigma("condition_number", s);
  if (s.empty()) return 0;
  return s.back() == 0 ? std::numeric_limits<double>::infinity() : double(s.front()) / double(s.back());
}

/// Every rank metric of one matrix. Ranks are counts, norms have the unit of the matrix, the rest are pure numbers.
struct SpectrumMetrics {
  double spectral_norm = 0, frobenius_norm = 0, nuclear_norm = 0;
  Index energy_rank_90 = 0, energy_rank_95 = 0, energy_rank_99 = 0;
  double effective_rank = 0, stable_rank = 0, participation_ratio = 0;
  Index numerical_rank = 0;
  double condition_number = 0;
};

/// Calls f(name, value) for every field, in the order and under the names that CSV, JSON and reports use. Works on
/// `SpectrumMetrics&` as well as on a const one.
template <class M, class F>
requires std::same_as<std::remove_const_t<M>, SpectrumMetrics>
void for_each_metric(M& m, F&& f) {
  f("spectral_norm", m.spectral_norm);
  f("frobenius_norm", m.frobenius_norm);
  f("nuclear_norm", m.nuclear_norm);
  f("energy_rank_90", m.energy_rank_90);
  f("energy_rank_95", m.energy_rank_95);
  f("energy_rank_99", m.energy_rank_99);
  f("effective_rank", m.effective_rank);
  f("stable_rank", m.stable_rank);
  f("participation_ratio", m.participation_ratio);
  f("numerical_rank", m.numerical_rank);
  f("condition_number", m.condition_number);
}

/// All metrics of an m×n matrix from its singular values, in one call. **Throws** as numerical_rank.
/// **Cost** O(n), three passes. `eps`: see numerical_rank.
template <SingularValueList S>
SpectrumMetrics spectrum_metrics(const S& sigma, Index rows, Index cols,
                                 double eps = std::numeric_limits<float>::epsilon()) {
  const auto s = detail::sigma_span(sigma);
  SpectrumMetrics m;
  m.numerical_rank = numerical_rank(sigma, rows, cols, eps);  // checks everything
  const auto sums = detail::power_sums(s);
  m.spectral_norm = sums.top;
  m.frobenius_norm = sums.top * std::sqrt(sums.two);
  m.nuclear_norm = sums.top * sums.one;
  m.energy_rank_90 = detail::energy_rank(s, 0.90, sums);
  m.energy_rank_95 = detail::energy_rank(s, 0.95, sums);
  m.energy_rank_99 = detail::energy_rank(s, 0.99, sums);
  m.effective_rank = detail::effective_rank(s, sums);
  m.stable_rank = sums.two;
  m.participation_ratio = sums.top == 0 ? 0 : sums.two * sums.two / sums.four;
  m.condition_number = condition_number(sigma);
  return m;
}

}  // namespace lowrank

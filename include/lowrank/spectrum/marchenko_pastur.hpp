// SPDX-License-Identifier: Apache-2.0
// The Marchenko–Pastur law in closed form: what the spectrum of pure noise looks like.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "lowrank/core/errors.hpp"

namespace lowrank {

/// The limit law of the squared singular values of an m×n matrix of iid entries of variance 1/max(m, n), as
/// β = min(m, n)/max(m, n) stays fixed: density √((x₊−x)(x−x₋))/(2πβx) on [x₋, x₊] = [(1−√β)², (1+√β)²].
///
/// Everything is a function of the angle θ in x = 1 + β + 2√β·cos θ, where tail count and tail energy are elementary:
/// share of values above x is [(1+β)θ − 2√β·sin θ − 2(1−β)·atan(g·tan(θ/2))]/(2πβ), g = (1−√β)/(1+√β);
/// share of Σx above x is (θ − sin θ·cos θ)/π, the same for every β.
///
/// **Throws** ArgumentError unless 0 < β ≤ 1 (constructor), and when a probability lies outside [0, 1].
/// **Cost** O(1); quantiles and energy_rank_share some 5 Newton steps.
/// **Numerics** absolute error of shares about 1e-15, of quantiles about 1e-15·x₊.
/// **Source** Marčenko & Pastur, Math. USSR-Sbornik 1 (1967); the angle form follows by integrating it.
class MarchenkoPastur {
 public:
  explicit MarchenkoPastur(double beta) : beta_(beta) {
    if (!(beta > 0 && beta <= 1))
      throw ArgumentError(detail::text("MarchenkoPastur: beta must lie in (0, 1], got ", beta));
    root_ = std::sqrt(beta);
    g_ = (1 - root_) / (1 + root_);
  }
  /// The law of an m×n matrix. **Throws** ShapeError unless both are at least 1.
  static MarchenkoPastur of_shape(double rows, double cols) {
    if (!(rows >= 1 && cols >= 1))
      throw ShapeError(detail::text("MarchenkoPastur: needs at least one row and one column, got ", rows, "x", cols));
    return MarchenkoPastur(std::min(rows, cols) / std::max(rows, cols));
  }

  [[nodiscard]] double beta() const noexcept { return beta_; }
  [[nodiscard]] double lower_edge() const noexcept { return (1 - root_) * (1 - root_); }
  [[nodiscard]] double upper_edge() const noexcept { return (1 + root_) * (1 + root_); }

  /// Density at x; 0 outside the edges.
  [[nodiscard]] double density(double x) const {
    const double a = lower_edge(), b = upper_edge();
    return x <= a || x >= b ? 0 : std::sqrt((b - x) * (x - a)) / (2 * std::numbers::pi * beta_ * x);
  }
  /// Share of values at or below x.
  [[nodiscard]] double cdf(double x) const { return x <= lower_edge() ? 0 : 1 - count_above(angle(x)); }
  /// Share of the energy Σx that lies in values above x.
  [[nodiscard]] double energy_above(double x) const {
    const double t = angle(x);
    return (t - std::sin(t) * std::cos(t)) / std::numbers::pi;
  }
  /// x with cdf(x) = p.
  [[nodiscard]] double quantile(double p) const {
    check("quantile", p);
    return value(angle_of_count(1 - p));
  }
  /// The median, cdf = ½; the μ_β of Gavish & Donoho.
  [[nodiscard]] double median() const { return quantile(0.5); }
  /// The share of the values, largest first, that holds a share `tau` of the energy: the limit of r_τ / min(m, n).
  [[nodiscard]] double energy_rank_share(double tau) const {
    check("energy_rank_share", tau);
    const double t = solve(
        std::numbers::pi * tau, [](double u) { return u - std::sin(u) * std::cos(u); },
        [](double u) { return 2 * std::sin(u) * std::sin(u); });
    return count_above(t);
  }
  /// The value whose share of larger ones is q, counted from above: quantile(1 − q) without its cancellation.
  [[nodiscard]] double upper_quantile(double q) const {
    check("upper_quantile", q);
    return value(angle_of_count(q));
  }

 private:
  static void check(const char* where, double p) {
    if (!(p >= 0 && p <= 1))
      throw ArgumentError(detail::text("MarchenkoPastur::", where, ": share must lie in [0, 1], got ", p));
  }
  [[nodiscard]] double angle(double x) const { return std::acos(std::clamp((x - 1 - beta_) / (2 * root_), -1.0, 1.0)); }
  [[nodiscard]] double value(double t) const {
    // 1 + β + 2√β·cos θ written as a sum of squares: no cancellation at the lower edge.
    const double c = std::cos(t / 2);
    return (1 - root_) * (1 - root_) + 4 * root_ * c * c;
  }
  [[nodiscard]] double count_above(double t) const {
    if (t >= std::numbers::pi) return 1;
    const double area = (1 + beta_) * t - 2 * root_ * std::sin(t) - 2 * (1 - beta_) * std::atan(g_ * std::tan(t / 2));
    return std::clamp(area / (2 * std::numbers::pi * beta_), 0.0, 1.0);
  }
  [[nodiscard]] double angle_of_count(double q) const {
    return solve(
        q, [this](double t) { return count_above(t); },
        [this](double t) { return 2 * std::sin(t) * std::sin(t) / (std::numbers::pi * std::max(value(t), 1e-300)); });
  }
  /// The root in [0, π] of an increasing function: Newton inside a shrinking bracket. Both functions are flat at an
  /// end, where Newton alone would leave the interval.
  template <class F, class D>
  static double solve(double target, F&& f, D&& slope) {
    double low = 0, high = std::numbers::pi, t = high / 2;
    for (int step = 0; step < 200 && high - low > 4e-16 * high; ++step) {
      const double gap = f(t) - target;
      if (gap == 0) break;
      (gap > 0 ? high : low) = t;
      const double d = slope(t), next = t - gap / d;
      const double moved = d > 0 && next > low && next < high ? next : (low + high) / 2;
      if (std::abs(moved - t) <= 2e-16 * t) break;
      t = moved;
    }
    return t;
  }

  double beta_, root_ = 1, g_ = 0;
};

}  // namespace lowrank

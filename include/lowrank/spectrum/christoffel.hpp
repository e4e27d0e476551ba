// SPDX-License-Identifier: Apache-2.0
// How much of a vector can lie on one eigenvector of C, proven from a few Lanczos steps instead of an
// eigendecomposition.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lowrank/core/errors.hpp"
#include "lowrank/core/matrix_view.hpp"
#include "lowrank/linalg/lanczos_measure.hpp"

namespace lowrank {

namespace detail {

/// A lower bound of 1/λ_n over an interval between two neighbouring nodes. With ℓ_i the Lagrange polynomials of the
/// nodes, 1/λ_n(x) = Σ ℓ_i(x)²/w_i, and between neighbouring nodes every factor |x − θ_m| of ℓ_i is monotone, so its
/// minimum over the interval stands at an end: no grid, no derivative, and the bound tightens as the interval shrinks.
class ChristoffelBound {
 public:
  explicit ChristoffelBound(const LanczosMeasure& m) : x_(m.nodes), log_scale_(m.nodes.size()) {
    // Weights carry an absolute error of some eps; a larger weight only weakens the bound.
    for (std::size_t i = 0; i < x_.size(); ++i) {
      double log_product = 0;
      for (std::size_t j = 0; j < x_.size(); ++j)
        if (j != i) log_product += std::log(std::abs(x_[i] - x_[j]));
      log_scale_[i] = -2 * log_product - std::log(std::max(m.weights[i], 1e-14) * (1 + 1e-10));
    }
    logs_.resize(x_.size());
  }
  /// At least this is Σ ℓ_i²/w_i everywhere on [a, b], which lies between neighbouring nodes.
  double inverse_lower(double a, double b) {
    double sum = 0, bound = 0;
    int zeros = 0;
    std::size_t zero = 0;
    for (std::size_t m = 0; m < x_.size(); ++m) {
      const double f = std::min(std::abs(a - x_[m]), std::abs(b - x_[m]));
      if (f > 0) {
        sum += logs_[m] = std::log(f);
      } else {
        ++zeros;
        zero = m;
      }
    }
    if (zeros > 1) return 0;  // the whole interval between two nodes: the caller splits it
    if (zeros == 1) return std::exp(2 * sum + log_scale_[zero]);
    for (std::size_t i = 0; i < x_.size(); ++i) bound += std::exp(2 * (sum - logs_[i]) + log_scale_[i]);
    return bound;
  }
  /// Whether λ_n(x) < level(x) is proven on [a, b] for a level that does not fall with x; gives up at once where λ_n
  /// itself is not below the level.
  template <class Level>
  bool below(double a, double b, const Level& level, int depth) {
    if (inverse_lower(a, b) * level(a) > 1) return true;
    const double middle = a + (b - a) / 2;
    if (depth == 0 || !(middle > a && middle < b) || !(inverse_lower(middle, middle) * level(middle) > 1)) return false;
    return below(a, middle, level, depth - 1) && below(middle, b, level, depth - 1);
  }

 private:
  std::vector<double> x_, log_scale_, logs_;
};

}  // namespace detail

namespace detail {

/// Whether λ_n(x) < level(x) is proven for every x ≥ floor. The level must not fall with x.
template <class Level>
bool christoffel_below(const LanczosMeasure& m, double floor, const Level& level) {
  const auto &x = m.nodes, &w = m.weights;
  // At a node λ_n is the weight; beyond the outermost nodes it is less than theirs.
  for (std::size_t j = 0; j < w.size(); ++j)
    if (x[j] >= floor && !(w[j] < level(x[j]))) return false;
  if (x.back() > floor && !(w.back() < level(floor))) return false;
  const auto coarse = [&](std::size_t j) { return w[j] + w[j + 1] < level(std::max(x[j + 1], floor)); };
  bool all = true;
  for (std::size_t j = 0; j + 1 < w.size(); ++j) all = all && (x[j] < floor || coarse(j));
  if (all) return true;
  ChristoffelBound bound(m);
  for (std::size_t j = 0; j + 1 < w.size(); ++j)
    if (x[j] >= floor && !coarse(j) && !bound.below(std::max(x[j + 1], floor), x[j], level, 12)) return false;
  return true;
}

}  // namespace detail

/// Whether no single eigenvector of C holds a share `level` of u, proven: sup_x λ_n(x) < level, where λ_n is the
/// Christoffel function of the measure, λ_n(x) = min {∫q² dμ : deg q < n, q(x) = 1} ≥ μ({x}).
///
/// **Shapes** any measure from lanczos_measure. **Cost** O(n) when the coarse bound decides, else O(n²) a subinterval.
/// **Numerics** "true" is a proof up to rounding; "false" means only that n steps do not show it. Coarse: an atom
/// between neighbouring nodes weighs at most the sum of their weights. Fine: the exact supremum, peaks at the nodes
/// included, by bisection with monotone bounds.
/// **Source** Chebyshev–Markov–Stieltjes inequalities and the extremal property: Szegő, Orthogonal Polynomials, §3.41;
/// Nevai, J. Approx. Theory 48 (1986).
inline bool no_atom_above(const LanczosMeasure& m, double level) {
  return detail::christoffel_below(m, -std::numeric_limits<double>::infinity(), [level](double) { return level; });
}

}  // namespace lowrank

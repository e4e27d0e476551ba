// SPDX-License-Identifier: Apache-2.0
// What a few Lanczos steps from one vector know of its share in every eigenvector: Gauss quadrature.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lowrank/core/errors.hpp"
#include "lowrank/core/matrix_view.hpp"
#include "lowrank/linalg/detail/tridiagonal_ql.hpp"

namespace lowrank {

/// What n Lanczos steps from a unit vector u on a symmetric C know of the measure μ(x) = Σ (uᵀv)² over C's eigenpairs
/// (x, v): its Gauss quadrature.
///
/// Nodes are the Ritz values, descending; weight j is the energy u has on Ritz vector j, and residual j is ‖C·y_j −
/// θ_j·y_j‖.
struct LanczosMeasure {
  std::vector<double> nodes, weights, residuals;
};

namespace detail {

/// Follows the first and last component of every eigenvector through the QL sweeps.
struct EndComponents {
  std::vector<double> first, last;
  Index at = 0, step = 0;

  explicit EndComponents(Index n) : first(std::size_t(n), 0.0), last(std::size_t(n), 0.0) {
    first.front() = last.back() = 1;
  }
  void begin_sweep(Index start, Index direction) {
    at = start;
    step = direction;
  }
  void push(double c, double s) {
    for (auto* x : {first.data() + at, last.data() + at}) {
      const double a = x[0], b = x[1];
      x[0] = c * a + s * b;
      x[1] = c * b - s * a;
    }
    at += step;
  }
};

}  // namespace detail

/// The quadrature of a Jacobi matrix: diagonal α_0…α_{n−1}, off-diagonal β_1…β_{n−1}, and β_n, the norm left after the
/// last step.
///
/// **Shapes** alpha n, beta n: beta[k] couples step k to k + 1. **Throws** ShapeError on other sizes.
/// **Cost** O(n²). **Numerics** nodes to eps·‖C‖, weights to about eps absolutely.
/// **Source** Golub & Welsch, Math. Comp. 23 (1969).
inline LanczosMeasure lanczos_measure(const std::vector<double>& alpha, const std::vector<double>& beta) {
  const Index n = Index(alpha.size());
  if (n == 0 || beta.size() != alpha.size())
    throw ShapeError(detail::text("lanczos_measure: alpha and beta must have equal sizes of at least 1, got ",
                                  alpha.size(), " and ", beta.size()));
  auto d = alpha;
  auto e = beta;
  detail::EndComponents ends(n);
  if (!detail::tridiagonal_ql(n, d.data(), e.data(), ends, [] {}))
    throw Error("lanczos_measure: the QL iteration did not converge");
  std::vector<std::size_t> order(d.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return d[a] > d[b]; });
  LanczosMeasure m;
  for (const std::size_t i : order) {
    m.nodes.push_back(d[i]);
    m.weights.push_back(ends.first[i] * ends.first[i]);
    m.residuals.push_back(std::abs(beta.back() * ends.last[i]));
  }
  return m;
}

}  // namespace lowrank

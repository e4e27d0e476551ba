// SPDX-License-Identifier: Apache-2.0
// A proven lower bound of the smallest singular value of a tall matrix: two Cholesky factorisations of its Gram matrix.
#pragma once

#include <cmath>
#include <vector>

#include "lowrank/linalg/detail/cholesky.hpp"
#include "lowrank/linalg/detail/gram.hpp"

namespace lowrank::detail {

/// x with σ_min(W)² ≥ x, 0 when W is rank deficient to double precision of its Gram matrix.
///
/// Inverse iteration with one factorisation finds a value near σ_min² from above; a second factorisation of
/// WᵀW − 0.9·value·I succeeds only when every eigenvalue lies beyond. **Cost** m·n² + 4/3·n³ flops in double, in
/// products on all threads; two n×n matrices of doubles.
/// **Throws** nothing of its own.
/// **Source** Sylvester's law of inertia: a Cholesky factorisation of a shifted matrix counts its eigenvalues.
template <class S>
double smallest_squared_value(MatrixView<const S> W) {
  const Index n = W.cols();
  const Matrix<double> G = gram(W);
  double trace = 0;
  for (Index i = 0; i < n; ++i) trace += G(i, i);
  const double rounding = 1e-14 * double(n) * trace;
  Matrix<double> L = G;
  if (cholesky_pivots(L.view(), 0) < n) return 0;
  std::vector<double> x(std::size_t(n), 1.0);
  double value = trace;
  for (int step = 0; step < 8; ++step) {
    const double norm = std::sqrt(dot(n, x.data(), x.data()));
    for (double& c : x) c /= norm;
    std::vector<double> y = x;
    for (Index i = 0; i < n; ++i) y[std::size_t(i)] = (y[std::size_t(i)] - dot(i, &L(i, 0), y.data())) / L(i, i);
    value = 1 / dot(n, y.data(), y.data());  // 1/(xᵀG⁻¹x) is never below the smallest eigenvalue's reach by much
    for (Index i = n; i-- > 0;) {
      y[std::size_t(i)] /= L(i, i);
      axpy(i, -y[std::size_t(i)], &L(i, 0), y.data());
    }
    x = std::move(y);
  }
  for (const double share : {0.9, 0.5, 0.1}) {
    const double floor = share * value;
    if (!(floor > 4 * rounding)) return 0;
    L = G;
    for (Index i = 0; i < n; ++i) L(i, i) -= floor;
    if (cholesky_pivots(L.view(), 0) == n) return floor - rounding;
  }
  return 0;
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// A proven lower bound of the smallest singular value of a tall matrix: two Cholesky factorisations of its Gram matrix.
#pragma once

#include <cmath>
#include <vector>

#include "lowrank/linalg/gemm.hpp"
#include "lowrank/linalg/vector_ops.hpp"

namespace lowrank::detail {

/// WᵀW in double, lower triangle, from a matrix in any storage, in bands of rows so that only a band is ever widened.
template <class S>
Matrix<double> gram_lower(MatrixView<const S> W) {
  const Index m = W.rows(), n = W.cols();
  constexpr Index band = 512, tile = 256;
  Matrix<double> G(n, n), wide;
  for (Index i0 = 0; i0 < m; i0 += band) {
    const Index rows = std::min(band, m - i0);
    wide.assign(W.middle_rows(i0, rows));
    const MatrixView<const double> w = wide.view();
    for (Index j0 = 0; j0 < n; j0 += tile) {
      const Index cols = std::min(tile, n - j0);
      gemm(1.0, w.middle_cols(j0, n - j0).transposed(), w.middle_cols(j0, cols), G.view().block(j0, j0, n - j0, cols),
           Update::accumulate);
    }
  }
  return G;
}

/// The Cholesky factor in the lower triangle of G, or false when a pivot is not positive. Right-looking in blocks, so
/// that products do the work.
inline bool cholesky_lower(MatrixView<double> G) {
  const Index n = G.rows();
  constexpr Index block = 64;
  Matrix<double> panel;
  for (Index k0 = 0; k0 < n; k0 += block) {
    const Index k1 = std::min(n, k0 + block);
    for (Index j = k0; j < k1; ++j) {
      double pivot = G(j, j);
      for (Index l = k0; l < j; ++l) pivot -= G(j, l) * G(j, l);
      if (!(pivot > 0)) return false;
      G(j, j) = std::sqrt(pivot);
      for (Index i = j + 1; i < n; ++i) G(i, j) = (G(i, j) - dot(j - k0, &G(i, k0), &G(j, k0))) / G(j, j);
    }
    if (k1 == n) break;
    panel.assign(G.block(k1, k0, n - k1, k1 - k0));
    for (Index j0 = k1; j0 < n; j0 += 4 * block) {
      const Index cols = std::min(4 * block, n - j0);
      gemm(-1.0, panel.view().middle_rows(j0 - k1, n - j0), panel.view().middle_rows(j0 - k1, cols).transposed(),
           G.block(j0, j0, n - j0, cols), Update::accumulate);
    }
  }
  return true;
}

/// x with σ_min(W)² ≥ x, 0 when W is rank deficient to double precision of its Gram matrix.
///
/// Inverse iteration with one factorisation finds a value near σ_min² from above; a second factorisation of
/// WᵀW − 0.9·value·I succeeds only when every eigenvalue lies beyond. **Cost** m·n² + 2/3·n³ flops in double.
/// **Throws** nothing of its own.
/// **Source** Sylvester's law of inertia: a Cholesky factorisation of a shifted matrix counts its eigenvalues.
template <class S>
double smallest_squared_value(MatrixView<const S> W) {
  const Index n = W.cols();
  const Matrix<double> G = gram_lower(W);
  double trace = 0;
  for (Index i = 0; i < n; ++i) trace += G(i, i);
  const double rounding = 1e-14 * double(n) * trace;
  Matrix<double> L = G;
  if (!cholesky_lower(L.view())) return 0;
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
    if (cholesky_lower(L.view())) return floor - rounding;
  }
  return 0;
}

}  // namespace lowrank::detail

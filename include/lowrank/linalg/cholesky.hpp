// SPDX-License-Identifier: Apache-2.0
// The Cholesky factor of a symmetric matrix, in double: blocked, so that products do the work of a large one.
#pragma once

#include <cmath>
#include <vector>

#include "lowrank/linalg/gemm.hpp"
#include "lowrank/linalg/vector_ops.hpp"

namespace lowrank::detail {

inline constexpr Index cholesky_block = 64;

/// Rows [k0, k1) of the factor from columns [k0, k1) alone; how many pivots were good. See cholesky_pivots.
inline Index cholesky_diagonal(MatrixView<double> G, Index k0, Index k1, const double* diagonal, double floor) {
  for (Index j = k0; j < k1; ++j) {
    G(j, j) -= sum_of_squares(j - k0, &G(j, k0));
    const double scale = diagonal[j];
    if (!(G(j, j) > floor * scale) || !(scale > 0) || !(G(j, j) > 0)) return j;
    G(j, j) = std::sqrt(G(j, j));
    for (Index i = j + 1; i < k1; ++i) G(i, j) = (G(i, j) - dot(j - k0, &G(i, k0), &G(j, k0))) / G(j, j);
  }
  return k1;
}

/// Lower Cholesky factor of G in place, the strict upper triangle never read and left unspecified; returns how many
/// pivots were good, n when the factor is complete. A pivot is bad that is not positive or not above `floor` times its
/// diagonal element: it is left in its place, so that G(k, k) says what it was.
///
/// **Shapes** G n×n, row-major. **Cost** n³/3 multiply-adds, all but n²·64 of them in products on all threads; scratch
/// n·64 doubles. **Numerics** right-looking in blocks of 64; the same bits for any number of threads.
/// **Source** Golub & Van Loan, Matrix Computations, 4th ed., §4.2.
inline Index cholesky_pivots(MatrixView<double> G, double floor) {
  const Index n = G.rows();
  std::vector<double> diagonal(static_cast<std::size_t>(n));
  for (Index i = 0; i < n; ++i) diagonal[std::size_t(i)] = G(i, i);
  Matrix<double> panel;
  for (Index k0 = 0; k0 < n; k0 += cholesky_block) {
    const Index k1 = std::min(n, k0 + cholesky_block);
    if (const Index good = cholesky_diagonal(G, k0, k1, diagonal.data(), floor); good < k1) return good;
    if (k1 == n) break;
    parallel_ranges(n - k1, 64, [&](Index i0, Index i1) {
      for (Index i = k1 + i0; i < k1 + i1; ++i)
        for (Index j = k0; j < k1; ++j) G(i, j) = (G(i, j) - dot(j - k0, &G(i, k0), &G(j, k0))) / G(j, j);
    });
    panel.assign(G.block(k1, k0, n - k1, k1 - k0));
    const MatrixView<const double> L = panel.view();
    constexpr Index tile = 4 * cholesky_block;  // what a tile computes above the diagonal is never read
    for (Index j0 = k1; j0 < n; j0 += tile)
      gemm(-1.0, L.middle_rows(j0 - k1, n - j0), L.middle_rows(j0 - k1, std::min(tile, n - j0)).transposed(),
           G.block(j0, j0, n - j0, std::min(tile, n - j0)), Update::accumulate);
  }
  return n;
}

/// The same with zeros above the diagonal; false when a pivot is bad: the vectors whose Gram matrix G is are then
/// dependent, or too close to it for Cholesky QR.
inline bool cholesky(MatrixView<double> G, double floor) {
  if (cholesky_pivots(G, floor) < G.rows()) return false;
  for (Index j = 1; j < G.rows(); ++j)
    for (Index i = 0; i < j; ++i) G(i, j) = 0;
  return true;
}

}  // namespace lowrank::detail

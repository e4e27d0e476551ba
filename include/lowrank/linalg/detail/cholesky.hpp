// SPDX-License-Identifier: Apache-2.0
// The Cholesky factor of a symmetric matrix, in double: blocked, so that products do the work of a large one.
#pragma once

#include <cmath>
#include <vector>

#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/gemm.hpp"

namespace lowrank::detail {

/// Lower Cholesky factor of G in place, the strict upper triangle never read and left unspecified; returns how many
/// pivots were good, n when the factor is complete. A pivot is bad that is not positive and finite, or not above
/// `floor` times its diagonal element: it is left in its place, so that G(k, k) says what it was.
///
/// **Shapes** G n×n, row-major. **Cost** n³/3 multiply-adds, all but n²·128 of them in products on all threads; in
/// place but for n doubles. **Numerics** left-looking in blocks of 128; the same bits for any number of threads.
/// **Source** Golub & Van Loan, Matrix Computations, 4th ed., §4.2.
inline Index cholesky_pivots(MatrixView<double> G, double floor) {
  const Index n = G.rows();
  constexpr Index width = 128;
  std::vector<double> diagonal(static_cast<std::size_t>(n));
  for (Index i = 0; i < n; ++i) diagonal[std::size_t(i)] = G(i, i);
  for (Index k0 = 0; k0 < n; k0 += width) {
    const Index k1 = std::min(n, k0 + width), below = n - k0;
    // The factored columns and those to come share their rows: disjoint, which gemm would not see of a transpose.
    if (k0 > 0)
      product<double, double, double>(-1, G.block(k0, 0, below, k0), G.block(k0, 0, k1 - k0, k0), true,
                                      G.block(k0, k0, below, k1 - k0));
    const auto solve = [&](Index i, Index end) {  // row i of the factor, columns [k0, end)
      for (Index j = k0; j < end; ++j) G(i, j) = (G(i, j) - dot(j - k0, &G(i, k0), &G(j, k0))) / G(j, j);
    };
    for (Index i = k0; i < k1; ++i) {
      solve(i, i);
      const double scale = diagonal[std::size_t(i)];
      double& pivot = G(i, i);
      pivot -= sum_of_squares(i - k0, &G(i, k0));
      if (!(pivot > 0) || !std::isfinite(pivot) || !(scale > 0) || !(pivot > floor * scale)) return i;
      pivot = std::sqrt(pivot);
    }
    parallel_ranges(n - k1, 16, [&](Index i0, Index i1) {
      for (Index i = k1 + i0; i < k1 + i1; ++i) solve(i, k1);
    });
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

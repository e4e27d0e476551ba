// SPDX-License-Identifier: Apache-2.0
// The Cholesky factor of a small symmetric matrix, in double.
#pragma once

#include <cmath>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank::detail {

/// Lower Cholesky factor of G in place, zeros above it. False when a pivot is not positive or falls below `floor` times
/// its diagonal element: the vectors whose Gram matrix G is are then dependent, or too close to it for Cholesky QR.
/// **Cost** n³/3 multiply-adds, one by one: for the sizes of blocks and ranks.
inline bool cholesky(MatrixView<double> G, double floor) {
  const Index n = G.rows();
  for (Index j = 0; j < n; ++j) {
    const double diagonal = G(j, j);
    double pivot = diagonal;
    for (Index k = 0; k < j; ++k) pivot -= G(j, k) * G(j, k);
    if (!(pivot > floor * diagonal) || !(diagonal > 0)) return false;
    G(j, j) = std::sqrt(pivot);
    for (Index i = j + 1; i < n; ++i) {
      double sum = G(i, j);
      for (Index k = 0; k < j; ++k) sum -= G(i, k) * G(j, k);
      G(i, j) = sum / G(j, j);
    }
    for (Index i = 0; i < j; ++i) G(i, j) = 0;
  }
  return true;
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// A damped covariance, and the inverse of its Cholesky factor, in double and at the speed of products: what data-aware
// methods weigh errors with.
#pragma once

#include <cmath>
#include <span>

#include "lowrank/linalg/detail/cholesky.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/gemm.hpp"

namespace lowrank::detail {

/// The lower triangle of C + damping·mean(diag C)·I, rows and columns taken in `order` (as they come when it is empty);
/// `added` receives what was added to the diagonal.
///
/// **Shapes** C n×n. **Throws** ShapeError unless it is; ArgumentError for a damping that is negative or not finite and
/// for a C that is not symmetric within 1e-4·√(C_ii·C_jj), of which the mean is taken; NonFiniteError. `what` names C.
template <class T>
Matrix<double> damped_covariance(const char* where, const char* what, MatrixView<const T> C, Index n, double damping,
                                 std::span<const Index> order = {}, double* added = nullptr) {
  expect_shape(where, what, C.rows(), C.cols(), n, n);
  if (!(damping >= 0) || !std::isfinite(damping))
    throw ArgumentError(text(where, ": damping must be finite and not negative, got ", damping));
  Matrix<double> G(n, n);
  double mean = 0;
  for (Index i = 0; i < n; ++i) mean += double(C(i, i)) / double(n);
  const auto at = [&](Index i) { return order.empty() ? i : order[std::size_t(i)]; };
  constexpr Index tile = 16;  // C(j, i) walks down columns: a tile at a time, so that its lines are still in cache
  for (Index i0 = 0; i0 < n; i0 += tile)
    for (Index j0 = 0; j0 <= i0; j0 += tile)
      for (Index i = i0; i < std::min(n, i0 + tile); ++i)
        for (Index j = j0; j < std::min(i + 1, j0 + tile); ++j) {
          const Index p = at(i), q = at(j);
          const double a = double(C(p, q)), b = double(C(q, p));
          if (!std::isfinite(a) || !std::isfinite(b))
            throw NonFiniteError(text(where, ": ", what, " must be finite, got ", std::isfinite(a) ? b : a, " at (",
                                      std::isfinite(a) ? q : p, ", ", std::isfinite(a) ? p : q, ")"));
          if (std::abs(a - b) > 1e-4 * std::sqrt(std::abs(double(C(p, p)) * double(C(q, q)))))
            throw ArgumentError(
                text(where, ": ", what, " must be symmetric, got ", a, " and ", b, " at (", p, ", ", q, ")"));
          G(i, j) = (a + b) / 2;
        }
  for (Index i = 0; i < n; ++i) G(i, i) += damping * mean;
  if (added != nullptr) *added = n > 0 ? damping * mean : 0.0;
  return G;
}

/// L⁻¹ in place, L lower triangular with a diagonal without zeros.
/// **Cost** 2·n³/3 flops, all but O(n²·128) of them in products. **Numerics** same bits for any thread count.
inline void invert_lower(MatrixView<double> L) {
  const Index n = L.rows();
  constexpr Index width = 128;
  Matrix<double> X;  // rows [k0, k1) of the inverse
  for (Index k0 = 0; k0 < n; k0 += width) {
    const Index k1 = std::min(n, k0 + width);
    X.resize(k1 - k0, k1);
    X.set_zero();
    for (Index i = k0; i < k1; ++i) X(i - k0, i) = 1;
    if (k0 > 0) gemm(-1.0, L.block(k0, 0, k1 - k0, k0), L.block(0, 0, k0, k0), X.view().block(0, 0, k1 - k0, k0));
    parallel_ranges(k1, 64, [&](Index j0, Index j1) {
      for (Index i = k0; i < k1; ++i) {
        double* x = &X(i - k0, 0);
        for (Index k = k0; k < i; ++k) axpy(j1 - j0, -L(i, k), &X(k - k0, j0), x + j0);
        for (Index j = j0; j < j1; ++j) x[j] /= L(i, i);
      }
    });
    for (Index i = k0; i < k1; ++i) std::copy_n(&X(i - k0, 0), k1, &L(i, 0));
  }
}

}  // namespace lowrank::detail

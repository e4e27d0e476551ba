// SPDX-License-Identifier: Apache-2.0
// The leading singular triplets scans compare.
#pragma once

#include <utility>

#include "lowrank/linalg/factor_operators.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank::tool {

/// Residual at which leading triplets are taken, relative to σ₁.
inline constexpr double leading_residual = 1e-5;

/// The k leading triplets of a matrix, residuals at most leading_residual·σ₁.
template <Real T>
TruncatedSvd<T> leading(MatrixView<const T> W, Index k) {
  return truncated_svd<T>(dense_operator<T, T>(W), std::min({k, W.rows(), W.cols()}),
                          {.energy_tolerance = 0, .residual_tolerance = leading_residual});
}

/// The first k of them, without those beyond the range of a rank-deficient matrix, which are no directions of it.
template <Real T>
Svd<T> trimmed(Svd<T> s, Index k) {
  Index keep = 0;
  while (keep < std::min(k, Index(s.S.size())) && s.S[std::size_t(keep)] > T(1e-6) * s.S[0]) ++keep;
  s.S.resize(std::size_t(keep));
  s.U = Matrix<T>(s.U.view().middle_cols(0, keep));
  s.V = Matrix<T>(s.V.view().middle_cols(0, keep));
  return s;
}

}  // namespace lowrank::tool

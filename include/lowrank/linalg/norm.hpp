// SPDX-License-Identifier: Apache-2.0
// The Frobenius norm of a matrix in memory, and the check that all of it is finite.
#pragma once

#include <cmath>
#include <type_traits>

#include "lowrank/linalg/detail/scaling.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"

namespace lowrank {

/// ‖M‖_F. That of s·B·A, from the factors, is in factor_svd.hpp, that of singular values in spectrum/metrics.hpp.
///
/// **Cost** one pass, on all threads. **Numerics** squares are summed in double, a row at a time, the same bits for any
/// number of threads; of doubles whose squares leave the range, scaled ones. NaN or infinity if any element is.
template <class S>
double frobenius_norm(MatrixView<S> M) {
  const double sum = detail::squared_norm(MatrixView<const std::remove_const_t<S>>(M));
  if constexpr (std::is_same_v<std::remove_const_t<S>, double>) {
    if (!(sum > 1e-280 && sum < 1e280) && !std::isnan(sum)) [[unlikely]] {
      double largest = 0;
      for (Index i = 0; i < M.rows(); ++i)
        for (Index j = 0; j < M.cols(); ++j) largest = std::max(largest, std::abs(M(i, j)));
      if (largest == 0 || !std::isfinite(largest)) return largest;
      double scaled = 0;
      for (Index i = 0; i < M.rows(); ++i)
        for (Index j = 0; j < M.cols(); ++j) scaled += (M(i, j) / largest) * (M(i, j) / largest);
      return largest * std::sqrt(scaled);
    }
  }
  return std::sqrt(sum);
}

/// Throws unless every element is finite: "`where`: `what` must be finite, got nan at (3, 7)", the first by rows.
/// **Throws** NonFiniteError. **Cost** one pass, on all threads.
template <class S>
void require_finite(const char* where, const char* what, MatrixView<S> M) {
  detail::expect_finite(where, what, MatrixView<const std::remove_const_t<S>>(M));
}

}  // namespace lowrank

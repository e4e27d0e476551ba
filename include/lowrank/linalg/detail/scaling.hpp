// SPDX-License-Identifier: Apache-2.0
// What every decomposition does first: look for numbers that are none, and bring the others to around 1.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "lowrank/core/half.hpp"
#include "lowrank/core/matrix_view.hpp"

namespace lowrank::detail {

/// The largest |element|. **Throws** NonFiniteError naming the function, the argument and the first element that is NaN
/// or infinite. **Cost** one reading.
template <class S>
double checked_max_abs(const char* where, const char* what, const MatrixView<S>& A) {
  using F = std::conditional_t<std::same_as<std::remove_const_t<S>, double>, double, float>;
  double largest = 0;
  bool finite = true;
  for_each_run(A, [&](const auto* x, Index n) {
    F high = 0, poison = 0;  // NaN and infinity survive a sum of x·0
    for (Index i = 0; i < n; ++i) {
      const F a = std::abs(F(x[i]));
      high = std::max(high, a);
      poison += F(x[i]) * F(0);
    }
    largest = std::max(largest, double(high));
    finite = finite && poison == 0;
  });
  if (finite) return largest;
  for (Index i = 0; i < A.rows(); ++i)
    for (Index j = 0; j < A.cols(); ++j) {
      const double x = double(A(i, j));
      if (!std::isfinite(x))
        throw NonFiniteError(text(where, ": ", what, " must be finite, got ", x, " at (", i, ", ", j, ")"));
    }
  return largest;
}

/// The same where only the exception is wanted.
template <class S>
void expect_finite(const char* where, const char* what, const MatrixView<S>& A) {
  checked_max_abs(where, what, A);
}

/// The power of two that brings `largest` to [1, 2); 1 for zero. Scaling by it costs no bits.
inline double unit_scale(double largest) {
  return largest > 0 ? std::ldexp(1.0, std::clamp(-std::ilogb(largest), -1020, 1020)) : 1;
}

/// out = scale·W, in tiles, so that neither order is walked across its grain.
template <class S, class T>
void copy_scaled(const MatrixView<const S>& W, double scale, const MatrixView<T>& out) {
  constexpr Index tile = 32;
  for (Index i0 = 0; i0 < W.rows(); i0 += tile)
    for (Index j0 = 0; j0 < W.cols(); j0 += tile)
      for (Index i = i0; i < std::min(W.rows(), i0 + tile); ++i)
        for (Index j = j0; j < std::min(W.cols(), j0 + tile); ++j) out(i, j) = T(double(W(i, j)) * scale);
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Are apply and apply_adjoint of an operator products with one and the same matrix?
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/detail/any_operator.hpp"

namespace lowrank {

namespace detail {

/// What adjoint_error computes.
template <Real T>
[[gnu::cold]] double adjoint_error_of(AnyOperator<T> A, std::uint64_t seed, Index probes) {
  const Index m = A.rows(), n = A.cols();
  if (m == 0 || n == 0) return 0;
  Matrix<T> X(probes, n), Y(probes, m), AX(probes, m), AtY(probes, n);
  CounterRng(seed, 0xad1).fill_normal(X.view());
  CounterRng(seed, 0xad2).fill_normal(Y.view());
  const auto columns = [](const Matrix<T>& M) { return M.view().transposed(); };
  A.apply(columns(X), AX.view().transposed());
  A.apply_adjoint(columns(Y), AtY.view().transposed());
  double worst = 0;
  for (Index p = 0; p < probes; ++p) {
    double largest = 0;
    bool finite = true;
    const auto look = [&](const Matrix<T>& M) {
      for (Index i = 0; i < M.cols(); ++i) {
        finite = finite && std::isfinite(M(p, i));
        largest = std::max(largest, std::abs(double(M(p, i))));
      }
    };
    look(AX);
    look(AtY);
    if (!finite) return std::numeric_limits<double>::quiet_NaN();
    if (largest == 0) continue;
    // Scaled by a power of two: the squares of large doubles overflow.
    const double unit = std::ldexp(1.0, -std::clamp(std::ilogb(largest), -1000, 1000));
    double left = 0, right = 0, ax = 0, aty = 0;
    for (Index i = 0; i < m; ++i) {
      const double x = unit * double(AX(p, i));
      left += double(Y(p, i)) * x;
      ax += x * x;
    }
    for (Index j = 0; j < n; ++j) {
      const double x = unit * double(AtY(p, j));
      right += x * double(X(p, j));
      aty += x * x;
    }
    const double size = std::sqrt(std::max(ax, aty));
    // Products among denormals are all rounding: they say nothing.
    if (size * double(std::numeric_limits<T>::epsilon()) <= unit * double(std::numeric_limits<T>::min())) continue;
    worst = std::max(worst, std::abs(left - right) / size);
  }
  return worst;
}

template <Real T>
[[gnu::cold]] void check_adjoint_of(AnyOperator<T> A, std::uint64_t seed) {
  const double error = adjoint_error_of<T>(A, seed, 4), limit = std::same_as<T, float> ? 0x1p-10 : 0x1p-26;
  if (std::isnan(error)) throw NonFiniteError("check_adjoint: apply or apply_adjoint of finite vectors is not finite");
  if (error > limit)
    throw ArgumentError(
        text("check_adjoint: apply_adjoint is not the adjoint of apply: <y, Ax> and <A'y, x> differ by ", error,
             " of the size of the products, expected at most ", limit));
}

}  // namespace detail

/// The largest |⟨y, A·x⟩ − ⟨Aᵀ·y, x⟩| / max(‖A·x‖, ‖Aᵀ·y‖) over a few pairs of Gaussian vectors x, y.
///
/// **Numerics** for a right pair a few eps·√max(m, n); for a wrong one of order 1 (below δ with probability about δ a
/// pair). NaN when a product, or its squared norm, is not finite. **Cost** two products with `probes` vectors.
/// **Source** the dot-product test of inverse problems, Claerbout, Earth Soundings Analysis (1992).
template <Real T, class Op>
requires LinearOperator<Op, T>
double adjoint_error(const Op& A, std::uint64_t seed = 0, Index probes = 4) {
  return detail::adjoint_error_of<T>(A, seed, probes);
}
/// **Throws** ArgumentError when A's two products do not belong to one matrix: adjoint_error above 2⁻¹⁰ (float) or 2⁻²⁶
/// (double), which rounding does not reach; NonFiniteError when it is NaN.
template <Real T, class Op>
requires LinearOperator<Op, T>
void check_adjoint(const Op& A, std::uint64_t seed = 0) { detail::check_adjoint_of<T>(A, seed); }

}  // namespace lowrank

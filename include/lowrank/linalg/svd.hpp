// SPDX-License-Identifier: Apache-2.0
// The full thin SVD of a dense matrix: LAPACK's when the build links one, our own bidiagonalisation else.
#pragma once

#include <utility>
#include <vector>

#include "lowrank/linalg/small_svd.hpp"

#if defined(LOWRANK_USE_LAPACK)
#include "lowrank/linalg/detail/lapack.hpp"
#endif

namespace lowrank {
namespace detail {

/// Up to this many columns the SVD runs in double whatever T is: it costs little and gains nine digits.
inline constexpr Index svd_in_double = 64;

#if defined(LOWRANK_USE_LAPACK)
/// SVD of a row-major A (m ≥ n, destroyed) by gesdd on the column-major Aᵀ = V·S·Uᵀ with the same bytes.
template <class T>
Svd<T> dense_svd(MatrixView<T> A, const char* where) {
  const Index m = A.rows(), n = A.cols();
  Svd<T> out{Matrix<T>(m, n), std::vector<T>(std::size_t(n)), Matrix<T>(n, n)};
  Matrix<T> V(n, n);  // column-major for LAPACK
  lapack_svd<T>('S', A.transposed(), out.S.data(), V.data(), out.U.data(), where);
  out.V.assign(std::as_const(V).view().transposed());
  return out;
}
#else
template <class T>
Svd<T> dense_svd(MatrixView<T> A, const char* where) {
  return bidiagonal_svd<T, T>(A, where);
}
#endif

/// `largest`: the largest magnitude in W.
template <class T, class S>
[[gnu::cold]] Svd<T> svd_of(MatrixView<const S> W, double largest) {
  constexpr const char* where = "svd";
  if (W.rows() < W.cols()) {
    Svd<T> swapped = svd_of<T, S>(W.transposed(), largest);
    return {std::move(swapped.V), std::move(swapped.S), std::move(swapped.U)};
  }
  const Index m = W.rows(), n = W.cols();
  const double scale = unit_scale(largest);
  if (n == 0) return {Matrix<T>(m, 0), {}, Matrix<T>(0, 0)};
  if (n <= svd_in_double) {
    const Matrix<T> copy(W);
    return small_svd<T>(copy.view());
  }
  Matrix<T> A;
  A.resize(m, n);
  copy_scaled(W, scale, A.view());
  Svd<T> out;
  if (m > n + n / 2) {
    Matrix<T> R(n, n);
    thin_qr_in_place(A.view(), R.view());
    Svd<T> inner = dense_svd<T>(R.view(), where);
    out = {multiply<T>(A.view(), inner.U.view()), std::move(inner.S), std::move(inner.V)};
  } else {
    out = dense_svd<T>(A.view(), where);
  }
  for (T& s : out.S) s = T(double(s) / scale);
  return out;
}

}  // namespace detail

/// The full thin SVD of a dense matrix, W = U·diag(S)·Vᵀ.
///
/// **Shapes** W m×n in any order, stored as float, double, bf16 or f16 (two-byte storage gives float results); U m×k, S
/// k, V n×k, k = min(m, n). **Throws** NonFiniteError naming the first NaN or infinity, before anything else happens.
/// **Cost** 8/3·k³ flops of reduction, bound by memory, 8/3·k³ in products and 12·k³ in rotations; a QR and a product
/// more when one side is 1.5 times the other. LAPACK's gesdd where the build links one (LOWRANK_WITH_LAPACK).
/// **Numerics** backward error and loss of orthogonality of order √k·eps of T times a small factor; scaled by a power
/// of two, so any finite entries do. Singular values below eps·σ₁ have no correct digits: singular_values(W) finds
/// those.
/// **Source** Golub & Kahan (1965), Demmel & Kahan (1990), Chan (1982).
template <MatrixLike X>
Svd<arithmetic_of<scalar_of<X>>> svd(X&& W) {
  using S = scalar_of<X>;
  using T = arithmetic_of<S>;
  const MatrixView<const S> view = view_of(W);
  return detail::svd_of<T, S>(view, detail::checked_max_abs("svd", "W", view));
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template Svd<float> svd_of(MatrixView<const float>, double);
extern template Svd<double> svd_of(MatrixView<const double>, double);
extern template Svd<float> svd_of(MatrixView<const bf16>, double);
extern template Svd<float> svd_of(MatrixView<const f16>, double);
}  // namespace lowrank::detail
#endif

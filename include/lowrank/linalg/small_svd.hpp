// SPDX-License-Identifier: Apache-2.0
// The dense SVD other algorithms call on their small matrices: bidiagonalisation and implicit QR, in double throughout.
#pragma once

#include <algorithm>
#include <vector>

#include "lowrank/linalg/detail/bidiagonal.hpp"
#include "lowrank/linalg/detail/bidiagonal_qr.hpp"
#include "lowrank/linalg/detail/scaling.hpp"
#include "lowrank/linalg/qr.hpp"
#include "lowrank/linalg/svd_result.hpp"
#include "lowrank/linalg/symmetric_eigen.hpp"

namespace lowrank {
namespace detail {

/// Rows of Z in the given order become the columns of a new matrix, of unit norm and negated where `signs` is.
///
/// Thousands of rotations rounded to U leave the angles between vectors at √k·eps, but let lengths drift further.
template <class T, class U>
[[gnu::noinline]] Matrix<T> unit_columns(const Matrix<U>& Z, const std::vector<Index>& order,
                                         const std::vector<double>* signs) {
  const Index k = Index(order.size()), n = Z.cols();
  std::vector<double> factor(std::size_t(k), 1.0);
  for (Index j = 0; j < k; ++j) {
    const Index from = order[std::size_t(j)];
    factor[std::size_t(j)] = (signs != nullptr && (*signs)[std::size_t(from)] < 0 ? -1 : 1) / norm2(n, &Z(from, 0));
  }
  Matrix<T> out;
  out.resize(n, k);
  constexpr Index band = 32;
  for (Index i0 = 0; i0 < n; i0 += band)
    for (Index j = 0; j < k; ++j)
      for (Index i = i0; i < std::min(n, i0 + band); ++i)
        out(i, j) = T(factor[std::size_t(j)] * double(Z(order[std::size_t(j)], i)));
  return out;
}

/// SVD of A (m×n, m ≥ n, row-major, entries around 1, destroyed) by bidiagonalisation in U.
template <class T, class U>
[[gnu::cold]] Svd<T> bidiagonal_svd(MatrixView<U> A, const char* where) {
  const Index m = A.rows(), n = A.cols();
  std::vector<double> d(std::size_t(n), 0.0), e(std::size_t(n), 0.0);
  Matrix<U> Ut(n, m), Vt(n, n);
  {
    BidiagonalReflectors<U> reflectors;
    bidiagonalise(A, d.data(), e.data(), &reflectors);
    form_orthogonal<U>(reflectors.left.view(), reflectors.left_tau.data(), 0, Ut.view());
    form_orthogonal<U>(reflectors.right.view().middle_rows(0, n - 1), reflectors.right_tau.data(), 1, Vt.view());
  }
  RotationQueue<U> left, right;
  const auto apply = [&] {
    left.apply(Ut.data(), m, m);
    right.apply(Vt.data(), n, n);
  };
  const bool converged = bidiagonal_qr(n, d.data(), e.data(), false, left, right, [&] {
    if (left.size() >= rotation_batch) apply();
  });
  if (!converged) throw Error(text(where, ": the QR iteration did not converge"));
  apply();
  std::vector<double> size(d);
  for (double& x : size) x = std::abs(x);
  const auto order = descending_order(size);
  Svd<T> out{unit_columns<T>(Ut, order, nullptr), std::vector<T>(std::size_t(n)), unit_columns<T>(Vt, order, &d)};
  for (std::size_t j = 0; j < out.S.size(); ++j) out.S[j] = T(size[std::size_t(order[j])]);
  return out;
}

}  // namespace detail

/// Thin SVD of a small dense matrix (up to a few hundred columns), computed in double whatever T is.
///
/// **Shapes** A m×n in any order; U m×k, S k, V n×k, k = min(m, n). **Throws** NonFiniteError naming the first bad
/// element.
/// **Cost** QR of the longer side, then about 10·k³ flops of reduction in L2 and 6·k³ of rotations for each side.
/// **Numerics** backward error and loss of orthogonality of order eps of T (double: c·n·eps); scaled, so any finite
/// entries do. Small singular values are accurate to eps·σ₁, not relative to themselves.
/// **Source** Golub & Kahan (1965) as stabilised by Demmel & Kahan (1990); Chan, ACM TOMS 8 (1982), for the QR in
/// front.
template <Real T>
[[gnu::cold]] Svd<T> small_svd(MatrixView<const T> A) {
  if (A.rows() < A.cols()) {
    Svd<T> swapped = small_svd<T>(A.transposed());
    return {std::move(swapped.V), std::move(swapped.S), std::move(swapped.U)};
  }
  const Index m = A.rows(), n = A.cols();
  const double largest = detail::checked_max_abs("small_svd", "A", A), scale = detail::unit_scale(largest);
  if (n == 0) return {Matrix<T>(m, 0), {}, Matrix<T>(0, 0)};
  Matrix<double> W;
  W.resize(m, n);
  detail::copy_scaled(A, scale, W.view());
  Svd<T> out;
  if (m > n + n / 2) {
    Matrix<double> R(n, n);
    thin_qr_in_place(W.view(), R.view());
    Svd<double> inner = detail::bidiagonal_svd<double, double>(R.view(), "small_svd");
    Matrix<double> U;
    U.resize(m, n);
    gemm(1.0, W.view(), inner.U.view(), U.view());
    if constexpr (std::same_as<T, double>)
      out = {std::move(U), std::move(inner.S), std::move(inner.V)};
    else
      out = {Matrix<T>(U), std::vector<T>(inner.S.begin(), inner.S.end()), Matrix<T>(inner.V)};
  } else {
    out = detail::bidiagonal_svd<T, double>(W.view(), "small_svd");
  }
  for (T& s : out.S) s = T(double(s) / scale);
  return out;
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank {
extern template Svd<float> small_svd(MatrixView<const float>);
extern template Svd<double> small_svd(MatrixView<const double>);
}  // namespace lowrank
#endif

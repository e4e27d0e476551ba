// SPDX-License-Identifier: Apache-2.0
// Thin QR of tall matrices by recursive Householder transforms: products do nearly all the work, rank does not matter.
#pragma once

#include <vector>

#include "lowrank/linalg/detail/householder.hpp"

namespace lowrank {

/// A = Q·R.
template <Real T>
struct Qr {
  Matrix<T> Q;  ///< m×k, orthonormal columns, k = min(m, n)
  Matrix<T> R;  ///< k×n, upper trapezoidal
};

namespace detail {

/// Columns that are reflected one by one, in a column-major copy.
inline constexpr Index qr_panel = 8;

template <class T>
struct QrScratch {
  Buffer<T> panel, block;
};

/// QR of at most qr_panel columns. A becomes V (explicit zeros and ones on top), R and F (see compact_wy) are filled.
template <class T>
[[gnu::noinline]] void qr_columns(MatrixView<T> A, MatrixView<T> R, MatrixView<T> F, QrScratch<T>& scratch) {
  const Index m = A.rows(), n = A.cols();
  scratch.panel.resize(m * n);
  T* const p = scratch.panel.data();
  copy_elements(A, view_of(p, m, n, Order::col_major));
  T tau[qr_panel];
  for (Index j = 0; j < n; ++j) {
    T* const v = p + j * m + j;
    tau[j] = make_reflector(m - j, v);
    for (Index i = 0; i <= j; ++i) R(i, j) = p[j * m + i];
    for (Index i = j + 1; i < n; ++i) R(i, j) = T(0);
    std::fill(p + j * m, v, T(0));
    v[0] = T(1);
    for (Index l = j + 1; l < n; ++l) {
      T* const c = p + l * m + j;
      axpy(m - j, -tau[j] * dot(m - j, v, c), v, c);
    }
  }
  copy_elements(view_of(p, m, n, Order::col_major), A);
  compact_wy<T>(view_of(const_cast<const T*>(p), m, n, Order::col_major), tau, F);
}

/// QR of A (m ≥ n): halves of the columns, the right half updated by two products in between.
/// **Source** Elmroth & Gustavson, IBM J. Res. Dev. 44 (2000).
template <class T>
[[gnu::cold]] void qr_recursive(MatrixView<T> A, MatrixView<T> R, MatrixView<T> F, QrScratch<T>& scratch) {
  const Index m = A.rows(), n = A.cols();
  if (n <= qr_panel) return qr_columns(A, R, F, scratch);
  const Index n1 = (n / 2 + qr_panel - 1) / qr_panel * qr_panel, n2 = n - n1;
  const auto A1 = A.middle_cols(0, n1), A2 = A.middle_cols(n1, n2);
  const auto F1 = F.block(0, 0, n1, n1), F2 = F.block(n1, n1, n2, n2), F12 = F.block(0, n1, n1, n2);
  qr_recursive(A1, R.block(0, 0, n1, n1), F1, scratch);
  apply_block_reflector<T>(A1, F1, true, A2, scratch.block);
  copy_elements(A2.middle_rows(0, n1), R.block(0, n1, n1, n2));
  fill_elements(A2.middle_rows(0, n1), 0);
  fill_elements(R.block(n1, 0, n2, n1), 0);
  const auto V2 = A2.middle_rows(n1, m - n1);
  qr_recursive(V2, R.block(n1, n1, n2, n2), F2, scratch);
  // (I − V₁F₁V₁ᵀ)(I − V₂F₂V₂ᵀ): the corner of the joint factor is −F₁·(V₁ᵀV₂)·F₂.
  scratch.block.resize(2 * n1 * n2);
  const auto G = view_of(scratch.block.data(), n1, n2), H = view_of(scratch.block.data() + n1 * n2, n1, n2);
  product<T, T, T>(T(1), A1.middle_rows(n1, m - n1).transposed(), V2.transposed(), false, G);
  product<T, T, T>(T(1), G, F2.transposed(), false, H);
  product<T, T, T>(T(-1), F1, H.transposed(), false, F12);
  fill_elements(F.block(n1, 0, n2, n1), 0);
}

/// V (m×k, in place) becomes the first k columns of I − V·F·Vᵀ, in bands of rows so that the copy stays small.
template <class T>
[[gnu::cold]] void form_thin_q(MatrixView<T> V, MatrixView<const T> F, Buffer<T>& scratch) {
  constexpr Index band = 1024;
  const Index m = V.rows(), k = V.cols();
  scratch.resize(k * k + k * k + std::min(m, band) * k);
  const auto top = view_of(scratch.data(), k, k), M = view_of(scratch.data() + k * k, k, k);
  copy_elements(V.middle_rows(0, k), top);
  product<T, T, T>(T(1), F, top, false, M);  // F·V_topᵀ
  for (Index i0 = 0; i0 < m; i0 += band) {
    const Index rows = std::min(band, m - i0);
    const auto copy = view_of(scratch.data() + 2 * k * k, rows, k), out = V.middle_rows(i0, rows);
    copy_elements(out, copy);
    product<T, T, T>(T(-1), copy, M.transposed(), false, out);
  }
  for (Index j = 0; j < k; ++j) V(j, j) += T(1);
}

}  // namespace detail

/// Thin QR of a tall matrix in its own storage: A becomes Q, and R is returned or written.
///
/// **Shapes** A m×k with m ≥ k, any order; R k×k. **Throws** ShapeError when m < k or R is not k×k.
/// **Cost** about 7·m·k² flops, all but 2·m·k·8 of them in products; k² scratch besides a few bands of rows.
/// **Numerics** Q orthonormal and A = Q·R to c·eps·‖A‖ for every A of finite elements, of full rank or not; R's
/// diagonal may have any sign; a zero column of A gives a unit column of Q orthogonal to the others. No inner scaling:
/// entries whose squares sum beyond the range of T in products must be scaled by the caller.
/// **Source** Elmroth & Gustavson (2000) for the recursion; Schreiber & Van Loan (1989) for the compact WY form.
template <Real T>
void thin_qr_in_place(MatrixView<T> A, std::type_identity_t<MatrixView<T>> R) {
  const Index m = A.rows(), k = A.cols();
  if (m < k)
    throw ShapeError(
        detail::text("thin_qr_in_place: A must have no more columns than rows, got ", detail::shape_text(m, k)));
  detail::expect_shape("thin_qr_in_place", "R", R.rows(), R.cols(), k, k);
  if (k == 0) return;
  Matrix<T> F(k, k);
  detail::QrScratch<T> scratch;
  detail::qr_recursive(A, R, F.view(), scratch);
  detail::form_thin_q<T>(A, F.view(), scratch.block);
}
/// As above, for the caller who does not want R.
template <Real T>
void orthonormalise(MatrixView<T> A) {
  Matrix<T> R(A.cols(), A.cols());
  thin_qr_in_place(A, R.view());
}

/// Thin QR: A = Q·R with Q m×k, R k×n, k = min(m, n).
///
/// **Shapes** A m×n in any order. **Cost**, **Numerics**, **Source**: see thin_qr_in_place; a wide A costs a product
/// more.
template <Real T>
Qr<T> thin_qr(MatrixView<const T> A) {
  const Index m = A.rows(), n = A.cols(), k = std::min(m, n);
  Qr<T> out{Matrix<T>(m, k), Matrix<T>(k, n)};
  out.Q.assign(A.middle_cols(0, k));
  thin_qr_in_place(out.Q.view(), out.R.view().middle_cols(0, k));
  if (n > k) {
    const auto rest = out.R.view().middle_cols(k, n - k);
    gemm(T(1), out.Q.view().transposed(), A.middle_cols(k, n - k), rest);
  }
  return out;
}
/// As above for matrix-like things: Eigen, xtensor, lowrank::Matrix, views of elements that are not const.
template <class X>
requires RealMatrix<const X&> Qr<scalar_of<const X&>> thin_qr(const X& A) {
  return thin_qr<scalar_of<const X&>>(detail::const_view_of(A));
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank {
extern template void thin_qr_in_place(MatrixView<float>, MatrixView<float>);
extern template void thin_qr_in_place(MatrixView<double>, MatrixView<double>);
extern template void detail::qr_recursive(MatrixView<float>, MatrixView<float>, MatrixView<float>,
                                          detail::QrScratch<float>&);
extern template void detail::qr_recursive(MatrixView<double>, MatrixView<double>, MatrixView<double>,
                                          detail::QrScratch<double>&);
}  // namespace lowrank
#endif

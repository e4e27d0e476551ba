// SPDX-License-Identifier: Apache-2.0
// gemm: the matrix product on views. The only algorithm that looks at storage orders.
#pragma once

#include "lowrank/core/scalar.hpp"
#include "lowrank/core/view_of.hpp"
#include "lowrank/linalg/detail/blas.hpp"
#include "lowrank/linalg/detail/few_rows.hpp"
#include "lowrank/linalg/detail/packed_gemm.hpp"

namespace lowrank {

/// What an output argument's old contents mean: overwritten, or added to.
enum class Update { assign, accumulate };

namespace detail {

/// C = accumulate·C + α·P·Qᵀ with C's rows contiguous; P and Q in any order, Q perhaps in two-byte storage.
template <class T, class S>
void product_row_major(T alpha, MatrixView<const T> p, MatrixView<const S> q, bool accumulate, MatrixView<T> c) {
  if (c.rows() <= few_rows_limit && p.col_stride() == 1) return few_rows_product(alpha, p, q, accumulate, c);
#if defined(LOWRANK_USE_BLAS)
  if constexpr (std::same_as<S, T>)
    if (double(c.size()) * double(p.cols()) >= blas_threshold) return blas_gemm(alpha, p, q, accumulate, c);
#endif
  gemm_packed(alpha, DenseSource<T>{p}, DenseSource<T, S>{q}, accumulate, c);
}

/// C = accumulate·C + α·P·Qᵀ for all orders; either operand may be in two-byte storage, not both.
template <class T, class SP, class SQ>
void product(T alpha, MatrixView<const SP> p, MatrixView<const SQ> q, bool accumulate, MatrixView<T> c) {
  if (c.empty()) return;
  if (p.cols() == 0 || alpha == T(0)) {
    if (!accumulate) for_each_run(c, [](T* x, Index n) { std::fill_n(x, n, T(0)); });
    return;
  }
  if (!c.is_row_major()) {  // Cᵀ = Q·Pᵀ is row-major
    if constexpr (std::same_as<SQ, T>)
      return product_row_major<T, SP>(alpha, q, p, accumulate, c.transposed());
    else
      return gemm_packed(alpha, DenseSource<T, SQ>{q}, DenseSource<T, SP>{p}, accumulate, c.transposed());
  }
  if constexpr (std::same_as<SP, T>)
    product_row_major<T, SQ>(alpha, p, q, accumulate, c);
  else
    gemm_packed(alpha, DenseSource<T, SP>{p}, DenseSource<T, SQ>{q}, accumulate, c);
}

}  // namespace detail

/// C = α·A·B (assign) or C += α·A·B (accumulate).
///
/// **Shapes** A m×k, B k×n, C m×n, each in any order; pass `x.transposed()` for a transposed operand. C must not
/// overlap A or B. **Throws** ShapeError when sizes disagree, ArgumentError on overlap.
/// **Cost** 2·m·n·k flops; no allocation once the calling threads have seen a product as large.
/// **Numerics** sums run in T in blocks of 256 (float): error about k·eps·‖a‖·‖b‖ at worst; bits do not depend on the
/// number of threads, unless LOWRANK_USE_BLAS hands big products to BLAS.
template <Real T>
void gemm(T alpha, std::type_identity_t<MatrixView<const T>> A, std::type_identity_t<MatrixView<const T>> B,
          MatrixView<T> C, Update update = Update::assign) {
  detail::expect_shape("gemm", "B", B.rows(), B.cols(), A.cols(), C.cols());
  detail::expect_shape("gemm", "C", C.rows(), C.cols(), A.rows(), B.cols());
  if (detail::overlap(C, A) || detail::overlap(C, B)) throw ArgumentError("gemm: C must not overlap A or B");
  detail::product<T, T, T>(alpha, A, B.transposed(), update == Update::accumulate, C);
}

/// A·B as a new matrix. **Throws**, **Cost**: see gemm.
template <Real T>
Matrix<T> multiply(MatrixView<const T> A, std::type_identity_t<MatrixView<const T>> B) {
  Matrix<T> C;
  C.resize(A.rows(), B.cols());
  gemm(T(1), A, B, C.view());
  return C;
}
/// As above for matrix-like things: Eigen, xtensor, lowrank::Matrix, views of elements that are not const.
template <class X, class Y>
requires RealMatrix<const X&> && MatrixOf<const Y&, const scalar_of<const X&>> Matrix<scalar_of<const X&>> multiply(
    const X& A, const Y& B) {
  return multiply<scalar_of<const X&>>(detail::const_view_of(A), detail::const_view_of(B));
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template void product(float, MatrixView<const float>, MatrixView<const float>, bool, MatrixView<float>);
extern template void product(double, MatrixView<const double>, MatrixView<const double>, bool, MatrixView<double>);
extern template void product(float, MatrixView<const float>, MatrixView<const bf16>, bool, MatrixView<float>);
extern template void product(float, MatrixView<const bf16>, MatrixView<const float>, bool, MatrixView<float>);
extern template void product(float, MatrixView<const float>, MatrixView<const f16>, bool, MatrixView<float>);
extern template void product(float, MatrixView<const f16>, MatrixView<const float>, bool, MatrixView<float>);
}  // namespace lowrank::detail
#endif

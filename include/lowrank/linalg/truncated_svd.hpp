// SPDX-License-Identifier: Apache-2.0
// truncated_svd: the leading singular triplets of anything that multiplies vectors, with the errors stated.
#pragma once

#include <limits>
#include <utility>

#include "lowrank/linalg/adjoint_check.hpp"
#include "lowrank/linalg/detail/hidden_copies.hpp"
#include "lowrank/linalg/operators.hpp"
#include "lowrank/linalg/truncated_svd_result.hpp"

namespace lowrank {
namespace detail {

/// What truncated_svd computes, of any operator over T.
template <Real T>
[[gnu::cold]] TruncatedSvd<T> truncated_svd_of(AnyOperator<T> A, Index rank, const TruncatedSvdOptions& options,
                                               MatrixView<const T> start) {
  check_rank("truncated_svd", rank, A.rows(), A.cols());
  check_options("truncated_svd", options);
  if (!start.empty() && start.rows() != A.cols())
    throw ShapeError(text("truncated_svd: start must have A's ", A.cols(), " columns as rows, got ",
                          shape_text(start.rows(), start.cols())));
  if (options.check_adjoint) check_adjoint_of<T>(A, options.seed);
  BlockKrylov<T> iteration(A, rank, options);
  TruncatedSvd<T> found = iteration.run(start);
  return options.seek_copies && iteration.may_hide_copies() ? with_hidden_copies<T>(A, options, std::move(found))
                                                            : found;
}

/// Of a dense matrix stored as S.
template <Real T, class S>
[[gnu::cold]] TruncatedSvd<T> truncated_svd_of_dense(MatrixView<const S> A, Index rank,
                                                     const TruncatedSvdOptions& options, MatrixView<const T> start) {
  try {
    return truncated_svd_of<T>(dense_operator<T, S>(A), rank, options, start);
  } catch (const NonFiniteError&) {
    expect_finite("truncated_svd", "A", A);  // says which element, if it is A's
    throw;
  }
}

}  // namespace detail

/// The top `rank` singular triplets of A by block Krylov iteration: A ≈ U·diag(S)·Vᵀ.
///
/// A block of vectors is multiplied by AᵀA (or AAᵀ, whichever A computes in one pass), orthogonalised against all
/// before it, and the best rank-k approximation is taken from the whole space so spanned (Rayleigh–Ritz), not from the
/// last block: that is where randomised power iteration loses its accuracy. Iteration stops at the accuracy asked for.
///
/// **Shapes** A m×n, 1 ≤ rank ≤ min(m, n); U m×rank, S rank, V n×rank. `start`: n×k₀ (k₀ ≥ 1), columns near the right
/// singular vectors sought, those of an earlier checkpoint for instance; empty: a random start.
/// **Throws** ArgumentError on a rank out of range or a bad option, ShapeError on a bad start, NonFiniteError when A
/// holds or produces NaN or infinity. Not reaching the tolerance is no exception: `converged` is false and the
/// residuals are true.
/// **Cost** `passes` readings of A with `block` vectors each (4·m·n·block flops in a pass over both products), plus
/// about 4·n·d² flops for a basis of d vectors; d·n + k·m scalars of memory besides A.
/// **Numerics** every value is at most the true one plus a few eps·σ₁; U and V are orthonormal to a few eps; signs are
/// such that they depend on the seed alone. The bits do not depend on the number of threads.
/// **Source** Musco & Musco, arXiv 1504.05477 (block Krylov with Rayleigh–Ritz); Golub & Kahan (1965), Golub, Luk &
/// Overton, ACM TOMS 7 (1981) (block Lanczos); Wu & Simon, SIAM J. Matrix Anal. Appl. 22 (2000) (thick restart).
template <Real T, class Op>
requires LinearOperator<Op, T> TruncatedSvd<T> truncated_svd(const Op& A, Index rank,
                                                             const TruncatedSvdOptions& options = {},
                                                             std::type_identity_t<MatrixView<const T>> start = {}) {
  return detail::truncated_svd_of<T>(A, rank, options, start);
}

/// As above for an operator that names its scalar, as all of this library do.
template <class Op>
requires(!MatrixLike<const Op&> && LinearOperator<Op, typename Op::scalar>)
    TruncatedSvd<typename Op::scalar> truncated_svd(const Op& A, Index rank, const TruncatedSvdOptions& options = {},
                                                    MatrixView<const typename Op::scalar> start = {}) {
  return truncated_svd<typename Op::scalar, Op>(A, rank, options, start);
}

/// As above for a dense matrix in any order: float, double, or bf16 / f16 storage with the result in float.
template <class W>
requires MatrixLike<const W&> TruncatedSvd<arithmetic_of<scalar_of<const W&>>> truncated_svd(
    const W& A, Index rank, const TruncatedSvdOptions& options = {},
    MatrixView<const arithmetic_of<scalar_of<const W&>>> start = {}) {
  using S = scalar_of<const W&>;
  return detail::truncated_svd_of_dense<arithmetic_of<S>, S>(view_of(A), rank, options, start);
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template TruncatedSvd<float> truncated_svd_of(AnyOperator<float>, Index, const TruncatedSvdOptions&,
                                                     MatrixView<const float>);
extern template TruncatedSvd<double> truncated_svd_of(AnyOperator<double>, Index, const TruncatedSvdOptions&,
                                                      MatrixView<const double>);
extern template TruncatedSvd<float> truncated_svd_of_dense(MatrixView<const float>, Index, const TruncatedSvdOptions&,
                                                           MatrixView<const float>);
extern template TruncatedSvd<double> truncated_svd_of_dense(MatrixView<const double>, Index, const TruncatedSvdOptions&,
                                                            MatrixView<const double>);
extern template TruncatedSvd<float> truncated_svd_of_dense(MatrixView<const bf16>, Index, const TruncatedSvdOptions&,
                                                           MatrixView<const float>);
extern template TruncatedSvd<float> truncated_svd_of_dense(MatrixView<const f16>, Index, const TruncatedSvdOptions&,
                                                           MatrixView<const float>);
}  // namespace lowrank::detail
#endif

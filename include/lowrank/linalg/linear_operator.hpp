// SPDX-License-Identifier: Apache-2.0
// LinearOperator: a matrix that is known only by what it does to a block of vectors.
#pragma once

#include <concepts>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/core/scalar.hpp"

namespace lowrank {

/// Something that multiplies blocks of vectors like a rows() × cols() matrix A over T.
///
/// - `apply(X, Y)`: Y = A·X. X cols()×k, Y rows()×k.
/// - `apply_adjoint(X, Y)`: Y = Aᵀ·X. X rows()×k, Y cols()×k.
///
/// X and Y come in any order and do not overlap; Y's old contents mean nothing. Both must describe the *same* matrix to
/// rounding: check_adjoint (adjoint_check.hpp) tells. An operator is passed by const reference and copied into
/// composites, so it should be as light as a view.
template <class Op, class T>
concept LinearOperator = Real<T> && requires(const Op& A, MatrixView<const T> in, MatrixView<T> out) {
  { A.rows() } -> std::convertible_to<Index>;
  { A.cols() } -> std::convertible_to<Index>;
  A.apply(in, out);
  A.apply_adjoint(in, out);
};

/// An operator that knows ‖A‖_F², to double precision, or, when it also has a rounding_norm(), to that one's error.
/// Without it a truncated SVD cannot tell which share of the energy it captured.
template <class Op>
concept HasFrobeniusNorm = requires(const Op& A) {
  { A.frobenius_norm_squared() } -> std::convertible_to<double>;
};

/// An operator made of parts that may cancel, which therefore rounds relative to more than its own norm:
///
/// - `rounding_norm()`: N such that A·x comes with an error of at most 2·√max(rows, cols)·eps·N·‖x‖, and
///   frobenius_norm_squared(), if there is one, with 2·√max(rows, cols)·eps·N² (eps of the scalar).
///
/// The certificates ask for it. Of an operator without it they assume N = ‖A‖_F and a norm exact to double.
template <class Op>
concept HasRoundingNorm = requires(const Op& A) {
  { A.rounding_norm() } -> std::convertible_to<double>;
};

/// The two products that stand on either side of A: AᵀA (on vectors of length cols) and AAᵀ (of length rows).
enum class GramSide { right, left };

/// An operator that computes both factors of a Gram product while it reads its matrix once:
///
/// - `gram_side()`: the side on which it can.
/// - `apply_gram(X, Y, Z)`: right: Y = A·X, Z = Aᵀ·Y; left: Y = Aᵀ·X, Z = A·Y.
///
/// Where memory bandwidth bounds a product with few vectors, this halves the time of a Krylov step.
template <class Op, class T>
concept HasGram = LinearOperator<Op, T> && requires(const Op& A, MatrixView<const T> X, MatrixView<T> Y) {
  { A.gram_side() } -> std::same_as<GramSide>;
  A.apply_gram(X, Y, Y);
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// The matrices a truncated SVD is asked for and nobody wants to form: dense views in any storage, transposes, scaled
// and updated weights, differences of checkpoints, products of factors, frozen bases.
//
// All are as light as a view and refer to the caller's matrices, which must outlive them.
#pragma once

#include <utility>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/base.hpp"
#include "lowrank/linalg/detail/streamed_pass.hpp"
#include "lowrank/linalg/linear_operator.hpp"

namespace lowrank {

namespace detail {

inline void expect_operands(const char* where, Index rows, Index cols, Index x_rows, Index x_cols, Index y_rows,
                            Index y_cols) {
  expect_shape(where, "X", x_rows, x_cols, cols, x_cols);
  expect_shape(where, "Y", y_rows, y_cols, rows, x_cols);
}

/// A block of vectors the way streamed_pass wants it, one vector a contiguous row: a column-major X transposed, or a
/// copy.
template <class T>
class VectorRows {
 public:
  explicit VectorRows(MatrixView<T> X) : target_(X), rows_(X.transposed()) {
    if (X.row_stride() == 1) return;
    copy_.assign(rows_);
    rows_ = copy_.view();
  }
  [[nodiscard]] MatrixView<T> rows() const { return rows_; }
  void copy_back() const {
    if (copy_.empty()) return;
    for (Index i = 0; i < rows_.rows(); ++i)
      for (Index j = 0; j < rows_.cols(); ++j) target_(j, i) = rows_(i, j);
  }

 private:
  MatrixView<T> target_, rows_;
  Matrix<std::remove_const_t<T>> copy_;
};

}  // namespace detail

/// The matrix of a row source, or its transpose, with every product done in one pass over the rows.
///
/// The functions below make these: dense_operator, difference_operator, row_scaled, column_scaled.
/// **Shapes** `side` right: the operator is the source; left: it is the source's transpose.
/// **Cost** apply and apply_adjoint 2·m·n·k flops, apply_gram 4·m·n·k, one reading of the matrix each.
template <Real T, detail::RowSource Rows>
class StreamedOperator {
 public:
  using scalar = T;
  StreamedOperator(Rows source, GramSide side) : source_(std::move(source)), side_(side) {}

  [[nodiscard]] Index rows() const { return side_ == GramSide::right ? source_.rows() : source_.cols(); }
  [[nodiscard]] Index cols() const { return side_ == GramSide::right ? source_.cols() : source_.rows(); }
  [[nodiscard]] const Rows& source() const noexcept { return source_; }

  void apply(MatrixView<const T> X, MatrixView<T> Y) const {
    detail::expect_operands("StreamedOperator::apply", rows(), cols(), X.rows(), X.cols(), Y.rows(), Y.cols());
    side_ == GramSide::right ? forward(X, Y) : adjoint(X, Y);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    detail::expect_operands("StreamedOperator::apply_adjoint", cols(), rows(), X.rows(), X.cols(), Y.rows(), Y.cols());
    side_ == GramSide::right ? adjoint(X, Y) : forward(X, Y);
  }
  [[nodiscard]] double frobenius_norm_squared() const { return detail::sum_of_squared_rows<T>(source_); }
  [[nodiscard]] GramSide gram_side() const noexcept { return side_; }
  void apply_gram(MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) const {
    const Index m = source_.rows(), n = source_.cols();
    detail::expect_operands("StreamedOperator::apply_gram", m, n, X.rows(), X.cols(), Y.rows(), Y.cols());
    detail::expect_shape("StreamedOperator::apply_gram", "Z", Z.rows(), Z.cols(), n, X.cols());
    const detail::VectorRows<const T> x(X);
    const detail::VectorRows<T> y(Y), z(Z);
    detail::streamed_pass<detail::Pass::gram, T>(source_, x.rows(), y.rows(), z.rows());
    y.copy_back();
    z.copy_back();
  }

 private:
  // A dense source also has the packed product, which wins when there are many vectors.
  static constexpr bool dense = requires(const Rows& r) { r.m; };
  static constexpr Index many = 4 * detail::pass_vectors;

  void forward(MatrixView<const T> X, MatrixView<T> Y) const {
    if constexpr (dense)
      if (X.cols() >= many)
        return detail::product<T, typename Rows::storage, T>(T(1), source_.m, X.transposed(), false, Y);
    const detail::VectorRows<const T> x(X);
    const detail::VectorRows<T> y(Y);
    detail::streamed_pass<detail::Pass::forward, T>(source_, x.rows(), y.rows(), {});
    y.copy_back();
  }
  void adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    if constexpr (dense)
      if (X.cols() >= many)
        return detail::product<T, typename Rows::storage, T>(T(1), source_.m.transposed(), X.transposed(), false, Y);
    const detail::VectorRows<const T> x(X);
    const detail::VectorRows<T> y(Y);
    // An adjoint pass only reads its second argument.
    const MatrixView<const T> given = x.rows();
    const MatrixView<T> in(const_cast<T*>(given.data()), given.rows(), given.cols(), given.row_stride(), 1);
    detail::streamed_pass<detail::Pass::adjoint, T>(source_, {}, in, y.rows());
    y.copy_back();
  }

  Rows source_;
  GramSide side_;
};

namespace detail {
/// W with its contiguous direction along rows, and which side that makes it.
template <class S>
std::pair<MatrixView<const S>, GramSide> contiguous_rows(MatrixView<const S> w) {
  if (w.is_row_major()) return {w, GramSide::right};
  return {w.transposed(), GramSide::left};
}
}  // namespace detail

/// What the functions below make. The rows they read are internal; a user names the operator.
template <Real T, class S>
using DenseOperator = StreamedOperator<T, detail::DenseRows<S>>;
template <Real T, class S1, class S0>
using DifferenceOperator = StreamedOperator<T, detail::DifferenceRows<T, S1, S0>>;
template <Real T, class Rows>
using ScaledOperator = StreamedOperator<T, detail::ScaledRows<T, Rows>>;

/// A dense matrix in any order, stored as S, used as T. Two-byte storage is widened in registers; W is never copied.
template <Real T, class S>
requires StorageOf<S, T> DenseOperator<T, S> dense_operator(MatrixView<const S> W) {
  const auto [rows, side] = detail::contiguous_rows(W);
  return DenseOperator<T, S>({rows}, side);
}

/// As above for matrix-like things, which must outlive the operator; T is double for double, else float.
template <MatrixLike X>
DenseOperator<arithmetic_of<scalar_of<X>>, scalar_of<X>> dense_operator(X&& W) {
  using S = scalar_of<X>;
  return dense_operator<arithmetic_of<S>, S>(detail::const_view_of(W));
}
template <Real T, MatrixLike X>
requires StorageOf<scalar_of<X>, T> DenseOperator<T, scalar_of<X>> dense_operator(X&& W) {
  return dense_operator<T, scalar_of<X>>(detail::const_view_of(W));
}

/// W₁ − W₀, subtracted in T after widening: the update a fine-tuning made. Storages and orders may differ.
/// **Throws** ShapeError when the shapes differ.
template <Real T, class S1, class S0>
requires StorageOf<S1, T> && StorageOf<S0, T> DifferenceOperator<T, S1, S0> difference_operator(
    MatrixView<const S1> tuned, MatrixView<const S0> base) {
  detail::expect_shape("difference_operator", "base", base.rows(), base.cols(), tuned.rows(), tuned.cols());
  const auto [rows, side] = detail::contiguous_rows(tuned);
  using Source = detail::DifferenceRows<T, S1, S0>;
  return StreamedOperator<T, Source>(Source{rows, side == GramSide::right ? base : base.transposed()}, side);
}

/// As above for matrix-like things, which must outlive the operator; T is double for double, else float.
template <MatrixLike X, MatrixLike Y>
requires std::same_as<arithmetic_of<scalar_of<X>>, arithmetic_of<scalar_of<Y>>>
    DifferenceOperator<arithmetic_of<scalar_of<X>>, scalar_of<X>, scalar_of<Y>> difference_operator(X&& tuned,
                                                                                                    Y&& base) {
  using S1 = scalar_of<X>;
  using S0 = scalar_of<Y>;
  return difference_operator<arithmetic_of<S1>, S1, S0>(detail::const_view_of(tuned), detail::const_view_of(base));
}

/// diag(d)·A of a streamed operator. **Throws** ShapeError unless d has A.rows() elements.
template <Real T, class Rows>
ScaledOperator<T, Rows> row_scaled(const StreamedOperator<T, Rows>& A, std::span<const T> d) {
  if (Index(d.size()) != A.rows())
    throw ShapeError(detail::text("row_scaled: expected ", A.rows(), " factors, got ", d.size()));
  using Source = detail::ScaledRows<T, Rows>;
  return A.gram_side() == GramSide::right ? StreamedOperator<T, Source>(Source{A.source(), d, {}}, GramSide::right)
                                          : StreamedOperator<T, Source>(Source{A.source(), {}, d}, GramSide::left);
}

/// A·diag(d) of a streamed operator. **Throws** ShapeError unless d has A.cols() elements.
template <Real T, class Rows>
ScaledOperator<T, Rows> column_scaled(const StreamedOperator<T, Rows>& A, std::span<const T> d) {
  if (Index(d.size()) != A.cols())
    throw ShapeError(detail::text("column_scaled: expected ", A.cols(), " factors, got ", d.size()));
  using Source = detail::ScaledRows<T, Rows>;
  return A.gram_side() == GramSide::right ? StreamedOperator<T, Source>(Source{A.source(), {}, d}, GramSide::right)
                                          : StreamedOperator<T, Source>(Source{A.source(), d, {}}, GramSide::left);
}

/// Aᵀ of any operator.
template <class Op>
class TransposedOperator {
 public:
  using scalar = typename Op::scalar;
  explicit TransposedOperator(Op a) : a_(std::move(a)) {}

  [[nodiscard]] Index rows() const { return a_.cols(); }
  [[nodiscard]] Index cols() const { return a_.rows(); }
  void apply(MatrixView<const scalar> X, MatrixView<scalar> Y) const { a_.apply_adjoint(X, Y); }
  void apply_adjoint(MatrixView<const scalar> X, MatrixView<scalar> Y) const { a_.apply(X, Y); }
  [[nodiscard]] double frobenius_norm_squared() const requires HasFrobeniusNorm<Op> {
    return a_.frobenius_norm_squared();
  }
  [[nodiscard]] double rounding_norm() const requires HasRoundingNorm<Op> { return a_.rounding_norm(); }
  [[nodiscard]] GramSide gram_side() const requires HasGram<Op, scalar> {
    return a_.gram_side() == GramSide::right ? GramSide::left : GramSide::right;
  }
  void apply_gram(MatrixView<const scalar> X, MatrixView<scalar> Y,
                  MatrixView<scalar> Z) const requires HasGram<Op, scalar> {
    a_.apply_gram(X, Y, Z);
  }

 private:
  Op a_;
};

}  // namespace lowrank

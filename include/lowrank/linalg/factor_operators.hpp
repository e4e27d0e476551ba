// SPDX-License-Identifier: Apache-2.0
// Operators with low-rank parts and frozen bases: s·B·A, W + s·B·A, and anything a layer can stand on.
#pragma once

#include <limits>

#include "lowrank/linalg/operators.hpp"

namespace lowrank {

/// s·B·A, never formed. B m×r, A r×n. For its *exact* SVD use svd(factors); this is for composing.
template <Real T>
class ProductOperator {
 public:
  using scalar = T;
  /// **Throws** ShapeError when B·A does not exist.
  ProductOperator(MatrixView<const T> B, MatrixView<const T> A, T scale = T(1)) : B_(B), A_(A), scale_(scale) {
    if (B.cols() != A.rows())
      throw ShapeError(detail::text("ProductOperator: B must have as many columns as A has rows, got B ",
                                    detail::shape_text(B.rows(), B.cols()), " and A ",
                                    detail::shape_text(A.rows(), A.cols())));
  }
  [[nodiscard]] Index rows() const noexcept { return B_.rows(); }
  [[nodiscard]] Index cols() const noexcept { return A_.cols(); }
  [[nodiscard]] MatrixView<const T> left() const noexcept { return B_; }
  [[nodiscard]] MatrixView<const T> right() const noexcept { return A_; }
  [[nodiscard]] T scale() const noexcept { return scale_; }

  void apply(MatrixView<const T> X, MatrixView<T> Y, Update update = Update::assign) const {
    through(A_, B_, X, Y, update);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y, Update update = Update::assign) const {
    through(B_.transposed(), A_.transposed(), X, Y, update);
  }
  /// tr((BᵀB)·(AAᵀ))·s², in double: exact to 2⁻⁵³ of rounding_norm()², which covers columns that cancel; O((m + n)·r²).
  [[nodiscard]] double frobenius_norm_squared() const {
    const Index r = A_.rows();
    double sum = 0;
    for (Index i = 0; i < r; ++i)
      for (Index j = 0; j < r; ++j) {
        double b = 0, a = 0;
        for (Index k = 0; k < B_.rows(); ++k) b += double(B_(k, i)) * double(B_(k, j));
        for (Index k = 0; k < A_.cols(); ++k) a += double(A_(i, k)) * double(A_(j, k));
        sum += a * b;
      }
    return std::max(0.0, sum * double(scale_) * double(scale_));
  }
  /// 2·|s|·Σ_k ‖b_k‖·‖a_k‖ with the columns of B and the rows of A: A·x and then B·(A·x) round relative to that,
  /// whatever the terms leave of each other; O((m + n)·r).
  [[nodiscard]] double rounding_norm() const {
    double sum = 0;
    for (Index k = 0; k < A_.rows(); ++k) {
      double b = 0, a = 0;
      for (Index i = 0; i < B_.rows(); ++i) b += double(B_(i, k)) * double(B_(i, k));
      for (Index j = 0; j < A_.cols(); ++j) a += double(A_(k, j)) * double(A_(k, j));
      sum += std::sqrt(b) * std::sqrt(a);
    }
    return 2 * std::abs(double(scale_)) * sum;
  }

 private:
  void through(MatrixView<const T> first, MatrixView<const T> second, MatrixView<const T> X, MatrixView<T> Y,
               Update update) const {
    // The intermediate is column-major like the blocks of vectors on either side, whose products then run on long rows.
    Matrix<T> t(X.cols(), first.rows());
    gemm(T(1), first, X, t.view().transposed());
    gemm(scale_, second, t.view().transposed(), Y, update);
  }
  MatrixView<const T> B_, A_;
  T scale_;
};

/// W + s·B·A for any operator W: an adapted weight, or with −s the base that is left of it. Nothing of its size is
/// formed.
///
/// On a streamed W the Gram product stays one pass over W: s·B·(A·X) is added to each panel of Y before it goes on.
template <class Op>
class UpdatedOperator {
 public:
  using scalar = typename Op::scalar;
  using T = scalar;
  /// **Throws** ShapeError when the shapes of W and s·B·A differ.
  UpdatedOperator(Op W, ProductOperator<T> update) : W_(std::move(W)), update_(update) {
    detail::expect_shape("UpdatedOperator", "B·A", update.rows(), update.cols(), Index(W_.rows()), Index(W_.cols()));
  }
  [[nodiscard]] Index rows() const { return W_.rows(); }
  [[nodiscard]] Index cols() const { return W_.cols(); }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const {
    W_.apply(X, Y);
    update_.apply(X, Y, Update::accumulate);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    W_.apply_adjoint(X, Y);
    update_.apply_adjoint(X, Y, Update::accumulate);
  }

  static constexpr bool streamed = requires(const Op& W) { W.source(); };

  [[nodiscard]] GramSide gram_side() const requires streamed { return W_.gram_side(); }
  void apply_gram(MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) const requires streamed {
    const auto& source = W_.source();
    const Index m = source.rows(), n = source.cols(), b = X.cols(), r = update_.right().rows();
    detail::expect_operands("UpdatedOperator::apply_gram", m, n, X.rows(), X.cols(), Y.rows(), Y.cols());
    detail::expect_shape("UpdatedOperator::apply_gram", "Z", Z.rows(), Z.cols(), n, b);
    // The source is W or Wᵀ; it is updated by s·L·R.
    const bool right = W_.gram_side() == GramSide::right;
    const MatrixView<const T> L = right ? update_.left() : update_.right().transposed();
    const MatrixView<const T> R = right ? update_.right() : update_.left().transposed();
    const detail::VectorRows<const T> x(X);
    const detail::VectorRows<T> y(Y), z(Z);
    Matrix<T> t(r, b), u(r, b);
    gemm(update_.scale(), R, X, t.view());
    const auto add_update = [&](Index i0, Index count, Index c0, T* panel) {
      const Index width = std::min(detail::pass_vectors, b - c0);
      for (Index i = 0; i < count; ++i)
        for (Index k = 0; k < r; ++k) {
          const T l = L(i0 + i, k);
          for (Index c = 0; c < width; ++c) panel[i * detail::pass_vectors + c] += l * t(k, c0 + c);
        }
    };
    detail::streamed_pass<detail::Pass::gram, T>(source, x.rows(), y.rows(), z.rows(), add_update);
    y.copy_back();
    z.copy_back();
    gemm(update_.scale(), L.transposed(), Y, u.view());
    gemm(T(1), R.transposed(), u.view(), Z, Update::accumulate);
  }
  /// ‖W‖² + 2s·⟨W, BA⟩ + ‖s·B·A‖², the middle term by one product of W with Aᵀ in T: its error is relative to
  /// rounding_norm()², as when s·B·A is close to −W and little is left.
  [[nodiscard]] double frobenius_norm_squared() const requires HasFrobeniusNorm<Op> {
    const MatrixView<const T> B = update_.left(), A = update_.right();
    Matrix<T> WA(A.rows(), rows());
    W_.apply(A.transposed(), WA.view().transposed());
    double inner = 0;
    for (Index k = 0; k < A.rows(); ++k)
      for (Index i = 0; i < rows(); ++i) inner += double(WA(k, i)) * double(B(i, k));
    return std::max(
        0.0, W_.frobenius_norm_squared() + 2 * double(update_.scale()) * inner + update_.frobenius_norm_squared());
  }
  /// That of s·B·A added to W's, or to ‖W‖_F.
  [[nodiscard]] double rounding_norm() const requires(HasRoundingNorm<Op> || HasFrobeniusNorm<Op>) {
    if constexpr (HasRoundingNorm<Op>)
      return W_.rounding_norm() + update_.rounding_norm();
    else
      return std::sqrt(W_.frobenius_norm_squared()) + update_.rounding_norm();
  }

 private:
  Op W_;
  ProductOperator<T> update_;
};

/// A frozen base (a quantised weight, a user's kernel) as an operator. It computes tokens × features, so a block of
/// vectors goes in transposed, which costs nothing.
///
/// A base that yields panels also gets the one-pass Gram product, decoding each row once for both products.
template <Real T, class Base>
requires FrozenBase<Base, T>
class FrozenOperator {
 public:
  using scalar = T;
  explicit FrozenOperator(const Base& base) : base_(&base) {}

  [[nodiscard]] Index rows() const { return base_->rows(); }
  [[nodiscard]] Index cols() const { return base_->cols(); }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const {
    base_->forward(X.transposed(), Y.transposed(), Update::assign);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    base_->backward(X.transposed(), Y.transposed(), Update::assign);
  }

  [[nodiscard]] auto source() const requires PackableBase<Base, T> {
    using Panels = decltype(base_->panels());
    return detail::PanelRows<T, Panels>{base_->panels()};
  }
  [[nodiscard]] GramSide gram_side() const requires PackableBase<Base, T> { return GramSide::right; }
  void apply_gram(MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) const requires PackableBase<Base, T> {
    StreamedOperator<T, decltype(source())>(source(), GramSide::right).apply_gram(X, Y, Z);
  }
  [[nodiscard]] double frobenius_norm_squared() const requires PackableBase<Base, T> {
    return detail::sum_of_squared_rows<T>(source());
  }

 private:
  const Base* base_;
};

/// The operator of a frozen base, which must outlive it: base_operator<float>(quantised).
template <Real T, class Base>
FrozenOperator<T, Base> base_operator(const Base& base) {
  return FrozenOperator<T, Base>(base);
}

/// W + s·B·A with LoRA factors, which must outlive it.
template <class Op>
requires(!MatrixLike<const Op&>) UpdatedOperator<Op> updated_operator(const Op& W,
                                                                      const LoraFactors<typename Op::scalar>& f) {
  using T = typename Op::scalar;
  return UpdatedOperator<Op>(W, ProductOperator<T>(f.B.view(), f.A.view(), f.scale));
}
/// As above for a matrix-like W, which must outlive it too.
template <MatrixLike X>
UpdatedOperator<DenseOperator<arithmetic_of<scalar_of<X>>, scalar_of<X>>> updated_operator(
    X&& W, const LoraFactors<arithmetic_of<scalar_of<X>>>& f) {
  return updated_operator(dense_operator(W), f);
}
/// Factors that die at the end of the expression. Name them, then pass them.
template <class W, Real T>
void updated_operator(W&&, LoraFactors<T>&&) = delete;

}  // namespace lowrank

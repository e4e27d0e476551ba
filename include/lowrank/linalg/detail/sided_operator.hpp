// SPDX-License-Identifier: Apache-2.0
// The operator an iteration sees: A or Aᵀ, brought to a norm near 1, its readings counted.
#pragma once

#include <cmath>
#include <limits>

#include "lowrank/linalg/detail/any_operator.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/operators.hpp"

namespace lowrank::detail {

/// M = c·A (right) or c·Aᵀ (left) on blocks of vectors that lie in rows: X is b×domain, Y is b×range.
///
/// c is a power of two and 1 unless the norm of A leaves the range in which squares of singular values are safe in T.
/// Then factors are spread over X and the result, so that neither entries near 1e38 overflow nor denormals lose their
/// bits.
///
/// **Throws** NonFiniteError, naming `where`, when a product is not finite. **Cost** that of A's products, and a look
/// at every result. **Numerics** scaling by powers of two loses nothing but denormal bits.
template <Real T>
class SidedOperator {
 public:
  SidedOperator(AnyOperator<T> A, GramSide side, const char* where) : A_(A), side_(side), where_(where) {}

  [[nodiscard]] Index domain() const { return side_ == GramSide::right ? A_.cols() : A_.rows(); }
  [[nodiscard]] Index range() const { return side_ == GramSide::right ? A_.rows() : A_.cols(); }
  [[nodiscard]] GramSide side() const noexcept { return side_; }
  [[nodiscard]] Index passes() const noexcept { return passes_; }
  /// A length measured on M, in A's units: x/c.
  [[nodiscard]] double unscaled(double x) const { return std::ldexp(x, -(pre_ + post_)); }

  /// Whether c = 1 is right for a matrix of this Frobenius norm.
  static bool safe_norm(double norm) { return norm > tiny && norm < 1 / tiny; }
  /// Settles c by what A does to a block of orthonormal vectors: Y = M·X. Returns ‖Y‖_F; 0 when A·X is zero.
  double settle_scale(MatrixView<const T> X, MatrixView<T> Y) {
    const auto measure = [&](int pre) {
      pre_ = pre;
      post_ = 0;
      run(X, Y, side_ == GramSide::right, false);
      return std::sqrt(squared_norm(Y));
    };
    // A huge A overflows on vectors of length 1, a tiny one loses its bits there.
    constexpr int far = std::same_as<T, float> ? 90 : 700;
    double norm = measure(0);
    if (std::isnan(norm)) fail();
    if (std::isinf(norm))
      norm = measure(-far);
    else if (norm < tiny)
      norm = measure(far);
    if (!std::isfinite(norm)) fail();
    if (norm == 0) {
      pre_ = 0;
      return 0;
    }
    if (pre_ == 0 && safe_norm(norm)) return norm;
    post_ = -std::ilogb(norm);
    multiply_by_power(Y, post_);
    return std::ldexp(norm, post_);
  }

  /// Y = M·X.
  void forward(MatrixView<const T> X, MatrixView<T> Y) { run(X, Y, side_ == GramSide::right, true); }
  /// Z = Mᵀ·Y.
  void adjoint(MatrixView<const T> Y, MatrixView<T> Z) { run(Y, Z, side_ == GramSide::left, true); }
  /// Y = M·X, Z = Mᵀ·Y; in one reading when A can.
  void gram(MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) {
    if (A_.has_gram() && pre_ == 0 && post_ == 0 && A_.gram_side() == side_) {
      A_.apply_gram(X.transposed(), Y.transposed(), Z.transposed());
      ++passes_;
      return check_products(Z);
    }
    forward(X, Y);
    adjoint(Y, Z);
  }

 private:
  static constexpr double tiny = std::same_as<T, float> ? 1e-8 : 1e-100;

  [[noreturn]] void fail() const {
    throw NonFiniteError(text(where_, ": the matrix holds NaN or infinity, or its products overflow"));
  }
  static void multiply_by_power(MatrixView<T> Y, int exponent) {
    for (Index i = 0; i < Y.rows(); ++i)
      for (Index j = 0; j < Y.cols(); ++j) Y(i, j) = std::ldexp(Y(i, j), exponent);
  }
  void check_products(MatrixView<const T> X) const {
    if (!std::isfinite(squared_norm(X))) fail();
  }
  void run(MatrixView<const T> X, MatrixView<T> Y, bool direct, bool check) {
    ++passes_;
    MatrixView<const T> in = X;
    if (pre_ != 0) {
      scaled_.resize(X.rows(), X.cols());
      for (Index i = 0; i < X.rows(); ++i)
        for (Index j = 0; j < X.cols(); ++j) scaled_(i, j) = std::ldexp(X(i, j), pre_);
      in = scaled_.view();
    }
    direct ? A_.apply(in.transposed(), Y.transposed()) : A_.apply_adjoint(in.transposed(), Y.transposed());
    if (post_ != 0) multiply_by_power(Y, post_);
    if (check) check_products(Y);
  }

  AnyOperator<T> A_;
  GramSide side_;
  const char* where_;
  int pre_ = 0, post_ = 0;
  Index passes_ = 0;
  Matrix<T> scaled_;
};

}  // namespace lowrank::detail

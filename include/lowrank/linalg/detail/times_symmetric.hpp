// SPDX-License-Identifier: Apache-2.0
// W·C with a symmetric C (a covariance, a metric), as an operator.
#pragma once

#include "lowrank/linalg/gemm.hpp"

namespace lowrank::detail {

/// W·C for symmetric C, never formed.
///
/// **Shapes** W m×n stored as S in any order, C n×n; of C only C = Cᵀ is assumed, to rounding. **Cost** 2·(m·n + n²)
/// flops a vector.
template <Real T, class S>
class TimesSymmetric {
 public:
  using scalar = T;
  TimesSymmetric(MatrixView<const S> W, MatrixView<const T> C) : W_(W), C_(C) {}
  [[nodiscard]] Index rows() const { return W_.rows(); }
  [[nodiscard]] Index cols() const { return W_.cols(); }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const {
    const Matrix<T> CX = multiply<T>(C_, X);
    product<T, S, T>(T(1), W_, CX.view().transposed(), false, Y);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    Matrix<T> WtX(W_.cols(), X.cols());
    product<T, S, T>(T(1), W_.transposed(), X.transposed(), false, WtX.view());
    product<T, T, T>(T(1), C_, WtX.view().transposed(), false, Y);
  }

 private:
  MatrixView<const S> W_;
  MatrixView<const T> C_;
};

}  // namespace lowrank::detail

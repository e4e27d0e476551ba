// SPDX-License-Identifier: Apache-2.0
// Errors weighted by the activations: ‖E·L‖_F with C = L·Lᵀ the covariance of a layer's inputs.
#pragma once

#include <cmath>

#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/detail/covariance.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"

namespace lowrank::detail {

/// The Cholesky factor of a damped covariance, n×n lower triangular, in double.
class ActivationWeight {
 public:
  ActivationWeight() = default;

  /// Factors C + damping·mean(diag C)·I. Throws ShapeError unless n×n; ArgumentError unless it is symmetric and
  /// positive definite after damping. **Cost** n³/3 multiply-adds on all threads; one n×n matrix of doubles, and one of
  /// floats when E is float.
  template <class T>
  ActivationWeight(const char* where, MatrixView<const T> C, Index n, double damping) {
    L_ = damped_covariance(where, "the covariance", C, n, damping);
    if (const Index pivot = cholesky_pivots(L_.view(), 0); pivot < n)
      throw ArgumentError(text(where, ": the covariance must be positive definite, pivot ", pivot, " is ",
                               L_(pivot, pivot), "; raise damping"));
    for (Index i = 0; i < n; ++i)
      for (Index j = i + 1; j < n; ++j) L_(i, j) = 0;
  }

  [[nodiscard]] bool empty() const noexcept { return L_.empty(); }

  /// E·L into `out`, E m×n.
  template <class T>
  void apply(MatrixView<const T> E, MatrixView<T> out) const {
    if constexpr (std::same_as<T, double>) {
      gemm(1.0, E, L_.view(), out);
    } else {
      if (narrow_.empty()) narrow_ = Matrix<float>(L_.view());
      gemm(1.0F, E, std::as_const(narrow_).view(), out);
    }
  }
  /// Rows a of A, r×n, replaced by a·L⁻¹: with V of the SVD of E·L, A = √S·Vᵀ·L⁻¹.
  template <class T>
  void solve_rows(MatrixView<T> A) const {
    const Index n = L_.rows();
    parallel_ranges(A.rows(), 1, [&](Index i0, Index i1) {
      std::vector<double> x(static_cast<std::size_t>(n));
      for (Index i = i0; i < i1; ++i) {
        for (Index j = 0; j < n; ++j) x[std::size_t(j)] = double(A(i, j));
        for (Index j = n - 1; j >= 0; --j) {  // x·L = a from the last column back
          x[std::size_t(j)] /= L_(j, j);
          axpy(j, -x[std::size_t(j)], &L_(j, 0), x.data());
        }
        for (Index j = 0; j < n; ++j) A(i, j) = T(x[std::size_t(j)]);
      }
    });
  }

 private:
  Matrix<double> L_;
  mutable Matrix<float> narrow_;
};

}  // namespace lowrank::detail

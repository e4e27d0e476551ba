// SPDX-License-Identifier: Apache-2.0
// Singular triplets from a subspace, with their residuals measured by products of the matrix itself.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "lowrank/linalg/detail/sided_operator.hpp"
#include "lowrank/linalg/small_svd.hpp"
#include "lowrank/linalg/truncated_svd_result.hpp"

namespace lowrank::detail {

/// The k leading triplets of M in the span of some orthonormal vectors, in rows on M's left and right.
template <Real T>
class MeasuredTriplets {
 public:
  explicit MeasuredTriplets(Index count) : k_(count) {}

  [[nodiscard]] const std::vector<double>& sigma() const noexcept { return sigma_; }
  [[nodiscard]] const std::vector<double>& residual() const noexcept { return residual_; }

  /// From the span of V's rows, with one product for Y = M·V.
  [[gnu::cold]] void take(SidedOperator<T>& M, const Matrix<T>& V) {
    Matrix<T> Y(V.rows(), M.range());
    M.forward(V.view(), Y.view());
    decompose(M, V, std::move(Y));
  }

  /// SVD of Y = M·V (vectors in rows), truncated to k, with the residuals measured.
  [[gnu::cold]] void decompose(SidedOperator<T>& M, const Matrix<T>& V, Matrix<T> Y) {
    const Index w = V.rows(), n = V.cols(), m = Y.cols();
    Matrix<T> R(w, w), product(Y.view());  // M·V as it came, to measure by
    thin_qr_in_place(Y.view().transposed(), R.view());
    const Svd<double> inner = small_svd<double>(Matrix<double>(R.view()).view());
    Matrix<T> P(w, k_), Q(w, k_), Z(k_, n);
    copy_elements(inner.U.view().block(0, 0, w, k_), P.view());
    copy_elements(inner.V.view().block(0, 0, w, k_), Q.view());
    left_.resize(k_, m);
    right_.resize(k_, n);
    gemm(T(1), P.view().transposed(), Y.view(), left_.view());
    gemm(T(1), Q.view().transposed(), V.view(), right_.view());
    M.adjoint(left_.view(), Z.view());
    gemm(T(1), Q.view().transposed(), product.view(), Y.view().middle_rows(0, k_));  // M·(right vectors)
    sigma_.assign(inner.S.begin(), inner.S.begin() + k_);
    residual_.assign(std::size_t(k_), 0.0);
    for (Index i = 0; i < k_; ++i) {
      const double sigma = sigma_[std::size_t(i)];
      residual_[std::size_t(i)] = std::max(distance_to_multiple(n, &Z(i, 0), sigma, &right_(i, 0)),
                                           distance_to_multiple(m, &Y(i, 0), sigma, &left_(i, 0)));
    }
  }

  /// Into the result, in A's units and on A's sides.
  [[gnu::cold]] void deliver(const SidedOperator<T>& M, TruncatedSvd<T>& result) const {
    for (Index i = 0; i < k_; ++i) {
      const double sigma = M.unscaled(sigma_[std::size_t(i)]);
      result.S.push_back(T(sigma));
      result.residuals.push_back(M.unscaled(residual_[std::size_t(i)]));
      result.captured_energy += sigma * sigma;
    }
    constexpr double eps = double(std::numeric_limits<T>::epsilon());
    result.rounding = (std::sqrt(double(std::max(left_.cols(), right_.cols()))) + 8) * eps * M.unscaled(sigma_[0]) +
                      double(std::numeric_limits<T>::denorm_min());
    const bool right = M.side() == GramSide::right;
    result.U = Matrix<T>((right ? left_ : right_).view().transposed());
    result.V = Matrix<T>((right ? right_ : left_).view().transposed());
  }

 private:
  Index k_;
  Matrix<T> left_, right_;
  std::vector<double> sigma_, residual_;
};

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// How far computed singular vectors may be from the true ones: residuals, stated or measured in double, over gaps.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/detail/wide_products.hpp"
#include "lowrank/linalg/truncated_svd_result.hpp"

namespace lowrank::detail {

/// A·X and Aᵀ·X in double for the A whose vectors are judged. Vectors are rows: X count×cols, Y count×rows; the adjoint
/// the other way round.
template <class S>
struct WideDense {
  MatrixView<const S> W;
  void apply(MatrixView<const double> X, MatrixView<double> Y) const { wide_product<S>(W, X, Y); }
  void apply_adjoint(MatrixView<const double> X, MatrixView<double> Y) const { wide_product<S>(W.transposed(), X, Y); }
};
/// Of W + s·B·A, which is not formed.
template <class S, class T>
struct WideUpdated {
  MatrixView<const S> W;
  const LoraFactors<T>& update;
  void apply(MatrixView<const double> X, MatrixView<double> Y) const {
    wide_product<S>(W, X, Y);
    add(update.A.view(), update.B.view(), X, Y);
  }
  void apply_adjoint(MatrixView<const double> X, MatrixView<double> Y) const {
    wide_product<S>(W.transposed(), X, Y);
    add(update.B.view().transposed(), update.A.view().transposed(), X, Y);
  }

 private:
  /// Y(v, :) += s·outer·(inner·X(v, :)).
  void add(MatrixView<const T> inner, MatrixView<const T> outer, MatrixView<const double> X,
           MatrixView<double> Y) const {
    Matrix<double> H(X.rows(), inner.rows()), part(Y.rows(), Y.cols());
    wide_product<T>(inner, X, H.view());
    wide_product<T>(outer, H.view(), part.view());
    for (Index v = 0; v < Y.rows(); ++v) axpy(Y.cols(), double(update.scale), &part(v, 0), &Y(v, 0));
  }
};

/// How far each triplet is from satisfying Av = σu, Aᵀu = σv, as the truncated SVD states it: measured in its scalar,
/// with what rounding may hide, and with the loss of orthogonality among its vectors.
template <class T>
std::vector<double> stated_errors(const TruncatedSvd<T>& t) {
  std::vector<double> error;
  const double eps = double(std::numeric_limits<T>::epsilon()), first = t.S.empty() ? 0 : double(t.S[0]);
  for (Index i = 0; i < Index(t.S.size()); ++i) error.push_back(std::max(t.error(i), double(t.S.size()) * eps * first));
  return error;
}
/// The same measured in double, which leaves of the rounding only that of the vectors' own scalars: for float a tenth
/// of what has to be stated otherwise. **Cost** two products of A with the vectors.
template <class T, class Wide>
std::vector<double> measured_errors(const TruncatedSvd<T>& t, const Wide& A) {
  const Matrix<double> u(t.U.view().transposed()), v(t.V.view().transposed());
  Matrix<double> Av(u.rows(), u.cols()), Au(v.rows(), v.cols());
  A.apply(v.view(), Av.view());
  A.apply_adjoint(u.view(), Au.view());
  std::vector<double> error;
  const double eps = double(std::numeric_limits<T>::epsilon()), first = t.S.empty() ? 0 : double(t.S[0]);
  for (Index i = 0; i < u.rows(); ++i) {
    axpy(u.cols(), -double(t.S[std::size_t(i)]), &u(i, 0), &Av(i, 0));
    axpy(v.cols(), -double(t.S[std::size_t(i)]), &v(i, 0), &Au(i, 0));
    const double residual =
        std::sqrt(std::max(dot(u.cols(), &Av(i, 0), &Av(i, 0)), dot(v.cols(), &Au(i, 0), &Au(i, 0))));
    error.push_back(residual + 4 * eps * first);
  }
  return error;
}

/// Sine of the angle by which each left vector may be off: its error over the distance to the neighbouring values
/// (Wedin). The last vector's lower neighbour was not computed unless the list is complete, so it counts as unknown.
/// **Source** Wedin, BIT 12 (1972).
template <class T>
std::vector<double> vector_errors(const TruncatedSvd<T>& t, const std::vector<double>& error, Index full) {
  const Index k = Index(t.S.size());
  std::vector<double> sine(std::size_t(k), 1.0);
  for (Index i = 0; i < k; ++i) {
    if (i + 1 == k && k < full) break;
    // A neighbour may be nearer than it looks, by its own error.
    const auto distance = [&](Index a, Index b) {
      return double(t.S[std::size_t(a)]) - double(t.S[std::size_t(b)]) - error[std::size_t(a == i ? b : a)];
    };
    double gap = i > 0 ? distance(i - 1, i) : INFINITY;
    if (i + 1 < k) gap = std::min(gap, distance(i, i + 1));
    if (k == full) gap = std::min(gap, double(t.S[std::size_t(i)]));  // the null space is a neighbour too
    if (gap > error[std::size_t(i)]) sine[std::size_t(i)] = std::min(1.0, 2 * error[std::size_t(i)] / gap);
  }
  return sine;
}

}  // namespace lowrank::detail

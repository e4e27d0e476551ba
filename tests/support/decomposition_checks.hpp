// SPDX-License-Identifier: Apache-2.0
// What every test of a decomposition measures: orthogonality, reconstruction, distances; plain loops in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/linalg/svd_result.hpp"
#include "support/compare.hpp"

namespace test {

using lowrank::Index;
using lowrank::Matrix;

/// A·B in double, entry by entry: slow, and independent of the library's products.
template <class T, class U>
Matrix<double> product(const Matrix<T>& A, const Matrix<U>& B) {
  Matrix<double> C(A.rows(), B.cols());
  for (Index i = 0; i < A.rows(); ++i)
    for (Index k = 0; k < A.cols(); ++k) {
      const double a = double(A(i, k));
      for (Index j = 0; j < B.cols(); ++j) C(i, j) += a * double(B(k, j));
    }
  return C;
}

template <class T>
Matrix<T> transpose(const Matrix<T>& A) {
  Matrix<T> out;
  out.assign(A.view().transposed());
  return out;
}

template <class T>
Matrix<T> round_to(const Matrix<double>& A) {
  return Matrix<T>(A);
}

template <class T>
double frobenius(const Matrix<T>& A) {
  double largest = 0, sum = 0;
  for (Index i = 0; i < A.rows(); ++i)
    for (Index j = 0; j < A.cols(); ++j) largest = std::max(largest, std::abs(double(A(i, j))));
  if (largest == 0) return 0;
  for (Index i = 0; i < A.rows(); ++i)
    for (Index j = 0; j < A.cols(); ++j) sum += (double(A(i, j)) / largest) * (double(A(i, j)) / largest);
  return largest * std::sqrt(sum);
}

inline double max_difference(const Matrix<double>& A, const Matrix<double>& B) {
  double d = 0;
  for (Index i = 0; i < A.rows(); ++i)
    for (Index j = 0; j < A.cols(); ++j) {
      const double x = std::abs(A(i, j) - B(i, j));
      d = x <= d ? d : x;  // a NaN stays
    }
  return d;
}

/// max |QᵀQ − I|.
template <class T>
double orthogonality_error(const Matrix<T>& Q) {
  Matrix<double> I(Q.cols(), Q.cols());
  for (Index i = 0; i < Q.cols(); ++i) I(i, i) = 1;
  return max_difference(product(transpose(Q), Q), I);
}

/// ‖A − U·diag(S)·Vᵀ‖_F.
template <class T, class U>
double reconstruction_error(const Matrix<U>& A, const lowrank::Svd<T>& f) {
  Matrix<double> US(f.U);
  for (Index i = 0; i < US.rows(); ++i)
    for (Index j = 0; j < US.cols(); ++j) US(i, j) *= double(f.S[std::size_t(j)]);
  Matrix<double> E = product(US, transpose(f.V));
  for (Index i = 0; i < A.rows(); ++i)
    for (Index j = 0; j < A.cols(); ++j) E(i, j) -= double(A(i, j));
  return frobenius(E);
}

template <class S, class R>
double max_difference(const std::vector<S>& a, const std::vector<R>& b) {
  double d = a.size() == b.size() ? 0 : INFINITY;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double x = std::abs(double(a[i]) - double(b[i]));
    d = x <= d ? d : x;
  }
  return d;
}

/// U·diag(values)·Vᵀ (m×n) with random orthonormal U and V from Gram-Schmidt, done twice, in double.
inline Matrix<double> with_singular_values(Index m, Index n, const std::vector<double>& values, std::uint64_t seed) {
  const Index k = Index(values.size());
  const auto orthonormal = [](Matrix<double> Q) {
    for (int pass = 0; pass < 2; ++pass)
      for (Index j = 0; j < Q.cols(); ++j) {
        for (Index l = 0; l < j; ++l) {
          double dot = 0;
          for (Index i = 0; i < Q.rows(); ++i) dot += Q(i, l) * Q(i, j);
          for (Index i = 0; i < Q.rows(); ++i) Q(i, j) -= dot * Q(i, l);
        }
        double norm = 0;
        for (Index i = 0; i < Q.rows(); ++i) norm += Q(i, j) * Q(i, j);
        for (Index i = 0; i < Q.rows(); ++i) Q(i, j) /= std::sqrt(norm);
      }
    return Q;
  };
  Matrix<double> U = orthonormal(random_matrix<double>(m, k, seed));
  const Matrix<double> V = orthonormal(random_matrix<double>(n, k, seed + 1));
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < k; ++j) U(i, j) *= values[std::size_t(j)];
  return product(U, transpose(V));
}

inline Matrix<double> hilbert(Index n) {
  Matrix<double> H(n, n);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j) H(i, j) = 1.0 / double(i + j + 1);
  return H;
}

/// Kahan's matrix: diag(1, s, s², …) times a unit upper triangle of −c; its condition number hides from QR with pivots.
inline Matrix<double> kahan(Index n, double theta = 1.2) {
  Matrix<double> K(n, n);
  for (Index i = 0; i < n; ++i)
    for (Index j = i; j < n; ++j) K(i, j) = std::pow(std::sin(theta), double(i)) * (i == j ? 1.0 : -std::cos(theta));
  return K;
}

}  // namespace test

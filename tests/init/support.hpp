// SPDX-License-Identifier: Apache-2.0
// What the tests of the initialisers share: test matrices with known spectra, and sums in double to judge by.
#pragma once

#include <cmath>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/gemm.hpp"
#include "lowrank/linalg/qr.hpp"
#include "support/compare.hpp"
#include "support/decomposition_checks.hpp"

namespace test {

/// U·diag(σ)·Vᵀ in double with random orthonormal U (m×k) and V (n×k).
struct KnownMatrix {
  lowrank::Matrix<double> U, V, W;
  std::vector<double> sigma;
};
inline KnownMatrix known_matrix(lowrank::Index m, lowrank::Index n, std::vector<double> sigma, std::uint64_t seed) {
  KnownMatrix out;
  const lowrank::Index k = lowrank::Index(sigma.size());
  out.U = random_matrix<double>(m, k, seed);
  out.V = random_matrix<double>(n, k, seed + 1);
  lowrank::orthonormalise(out.U.view());
  lowrank::orthonormalise(out.V.view());
  lowrank::Matrix<double> US = out.U;
  for (lowrank::Index i = 0; i < m; ++i)
    for (lowrank::Index j = 0; j < k; ++j) US(i, j) *= sigma[std::size_t(j)];
  out.W = lowrank::multiply<double>(US.view(), out.V.view().transposed());
  out.sigma = std::move(sigma);
  return out;
}

/// s·B·A in double.
template <class T>
lowrank::Matrix<double> update(const lowrank::LoraFactors<T>& f) {
  const lowrank::Matrix<double> A(f.A), B(f.B);
  lowrank::Matrix<double> out(B.rows(), A.cols());
  lowrank::gemm(double(f.scale), B.view(), A.view(), out.view());
  return out;
}

template <class X, class Y>
lowrank::Matrix<double> plus(const X& a, const Y& b, double factor = 1) {
  lowrank::Matrix<double> out(lowrank::view_of(a));
  const auto v = lowrank::view_of(b);
  for (lowrank::Index i = 0; i < out.rows(); ++i)
    for (lowrank::Index j = 0; j < out.cols(); ++j) out(i, j) += factor * double(v(i, j));
  return out;
}

template <class X>
double norm(const X& a) {
  const auto v = lowrank::view_of(a);
  double sum = 0;
  for (lowrank::Index i = 0; i < v.rows(); ++i)
    for (lowrank::Index j = 0; j < v.cols(); ++j) sum += double(v(i, j)) * double(v(i, j));
  return std::sqrt(sum);
}

/// ‖(base + s·B·A) − W‖_F / ‖W‖_F in double: what every method that moves part of W into the factors must keep small.
template <class Init, class X>
double split_error(const Init& init, const X& W) {
  const lowrank::Matrix<double> sum = plus(update(init.factors), init.base);
  return norm(plus(sum, W, -1)) / norm(W);
}

/// ‖(I − P_Q)·X‖_F / ‖X‖_F for orthonormal columns of Q: how far the columns of X stick out of span(Q).
template <class T>
double outside(const lowrank::Matrix<double>& Q, const lowrank::Matrix<T>& X) {
  const lowrank::Matrix<double> x(X);
  const lowrank::Matrix<double> inner = lowrank::multiply<double>(Q.view().transposed(), x.view());
  const lowrank::Matrix<double> inside = lowrank::multiply<double>(Q.view(), inner.view());
  return norm(plus(x, inside, -1)) / norm(x);
}

inline lowrank::Matrix<double> columns(const lowrank::Matrix<double>& m, lowrank::Index first, lowrank::Index n) {
  return lowrank::Matrix<double>(m.view().middle_cols(first, n));
}

}  // namespace test

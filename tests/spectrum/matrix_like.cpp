// SPDX-License-Identifier: Apache-2.0
// Analyses take whatever view_of understands: Eigen, lowrank::Matrix, views whose elements are not const. The oracle is
// the same call on plain views.
#include <doctest/doctest.h>

#include <Eigen/Core>

#include "lowrank/core/rng.hpp"
#include "lowrank/eigen.hpp"
#include "lowrank/linalg/certificates.hpp"
#include "lowrank/linalg/factor_operators.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/optim/precondition.hpp"
#include "lowrank/spectrum/alignment.hpp"
#include "lowrank/spectrum/rounding.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

bool same(const Matrix<double>& a, const Matrix<double>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && std::equal(a.data(), a.data() + a.size(), b.data());
}
template <class T>
MatrixView<const T> plain(const Matrix<T>& m) {
  return m.view();
}

}  // namespace

TEST_CASE("matrices of every kind are analysed as their views are") {
  const Index m = 70, n = 50, r = 3;
  Matrix<float> W = test::random_matrix<float>(m, n, 1), W0 = test::random_matrix<float>(m, n, 2);
  Eigen::MatrixXf E(m, n), E0(m, n);  // the same numbers by columns
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) E(i, j) = W(i, j), E0(i, j) = W0(i, j);
  auto t = truncated_svd(W, r), u = truncated_svd(W0, r);
  const LoraFactors<float> f{test::random_matrix<float>(r, n, 3), test::random_matrix<float>(m, r, 4), 0.5F};

  const Matrix<double> phi = subspace_similarity<float>(plain(t.U), plain(u.U));
  CHECK(same(subspace_similarity(t.U, u.U), phi));
  CHECK(same(subspace_similarity(t.U.view(), u.U.view()), phi));
  CHECK(same(subspace_similarity(as_eigen(t.U), as_eigen(u.U)), phi));
  const auto angles = principal_angles<float>(plain(t.U), plain(u.U));
  CHECK(principal_angles(t.U, u.U) == angles);
  CHECK(principal_angles(t.U.view(), as_eigen(u.U)) == angles);
  CHECK(amplification_factor(W, svd(f)) == amplification_factor<float>(plain(W), svd(f)));
  CHECK(amplification_factor(E, svd(f)) == doctest::Approx(amplification_factor(W, svd(f))).epsilon(1e-5));
  CHECK(rounding_noise<bf16>(W, true).edge == rounding_noise<bf16>(plain(W), true).edge);
  CHECK(rounding_noise<bf16>(E, true).edge == doctest::Approx(rounding_noise<bf16>(W, true).edge).epsilon(1e-9));

  const auto exact = frobenius_error<float>(dense_operator<float>(plain(W)), t);
  CHECK(frobenius_error(W, t).lower == exact.lower);
  CHECK(frobenius_error(W.view(), t).upper == exact.upper);
  CHECK(frobenius_error(E, t).upper == doctest::Approx(exact.upper).epsilon(1e-5));
  CHECK(spectral_error(W, t).upper == spectral_error<float>(dense_operator<float>(plain(W)), t).upper);
  const Matrix<float> sketch = test::random_matrix<float>(m, 8, 5);
  CHECK(leave_one_out_error(sketch) == leave_one_out_error<float>(plain(sketch)));

  CHECK(difference_operator(W, W0).frobenius_norm_squared() ==
        difference_operator<float>(plain(W), plain(W0)).frobenius_norm_squared());
  CHECK(difference_operator(E, W0).frobenius_norm_squared() ==
        doctest::Approx(difference_operator(W, W0).frobenius_norm_squared()).epsilon(1e-12));
  CHECK(truncated_svd(updated_operator(W, f), r).S == truncated_svd(updated_operator(dense_operator(W), f), r).S);
  CHECK(dense_operator(E).cols() == n);
  CHECK(dense_operator<float>(W.view()).rows() == m);
  const Matrix<float> product = multiply<float>(plain(W), plain(W0).transposed());
  CHECK(same(Matrix<double>(multiply(W, W0.view().transposed()).view()), Matrix<double>(product.view())));
  CHECK(thin_qr(W).R.rows() == n);
  CHECK(thin_qr(W.view()).Q.cols() == n);
}

TEST_CASE("gradients are preconditioned through views of any constness") {
  const Index out = 9, in = 7, r = 2;
  Matrix<double> A(r, in), B(out, r), gA(r, in), gB(out, r);
  CounterRng(1).fill_normal(A.view());
  CounterRng(2).fill_normal(B.view());
  CounterRng(3).fill_normal(gA.view());
  CounterRng(4).fill_normal(gB.view());
  Matrix<double> a = gA, b = gB, c = gB, d = gB;
  riemannian_precondition(A.view(), B.view(), gA.view(), gB.view());
  riemannian_precondition<double>(plain(A), plain(B), a.view(), b.view());
  CHECK(same(gA, a));
  CHECK(same(gB, b));
  lora_fa_gradient(A.view(), 2, c.view());
  lora_fa_gradient<double>(plain(A), 2.0, d.view());
  CHECK(same(c, d));
}

// Preconditioned gradients: the defining equations, and invariance of the step to how B·A is split.
#include "lowrank/optim/precondition.hpp"

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace lowrank;
using test::deviation;
using test::random_matrix;

TEST_CASE_TEMPLATE("the corrected gradients solve their equations", T, float, double) {
  const Matrix<T> A = random_matrix<T>(3, 20, 1), B = random_matrix<T>(15, 3, 2), gA = random_matrix<T>(3, 20, 3),
                  gB = random_matrix<T>(15, 3, 4);
  Matrix<T> pA(gA.view()), pB(gB.view());
  const double delta = 0.5;
  riemannian_precondition<T>(A.view(), B.view(), pA.view(), pB.view(), delta);
  // (BᵀB + δI)·pA = gA and pB·(AAᵀ + δI) = gB; the systems have condition below 100.
  Matrix<T> backA(3, 20), backB(15, 3);
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 20; ++j) {
      double sum = delta * double(pA(i, j));
      for (Index k = 0; k < 3; ++k)
        for (Index o = 0; o < 15; ++o) sum += double(B(o, i)) * double(B(o, k)) * double(pA(k, j));
      backA(i, j) = T(sum);
    }
  for (Index o = 0; o < 15; ++o)
    for (Index j = 0; j < 3; ++j) {
      double sum = delta * double(pB(o, j));
      for (Index k = 0; k < 3; ++k)
        for (Index i = 0; i < 20; ++i) sum += double(pB(o, k)) * double(A(k, i)) * double(A(j, i));
      backB(o, j) = T(sum);
    }
  CHECK(deviation(backA, gA) < test::rounding<T>(200));
  CHECK(deviation(backB, gB) < test::rounding<T>(200));

  Matrix<T> fa(gB.view());
  lora_fa_gradient<T>(A.view(), T(2), fa.view(), delta);
  for (Index i = 0; i < fa.size(); ++i) CHECK(double(fa.data()[i]) == doctest::Approx(double(pB.data()[i]) / 4));
}

TEST_CASE("the step of B·A does not depend on the split between the factors") {
  // A' = c·A, B' = B/c: the gradients are g_A/c and c·g_B, the first-order step B·pA + pB·A is the same.
  const Matrix<double> A = random_matrix<double>(3, 8, 1), B = random_matrix<double>(7, 3, 2);
  const auto step = [&](double c) {
    Matrix<double> a(A.view()), b(B.view()), gA = random_matrix<double>(3, 8, 3), gB = random_matrix<double>(7, 3, 4);
    for (Index i = 0; i < a.size(); ++i) a.data()[i] *= c, gA.data()[i] /= c;
    for (Index i = 0; i < b.size(); ++i) b.data()[i] /= c, gB.data()[i] *= c;
    riemannian_precondition<double>(a.view(), b.view(), gA.view(), gB.view(), 0);
    Matrix<double> d = multiply<double>(b.view(), gA.view());
    gemm(1.0, gB.view(), a.view(), d.view(), Update::accumulate);
    return d;
  };
  CHECK(deviation(step(10), step(1)) < 1e-12);
}

TEST_CASE("bad input") {
  const Matrix<double> A = random_matrix<double>(3, 8, 1), zero(7, 3);
  Matrix<double> gA(3, 8), gB(7, 3), wrong(3, 7);
  CHECK_THROWS_AS(riemannian_precondition<double>(A.view(), zero.view(), gA.view(), gB.view(), 0), ArgumentError);
  CHECK_THROWS_AS(riemannian_precondition<double>(A.view(), zero.view(), gA.view(), gB.view(), -1), ArgumentError);
  CHECK_THROWS_AS(riemannian_precondition<double>(A.view(), zero.view(), wrong.view(), gB.view()), ShapeError);
  CHECK_THROWS_AS(lora_fa_gradient<double>(A.view(), 0.0, gB.view()), ArgumentError);
}

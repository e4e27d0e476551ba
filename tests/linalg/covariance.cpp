// SPDX-License-Identifier: Apache-2.0
// The damped covariance and its blocked Cholesky factor: the factor multiplied out, the unblocked one, and refusals.
#include "lowrank/linalg/covariance.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "lowrank/linalg/cholesky.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {
Matrix<double> gram(Index n, Index tokens, std::uint64_t seed) {
  const Matrix<double> X = test::random_matrix<double>(tokens, n, seed);
  Matrix<double> C(n, n);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j)
      for (Index t = 0; t < tokens; ++t) C(i, j) += X(t, i) * X(t, j);
  return C;
}
}  // namespace

TEST_CASE("blocked Cholesky: L·Lᵀ is the matrix, and L that of the plain loops") {
  for (const Index n : {1, 2, 17, 127, 128, 129, 300}) {
    CAPTURE(n);
    const Matrix<double> C = gram(n, n + 5, std::uint64_t(n));
    double added = 0, pivot = 0;
    Matrix<double> L = detail::damped_covariance<double>("test", "C", C.view(), n, 0.01, {}, &added);
    double mean = 0;
    for (Index i = 0; i < n; ++i) mean += C(i, i) / double(n);
    CHECK(added == doctest::Approx(0.01 * mean));
    Matrix<double> plain = L;
    CHECK(detail::cholesky_blocked(L.view(), pivot) == -1);
    REQUIRE(detail::cholesky(plain.view(), 0));
    double worst = 0, largest = 0;
    for (Index i = 0; i < n; ++i) {
      largest = std::max(largest, C(i, i));
      for (Index j = 0; j < n; ++j) {
        if (j > i) CHECK(L(i, j) == 0);
        double sum = -C(i, j) - (i == j ? added : 0);
        for (Index k = 0; k < n; ++k) sum += L(i, k) * L(j, k);
        worst = std::max(worst, std::abs(sum));
      }
    }
    // |C − L·Lᵀ| ≤ (n + 1)·u·|L|·|Lᵀ|, and the diagonal of the last is C's.
    CHECK(worst <= double(n + 1) * 2.3e-16 * (largest + added));
    CHECK(test::deviation(L, plain) < 1e-10);  // that bound times the condition number, some 1e3
  }
}

TEST_CASE("an order permutes, and the first pivot that fails is named") {
  const Matrix<double> C = gram(5, 9, 1);
  const std::vector<Index> order{3, 0, 4, 1, 2};
  const Matrix<double> G = detail::damped_covariance<double>("test", "C", C.view(), 5, 0, order);
  for (Index i = 0; i < 5; ++i)
    for (Index j = 0; j <= i; ++j)
      CHECK(G(i, j) == doctest::Approx(C(order[std::size_t(i)], order[std::size_t(j)])).epsilon(1e-15));
  for (const Index at : {0, 100, 128, 199}) {
    Matrix<double> D(200, 200);
    for (Index i = 0; i < 200; ++i) D(i, i) = i == at ? -2 : 1;
    double pivot = 0;
    CHECK(detail::cholesky_blocked(D.view(), pivot) == at);
    CHECK(pivot == -2);
  }
}

TEST_CASE("what is no covariance") {
  Matrix<float> C(3, 3);
  for (Index i = 0; i < 3; ++i) C(i, i) = 1;
  const auto make = [&](double damping) {
    return detail::damped_covariance<float>("test", "C", std::as_const(C).view(), 3, damping);
  };
  CHECK_NOTHROW(make(0.01));
  CHECK_THROWS_AS(make(-1), ArgumentError);
  CHECK_THROWS_AS(make(INFINITY), ArgumentError);
  CHECK_THROWS_AS(detail::damped_covariance<float>("test", "C", std::as_const(C).view(), 4, 0), ShapeError);
  C(0, 2) = 0.5F;
  CHECK_THROWS_WITH_AS(make(0), doctest::Contains("must be symmetric"), ArgumentError);
  C(2, 0) = NAN;
  CHECK_THROWS_WITH_AS(make(0), doctest::Contains("(2, 0)"), NonFiniteError);
}

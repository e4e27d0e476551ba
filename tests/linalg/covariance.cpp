// SPDX-License-Identifier: Apache-2.0
// The damped covariance, an order of it, the inverse of a triangle, and refusals.
#include "lowrank/linalg/detail/covariance.hpp"

#include <doctest/doctest.h>

#include <vector>

#include "lowrank/linalg/detail/cholesky.hpp"
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

TEST_CASE("a damped covariance: the matrix, and what was added to its diagonal") {
  for (const Index n : {1, 2, 17, 127, 128, 129, 300}) {
    CAPTURE(n);
    const Matrix<double> C = gram(n, n + 5, std::uint64_t(n));
    double added = 0;
    const Matrix<double> G = detail::damped_covariance<double>("test", "C", C.view(), n, 0.01, {}, &added);
    double mean = 0;
    for (Index i = 0; i < n; ++i) mean += C(i, i) / double(n);
    CHECK(added == doctest::Approx(0.01 * mean));
    Index wrong = 0;
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j <= i; ++j) wrong += G(i, j) != (C(i, j) + C(j, i)) / 2 + (i == j ? added : 0);
    CHECK(wrong == 0);
  }
}

TEST_CASE("the inverse of a lower triangle") {
  for (const Index n : {1, 2, 17, 127, 128, 129, 300}) {
    CAPTURE(n);
    Matrix<double> L =
        detail::damped_covariance<double>("test", "C", gram(n, 2 * n + 5, std::uint64_t(n)).view(), n, 0.01);
    REQUIRE(detail::cholesky(L.view(), 0));
    Matrix<double> X = L;
    detail::invert_lower(X.view());
    // Higham, Accuracy and Stability, §14.2: |X·L − I| ≤ c·n·u·|X|·|L|.
    double worst = 0;
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < n; ++j) {
        double sum = i == j ? -1 : 0, size = 0;
        for (Index k = 0; k < n; ++k) {
          sum += X(i, k) * L(k, j);
          size += std::abs(X(i, k) * L(k, j));
        }
        if (size > 0) worst = std::max(worst, std::abs(sum) / size);
        if (j > i) CHECK(X(i, j) == 0);
      }
    CHECK(worst <= 4 * double(n) * std::numeric_limits<double>::epsilon());
  }
}

TEST_CASE("an order permutes") {
  const Matrix<double> C = gram(5, 9, 1);
  const std::vector<Index> order{3, 0, 4, 1, 2};
  const Matrix<double> G = detail::damped_covariance<double>("test", "C", C.view(), 5, 0, order);
  for (Index i = 0; i < 5; ++i)
    for (Index j = 0; j <= i; ++j)
      CHECK(G(i, j) == doctest::Approx(C(order[std::size_t(i)], order[std::size_t(j)])).epsilon(1e-15));
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

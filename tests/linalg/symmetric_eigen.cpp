// SPDX-License-Identifier: Apache-2.0
#include "lowrank/linalg/symmetric_eigen.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "lowrank/linalg/singular_values.hpp"
#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

Matrix<double> symmetric(Index n, std::uint64_t seed) {
  Matrix<double> A = random_matrix<double>(n, n, seed);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < i; ++j) A(i, j) = A(j, i);
  return A;
}

void check_eigen(const Matrix<double>& A) {
  const Index n = A.rows();
  CAPTURE(n);
  const SymmetricEigen f = symmetric_eigen(A.view());
  const double eps = std::numeric_limits<double>::epsilon(), size = frobenius(A);
  // Errors of orthogonal reductions grow like √n in practice; 10·√n is far from n², the proven bound, and from chance.
  const double tol = 10 * std::sqrt(double(n) + 1) * eps;
  CHECK(orthogonality_error(f.vectors) <= tol);
  Matrix<double> QL = f.vectors;
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j) QL(i, j) *= f.values[std::size_t(j)];
  CHECK(max_difference(product(QL, transpose(f.vectors)), A) <= tol * size);
  CHECK(std::is_sorted(f.values.rbegin(), f.values.rend()));
  CHECK(max_difference(f.values, oracle_eigenvalues(A.data(), n)) <= tol * size);
  // The tail goes through the same reduction and rotations, so that not even signs may differ.
  for (const Index tail : {Index(0), std::min<Index>(n, 3), n}) {
    const SymmetricEigen part = symmetric_eigen_tail(A.view(), tail);
    CHECK(part.values == f.values);
    double worst = 0;
    for (Index c = 0; c < tail; ++c)
      for (Index j = 0; j < n; ++j) worst = std::max(worst, std::abs(part.vectors(c, j) - f.vectors(n - tail + c, j)));
    CHECK(worst <= tol);
  }
}

}  // namespace

TEST_CASE("symmetric_eigen against Eigen and its own reconstruction") {
  for (const Index n : {1, 2, 3, 4, 7, 16, 33, 64, 100, 150}) check_eigen(symmetric(n, std::uint64_t(n)));
}

TEST_CASE("symmetric_eigen on matrices that deflate, repeat and vanish") {
  check_eigen(Matrix<double>(12, 12));
  Matrix<double> I(20, 20);
  for (Index i = 0; i < 20; ++i) I(i, i) = 3;
  check_eigen(I);
  check_eigen(hilbert(12));
  Matrix<double> ones(30, 30);
  for (Index i = 0; i < 30; ++i)
    for (Index j = 0; j < 30; ++j) ones(i, j) = 1;
  check_eigen(ones);
  Matrix<double> wilkinson(21, 21);  // W₂₁⁺: pairs of eigenvalues that agree to 15 digits
  for (Index i = 0; i < 21; ++i) {
    wilkinson(i, i) = std::abs(double(10 - i));
    if (i > 0) wilkinson(i, i - 1) = wilkinson(i - 1, i) = 1;
  }
  check_eigen(wilkinson);
  Matrix<double> graded(40, 40);
  for (Index i = 0; i < 40; ++i)
    for (Index j = 0; j < 40; ++j) graded(i, j) = std::pow(10.0, -0.4 * double(std::max(i, j)));
  check_eigen(graded);
}

TEST_CASE("symmetric_eigen reads the upper triangle only") {
  Matrix<double> A = symmetric(9, 1);
  const auto expected = symmetric_eigen(A.view()).values;
  for (Index i = 0; i < 9; ++i)
    for (Index j = 0; j < i; ++j) A(i, j) = NAN;
  CHECK(symmetric_eigen(A.view()).values == expected);
}

TEST_CASE("symmetric_eigen refuses what is not square or not finite") {
  CHECK_THROWS_AS(symmetric_eigen(Matrix<double>(2, 3).view()), ShapeError);
  Matrix<double> A = symmetric(5, 1);
  A(1, 3) = NAN;
  CHECK_THROWS_WITH_AS(symmetric_eigen(A.view()), "symmetric_eigen: element (1, 3) is nan", NonFiniteError);
  CHECK(symmetric_eigen(Matrix<double>(0, 0).view()).values.empty());
  CHECK_THROWS_WITH_AS(symmetric_eigen_tail(symmetric(3, 1).view(), 4),
                       "symmetric_eigen_tail: tail must be in [0, 3], got 4", ArgumentError);
}

TEST_CASE("the band reduction and the bulge chasing keep the spectrum, whatever the size") {
  const auto check = []<int Band>(Index n) {
    CAPTURE(n);
    const Matrix<double> A = symmetric(n, std::uint64_t(100 + n));
    const auto expected = oracle_eigenvalues(A.data(), n);
    Matrix<double> B = A;
    detail::reduce_to_band(B.view(), Band);
    for (Index i = 0; i < n; ++i)
      for (Index j = i + Band + 1; j < n; ++j) REQUIRE(B(i, j) == 0);
    std::vector<double> d(std::size_t(n), 0.0), e(std::size_t(n), 0.0);
    detail::BulgeChaser<Band>(B.view()).run(d.data(), e.data());
    detail::NoRotations none;
    REQUIRE(detail::tridiagonal_ql(n, d.data(), e.data(), none, [] {}));
    std::sort(d.begin(), d.end(), std::greater<>());
    CHECK(max_difference(d, expected) <= 10 * std::sqrt(double(n)) * 0x1p-52 * frobenius(A));
  };
  // Sizes around multiples of the half-bandwidth: last panels of every kind.
  for (const Index n : {2, 31, 32, 33, 34, 63, 64, 65, 66, 95, 96, 97, 130, 160, 161}) {
    check.operator()<32>(n);
    check.operator()<64>(n);
  }
}

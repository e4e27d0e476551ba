// SPDX-License-Identifier: Apache-2.0
#include "lowrank/linalg/qr.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "support/decomposition_checks.hpp"

using namespace lowrank;
using namespace test;

namespace {

template <class T>
void check_qr(const Matrix<T>& A) {
  CAPTURE(A.rows());
  CAPTURE(A.cols());
  const Qr<T> f = thin_qr<T>(A.view());
  const Index k = std::min(A.rows(), A.cols());
  REQUIRE(f.Q.rows() == A.rows());
  REQUIRE(f.Q.cols() == k);
  REQUIRE(f.R.rows() == k);
  REQUIRE(f.R.cols() == A.cols());
  // Householder QR: column-wise backward error and orthogonality of order √(m·n)·eps in practice; 8 gives room.
  const double tol = 8 * std::sqrt(double(A.rows() * k) + 1) * double(std::numeric_limits<T>::epsilon());
  CHECK(orthogonality_error(f.Q) <= tol);
  CHECK(max_difference(product(f.Q, f.R), Matrix<double>(A)) <= tol * frobenius(A));
  for (Index i = 0; i < k; ++i)
    for (Index j = 0; j < i; ++j) CHECK(f.R(i, j) == T(0));
}

}  // namespace

TEST_CASE_TEMPLATE("thin_qr factors matrices of every shape", T, float, double) {
  const Index shapes[][2] = {{1, 1},  {1, 7},   {7, 1},    {0, 4},    {4, 0},     {8, 8},    {9, 8},
                             {16, 9}, {33, 17}, {200, 40}, {40, 200}, {1500, 33}, {100, 100}};
  for (const auto& s : shapes) check_qr(random_matrix<T>(s[0], s[1], std::uint64_t(s[0] * 1000 + s[1])));
}

TEST_CASE_TEMPLATE("thin_qr does not care about rank", T, float, double) {
  Matrix<T> A = random_matrix<T>(60, 24, 1);
  for (Index i = 0; i < 60; ++i) {
    A(i, 0) = 0;        // a zero column first
    A(i, 5) = A(i, 4);  // repeated columns, within a panel and across panels
    A(i, 20) = -2 * A(i, 3);
  }
  check_qr(A);
  check_qr(Matrix<T>(30, 12));  // nothing but zeros
  const Matrix<T> rank_one = round_to<T>(product(random_matrix<T>(50, 1, 2), random_matrix<T>(1, 20, 3)));
  check_qr(rank_one);
}

TEST_CASE_TEMPLATE("thin_qr keeps orthogonality over badly scaled columns", T, float, double) {
  const double small = std::same_as<T, float> ? 1e-30 : 1e-290;
  Matrix<T> A = random_matrix<T>(40, 10, 4);
  for (Index i = 0; i < 40; ++i)
    for (Index j = 0; j < 10; j += 2) A(i, j) = T(double(A(i, j)) * small);
  check_qr(A);
  Matrix<T> tiny(20, 6);  // denormal columns, where 1/norm would overflow
  for (Index i = 0; i < 20; ++i)
    for (Index j = 0; j < 6; ++j) tiny(i, j) = T((i * 7 + j * 3) % 5) * std::numeric_limits<T>::denorm_min();
  CHECK(orthogonality_error(thin_qr<T>(tiny.view()).Q) <= 100 * double(std::numeric_limits<T>::epsilon()));
}

TEST_CASE_TEMPLATE("thin_qr_in_place agrees with thin_qr for any order", T, float, double) {
  const Matrix<T> A = random_matrix<T>(70, 19, 5);
  const Qr<T> f = thin_qr<T>(A.view());
  Matrix<T> row = A, storage(19, 70), R(19, 19), R2(19, 19);
  thin_qr_in_place(row.view(), R.view());
  const MatrixView<T> col = storage.view().transposed();
  for (Index i = 0; i < 70; ++i)
    for (Index j = 0; j < 19; ++j) col(i, j) = A(i, j);
  thin_qr_in_place(col, R2.view());
  const double tol = 100 * double(std::numeric_limits<T>::epsilon());
  CHECK(max_difference(Matrix<double>(row), Matrix<double>(f.Q)) == 0);
  CHECK(max_difference(Matrix<double>(col), Matrix<double>(f.Q)) <= tol);
  CHECK(max_difference(Matrix<double>(R2), Matrix<double>(R)) <= tol * frobenius(A));
  Matrix<T> only_q = A;
  orthonormalise(only_q.view());
  CHECK(max_difference(Matrix<double>(only_q), Matrix<double>(f.Q)) == 0);
}

TEST_CASE("thin_qr_in_place refuses shapes that do not fit") {
  Matrix<float> wide(3, 5), tall(5, 3), R(2, 2);
  CHECK_THROWS_AS(thin_qr_in_place(wide.view(), R.view()), ShapeError);
  CHECK_THROWS_WITH_AS(thin_qr_in_place(tall.view(), R.view()), "thin_qr_in_place: R must be 3x3, got 2x2", ShapeError);
}

TEST_CASE_TEMPLATE("the norm of a vector survives every scale, and no NaN goes unseen", T, float, double) {
  using limits = std::numeric_limits<T>;
  const auto norm = [](std::vector<T> x) { return detail::norm2(Index(x.size()), x.data()); };
  CHECK(norm({}) == 0);
  CHECK(norm(std::vector<T>(40, T(0))) == 0);
  for (const T unit : {T(1), std::ldexp(T(1), limits::max_exponent - 4), std::ldexp(T(1), limits::min_exponent + 3)})
    CHECK(norm({3 * unit, 0, -4 * unit}) / (5 * double(unit)) == doctest::Approx(1).epsilon(4e-16));
  CHECK(norm({limits::denorm_min(), 0}) == double(limits::denorm_min()));
  CHECK(norm({1, limits::infinity()}) == limits::infinity());
  // Wherever it stands, in the vectorised part or the rest, and whatever stands beside it.
  for (const T other : {T(0), T(1), limits::max(), limits::infinity(), limits::denorm_min()})
    for (const std::size_t at : {std::size_t(0), std::size_t(17), std::size_t(38)}) {
      std::vector<T> x(39, other);
      x[at] = limits::quiet_NaN();
      CAPTURE(other);
      CAPTURE(at);
      CHECK(std::isnan(norm(x)));
    }
}

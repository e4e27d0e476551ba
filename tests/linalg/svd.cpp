// SPDX-License-Identifier: Apache-2.0
#include "lowrank/linalg/svd.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

/// A must come back from f, with orthonormal vectors and Eigen's values, all to √(m·k)·eps.
template <class T, class M>
void check_svd(const M& A, const Svd<T>& f) {
  const Index m = A.rows(), n = A.cols(), k = std::min(m, n);
  CAPTURE(m);
  CAPTURE(n);
  REQUIRE(f.U.rows() == m);
  REQUIRE(f.U.cols() == k);
  REQUIRE(f.V.rows() == n);
  REQUIRE(f.V.cols() == k);
  REQUIRE(Index(f.S.size()) == k);
  if (k == 0) return;
  const auto exact = oracle_singular_values(A);
  const double eps = double(std::numeric_limits<T>::epsilon()), tol = 10 * std::sqrt(double(k)) * eps;
  CHECK(orthogonality_error(f.U) <= tol);
  CHECK(orthogonality_error(f.V) <= tol);
  // The Frobenius norm of a backward error of 2-norm c·eps·σ₁ is up to √k times larger.
  CHECK(reconstruction_error(A, f) <= tol * std::sqrt(double(k)) * exact[0]);
  CHECK(max_difference(f.S, exact) <= tol * exact[0]);
  CHECK(std::is_sorted(f.S.rbegin(), f.S.rend()));
  CHECK(f.S.back() >= T(0));
}

template <class M>
void check(const M& A) {
  check_svd(A, svd(A));
}

}  // namespace

TEST_CASE_TEMPLATE("svd of every shape", T, float, double) {
  const Index shapes[][2] = {{1, 1},   {1, 8},   {8, 1},    {0, 5},    {5, 0},   {2, 3},    {20, 20},
                             {64, 64}, {65, 65}, {66, 120}, {120, 66}, {90, 80}, {150, 150}};
  for (const auto& s : shapes) check(random_matrix<T>(s[0], s[1], std::uint64_t(s[0] + 100 * s[1])));
}

TEST_CASE_TEMPLATE("svd of matrices that are hard", T, float, double) {
  check(round_to<T>(hilbert(30)));
  check(round_to<T>(hilbert(80)));
  check(round_to<T>(kahan(90)));
  check(Matrix<T>(70, 70));  // zero
  const auto low = product(random_matrix<double>(100, 4, 1), random_matrix<double>(4, 70, 2));
  check(round_to<T>(low));  // rank 4
  std::vector<double> repeated(75, 1.0);
  for (int i = 0; i < 25; ++i) repeated[std::size_t(i)] = 3;
  const auto rep = with_singular_values(80, 75, repeated, 5);
  check(round_to<T>(rep));
  Matrix<T> I(100, 100);
  for (Index i = 0; i < 100; ++i) I(i, i) = T(i % 2 ? -1 : 1);
  check(I);
  Matrix<T> ones(80, 70);
  for (Index i = 0; i < 80; ++i)
    for (Index j = 0; j < 70; ++j) ones(i, j) = 1;
  check(ones);
}

TEST_CASE("repeated values: the subspaces come back, whatever basis spans them") {
  std::vector<double> s(70, 1.0);
  for (int i = 0; i < 10; ++i) s[std::size_t(i)] = 4;
  const auto A = with_singular_values(90, 70, s, 6);
  const auto f = svd(A);
  const auto reference = oracle_svd(A);
  // Projectors on the span of the first ten left vectors; the gap of 3 divides the backward error.
  Matrix<double> U(90, 10), R(90, 10);
  for (Index i = 0; i < 90; ++i)
    for (Index j = 0; j < 10; ++j) {
      U(i, j) = f.U(i, j);
      R(i, j) = reference.U(i, j);
    }
  CHECK(max_difference(product(U, transpose(U)), product(R, transpose(R))) <= 1e-13);
}

TEST_CASE_TEMPLATE("svd scales: 1e±30, the ends of the range and denormals", T, float, double) {
  const double sizes[] = {1e-30, 1e30, std::same_as<T, float> ? 1e36 : 1e300, std::same_as<T, float> ? 1e-40 : 1e-310};
  for (const double size : sizes)
    for (const Index n : {5, 80}) {
      CAPTURE(size);
      Matrix<T> A = random_matrix<T>(n, n, 5);
      Matrix<double> unit(n, n);
      for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < n; ++j) {
          A(i, j) = T(double(A(i, j)) * size);
          unit(i, j) = double(A(i, j)) / size;
        }
      const Svd<T> f = svd(A);
      Svd<double> scaled{Matrix<double>(f.U), {}, Matrix<double>(f.V)};
      for (const T s : f.S) scaled.S.push_back(double(s) / size);
      const double top = oracle_singular_values(unit)[0];
      // Singular values that are denormal themselves are rounded to their grid.
      const double grid = double(std::numeric_limits<T>::denorm_min()) / size;
      const double tol = 10 * std::sqrt(double(n)) * double(std::numeric_limits<T>::epsilon());
      CHECK(orthogonality_error(f.U) <= tol);
      CHECK(orthogonality_error(f.V) <= tol);
      CHECK(reconstruction_error(unit, scaled) <= std::sqrt(double(n)) * (tol * top + grid));
    }
}

TEST_CASE("svd of views, orders and two-byte storage") {
  const Matrix<float> A = random_matrix<float>(90, 70, 3);
  const Matrix<float> storage = transpose(A);
  check_svd(A, svd(storage.view().transposed()));
  check_svd(storage, svd(A.view().transposed()));
  Matrix<float> block;
  block.assign(A.view().block(3, 5, 80, 60));
  check_svd(block, svd(A.view().block(3, 5, 80, 60)));
  const Matrix<bf16> narrow(A);
  const Matrix<f16> half(A);
  check_svd(Matrix<float>(narrow), svd(narrow));
  check_svd(Matrix<float>(half), svd(half));
}

TEST_CASE("small_svd agrees with svd and takes anything small") {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const CounterRng rng(seed, 2);
    const Index m = Index(1 + rng.below(0, 12)), n = Index(1 + rng.below(1, 12));
    Matrix<double> A = random_matrix<double>(m, n, seed);
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j)
        if (rng.below(std::uint64_t(10 + i * n + j), 3) == 0) A(i, j) = 0;
    check_svd(A, small_svd<double>(A.view()));
  }
}

TEST_CASE("bidiagonal QR keeps relative accuracy of graded bidiagonal matrices") {
  // Singular values of a bidiagonal matrix are determined to high relative accuracy by its entries; Jacobi in Eigen
  // finds those of a strongly column-graded one to the same.
  const Index n = 16;
  std::vector<double> d, e;
  Matrix<double> B(n, n);
  for (Index i = 0; i < n; ++i) {
    d.push_back(std::pow(10.0, -double(i)));
    e.push_back(0.5 * std::pow(10.0, -double(i) - 1));
    B(i, i) = d.back();
    if (i + 1 < n) B(i, i + 1) = e.back();
  }
  detail::NoRotations none;
  REQUIRE(detail::bidiagonal_qr(n, d.data(), e.data(), true, none, none, [] {}));
  for (double& x : d) x = std::abs(x);
  std::sort(d.begin(), d.end(), std::greater<>());
  const auto exact = oracle_singular_values(B);
  for (Index i = 0; i < n; ++i) CHECK(d[std::size_t(i)] == doctest::Approx(exact[std::size_t(i)]).epsilon(1e-13));
}

TEST_CASE("svd is deterministic") {
  const Matrix<float> A = random_matrix<float>(100, 90, 7);
  const auto a = svd(A), b = svd(A);
  CHECK(a.S == b.S);
  CHECK(max_difference(Matrix<double>(a.U), Matrix<double>(b.U)) == 0);
  CHECK(max_difference(Matrix<double>(a.V), Matrix<double>(b.V)) == 0);
}

TEST_CASE("svd refuses what is not finite before it starts") {
  for (const Index n : {4, 100}) {
    Matrix<double> A = random_matrix<double>(n, n, 1);
    A(2, 3) = INFINITY;
    CHECK_THROWS_WITH_AS(svd(A), "svd: W must be finite, got inf at (2, 3)", NonFiniteError);
    CHECK_THROWS_WITH_AS(svd(A.view().transposed()), "svd: W must be finite, got inf at (3, 2)", NonFiniteError);
  }
}

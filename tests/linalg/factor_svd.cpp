// SPDX-License-Identifier: Apache-2.0
#include "lowrank/linalg/factor_svd.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

template <class T>
LoraFactors<T> factors(Index m, Index n, Index r, double scale, std::uint64_t seed) {
  return {random_matrix<T>(r, n, seed), random_matrix<T>(m, r, seed + 1), T(scale)};
}

/// Σ s·B·A in double, entry by entry.
template <class T>
Matrix<double> dense(const std::vector<LoraFactors<T>>& terms) {
  Matrix<double> W(terms[0].out_features(), terms[0].in_features());
  for (const auto& f : terms) {
    const auto P = product(f.B, f.A);
    for (Index i = 0; i < W.rows(); ++i)
      for (Index j = 0; j < W.cols(); ++j) W(i, j) += double(f.scale) * P(i, j);
  }
  return W;
}

template <class T>
void check(const std::vector<LoraFactors<T>>& terms, double condition = 1) {
  const Matrix<double> W = dense(terms);
  const std::span<const LoraFactors<T>> sum(terms);
  const Svd<T> f = terms.size() == 1 ? svd(terms[0]) : svd(sum);
  Index rank = 0;
  for (const auto& t : terms) rank += t.rank();
  const Index k = std::min({rank, W.rows(), W.cols()});
  REQUIRE(f.U.rows() == W.rows());
  REQUIRE(f.V.rows() == W.cols());
  REQUIRE(Index(f.S.size()) == k);
  auto exact = oracle_singular_values(W);
  const double top = exact.empty() ? 0 : exact[0];
  const double eps = double(std::numeric_limits<T>::epsilon());
  // `condition`: how much larger the terms are than their sum, which costs that many eps of double.
  const double tol = 10 * std::sqrt(double(k) + 1) * (eps + condition * 0x1p-52);
  CHECK(orthogonality_error(f.U) <= tol);
  CHECK(orthogonality_error(f.V) <= tol);
  CHECK(reconstruction_error(W, f) <= tol * std::sqrt(double(k)) * top);
  const auto values = terms.size() == 1 ? singular_values(terms[0]) : singular_values(sum);
  CHECK(values.method == SpectrumMethod::factors);
  exact.resize(std::size_t(k));
  CHECK(max_difference(f.S, exact) <= tol * top);
  // The dense oracle has an error of its own, of order eps of double times the size of the terms.
  CHECK(max_difference(values.values, exact) <= values.absolute_error + 1e-13 * condition * top);
  const double norm = terms.size() == 1 ? frobenius_norm(terms[0]) : frobenius_norm(sum);
  CHECK(norm == doctest::Approx(frobenius(W)).epsilon(1e-13 * condition));
}

}  // namespace

TEST_CASE_TEMPLATE("svd of s·B·A equals the svd of the dense product", T, float, double) {
  const Index shapes[][3] = {{30, 40, 4}, {40, 30, 1},   {1, 20, 1}, {20, 1, 3}, {12, 9, 9},
                             {9, 12, 12}, {100, 80, 64}, {6, 6, 20}, {50, 50, 0}};
  for (const auto& s : shapes) {
    CAPTURE(s[2]);
    check<T>({factors<T>(s[0], s[1], s[2], 2.5, 1)});
    check<T>({factors<T>(s[0], s[1], s[2], -0.125, 2)});
  }
}

TEST_CASE_TEMPLATE("B = 0, s = 0 and rank-deficient factors", T, float, double) {
  LoraFactors<T> f = factors<T>(20, 30, 5, 2, 3);
  f.B.set_zero();
  check<T>({f});
  CHECK(frobenius_norm(f) == 0);
  f = factors<T>(20, 30, 5, 0, 4);
  check<T>({f});
  f = factors<T>(20, 30, 5, 1.5, 5);
  for (Index i = 0; i < 20; ++i) f.B(i, 3) = f.B(i, 0);
  for (Index j = 0; j < 30; ++j) f.A(4, j) = 0;
  check<T>({f});
  const auto s = singular_values(f);
  CHECK(s.values[2] > 1);
  CHECK(s.values[4] <= s.absolute_error);
}

TEST_CASE_TEMPLATE("sums of factors, cross terms included", T, float, double) {
  check<T>({factors<T>(25, 35, 3, 2, 1), factors<T>(25, 35, 5, 0.5, 3)});
  check<T>(
      {factors<T>(8, 10, 6, 1, 1), factors<T>(8, 10, 6, 1, 3), factors<T>(8, 10, 6, -3, 5)});  // rank beyond the sizes
}

TEST_CASE("a difference that nearly cancels keeps the digits of float") {
  // The undo of a residual base: trained factors minus the initial ones they started from.
  const auto initial = factors<float>(60, 50, 8, 1, 7);
  auto trained = initial;
  for (Index i = 0; i < 60; ++i) trained.B(i, 2) += 1e-4F * float(i % 3);
  auto negative = initial;
  negative.scale = -1;
  check<float>({trained, negative}, 1e5);
}

TEST_CASE("factors at the ends of the range") {
  auto f = factors<float>(20, 15, 3, 1, 9);
  for (Index i = 0; i < f.B.size(); ++i) f.B.data()[i] *= 1e30F;
  for (Index i = 0; i < f.A.size(); ++i) f.A.data()[i] *= 1e-30F;
  check<float>({f});
  for (Index i = 0; i < f.A.size(); ++i) f.A.data()[i] *= 1e-12F;  // denormal A
  check<float>({f});
}

TEST_CASE("factors that do not fit or are not finite are refused") {
  LoraFactors<float> f{Matrix<float>(3, 10), Matrix<float>(8, 4), 1.0F};
  CHECK_THROWS_AS(svd(f), ShapeError);
  CHECK_THROWS_AS(singular_values(f), ShapeError);
  CHECK_THROWS_AS(frobenius_norm(f), ShapeError);
  f = factors<float>(8, 10, 3, 1, 1);
  f.A(1, 2) = NAN;
  CHECK_THROWS_WITH_AS(svd(f), "svd: A must be finite, got nan at (1, 2)", NonFiniteError);
  f = factors<float>(8, 10, 3, 1, 1);
  f.scale = INFINITY;
  CHECK_THROWS_AS(svd(f), ArgumentError);
  const std::vector<LoraFactors<float>> none, uneven{factors<float>(8, 10, 3, 1, 1), factors<float>(8, 9, 3, 1, 1)};
  CHECK_THROWS_AS(svd(std::span<const LoraFactors<float>>(none)), ArgumentError);
  CHECK_THROWS_AS(frobenius_norm(std::span<const LoraFactors<float>>(uneven)), ShapeError);
}

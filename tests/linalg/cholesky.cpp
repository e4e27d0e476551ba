// SPDX-License-Identifier: Apache-2.0
// The blocked Cholesky factor and the Gram matrix against their definitions, at sizes around the block's.
#include "lowrank/linalg/detail/cholesky.hpp"

#include <doctest/doctest.h>

#include "lowrank/linalg/detail/gram.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

/// WᵀW in the obvious three loops.
template <class S>
Matrix<double> slow_gram(const Matrix<S>& W) {
  Matrix<double> G(W.cols(), W.cols());
  for (Index i = 0; i < W.cols(); ++i)
    for (Index j = 0; j < W.cols(); ++j)
      for (Index k = 0; k < W.rows(); ++k) G(i, j) += double(W(k, i)) * double(W(k, j));
  return G;
}

/// The factor by its definition, one element after the other in long double.
Matrix<double> slow_cholesky(const Matrix<double>& G) {
  const Index n = G.rows();
  std::vector<long double> L(std::size_t(n * n), 0.0L);
  const auto at = [&](Index i, Index j) -> long double& { return L[std::size_t(i * n + j)]; };
  for (Index j = 0; j < n; ++j)
    for (Index i = j; i < n; ++i) {
      long double sum = G(i, j);
      for (Index k = 0; k < j; ++k) sum -= at(i, k) * at(j, k);
      at(i, j) = i == j ? std::sqrt(sum) : sum / at(j, j);
    }
  Matrix<double> out(n, n);
  for (Index i = 0; i < n * n; ++i) out.data()[i] = double(L[std::size_t(i)]);
  return out;
}

}  // namespace

TEST_CASE("the factor of a well-conditioned matrix, blocks whole and ragged") {
  for (const Index n : {0, 1, 2, 3, 63, 64, 65, 127, 128, 129, 321, 400}) {
    CAPTURE(n);
    const Matrix<double> W = test::random_matrix<double>(3 * n, n, std::uint64_t(n) + 1);
    const Matrix<double> G = slow_gram(W);
    Matrix<double> L = G;
    REQUIRE(detail::cholesky(L.view(), 0));
    // Higham, Accuracy and Stability, thm 10.3: |L·Lᵀ − G| ≤ γ_{n+1}·|L|·|Lᵀ| ≤ γ_{n+1}·√(g_ii·g_jj).
    const double gamma = double(n + 1) * std::numeric_limits<double>::epsilon();
    double worst = 0;
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < n; ++j) {
        double sum = 0;
        for (Index k = 0; k <= std::min(i, j); ++k) sum += L(i, k) * L(j, k);
        worst = std::max(worst, std::abs(sum - G(i, j)) / std::sqrt(G(i, i) * G(j, j)));
        if (j > i) CHECK(L(i, j) == 0);
      }
    CHECK(worst <= gamma);
    // The factor's own error is larger by about the condition number, at most ((√3 + 1)/(√3 − 1))² ≈ 14 in the limit.
    if (n > 0) CHECK(test::deviation(L, slow_cholesky(G)) <= 100 * gamma);
  }
}

TEST_CASE("a bad pivot is named, and left where it failed") {
  for (const Index n : {1, 5, 64, 65, 200})
    for (const Index bad : {Index(0), n / 2, n - 1}) {
      CAPTURE(n);
      CAPTURE(bad);
      const Matrix<double> W = test::random_matrix<double>(2 * n, n, std::uint64_t(n));
      Matrix<double> G = slow_gram(W);
      // The pivot of row `bad` is g − Σ l², whatever comes after: a negative g makes it negative.
      G(bad, bad) = -1;
      CHECK(detail::cholesky_pivots(G.view(), 0) == bad);
      CHECK(G(bad, bad) <= -1 + 1e-9);
      G = slow_gram(W);
      G(bad, bad) = std::nan("");
      CHECK(detail::cholesky_pivots(G.view(), 0) == bad);
      CHECK_FALSE(detail::cholesky(G.view(), 0));
    }
}

TEST_CASE("a pivot below its share of the diagonal is bad") {
  // Columns 0 … 69 are independent; column 70 is column 3 and a little noise: its pivot is the noise squared.
  const Index n = 90;
  Matrix<double> W = test::random_matrix<double>(400, n, 4);
  for (Index i = 0; i < 400; ++i) W(i, 70) = W(i, 3) + 1e-3 * W(i, 70);
  const Matrix<double> G = slow_gram(W);
  Matrix<double> L = G;
  CHECK(detail::cholesky_pivots(L.view(), 0.1) == 70);
  L = G;
  CHECK(detail::cholesky_pivots(L.view(), 1e-8) == n);
}

TEST_CASE("the same bits for any number of threads") {
#if defined(_OPENMP)
  const Matrix<double> G = slow_gram(test::random_matrix<double>(500, 300, 2));
  Matrix<double> many = G, one = G;
  const int threads = omp_get_max_threads();
  omp_set_num_threads(4);
  CHECK(detail::cholesky(many.view(), 0));
  const Matrix<double> gram_many = detail::gram(G.view());
  omp_set_num_threads(1);
  CHECK(detail::cholesky(one.view(), 0));
  const Matrix<double> gram_one = detail::gram(G.view());
  omp_set_num_threads(threads);
  CHECK(test::same_bits(many, one));
  CHECK(test::same_bits(gram_many, gram_one));
#endif
}

TEST_CASE_TEMPLATE("a Gram matrix in double", S, float, double, bf16) {
  for (const auto& [m, n] : {std::pair<Index, Index>{1, 1}, {0, 3}, {3, 0}, {1, 70}, {70, 1}, {300, 65}, {40, 130}}) {
    CAPTURE(m);
    CAPTURE(n);
    const Matrix<float> values = test::random_matrix<float>(m, n, 7);
    Matrix<S> W(m, n), turned(n, m);
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) turned(j, i) = W(i, j) = S(values(i, j));
    const Matrix<double> want = slow_gram(W);
    // Sums of m exact products (of floats; of doubles, rounded ones) in some order.
    const double tolerance = 2 * double(m + 1) * std::numeric_limits<double>::epsilon();
    const Matrix<double> got = detail::gram(MatrixView<const S>(W.view()));
    CHECK(test::deviation(got, want) <= tolerance);
    CHECK(test::deviation(detail::gram(MatrixView<const S>(turned.view()).transposed()), want) <= tolerance);
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < i; ++j) CHECK(got(i, j) == got(j, i));
  }
}

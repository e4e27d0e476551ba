// SPDX-License-Identifier: Apache-2.0
#include "lowrank/linalg/singular_values.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

/// The error a result claims must hold against Eigen in double, whose own error is granted on top.
template <class T>
void check_values(const Matrix<T>& W, const SingularValueOptions& options = {}) {
  const auto exact = oracle_singular_values(W);
  const SingularValues ours = singular_values(W, options);
  REQUIRE(ours.values.size() == exact.size());
  if (exact.empty()) return;
  const double oracle = 0x1p-52 * 8 * std::sqrt(double(exact.size())) * exact[0];
  bool within = true;
  for (std::size_t i = 0; i < exact.size(); ++i)
    within = within && std::abs(ours.values[i] - exact[i]) <= ours.error(Index(i)) + oracle;
  CAPTURE(W.rows());
  CAPTURE(W.cols());
  CAPTURE(ours.absolute_error);
  CHECK(within);
  CHECK(std::is_sorted(ours.values.rbegin(), ours.values.rend()));
  CHECK(ours.absolute_error <= options.accuracy * exact[0]);
  CHECK(ours.values.back() >= 0);
}

Matrix<float> decaying(Index m, Index n, std::uint64_t seed) {
  std::vector<double> values;
  for (Index k = 0; k < std::min(m, n); ++k) values.push_back(std::pow(double(k + 1), -1.5));
  return round_to<float>(with_singular_values(m, n, values, seed));
}

}  // namespace

TEST_CASE_TEMPLATE("singular values of every shape against Eigen in double", T, float, double) {
  const Index shapes[][2] = {{1, 1},     {1, 9},     {9, 1},     {2, 2},     {40, 17},   {17, 40},   {127, 127},
                             {128, 128}, {129, 300}, {300, 140}, {257, 257}, {290, 280}, {1000, 130}};
  for (const auto& s : shapes) check_values(random_matrix<T>(s[0], s[1], std::uint64_t(s[0] + 7 * s[1])));
}

TEST_CASE("error bounds hold on thousands of small matrices and hundreds through the Gram matrix") {
  for (std::uint64_t seed = 0; seed < 2500; ++seed) {
    const CounterRng rng(seed, 1);
    const Index m = Index(1 + rng.below(0, 24)), n = Index(1 + rng.below(1, 24));
    Matrix<double> A = random_matrix<double>(m, n, seed);
    if (seed % 3 == 1)  // strongly graded rows
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < n; ++j) A(i, j) *= std::pow(10.0, -double(rng.below(std::uint64_t(2 + i), 12)));
    if (seed % 3 == 2)  // repeated rows
      for (Index i = 1; i < m; i += 2)
        for (Index j = 0; j < n; ++j) A(i, j) = A(i - 1, j);
    check_values(A);
    // The same matrices through the path of the large ones.
    const auto exact = oracle_singular_values(A);
    const auto tall = m >= n ? A : transpose(A);
    const SingularValues gram = detail::gram_singular_values<double>(std::as_const(tall).view(), 1.0, "test");
    bool within = true;
    for (std::size_t i = 0; i < exact.size(); ++i)
      within = within && std::abs(gram.values[i] - exact[i]) <= gram.error(Index(i)) + 0x1p-48 * exact[0];
    CHECK(within);
  }
}

TEST_CASE("known spectra come back") {
  std::vector<double> flat(150, 2.0), steps, zeros(140, 0.0);
  for (int i = 0; i < 160; ++i) steps.push_back(i < 40 ? 5.0 : i < 100 ? 1.0 : 1e-3);
  for (int i = 0; i < 20; ++i) zeros[std::size_t(i)] = 20 - i;
  const std::vector<double>* spectra[] = {&flat, &steps, &zeros};
  for (const auto* s : spectra) {
    const auto A = with_singular_values(170, Index(s->size()), *s, 11);
    const SingularValues ours = singular_values(A);
    CHECK(ours.method == SpectrumMethod::gram);
    // The constructed matrix itself carries some eps·σ₁·√n.
    for (std::size_t i = 0; i < s->size(); ++i)
      CHECK(std::abs(ours.values[i] - (*s)[i]) <= ours.error(Index(i)) + 1e-13 * (*s)[0]);
  }
}

TEST_CASE("Hilbert and Kahan matrices: small values need the other path, and get it") {
  for (const Index n : {5, 20, 60, 150}) {
    check_values(hilbert(n));
    check_values(kahan(n));
    check_values(kahan(n), {.accuracy = 1e-12});
  }
  const auto h = hilbert(150);
  CHECK(singular_values(h).method == SpectrumMethod::gram);
  CHECK(singular_values(h, {.accuracy = 1e-12}).method != SpectrumMethod::gram);
  // σ = 1 … 1e-9: the Gram matrix loses the tail, bidiagonalisation keeps six digits of it.
  std::vector<double> s;
  for (int i = 0; i < 160; ++i) s.push_back(std::pow(10.0, -9.0 * i / 159));
  const auto A = with_singular_values(160, 160, s, 3);
  const SingularValues precise = singular_values(A, {.relative_accuracy = 1e-3});
  CHECK(precise.method != SpectrumMethod::gram);
  for (std::size_t i = 0; i < s.size(); ++i) CHECK(std::abs(precise.values[i] - s[i]) <= 1e-5 * s[i]);
  // σ = 1 … 1e-3 is within the Gram matrix's reach.
  for (double& x : s) x = std::cbrt(x);
  const auto milder = with_singular_values(160, 160, s, 4);
  CHECK(singular_values(milder, {.relative_accuracy = 1e-3}).method == SpectrumMethod::gram);
}

TEST_CASE("rank deficient, zero and empty matrices") {
  check_values(Matrix<float>(150, 140));
  check_values(Matrix<double>(5, 3));
  check_values(Matrix<float>(0, 4));
  check_values(Matrix<float>(4, 0));
  const auto low_rank = product(random_matrix<double>(200, 3, 1), random_matrix<double>(3, 150, 2));
  check_values(low_rank);
  const SingularValues s = singular_values(low_rank);
  CHECK(s.values[2] > 1);
  CHECK(s.values[3] <= s.error(3));
}

TEST_CASE_TEMPLATE("scaling: 1e±30, the ends of the range and denormals", T, float, double) {
  const double sizes[] = {1e-30, 1e30, std::same_as<T, float> ? 1e37 : 1e300, std::same_as<T, float> ? 1e-42 : 1e-312};
  for (const double size : sizes)
    for (const Index n : {6, 140}) {
      CAPTURE(size);
      Matrix<T> A = random_matrix<T>(n + 3, n, 5);
      Matrix<double> unit(n + 3, n);
      for (Index i = 0; i < A.rows(); ++i)
        for (Index j = 0; j < n; ++j) {
          A(i, j) = T(double(A(i, j)) * size);  // denormals are rounded here
          unit(i, j) = double(A(i, j)) / size;  // and seen by the oracle as they are
        }
      const auto exact = oracle_singular_values(unit);
      const SingularValues ours = singular_values(A);
      for (std::size_t i = 0; i < exact.size(); ++i)
        CHECK(std::abs(ours.values[i] / size - exact[i]) <= 1e-6 * exact[0]);
    }
}

TEST_CASE("all storage kinds and orders give the same values") {
  Matrix<float> W = decaying(180, 150, 8);
  const Matrix<bf16> narrow(W);
  const Matrix<f16> half(W);
  W = Matrix<float>(narrow);
  const Matrix<double> wide(W);
  const auto reference = singular_values(wide);
  CHECK(singular_values(W).values == reference.values);
  CHECK(singular_values(narrow).values == reference.values);
  const Matrix<float> half_wide(half);
  CHECK(singular_values(half).values == singular_values(half_wide).values);
  // A column-major copy, a transpose, and a block with gaps.
  Matrix<float> storage = transpose(W);
  CHECK(singular_values(storage.view().transposed()).values == reference.values);
  const double tol = 2 * reference.absolute_error;
  CHECK(max_difference(singular_values(W.view().transposed()).values, reference.values) <= tol);
  Matrix<float> larger(200, 190);
  for (Index i = 0; i < 180; ++i)
    for (Index j = 0; j < 150; ++j) larger(i + 5, j + 9) = W(i, j);
  CHECK(singular_values(larger.view().block(5, 9, 180, 150)).values == reference.values);
}

TEST_CASE("the same bits for any number of threads, and every time") {
  const Matrix<float> W = decaying(300, 290, 9);
  const auto first = singular_values(W).values;
  CHECK(singular_values(W).values == first);
#if defined(_OPENMP)
  const int threads = omp_get_max_threads();
  for (const int t : {1, 3}) {
    omp_set_num_threads(t);
    CHECK(singular_values(W).values == first);
  }
  omp_set_num_threads(threads);
#endif
}

TEST_CASE("what is not finite is refused by name, and so are senseless options") {
  Matrix<float> W = random_matrix<float>(150, 140, 1);
  W(7, 139) = NAN;
  W(100, 3) = INFINITY;
  CHECK_THROWS_WITH_AS(singular_values(W), "singular_values: W must be finite, got nan at (7, 139)", NonFiniteError);
  Matrix<bf16> narrow(3, 3);
  narrow(2, 1) = bf16(-INFINITY);
  CHECK_THROWS_WITH_AS(singular_values(narrow), "singular_values: W must be finite, got -inf at (2, 1)",
                       NonFiniteError);
  const Matrix<float> small(2, 2);
  CHECK_THROWS_AS(singular_values(small, {.accuracy = 0}), ArgumentError);
  CHECK_THROWS_AS(singular_values(small, {.accuracy = NAN}), ArgumentError);
  CHECK_THROWS_AS(singular_values(small, {.relative_accuracy = -1}), ArgumentError);
}

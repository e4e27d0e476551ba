// SPDX-License-Identifier: Apache-2.0
// Certificates on thousands of random matrices: a bound that is violated once is a bug.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "lowrank/linalg/certificates.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace lowrank_test;

namespace {

/// A small random matrix of random shape and spectrum: Gaussian, decaying, low rank or graded.
template <class T>
Matrix<T> specimen(std::uint64_t i) {
  const CounterRng rng(i, 77);
  const Index m = 1 + Index(rng.below(0, 24)), n = 1 + Index(rng.below(1, 24));
  Matrix<T> A = gaussian<T>(m, n, i);
  switch (rng.below(2, 4)) {
    case 1:  // decaying columns
      for (Index r = 0; r < m; ++r)
        for (Index c = 0; c < n; ++c) A(r, c) *= T(std::pow(0.6, double(c)));
      break;
    case 2: {  // rank at most 3
      const Index k = std::min<Index>(3, std::min(m, n));
      A = round_to<T>(product(gaussian<T>(m, k, i), gaussian<T>(k, n, i + 1)));
      break;
    }
    case 3:  // graded rows
      for (Index r = 0; r < m; ++r)
        for (Index c = 0; c < n; ++c) A(r, c) *= T(std::pow(10.0, -double(r) / 3));
      break;
    default:
      break;
  }
  return A;
}

/// A truncated SVD of it, sometimes spoiled: the certificates do not care who made it.
template <class T>
Svd<T> approximation(const Matrix<T>& A, std::uint64_t i) {
  const CounterRng rng(i, 78);
  const Index k = 1 + Index(rng.below(0, std::uint64_t(std::min(A.rows(), A.cols()))));
  Svd<T> a = truncated_svd(A, k);
  if (rng.below(1, 3) == 0)
    for (T& s : a.S) s *= T(0.5 + rng.uniform(2));
  if (rng.below(3, 5) == 0) a.U = gaussian<T>(A.rows(), k, i + 5);  // not even orthonormal
  return a;
}

template <class T>
Matrix<double> error_of(const Matrix<T>& A, const Svd<T>& a) {
  Matrix<double> US(a.U);
  for (Index i = 0; i < US.rows(); ++i)
    for (Index j = 0; j < US.cols(); ++j) US(i, j) *= double(a.S[std::size_t(j)]);
  Matrix<double> E = product(US, transpose(a.V));
  for (Index i = 0; i < A.rows(); ++i)
    for (Index j = 0; j < A.cols(); ++j) E(i, j) = double(A(i, j)) - E(i, j);
  return E;
}

}  // namespace

TEST_CASE_TEMPLATE("Frobenius and spectral bounds hold on thousands of matrices", T, float, double) {
  int violations = 0, wide = 0;
  const int count = 2500;
  for (int i = 0; i < count; ++i) {
    const Matrix<T> A = specimen<T>(std::uint64_t(i));
    const Svd<T> a = approximation(A, std::uint64_t(i));
    const Matrix<double> E = error_of(A, a);
    const auto op = dense_operator<T, T>(A.view());
    const NormBounds f = frobenius_error(op, a);
    const NormBounds s = spectral_error(op, a, {.failure_probability = 1e-9, .seed = std::uint64_t(i)});
    const double frobenius_norm = frobenius(E), spectral_norm = oracle_singular_values(E)[0];
    if (!(f.lower <= frobenius_norm && frobenius_norm <= f.upper)) ++violations;
    if (!(s.lower <= spectral_norm && spectral_norm <= s.upper)) ++violations;
    // Bounds that hold by saying nothing would pass, too: they must be close where the error is well above rounding.
    const double rounding = 1e3 * double(std::numeric_limits<T>::epsilon()) * frobenius(A);
    if (frobenius_norm > 200 * std::sqrt(double(std::numeric_limits<T>::epsilon())) * frobenius(A) &&
        f.upper - f.lower > 0.01 * frobenius_norm)
      ++wide;
    if (spectral_norm > 100 * rounding && (s.upper > 2 * spectral_norm || s.lower < 0.5 * spectral_norm)) ++wide;
  }
  CHECK(violations == 0);
  CHECK(wide == 0);
}

TEST_CASE("more powers bring the spectral bounds together") {
  const Matrix<double> A = gaussian<double>(60, 50, 3);
  const Svd<double> nothing{Matrix<double>(60, 0), {}, Matrix<double>(50, 0)};
  const auto op = dense_operator<double, double>(A.view());
  const double norm = oracle_singular_values(A)[0];
  double previous = INFINITY;
  for (const Index q : {0, 1, 3, 10, 40}) {
    const auto b = spectral_error(op, nothing, {.powers = q});
    CHECK(b.lower <= norm * (1 + 1e-13));
    CHECK(norm <= b.upper);
    CHECK(b.upper / b.lower < previous);
    previous = b.upper / b.lower;
  }
  CHECK(previous < 1.05);
}

TEST_CASE("the failure probability is kept when it is large enough to be seen") {
  // One probe and probability 0.2: the bound may fail in at most a fifth of the draws.
  const Matrix<double> A = with_singular_values(30, 20, {1}, 5);
  const Svd<double> nothing{Matrix<double>(30, 0), {}, Matrix<double>(20, 0)};
  const auto op = dense_operator<double, double>(A.view());
  int failures = 0;
  const int draws = 4000;
  for (int i = 0; i < draws; ++i)
    if (spectral_error(op, nothing, {.failure_probability = 0.2, .probes = 1, .powers = 0, .seed = std::uint64_t(i)})
            .upper < 1 - 1e-12)
      ++failures;
  // Never so often, up to four standard deviations of the count; and for a rank-one matrix nearly so often.
  CHECK(failures <= 0.2 * draws + 4 * std::sqrt(0.2 * 0.8 * draws));
}

TEST_CASE("the Frobenius identity of a converged truncated SVD") {
  const Matrix<float> A = gaussian<float>(200, 150, 2);
  const auto r = truncated_svd(A, 10, {.energy_tolerance = 0, .residual_tolerance = 1e-6});
  const NormBounds f = frobenius_error(dense_operator<float, float>(A.view()), static_cast<const Svd<float>&>(r));
  const double identity = std::sqrt(r.total_energy - r.captured_energy);
  CHECK(f.lower <= identity);
  CHECK(identity <= f.upper);
  CHECK(identity == doctest::Approx(frobenius(error_of(A, static_cast<const Svd<float>&>(r)))).epsilon(1e-6));
}

TEST_CASE("the leave-one-out estimate is unbiased") {
  // Estimate² of a sketch with s columns against the true error² with s − 1, both averaged over many sketches.
  const Index m = 40, n = 30, s = 6;
  std::vector<double> spectrum;
  for (Index i = 0; i < n; ++i) spectrum.push_back(std::pow(0.7, double(i)));
  const Matrix<double> A = with_singular_values(m, n, spectrum, 4);
  const int draws = 3000;
  double mean_estimate = 0, mean_error = 0, square_difference = 0;
  for (int i = 0; i < draws; ++i) {
    const Matrix<double> Y = product(A, gaussian<double>(n, s, std::uint64_t(1000 + i)));
    const double estimate = std::pow(leave_one_out_error<double>(Y.view()), 2);
    Matrix<double> Q(Y.view().middle_cols(0, s - 1));
    orthonormalize(Q.view());
    const double error = std::pow(frobenius(A), 2) - std::pow(frobenius(product(transpose(Q), A)), 2);
    mean_estimate += estimate / draws;
    mean_error += error / draws;
    square_difference += (estimate - error) * (estimate - error) / draws;
  }
  // Difference of the means within five standard errors of it.
  CHECK(std::abs(mean_estimate - mean_error) < 5 * std::sqrt(square_difference / draws));
  CHECK(leave_one_out_error<double>(product(gaussian<double>(20, 2, 1), gaussian<double>(2, 5, 2)).view()) < 1e-12);
  CHECK_THROWS_AS(leave_one_out_error<double>(Matrix<double>(5, 1).view()), ArgumentError);
  CHECK_THROWS_AS(leave_one_out_error<double>(Matrix<double>(5, 6).view()), ArgumentError);
}

TEST_CASE_TEMPLATE("residuals and values of truncated_svd bound true singular values, thousands of times", T, float,
                   double) {
  int violations = 0;
  const double eps = double(std::numeric_limits<T>::epsilon());
  for (int i = 0; i < 1500; ++i) {
    const CounterRng rng(std::uint64_t(i), 79);
    // Larger than the whole-space limit, so that the iteration itself is judged, and stopped early.
    const Index m = 60 + Index(rng.below(0, 30)), n = 60 + Index(rng.below(1, 30)), k = 1 + Index(rng.below(2, 6));
    Matrix<T> A = gaussian<T>(m, n, std::uint64_t(i));
    if (i % 2 == 1)
      for (Index r = 0; r < m; ++r)
        for (Index c = 0; c < n; ++c) A(r, c) *= T(1 / double(c + 1));
    const auto r = truncated_svd(A, k, {.energy_tolerance = 1e-2, .seed = std::uint64_t(i)});
    // Exact values once in twenty: Eigen's decomposition is the cost here.
    if (i % 20 > 1) {
      double captured = 0;
      for (const T v : r.S) captured += double(v) * double(v);
      if (!(captured <= r.total_energy * (1 + 64 * eps))) ++violations;
      continue;
    }
    const auto exact = oracle_singular_values(A);
    const double unit = 64 * eps * exact[0];
    for (std::size_t j = 0; j < r.S.size(); ++j) {
      if (!(double(r.S[j]) <= exact[j] + unit)) ++violations;
      double nearest = INFINITY;
      for (const double s : exact) nearest = std::min(nearest, std::abs(s - double(r.S[j])));
      if (!(nearest <= r.residuals[j] + unit)) ++violations;
    }
  }
  CHECK(violations == 0);
}

TEST_CASE("certificates refuse bad input") {
  const Matrix<float> A = gaussian<float>(20, 10, 1);
  const auto op = dense_operator<float, float>(A.view());
  Svd<float> a = truncated_svd(A, 2);
  CHECK_THROWS_AS(spectral_error(op, a, {.failure_probability = 0}), ArgumentError);
  CHECK_THROWS_AS(spectral_error(op, a, {.failure_probability = 1}), ArgumentError);
  CHECK_THROWS_AS(spectral_error(op, a, {.probes = 0}), ArgumentError);
  CHECK_THROWS_AS(spectral_error(op, a, {.powers = -1}), ArgumentError);
  a.S.push_back(1);
  CHECK_THROWS_AS(spectral_error(op, a), ShapeError);
  CHECK_THROWS_AS(frobenius_error(op, a), ShapeError);
}

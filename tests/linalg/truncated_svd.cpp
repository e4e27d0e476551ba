// SPDX-License-Identifier: Apache-2.0
// truncated_svd against Eigen in double, on spectra that are known, hard, degenerate or out of range.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "lowrank/linalg/truncated_svd.hpp"
#include "support/capture.hpp"
#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

std::vector<double> power_law(Index n, double exponent) {
  std::vector<double> s;
  for (Index i = 1; i <= n; ++i) s.push_back(std::pow(double(i), -exponent));
  return s;
}

/// Everything a result promises, checked in double against A itself.
template <class T>
void check_promises(const Matrix<double>& A, const TruncatedSvd<T>& r, Index k) {
  const Index m = A.rows(), n = A.cols();
  const double eps = double(std::numeric_limits<T>::epsilon());
  REQUIRE(r.U.rows() == m);
  REQUIRE(r.U.cols() == k);
  REQUIRE(r.V.rows() == n);
  REQUIRE(r.V.cols() == k);
  REQUIRE(Index(r.S.size()) == k);
  REQUIRE(Index(r.residuals.size()) == k);
  CHECK(orthogonality_error(r.U) < 64 * eps);
  CHECK(orthogonality_error(r.V) < 64 * eps);
  const Matrix<double> AV = product(A, r.V), AtU = product(transpose(A), r.U);
  double captured = 0;
  for (Index i = 0; i < k; ++i) {
    const double s = double(r.S[std::size_t(i)]);
    captured += s * s;
    CHECK(s >= 0);
    if (i > 0) CHECK(s <= double(r.S[std::size_t(i - 1)]));
    double left = 0, right = 0;
    for (Index j = 0; j < m; ++j) left += std::pow(AV(j, i) - s * double(r.U(j, i)), 2);
    for (Index j = 0; j < n; ++j) right += std::pow(AtU(j, i) - s * double(r.V(j, i)), 2);
    CHECK(std::abs(std::sqrt(std::max(left, right)) - r.residuals[std::size_t(i)]) <= r.rounding);
    CHECK(r.error(i) == r.residuals[std::size_t(i)] + r.rounding);
  }
  CHECK(r.rounding <= 16 * eps * std::sqrt(double(std::max(m, n))) * double(r.S[0]) + 1e-300);
  CHECK(r.converged == (r.stopped == StopReason::met));
  CHECK(r.captured_energy == doctest::Approx(captured).epsilon(8 * eps));
  CHECK(r.total_energy == doctest::Approx(std::pow(frobenius(A), 2)).epsilon(8 * eps + double(m * n) * 0x1p-53));
}

/// Our values are at most the true ones, to rounding, and each is within its stated error of one.
template <class T>
void check_values(const std::vector<double>& exact, const TruncatedSvd<T>& r) {
  for (std::size_t i = 0; i < r.S.size(); ++i) {
    CHECK(double(r.S[i]) <= exact[i] + r.rounding);
    double nearest = std::numeric_limits<double>::infinity();
    for (const double s : exact) nearest = std::min(nearest, std::abs(s - double(r.S[i])));
    CHECK(nearest <= r.error(Index(i)));
  }
}

double deficit(const std::vector<double>& exact, const std::vector<float>& ours) {
  double best = 0, got = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    best += exact[i] * exact[i];
    got += double(ours[i]) * double(ours[i]);
  }
  return (best - got) / best;
}

}  // namespace

TEST_CASE_TEMPLATE("every shape, order and rank agrees with Eigen", T, float, double) {
  const double eps = double(std::numeric_limits<T>::epsilon());
  const Index shapes[][3] = {{1, 1, 1},   {1, 9, 1},   {9, 1, 1},    {5, 3, 3},     {3, 5, 2},     {40, 40, 40},
                             {7, 300, 4}, {300, 7, 7}, {150, 90, 5}, {90, 150, 20}, {200, 160, 1}, {130, 260, 33}};
  for (const auto& [m, n, k] : shapes) {
    CAPTURE_BOUND(m);
    CAPTURE_BOUND(n);
    const Matrix<T> A = random_matrix<T>(m, n, 7);
    const Matrix<T> At = transpose(A);
    const Matrix<double> wide(A);
    const auto exact = oracle_singular_values(A);
    const TruncatedSvdOptions options{.energy_tolerance = 0, .residual_tolerance = 64 * eps};
    for (const bool row_major : {true, false}) {
      const auto view = row_major ? A.view() : At.view().transposed();
      const auto r = truncated_svd(view, k, options);
      check_promises(wide, r, k);
      CHECK(r.converged);
      for (Index i = 0; i < k; ++i)
        CHECK(std::abs(double(r.S[std::size_t(i)]) - exact[std::size_t(i)]) <=
              64 * eps * std::sqrt(double(std::max(m, n))) * exact[0]);
    }
  }
}

TEST_CASE("the deficit asked for is the deficit delivered") {
  const auto spectra = {power_law(300, 0.7), power_law(300, 0.1), power_law(300, 2.0)};
  for (const auto& s : spectra)
    for (const Index k : {1, 8, 40})
      for (const double tolerance : {1e-2, 1e-4, 1e-6}) {
        CAPTURE(k);
        CAPTURE(tolerance);
        const Matrix<float> A = round_to<float>(with_singular_values(400, 300, s, 11));
        const auto r = truncated_svd(A, k, {.energy_tolerance = tolerance});
        CHECK(r.converged);
        CHECK(r.energy_deficit <= tolerance);
        // Estimated, not bounded; within a factor of two for spectra without clusters at the cut.
        CHECK(deficit(s, r.S) <= 2 * tolerance);
      }
}

TEST_CASE_TEMPLATE("a residual asked for is delivered, also for small singular values", T, float, double) {
  // σ_k/σ₁ = 1e-5: squares of singular values cannot resolve these vectors in T.
  std::vector<double> s;
  for (Index i = 0; i < 200; ++i) s.push_back(std::pow(10.0, -double(i) / 4));
  const Matrix<double> exact = with_singular_values(260, 220, s, 5);
  const Matrix<T> A(exact);
  const double tolerance = std::same_as<T, float> ? 1e-6 : 1e-13;
  const auto r = truncated_svd(A, 20, {.energy_tolerance = 0, .residual_tolerance = tolerance});
  CHECK(r.converged);
  check_promises(Matrix<double>(A), r, 20);
  for (std::size_t i = 0; i < 20; ++i) {
    CHECK(r.residuals[i] <= tolerance * double(r.S[0]));
    CHECK(std::abs(double(r.S[i]) - s[i]) <= 2 * tolerance);
  }
}

TEST_CASE_TEMPLATE("Hilbert and Kahan matrices", T, float, double) {
  const Index n = 120, k = 12;
  const double eps = double(std::numeric_limits<T>::epsilon());
  const Matrix<T> H = round_to<T>(hilbert(n)), K = round_to<T>(kahan(n));
  for (const auto* A : {&H, &K}) {
    const auto exact = oracle_singular_values(*A);
    const auto r = truncated_svd(*A, k, {.energy_tolerance = 0, .residual_tolerance = 64 * eps});
    check_promises(Matrix<double>(*A), r, k);
    check_values(exact, r);
    CHECK(r.converged);
  }
}

TEST_CASE_TEMPLATE("rank deficient, repeated and zero singular values", T, float, double) {
  const double eps = double(std::numeric_limits<T>::epsilon());
  SUBCASE("rank 3, asked for 10") {
    const Matrix<T> A = round_to<T>(with_singular_values(200, 150, {3, 2, 1}, 3));
    const auto r = truncated_svd(A, 10, {.energy_tolerance = 0, .residual_tolerance = 128 * eps});
    CHECK(r.converged);
    check_promises(Matrix<double>(A), r, 10);
    for (std::size_t i = 0; i < 3; ++i) CHECK(double(r.S[i]) == doctest::Approx(double(3 - i)).epsilon(64 * eps));
    for (std::size_t i = 3; i < 10; ++i) CHECK(double(r.S[i]) < 128 * eps);
  }
  SUBCASE("as many as there are: a block that runs dry is replaced, and the replacement is orthogonal too") {
    for (const auto& [m, n] : {std::pair<Index, Index>{60, 50}, {300, 200}})
      for (const Index rank : {Index(1), Index(3), Index(8), Index(13)}) {
        std::vector<double> s;
        for (Index i = 0; i < rank; ++i) s.push_back(2.0 - double(i) / double(rank));
        const Matrix<T> A = round_to<T>(with_singular_values(m, n, s, std::uint64_t(17 + rank)));
        for (const Index block : {Index(0), Index(1), Index(2), Index(3), Index(5), Index(8)}) {
          CAPTURE_BOUND(m);
          CAPTURE(rank);
          CAPTURE(block);
          const auto r = truncated_svd(A, rank, {.block = block});
          CHECK(r.converged);
          check_promises(Matrix<double>(A), r, rank);
          // What the default asks for: energy missing within 1e-5 of the whole.
          CHECK(r.total_energy - r.captured_energy < 1e-5 * r.total_energy);
          // Σ(σ² − σ̂²) < 1e-5·Σσ² and σ̂ ≤ σ bound each value: σ − σ̂ < 1e-5·Σσ²/σ, σ ≥ 1. Rounding to T is far below.
          for (std::size_t i = 0; i < s.size(); ++i)
            CHECK(std::abs(double(r.S[i]) - s[i]) < 1e-5 * r.total_energy + 4 * eps * std::sqrt(double(m * n)));
        }
      }
  }
  SUBCASE("ten equal values: the subspace, not the vectors") {
    std::vector<double> s(10, 1.0);
    for (Index i = 0; i < 90; ++i) s.push_back(0.3);
    const Matrix<double> exact = with_singular_values(220, 180, s, 9);
    const Matrix<T> A(exact);
    const auto r = truncated_svd(A, 10, {.energy_tolerance = 0, .residual_tolerance = 128 * eps});
    CHECK(r.converged);
    check_promises(Matrix<double>(A), r, 10);
    // A part of the space outside of the ten would bring 0.09 in place of 1.
    CHECK(r.captured_energy == doctest::Approx(10.0).epsilon(1e3 * eps));
    for (const T x : r.S) CHECK(double(x) == doctest::Approx(1.0).epsilon(1e3 * eps));
  }
  SUBCASE("identity: every vector is singular") {
    Matrix<T> A(160, 160);
    for (Index i = 0; i < 160; ++i) A(i, i) = T(1);
    const auto r = truncated_svd(A, 6);
    CHECK(r.converged);
    check_promises(Matrix<double>(A), r, 6);
    for (const T s : r.S) CHECK(double(s) == doctest::Approx(1.0).epsilon(16 * eps));
  }
  SUBCASE("zero") {
    const Matrix<T> A(120, 170);
    const auto r = truncated_svd(A, 4);
    CHECK(r.converged);
    CHECK(r.captured_energy == 0);
    CHECK(r.energy_deficit == 0);
    for (const T s : r.S) CHECK(s == 0);
    CHECK(orthogonality_error(r.U) < 64 * eps);
    CHECK(orthogonality_error(r.V) < 64 * eps);
  }
  SUBCASE("one entry") {
    Matrix<T> A(300, 200);
    A(170, 33) = T(-2);
    const auto r = truncated_svd(A, 3);
    CHECK(r.converged);
    CHECK(double(r.S[0]) == doctest::Approx(2.0).epsilon(16 * eps));
    CHECK(double(r.S[1]) < 16 * eps);
    CHECK(double(r.U(170, 0)) * double(r.V(33, 0)) == doctest::Approx(-1.0).epsilon(64 * eps));
  }
}

TEST_CASE_TEMPLATE("entries far from 1 are scaled, denormals included", T, float, double) {
  const double eps = double(std::numeric_limits<T>::epsilon());
  const Matrix<double> unit = with_singular_values(170, 140, power_law(140, 0.8), 21);
  std::vector<int> exponents = {100, -100};  // 1.3e30, 8e-31
  if (std::same_as<T, double>) exponents = {100, -100, 700, -700};
  for (const int e : exponents)
    for (const Index k : {5, 60}) {  // 60: the whole space of the shorter side
      CAPTURE(e);
      Matrix<T> A(170, 140);
      for (Index i = 0; i < 170; ++i)
        for (Index j = 0; j < 140; ++j) A(i, j) = T(std::ldexp(unit(i, j), e));
      const auto r = truncated_svd(A, k, {.energy_tolerance = 0, .residual_tolerance = 64 * eps});
      CHECK(r.converged);
      for (std::size_t i = 0; i < std::size_t(k); ++i)
        CHECK(std::ldexp(double(r.S[i]), -e) == doctest::Approx(std::pow(double(i + 1), -0.8)).epsilon(256 * eps * 60));
    }
  // Multiples of the smallest denormal: exact small integers, scaled.
  Matrix<T> A(130, 110), integers(130, 110);
  for (Index i = 0; i < 130; ++i)
    for (Index j = 0; j < 110; ++j) {
      const int x = int(CounterRng(4).below(std::uint64_t(i * 110 + j), 9)) - 4;
      integers(i, j) = T(x);
      A(i, j) = T(x) * std::numeric_limits<T>::denorm_min();
    }
  const auto exact = oracle_singular_values(integers);
  const auto r = truncated_svd(A, 4, {.energy_tolerance = 0, .residual_tolerance = 256 * eps});
  // Values are rounded to whole denormals on return.
  for (std::size_t i = 0; i < 4; ++i)
    CHECK(std::abs(double(r.S[i] / std::numeric_limits<T>::denorm_min()) - exact[i]) <= 0.51);
  CHECK(orthogonality_error(r.U) < 64 * eps);
}

TEST_CASE("restarts change the cost, not the answer") {
  const auto s = power_law(250, 0.3);
  const Matrix<double> A = with_singular_values(300, 250, s, 2);
  for (const Index basis : {Index(0), Index(40), Index(60), Index(250)}) {
    CAPTURE(basis);
    const auto r = truncated_svd(A, 10, {.energy_tolerance = 0, .residual_tolerance = 1e-10, .max_basis = basis});
    CHECK(r.converged);
    check_promises(A, r, 10);
    for (std::size_t i = 0; i < 10; ++i) CHECK(r.S[i] == doctest::Approx(s[i]).epsilon(1e-12));
  }
}

TEST_CASE("every block size and oversampling finds the same triplets") {
  const auto s = power_law(200, 0.5);
  const Matrix<double> A = with_singular_values(210, 200, s, 31);
  for (const Index block : {1, 2, 3, 5, 8, 17, 40, 500})
    for (const Index extra : {0, 1, 20}) {
      CAPTURE(block);
      CAPTURE(extra);
      const auto r = truncated_svd(
          A, 7, {.energy_tolerance = 0, .residual_tolerance = 1e-9, .block = block, .oversampling = extra, .seed = 5});
      CHECK(r.converged);
      for (std::size_t i = 0; i < 7; ++i) CHECK(r.S[i] == doctest::Approx(s[i]).epsilon(1e-10));
    }
}

TEST_CASE("the same seed gives the same bits, another seed the same triplets, whatever the threads") {
  const Matrix<float> A = round_to<float>(with_singular_values(500, 400, power_law(400, 0.5), 13));
  const auto bits = [](const TruncatedSvd<float>& a, const TruncatedSvd<float>& b) {
    return a.S == b.S && max_difference(Matrix<double>(a.U), Matrix<double>(b.U)) == 0 &&
           max_difference(Matrix<double>(a.V), Matrix<double>(b.V)) == 0 && a.residuals == b.residuals;
  };
  const auto first = truncated_svd(A, 12, {.seed = 42}), again = truncated_svd(A, 12, {.seed = 42});
  CHECK(bits(first, again));
  const auto other = truncated_svd(A, 12, {.seed = 43});
  for (std::size_t i = 0; i < 12; ++i) CHECK(double(other.S[i]) == doctest::Approx(double(first.S[i])).epsilon(1e-3));
#if defined(_OPENMP)
  const int threads = omp_get_max_threads();
  for (const int t : {1, 3}) {
    omp_set_num_threads(t);
    CHECK(bits(first, truncated_svd(A, 12, {.seed = 42})));
  }
  omp_set_num_threads(threads);
#endif
}

TEST_CASE("a warm start needs a third of the passes") {
  // 0.02·N(0,1) + a decaying signal, moved by 1 % in norm.
  const Index m = 600, n = 500, k = 10;
  Matrix<float> W = random_matrix<float>(m, n, 1);
  const Matrix<float> signal = round_to<float>(with_singular_values(m, n, power_law(60, 0.7), 6));
  Matrix<float> step = random_matrix<float>(m, n, 99);
  for (Index i = 0; i < W.size(); ++i) W.data()[i] = 0.005F * W.data()[i] + signal.data()[i];
  const double ratio = 0.01 * frobenius(W) / frobenius(step);
  Matrix<float> moved = W;
  for (Index i = 0; i < W.size(); ++i) moved.data()[i] += float(ratio) * step.data()[i];
  const TruncatedSvdOptions options{.energy_tolerance = 1e-4};
  const auto before = truncated_svd(W, k, options);
  const auto cold = truncated_svd(moved, k, options), warm = truncated_svd(moved, k, options, before.V.view());
  CHECK(warm.converged);
  CHECK(3 * warm.passes <= cold.passes);
  check_promises(Matrix<double>(moved), warm, k);
  CHECK(deficit(oracle_singular_values(moved), warm.S) <= 2e-4);
  // The same from the other side: a column-major matrix iterates on AAᵀ.
  const Matrix<float> turned = transpose(moved);
  const auto left = truncated_svd(turned.view().transposed(), k, options, before.V.view());
  CHECK(left.converged);
  CHECK(3 * left.passes <= cold.passes + 3);
  // A start that is of no use does no harm.
  const Matrix<float> useless(n, 3);
  const auto from_zero = truncated_svd(moved, k, options, useless.view());
  CHECK(from_zero.converged);
  check_promises(Matrix<double>(moved), from_zero, k);
}

TEST_CASE("what cannot be reached is reported, not thrown") {
  const Matrix<float> A = random_matrix<float>(300, 200, 8);
  SUBCASE("a tolerance below float's resolution") {
    const auto r = truncated_svd(A, 5, {.energy_tolerance = 0, .residual_tolerance = 1e-12});
    CHECK_FALSE(r.converged);
    CHECK(r.stopped == StopReason::scalar_limit);
    check_promises(Matrix<double>(A), r, 5);
    CHECK(*std::max_element(r.residuals.begin(), r.residuals.end()) < 1e-5 * double(r.S[0]));
  }
  SUBCASE("an energy tolerance below float's resolution, by iteration and by the whole space") {
    for (const Index k : {5, 180}) {
      const auto r = truncated_svd(A, k, {.energy_tolerance = 1e-13});
      CHECK_FALSE(r.converged);
      CHECK(r.stopped == StopReason::scalar_limit);
      check_promises(Matrix<double>(A), r, k);
      // The best there is all the same.
      CHECK(std::abs(deficit(oracle_singular_values(A), r.S)) < 1e-6);
      const auto wide = truncated_svd(Matrix<double>(A), k, {.energy_tolerance = 1e-13});
      CHECK(wide.converged);
    }
    const auto nothing = truncated_svd(Matrix<float>(90, 70), 3, {.energy_tolerance = 1e-13});
    CHECK(nothing.stopped == StopReason::met);  // zero is exact in any type
  }
  SUBCASE("out of passes") {
    for (const Index most : {1, 3, 6, 9}) {
      const auto r = truncated_svd(A, 8, {.energy_tolerance = 1e-9, .max_passes = most});
      CHECK_FALSE(r.converged);
      CHECK(r.stopped == StopReason::passes);
      CHECK(r.passes <= std::max<Index>(most, 4));
      check_promises(Matrix<double>(A), r, 8);
      const auto strict = truncated_svd(A, 8, {.energy_tolerance = 0, .residual_tolerance = 1e-5, .max_passes = most});
      CHECK_FALSE(strict.converged);
      CHECK(strict.stopped == StopReason::passes);
    }
  }
}

TEST_CASE_TEMPLATE("bad input is refused with a reason", T, float, double) {
  Matrix<T> A = random_matrix<T>(100, 80, 3);
  CHECK_THROWS_AS(truncated_svd(A, 0), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 81), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, -1), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(Matrix<T>(0, 5), 1), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 5, {.energy_tolerance = 0}), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 5, {.energy_tolerance = -1}), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 5, {.energy_tolerance = NAN}), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 5, {.residual_tolerance = INFINITY}), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 5, {.block = -1}), ArgumentError);
  CHECK_THROWS_AS(truncated_svd(A, 5, {.max_passes = -1}), ArgumentError);
  const Matrix<T> start(79, 5);
  CHECK_THROWS_AS(truncated_svd(A, 5, {}, start.view()), ShapeError);
  for (const double bad : {double(NAN), double(INFINITY), -double(INFINITY)})
    for (const auto& [i, j] : {std::pair<Index, Index>{0, 0}, {99, 79}, {50, 1}})
      for (const Index k : {2, 40}) {
        Matrix<T> B = A;
        B(i, j) = T(bad);
        CHECK_THROWS_AS(truncated_svd(B, k), NonFiniteError);
        CHECK_THROWS_AS(truncated_svd(B.view().transposed(), k), NonFiniteError);
      }
}

TEST_CASE_TEMPLATE("repeated values are found, more copies of them than the block has vectors too", T, float, double) {
  // `equal` values at 1, `spacing` apart, and a tail from 0.5 down. A Krylov space of four vectors holds four copies.
  struct Case {
    Index m, n, equal, rank;
    double spacing;
  };
  for (const Case c :
       {Case{256, 256, 60, 32, 0}, Case{140, 200, 20, 16, 0}, Case{200, 140, 5, 16, 0}, Case{200, 200, 9, 14, 0},
        Case{180, 150, 100, 16, 0}, Case{200, 160, 60, 32, 1e-5}, Case{200, 160, 60, 32, 1e-3}}) {
    for (const auto& [energy, residual] : {std::pair{1e-5, 0.0}, {1e-3, 0.0}, {0.0, 1e-5}}) {
      CAPTURE(c.m);
      CAPTURE(c.equal);
      CAPTURE(c.rank);
      CAPTURE(c.spacing);
      CAPTURE(energy);
      std::vector<double> sigma;
      for (Index i = 0; i < std::min(c.m, c.n); ++i)
        sigma.push_back(i < c.equal ? 1 - c.spacing * double(i) : 0.5 * std::pow(0.99, double(i - c.equal)));
      const Matrix<T> W = round_to<T>(with_singular_values(c.m, c.n, sigma, 11));
      const auto t = truncated_svd(W, c.rank, {.energy_tolerance = energy, .residual_tolerance = residual, .seed = 3});
      CHECK(t.converged);
      double best = 0;
      for (Index i = 0; i < c.rank; ++i) best += sigma[std::size_t(i)] * sigma[std::size_t(i)];
      // One copy missing would cost 0.75/rank or more; any members of the group for its largest, twice its width.
      const double deficit = (best - t.captured_energy) / best, width = c.spacing * double(c.equal);
      CHECK(deficit <= std::max(energy, 1e-5) + 2 * width);
      CHECK(deficit * best < 0.3);
      CHECK(deficit >= -1e-5);
      CHECK(orthogonality_error(t.V) < 64 * double(std::numeric_limits<T>::epsilon()));
    }
  }
  // Asked not to look for them, it may miss them; it is no slower than before.
  const Matrix<T> W = round_to<T>(with_singular_values(256, 256, std::vector<double>(256, 1.0), 5));
  CHECK(truncated_svd(W, 40, {.seek_copies = false}).passes <= truncated_svd(W, 40).passes);
}

TEST_CASE("what is not finite is named where it lies") {
  Matrix<float> wide(20, 60), tall(60, 20);
  CounterRng(1).fill_normal(wide.view());
  CounterRng(2).fill_normal(tall.view());
  wide(3, 14) = NAN;
  tall(14, 3) = INFINITY;
  CHECK_THROWS_WITH_AS((void)truncated_svd(wide, 4), doctest::Contains("A must be finite, got nan at (3, 14)"),
                       NonFiniteError);
  CHECK_THROWS_WITH_AS((void)truncated_svd(tall, 4), doctest::Contains("got inf at (14, 3)"), NonFiniteError);
}

// SPDX-License-Identifier: Apache-2.0
// Certificates on thousands of random matrices: a bound that is violated once is a bug.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "lowrank/linalg/certificates.hpp"
#include "lowrank/linalg/factor_operators.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

/// A small random matrix of random shape and spectrum: Gaussian, decaying, low rank or graded.
template <class T>
Matrix<T> specimen(std::uint64_t i) {
  const CounterRng rng(i, 77);
  const Index m = 1 + Index(rng.below(0, 24)), n = 1 + Index(rng.below(1, 24));
  Matrix<T> A = random_matrix<T>(m, n, i);
  switch (rng.below(2, 4)) {
    case 1:  // decaying columns
      for (Index r = 0; r < m; ++r)
        for (Index c = 0; c < n; ++c) A(r, c) *= T(std::pow(0.6, double(c)));
      break;
    case 2: {  // rank at most 3
      const Index k = std::min<Index>(3, std::min(m, n));
      A = round_to<T>(product(random_matrix<T>(m, k, i), random_matrix<T>(k, n, i + 1)));
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
  if (rng.below(3, 5) == 0) a.U = random_matrix<T>(A.rows(), k, i + 5);  // not even orthonormal
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

namespace {

/// Whether both certificates hold for the operator of `A` (exact, in double) and this approximation.
struct Tally {
  int violations = 0, wide = 0, count = 0;

  template <class T, class Op>
  void judge(const Op& op, const Matrix<double>& A, const Svd<T>& a, double part_norm) {
    ++count;
    Matrix<double> E = A;
    const Matrix<double> U(a.U), V(a.V);
    for (Index i = 0; i < A.rows(); ++i)
      for (Index j = 0; j < A.cols(); ++j)
        for (std::size_t k = 0; k < a.S.size(); ++k) E(i, j) -= double(a.S[k]) * U(i, Index(k)) * V(j, Index(k));
    const NormBounds f = frobenius_error<T>(op, a);
    const NormBounds s = spectral_error<T>(op, a, {.seed = std::uint64_t(count)});
    const double frobenius_norm = frobenius(E), spectral_norm = oracle_singular_values(E)[0];
    if (!(f.lower <= frobenius_norm && frobenius_norm <= f.upper)) ++violations;
    if (!(s.lower <= spectral_norm && spectral_norm <= s.upper)) ++violations;
    // Close where the error is well above what the parts' rounding hides.
    const double root_eps = std::sqrt(double(std::numeric_limits<T>::epsilon()));
    if (frobenius_norm > 200 * root_eps * part_norm && f.upper - f.lower > 0.01 * frobenius_norm) ++wide;
  }
};

}  // namespace

TEST_CASE_TEMPLATE("the certificates hold for every kind of operator, and for an empty approximation", T, float,
                   double) {
  using Store = std::conditional_t<std::same_as<T, float>, bf16, double>;
  Tally tally;
  for (std::uint64_t i = 0; i < 400; ++i) {
    const CounterRng rng(i, 80);
    const Matrix<T> W = specimen<T>(i);
    const Index m = W.rows(), n = W.cols(), r = 1 + Index(rng.below(0, 5));
    const Svd<T> empty{Matrix<T>(m, 0), {}, Matrix<T>(n, 0)};
    // A truncated SVD of what the operator stands for, or nothing at all.
    const auto judge = [&](const auto& op, const Matrix<double>& exact, double parts) {
      tally.judge(op, exact, empty, parts);
      if (i % 4 == 0) tally.judge(op, exact, approximation(round_to<T>(exact), i), parts);
    };
    const auto dense = dense_operator<T, T>(W.view());
    judge(dense, Matrix<double>(W), frobenius(W));
    judge(TransposedOperator(dense_operator<T, T>(W.view().transposed())), Matrix<double>(W), frobenius(W));
    const Matrix<Store> stored(W);
    judge(dense_operator<T, Store>(stored.view()), Matrix<double>(stored), frobenius(W));
    const DenseBase<T, Store> base(stored.view());
    judge(base_operator<T>(base), Matrix<double>(stored), frobenius(W));

    // W₁ − W₀ and diag(d)·W·diag(e) are the matrices of the differences and products rounded to T.
    Matrix<double> difference(m, n), scaled(m, n);
    std::vector<T> d(static_cast<std::size_t>(m)), e(static_cast<std::size_t>(n));
    CounterRng(i, 81).fill_normal(MatrixView<T>(d.data(), 1, m, m, 1));
    CounterRng(i, 82).fill_normal(MatrixView<T>(e.data(), 1, n, n, 1));
    for (Index a = 0; a < m; ++a)
      for (Index b = 0; b < n; ++b) {
        difference(a, b) = double(T(W(a, b) - T(stored(a, b))));
        scaled(a, b) = double(T(T(d[std::size_t(a)] * W(a, b)) * e[std::size_t(b)]));
      }
    judge(difference_operator<T, T, Store>(W.view(), stored.view()), difference, frobenius(difference));
    judge(column_scaled(row_scaled(dense, std::span<const T>(d)), std::span<const T>(e)), scaled, frobenius(scaled));

    // s·B·A and W + s·B·A; in every third W cancels s·B·A but for its rounding, in the next but for a hundredth.
    LoraFactors<T> f{random_matrix<T>(r, n, i + 7), random_matrix<T>(m, r, i + 8), T(0.7)};
    if (r > 1 && i % 5 == 0)  // two columns that cancel
      for (Index a = 0; a < m; ++a) f.B(a, 1) = -f.B(a, 0);
    if (r > 1 && i % 5 == 0)
      for (Index b = 0; b < n; ++b) f.A(1, b) = f.A(0, b) * T(1 + 1e-3);
    Matrix<double> BA = product(f.B, f.A);
    for (Index a = 0; a < BA.size(); ++a) BA.data()[a] *= double(f.scale);
    judge(ProductOperator<T>(f.B.view(), f.A.view(), f.scale), BA, frobenius(f.B) * frobenius(f.A));
    Matrix<T> under = W;
    for (Index a = 0; a < W.size() && i % 3 > 0; ++a)
      under.data()[a] = T((i % 3 == 1 ? 0 : 0.01) * double(W.data()[a]) - BA.data()[a]);
    Matrix<double> sum(under);
    for (Index a = 0; a < sum.size(); ++a) sum.data()[a] += BA.data()[a];
    const double parts = frobenius(under) + frobenius(f.B) * frobenius(f.A);
    const auto updated = updated_operator(dense_operator<T, T>(under.view()), f);
    judge(updated, sum, parts);
    // The same from the other side, through a transpose, and on factors in place of W.
    using Once = TransposedOperator<std::remove_const_t<decltype(updated)>>;
    judge(TransposedOperator<Once>(Once(updated)), sum, parts);
    Matrix<T> one(n, n);
    for (Index b = 0; b < n; ++b) one(b, b) = T(1);
    judge(updated_operator(ProductOperator<T>(under.view(), one.view()), f), sum,
          parts + frobenius(one) * frobenius(under));
  }
  CHECK(tally.count > 4000);
  CHECK(tally.violations == 0);
  CHECK(tally.wide == 0);
}

TEST_CASE_TEMPLATE("factors of any size are no trouble to the spectral bound", T, float, double) {
  // A = B·Aᵀ exactly as the approximation has it, S = 1: what is left is rounding, of products 1e6 times those of S.
  for (std::uint64_t i = 0; i < 100; ++i) {
    Svd<T> a{random_matrix<T>(40, 5, i), std::vector<T>(5, T(1)), random_matrix<T>(30, 5, i + 1)};
    for (Index j = 0; j < a.U.size(); ++j) a.U.data()[j] *= T(1e6);
    const Matrix<T> A = round_to<T>(product(a.U, transpose(a.V)));
    const double exact = oracle_singular_values(error_of(A, a))[0];
    const NormBounds s = spectral_error(dense_operator<T, T>(A.view()), a, {.seed = i});
    CHECK(s.lower <= exact);
    CHECK(exact <= s.upper);
    CHECK(s.upper < 1e-3 * frobenius(A));
  }
}

TEST_CASE("more powers bring the spectral bounds together") {
  const Matrix<double> A = random_matrix<double>(60, 50, 3);
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
  // For a matrix of rank one it fails exactly so often: within four standard deviations of the count. A bound that
  // never failed would not depend on the probability at all.
  const double expected = 0.2 * draws, deviation = std::sqrt(0.2 * 0.8 * draws);
  CHECK(failures <= expected + 4 * deviation);
  CHECK(failures >= expected - 4 * deviation);
}

TEST_CASE("the Frobenius identity of a converged truncated SVD") {
  const Matrix<float> A = random_matrix<float>(200, 150, 2);
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
    const Matrix<double> Y = product(A, random_matrix<double>(n, s, std::uint64_t(1000 + i)));
    const double estimate = std::pow(leave_one_out_error<double>(Y.view()), 2);
    Matrix<double> Q(Y.view().middle_cols(0, s - 1));
    orthonormalise(Q.view());
    const double error = std::pow(frobenius(A), 2) - std::pow(frobenius(product(transpose(Q), A)), 2);
    mean_estimate += estimate / draws;
    mean_error += error / draws;
    square_difference += (estimate - error) * (estimate - error) / draws;
  }
  // Difference of the means within five standard errors of it.
  CHECK(std::abs(mean_estimate - mean_error) < 5 * std::sqrt(square_difference / draws));
  CHECK(leave_one_out_error<double>(product(random_matrix<double>(20, 2, 1), random_matrix<double>(2, 5, 2)).view()) <
        1e-12);
  CHECK_THROWS_AS(leave_one_out_error<double>(Matrix<double>(5, 1).view()), ArgumentError);
  CHECK_THROWS_AS(leave_one_out_error<double>(Matrix<double>(5, 6).view()), ArgumentError);
}

TEST_CASE_TEMPLATE("residuals and values of truncated_svd bound true singular values, thousands of times", T, float,
                   double) {
  int violations = 0;
  const double eps = double(std::numeric_limits<T>::epsilon());
  // What judges errs too: Eigen in double, and plain sums in double. In float that is nothing.
  const double unit = 64 * 0x1p-52;
  const auto judge_residuals = [&](const Matrix<T>& A, const TruncatedSvd<T>& r) {
    const Matrix<double> AV = product(A, r.V), AtU = product(transpose(A), r.U);
    const double judge_error = unit * frobenius(A);
    for (std::size_t j = 0; j < r.S.size(); ++j) {
      const double s = double(r.S[j]);
      double left = 0, right = 0;
      for (Index a = 0; a < A.rows(); ++a) left += std::pow(AV(a, Index(j)) - s * double(r.U(a, Index(j))), 2);
      for (Index a = 0; a < A.cols(); ++a) right += std::pow(AtU(a, Index(j)) - s * double(r.V(a, Index(j))), 2);
      if (!(std::sqrt(std::max(left, right)) <= r.error(Index(j)) + judge_error)) ++violations;
    }
  };
  const auto judge = [&](const Matrix<T>& A, const TruncatedSvd<T>& r) {
    judge_residuals(A, r);
    const auto exact = oracle_singular_values(A);
    for (std::size_t j = 0; j < r.S.size(); ++j) {
      const double s = double(r.S[j]);
      if (!(s <= exact[j] + r.rounding + unit * exact[0])) ++violations;
      double nearest = INFINITY;
      for (const double x : exact) nearest = std::min(nearest, std::abs(x - s));
      if (!(nearest <= r.error(Index(j)) + unit * exact[0])) ++violations;
    }
  };
  // Small ones, decomposed whole: what is left is rounding alone.
  for (std::uint64_t i = 0; i < 1500; ++i) {
    const Matrix<T> A = specimen<T>(i);
    judge(A, truncated_svd(A, 1 + Index(CounterRng(i, 83).below(0, std::uint64_t(std::min(A.rows(), A.cols()))))));
  }
  // Converged to the floor of T, elements all of one sign among them: their rounding errors agree.
  for (std::uint64_t i = 0; i < 30; ++i) {
    Matrix<T> A = random_matrix<T>(200, 160, i);
    for (Index r = 0; r < 200; ++r)
      for (Index c = 0; c < 160; ++c) {
        if (i % 3 == 0) A(r, c) *= T(std::pow(0.9, double(c)));
        if (i % 3 == 1) A(r, c) = std::abs(A(r, c));
        if (i % 3 == 2) A(r, c) = T(0.1 + 0.01 * double(A(r, c)));
      }
    judge(A, truncated_svd(A, 20, {.energy_tolerance = 0, .residual_tolerance = 8 * eps, .max_passes = 60}));
  }
  for (int i = 0; i < 1500; ++i) {
    const CounterRng rng(std::uint64_t(i), 79);
    // Larger than the whole-space limit, so that the iteration itself is judged, and stopped early.
    const Index m = 60 + Index(rng.below(0, 30)), n = 60 + Index(rng.below(1, 30)), k = 1 + Index(rng.below(2, 6));
    Matrix<T> A = random_matrix<T>(m, n, std::uint64_t(i));
    if (i % 2 == 1)
      for (Index r = 0; r < m; ++r)
        for (Index c = 0; c < n; ++c) A(r, c) *= T(1 / double(c + 1));
    const auto r = truncated_svd(A, k, {.energy_tolerance = 1e-2, .seed = std::uint64_t(i)});
    // Residuals of all; exact values of one in ten, because Eigen's decomposition is the cost here.
    if (i % 20 > 1)
      judge_residuals(A, r);
    else
      judge(A, r);
  }
  CHECK(violations == 0);
}

TEST_CASE("certificates refuse bad input") {
  const Matrix<float> A = random_matrix<float>(20, 10, 1);
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

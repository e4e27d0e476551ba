// SPDX-License-Identifier: Apache-2.0
// Every initialiser that looks at data, at the ends of the scalar's range: entries of 1e±30, and denormals.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "init/support.hpp"
#include "lowrank/init/corda.hpp"
#include "lowrank/init/eva.hpp"
#include "lowrank/init/loftq.hpp"
#include "lowrank/init/lora_ga.hpp"
#include "lowrank/init/lora_xs.hpp"
#include "lowrank/init/milora.hpp"
#include "lowrank/init/olora.hpp"
#include "lowrank/init/pissa.hpp"
#include "lowrank/init/qpissa.hpp"

using namespace lowrank;

namespace {

template <class T>
Matrix<T> scaled(const Matrix<double>& m, double factor) {
  Matrix<T> out(m.rows(), m.cols());
  for (Index i = 0; i < m.size(); ++i) out.data()[i] = T(m.data()[i] * factor);
  return out;
}

/// Factors that run from 1e30 down into the denormals of T, where 20 bits are left of an entry.
template <class T>
std::vector<double> factors() {
  const double denormal = double(std::numeric_limits<T>::denorm_min()) * 0x1p20;
  if constexpr (std::same_as<T, float>) return {1e30, 1e-30, denormal};
  return {1e30, 1e-30, 1e150, 1e-150, denormal};
}

/// base + s·B·A = W element by element: rounding of the largest entry in T, and of r + 2 numbers to whole denormals.
template <class Init, class T>
void check_split(const Init& init, const Matrix<T>& W, Index r) {
  double largest = 0, worst = 0;
  const Matrix<double> update = test::update(init.factors);
  for (Index i = 0; i < W.rows(); ++i)
    for (Index j = 0; j < W.cols(); ++j) {
      largest = std::max({largest, std::abs(double(W(i, j))), std::abs(update(i, j))});
      const double error = std::abs(double(init.base(i, j)) + update(i, j) - double(W(i, j)));
      worst = error <= worst ? worst : error;  // a NaN stays
    }
  CHECK(worst <= 8 * double(std::numeric_limits<T>::epsilon()) * double(r) * largest +
                     double(r + 2) * double(std::numeric_limits<T>::denorm_min()));
  CHECK(std::isfinite(init.report.residual_norm));
}

/// That two matrices agree but for a factor.
template <class X, class Y>
void check_parallel(const X& a, const Y& b, double tolerance) {
  // Squares of the entries need not be in range.
  const auto length = [](const auto& m) {
    double largest = 0, sum = 0;
    for (Index i = 0; i < m.size(); ++i) largest = std::max(largest, std::abs(double(m.data()[i])));
    for (Index i = 0; i < m.size(); ++i) sum += std::pow(double(m.data()[i]) / std::max(largest, 1e-323), 2);
    return largest * std::sqrt(sum);
  };
  const double na = length(a), nb = length(b);
  REQUIRE(na > 0);
  REQUIRE(nb > 0);
  double inner = 0;
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j) inner += double(a(i, j)) / na * (double(b(i, j)) / nb);
  CHECK(std::abs(1 - inner) < tolerance);
}

}  // namespace

TEST_CASE_TEMPLATE("weights of any size are split as weights near 1 are", T, float, double) {
  const Index m = 40, n = 30, r = 4;
  std::vector<double> sigma;
  for (Index i = 0; i < n; ++i) sigma.push_back(std::pow(0.7, double(i)));
  const Matrix<double> W1 = test::known_matrix(m, n, sigma, 3).W;
  const Matrix<T> X = test::random_matrix<T>(60, n, 5);
  ActivationCovariance<T> covariance(n);
  covariance.add(X);
  const Matrix<T> unit = scaled<T>(W1, 1);
  for (const double factor : factors<T>()) {
    CAPTURE(factor);
    const Matrix<T> W = scaled<T>(W1, factor);
    // 20 bits of the entries are left among the denormals; the smallest values of W are 3e-5 of the largest.
    const bool denormal = factor < double(std::numeric_limits<T>::min());
    const double tolerance = denormal ? 1e-4 : 1e4 * double(std::numeric_limits<T>::epsilon());

    const auto p = pissa(W, {.rank = r, .alpha = 8});
    check_split(p, W, r);
    check_parallel(test::update(p.factors), test::update(pissa(unit, {.rank = r, .alpha = 8}).factors), tolerance);
    const auto o = olora(W, {.rank = r, .alpha = 4});
    check_split(o, W, r);
    check_parallel(test::update(o.factors), test::update(olora(unit, {.rank = r, .alpha = 4}).factors), tolerance);
    CHECK(test::orthogonality_error(o.factors.B) < 64 * double(std::numeric_limits<T>::epsilon()));
    const auto c = corda(W, covariance, {.rank = r, .alpha = 8});
    check_split(c, W, r);
    check_parallel(test::update(c.factors), test::update(corda(unit, covariance, {.rank = r, .alpha = 8}).factors),
                   tolerance);
    check_split(corda(W, covariance, {.rank = r, .alpha = 8, .mode = CordaMode::knowledge}), W, r);
    check_split(milora(W, {.rank = r, .alpha = 8}), W, r);
    CHECK(test::orthogonality_error(mica(W, {.rank = r}).factors.B) < 64 * double(std::numeric_limits<T>::epsilon()));
    const auto x = lora_xs(W, {.rank = r});
    CHECK(test::orthogonality_error(Matrix<T>(x.A.view().transposed())) <
          64 * double(std::numeric_limits<T>::epsilon()));
    check_parallel(x.B, lora_xs(unit, {.rank = r}).B, tolerance);
  }
}

TEST_CASE_TEMPLATE("gradients and inputs of any size give the directions of those near 1", T, float, double) {
  const Index m = 40, n = 30, r = 4;
  std::vector<double> sigma;
  for (Index i = 0; i < n; ++i) sigma.push_back(std::pow(0.6, double(i)));
  const Matrix<double> G1 = test::known_matrix(m, n, sigma, 7).W, X1 = test::known_matrix(50, n, sigma, 9).W;
  const Matrix<T> W = test::random_matrix<T>(m, n, 1);
  const auto directions = [&](double factor) {
    ActivationSvd<T> inputs(n, {.components = r});
    const Matrix<T> X = scaled<T>(X1, factor);
    inputs.add(X);
    inputs.add(X);
    return eva(m, inputs, {.rank = r});
  };
  const auto projector = [](const Matrix<T>& A) {
    return multiply<double>(Matrix<double>(A).view().transposed(), Matrix<double>(A).view());
  };
  const LoraGaOptions options{.rank = r, .alpha = 8};
  const Matrix<T> G = scaled<T>(G1, 1);
  const auto g1 = lora_ga(W, G, options);
  const auto e1 = directions(1);
  for (const double factor : factors<T>()) {
    CAPTURE(factor);
    const bool denormal = factor < double(std::numeric_limits<T>::min());
    const double tolerance = denormal ? 1e-4 : 1e4 * double(std::numeric_limits<T>::epsilon());
    const Matrix<T> far = scaled<T>(G1, factor);
    const auto g = lora_ga(W, far, options);
    check_split(g, W, r);
    check_parallel(projector(g.factors.A), projector(g1.factors.A), tolerance);
    check_parallel(projector(directions(factor).factors.A), projector(e1.factors.A), tolerance);
  }
}

TEST_CASE_TEMPLATE("weights of any size are quantised as weights near 1 are", T, float, double) {
  // Powers of two move every scale and every difference alike: codes and relative errors stay, but for the SVD's bits.
  const Index m = 64, n = 96, r = 4;
  const Matrix<double> W1(test::random_matrix<float>(m, n, 3).view());
  const Matrix<T> unit = scaled<T>(W1, 1);
  const LoftqOptions options{.rank = r, .alpha = 8, .iterations = 2};
  const auto error = [](const auto& q) { return q.report.result().frobenius / q.report.weight_norm; };
  const auto loftq1 = loftq(unit, options), qpissa1 = qpissa(unit, options);
  for (const double factor : {0x1p100, 0x1p-100}) {
    CAPTURE(factor);
    const Matrix<T> W = scaled<T>(W1, factor);
    const auto l = loftq(W, options), q = qpissa(W, options);
    CHECK(error(l) < error(loftq1) * (1 + 1e-3));
    CHECK(error(l) > error(loftq1) * (1 - 1e-3));
    CHECK(error(q) < error(qpissa1) * (1 + 1e-3));
    CHECK(error(q) > error(qpissa1) * (1 - 1e-3));
    CHECK(l.report.result().frobenius <= l.report.plain.frobenius);
    CHECK(l.report.plain.frobenius / l.report.weight_norm ==
          doctest::Approx(loftq1.report.plain.frobenius / loftq1.report.weight_norm).epsilon(1e-6));
  }
  // Blocks are quantised in float: what leaves its range is refused, not stored as infinity.
  if constexpr (std::same_as<T, double>) {
    const Matrix<T> huge = scaled<T>(W1, 1e150);
    CHECK_THROWS_AS((void)loftq(huge, options), NonFiniteError);
  }
}

TEST_CASE("a covariance that cannot be had in the scalar is refused") {
  ActivationCovariance<float> large(20), small(20);
  const Matrix<double> X = test::random_matrix<double>(50, 20, 1);
  const Matrix<float> up = scaled<float>(X, 1e30), down = scaled<float>(X, 1e-30), none(5, 20);
  CHECK_THROWS_AS(large.add(up), ArgumentError);
  CHECK(large.tokens() == 0);
  small.add(down);
  CHECK_THROWS_AS((void)small.damped(0.01), ArgumentError);
  // In double there is room for both, and zero inputs are no error.
  ActivationCovariance<double> wide(20);
  const Matrix<double> far = scaled<double>(X, 1e30);
  wide.add(far);
  CHECK(std::isfinite(wide.damped(0.01)(3, 3)));
  ActivationCovariance<float> zero(20);
  zero.add(none);
  CHECK(zero.damped(0.01)(3, 3) == 0);
}

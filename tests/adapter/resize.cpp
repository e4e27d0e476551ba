// SPDX-License-Identifier: Apache-2.0
#include "lowrank/adapter/resize.hpp"

#include <doctest/doctest.h>

#include "init/support.hpp"
#include "lowrank/adapter/extract.hpp"
#include "lowrank/adapter/undo.hpp"
#include "lowrank/init/olora.hpp"
#include "lowrank/init/pissa.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {

/// An adapter whose update has the singular values given, through a badly balanced pair of factors.
template <class T>
LoraFactors<T> adapter_with(Index m, Index n, std::vector<double> sigma, std::uint64_t seed, double scale) {
  const test::KnownMatrix k = test::known_matrix(m, n, sigma, seed);
  LoraFactors<T> f;
  f.scale = T(scale);
  f.A = Matrix<T>(k.V.view().transposed());
  f.B = Matrix<T>(k.U);
  for (Index i = 0; i < m; ++i)
    for (std::size_t j = 0; j < sigma.size(); ++j) f.B(i, Index(j)) = T(double(f.B(i, Index(j))) * sigma[j] / scale);
  return f;
}

}  // namespace

TEST_CASE_TEMPLATE("resize: every rule finds its rank, the error is the tail", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  const std::vector<double> sigma{4, 2, 2, 1, 0.5};  // energy 25.25, sum 9.5
  const auto f = adapter_with<T>(20, 15, sigma, 3, 0.25);
  const auto rank = [&](ResizeRule rule, double value) {
    return resize_adapter(f, {.rule = rule, .value = value}).factors.rank();
  };
  CHECK(rank(ResizeRule::rank, 3) == 3);
  CHECK(rank(ResizeRule::rank, 99) == 5);
  CHECK(rank(ResizeRule::energy, 0.63) == 1);
  CHECK(rank(ResizeRule::energy, 0.95) == 3);
  CHECK(rank(ResizeRule::cumulative, 0.4) == 1);
  CHECK(rank(ResizeRule::cumulative, 0.7) == 3);
  CHECK(rank(ResizeRule::ratio, 3) == 3);
  CHECK(rank(ResizeRule::ratio, 1.5) == 1);
  CHECK(rank(ResizeRule::ratio, 100) == 5);
  CHECK(resize_adapter(f, {.rule = ResizeRule::ratio, .value = 100, .max_rank = 2}).factors.rank() == 2);

  const Matrix<double> whole = test::update(f);
  for (Index r = 1; r <= 5; ++r) {
    const auto small = resize_adapter(f, {.rule = ResizeRule::rank, .value = double(r)});
    double tail = 0;
    for (std::size_t i = std::size_t(r); i < 5; ++i) tail += sigma[i] * sigma[i];
    CHECK(std::abs(small.error - std::sqrt(tail)) < 50 * eps * 5);
    CHECK(std::abs(test::norm(test::plus(test::update(small.factors), whole, -1)) - std::sqrt(tail)) < 50 * eps * 5);
    CHECK(small.norm == doctest::Approx(std::sqrt(25.25)).epsilon(1e-6));
    CHECK(small.factors.scale == T(0.25));
    // Balanced again.
    CHECK(test::norm(small.factors.A) == doctest::Approx(test::norm(small.factors.B)).epsilon(1e-4));
  }
  const auto rescaled = resize_adapter(f, {.rule = ResizeRule::rank, .value = 5, .scale = 3});
  CHECK(rescaled.factors.scale == T(3));
  CHECK(test::deviation(test::update(rescaled.factors), whole) < 100 * eps);
  for (std::size_t i = 0; i < 5; ++i) CHECK(double(rescaled.sigma[i]) == doctest::Approx(sigma[i]).epsilon(1e-5));
}

TEST_CASE("resize: zero updates and bad input") {
  LoraFactors<float> f{Matrix<float>(3, 6), Matrix<float>(5, 3), 2.0F};
  const auto zero = resize_adapter(f);
  CHECK(zero.factors.rank() == 1);
  CHECK(zero.error == 0);
  CHECK_THROWS_AS((void)resize_adapter(f, {.rule = ResizeRule::rank, .value = 0}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(f, {.rule = ResizeRule::rank, .value = 1.5}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(f, {.rule = ResizeRule::energy, .value = 1.5}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(f, {.rule = ResizeRule::cumulative, .value = 0}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(f, {.rule = ResizeRule::ratio, .value = 0.5}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(f, {.max_rank = -1}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(f, {.scale = -2}), ArgumentError);
  CHECK_THROWS_AS((void)resize_adapter(LoraFactors<float>{Matrix<float>(0, 6), Matrix<float>(5, 0), 1.0F}),
                  ArgumentError);
  f.B(0, 0) = NAN;
  CHECK_THROWS_AS((void)resize_adapter(f), NonFiniteError);
}

TEST_CASE_TEMPLATE("undo: a trained PiSSA or OLoRA adapter moves to the original weight", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  const Matrix<T> W = test::random_matrix<T>(26, 18, 3);
  const auto check = [&](const Initialised<T>& init) {
    LoraFactors<T> trained = init.factors;  // a training that moves both factors a little
    const Matrix<T> dA = test::random_matrix<T>(trained.rank(), 18, 5, 0.05),
                    dB = test::random_matrix<T>(26, trained.rank(), 6, 0.05);
    for (Index i = 0; i < dA.size(); ++i) trained.A.data()[i] += dA.data()[i];
    for (Index i = 0; i < dB.size(); ++i) trained.B.data()[i] += dB.data()[i];
    const Matrix<double> tuned = test::plus(test::update(trained), init.base);

    const auto whole = undo_residual(trained, init.factors);
    CHECK(whole.factors.rank() == 2 * trained.rank());
    CHECK(test::norm(test::plus(test::plus(W, test::update(whole.factors)), tuned, -1)) < 30 * eps * test::norm(W));
    CHECK(whole.distance < 1e-6 * whole.sum_norm);

    const Matrix<double> delta = test::plus(test::update(trained), test::update(init.factors), -1);
    const auto S = test::oracle_singular_values(delta);
    for (const Index r : {1, 3, 4}) {
      const auto cut = undo_residual(trained, init.factors, r, 2.0);
      CHECK(cut.factors.scale == T(2));
      double tail = 0;
      for (std::size_t i = std::size_t(r); i < S.size(); ++i) tail += S[i] * S[i];
      CHECK(std::abs(cut.distance - std::sqrt(tail)) < 100 * eps * test::norm(W));
      CHECK(std::abs(test::norm(test::plus(test::update(cut.factors), delta, -1)) - std::sqrt(tail)) <
            100 * eps * test::norm(W));
      CHECK(cut.sum_norm == doctest::Approx(test::norm(delta)).epsilon(1e-4));
    }
  };
  check(pissa(W, {.rank = 4, .alpha = 10}));
  check(olora(W, {.rank = 4, .alpha = 10}));
  check(pissa(W, {.rank = 9, .alpha = 3}));  // 2r = min(out, in)
}

TEST_CASE("undo: untrained is zero; the full rank stops at min(out, in); bad input") {
  const Matrix<double> W = test::random_matrix<double>(10, 8, 3);
  const auto init = pissa(W, {.rank = 6, .alpha = 2});
  const auto nothing = undo_residual(init.factors, init.factors);
  CHECK(nothing.factors.rank() == 8);
  CHECK(nothing.sum_norm < 1e-14 * test::norm(W));
  CHECK_THROWS_AS((void)undo_residual(init.factors, init.factors, 9), ArgumentError);
  CHECK_THROWS_AS((void)undo_residual(init.factors, init.factors, -1), ArgumentError);
  CHECK_THROWS_AS((void)undo_residual(init.factors, init.factors, 2, 0.0), ArgumentError);
  const Matrix<double> wider = test::random_matrix<double>(10, 9, 3);
  const auto other = pissa(wider, {.rank = 6, .alpha = 2});
  CHECK_THROWS_AS((void)undo_residual(init.factors, other.factors), ShapeError);
}

TEST_CASE("extract: the difference of two weights, in every storage and order") {
  const test::KnownMatrix update = test::known_matrix(48, 36, {3, 2, 1, 0.2, 0.1}, 2);
  const Matrix<double> base64 = test::random_matrix<double>(48, 36, 9);
  const Matrix<double> tuned64 = test::plus(base64, update.W);
  const auto exact = extract_adapter(tuned64, base64, {.rank = 3, .scale = 0.5, .svd = {.residual_tolerance = 1e-12}});
  CHECK(exact.converged);
  CHECK(exact.factors.scale == 0.5);
  CHECK(exact.norm == doctest::Approx(std::sqrt(14.05)));
  CHECK(exact.error == doctest::Approx(std::sqrt(0.05)));
  for (std::size_t i = 0; i < 3; ++i) CHECK(exact.sigma[i] == doctest::Approx(3.0 - double(i)));
  CHECK(std::abs(test::norm(test::plus(test::update(exact.factors), update.W, -1)) - std::sqrt(0.05)) < 1e-10);

  // bf16 tuned, float base stored the other way round: ΔW is what the stored numbers say.
  const Matrix<float> base(base64), base_t(base.view().transposed()), tuned_wide(tuned64);
  const Matrix<bf16> tuned(tuned_wide);
  Matrix<double> delta(tuned);
  delta = test::plus(delta, base, -1);
  const auto mixed =
      extract_adapter(tuned, base_t.view().transposed(), {.rank = 3, .svd = {.residual_tolerance = 1e-6}});
  CHECK(mixed.norm == doctest::Approx(test::norm(delta)).epsilon(1e-5));
  CHECK(mixed.error == doctest::Approx(test::norm(test::plus(test::update(mixed.factors), delta, -1))).epsilon(1e-4));

  const auto same = extract_adapter(base, base, {.rank = 3});
  CHECK(same.norm == 0);
  CHECK(test::norm(same.factors.B) == 0);
  CHECK_THROWS_AS((void)extract_adapter(base, base_t, {.rank = 3}), ShapeError);
  CHECK_THROWS_AS((void)extract_adapter(base, base, {.rank = 37}), ArgumentError);
  CHECK_THROWS_AS((void)extract_adapter(base, base, {.rank = 3, .scale = 0}), ArgumentError);
  Matrix<float> bad = base;
  bad(1, 1) = NAN;
  CHECK_THROWS_AS((void)extract_adapter(bad, base, {.rank = 3}), NonFiniteError);
}

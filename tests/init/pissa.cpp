// SPDX-License-Identifier: Apache-2.0
// PiSSA, MiLoRA, MiCA and LoRA-XS against Eigen's SVD in double and matrices of known spectrum.
#include "lowrank/init/pissa.hpp"

#include <doctest/doctest.h>

#include "init/support.hpp"
#include "lowrank/init/lora_xs.hpp"
#include "lowrank/init/milora.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {

/// A decaying spectrum over a flat one, in the shape given.
test::KnownMatrix decaying(Index m, Index n, std::uint64_t seed) {
  std::vector<double> sigma;
  for (Index i = 0; i < std::min(m, n); ++i) sigma.push_back(4 * std::pow(0.8, double(i)) + 0.5 + 0.01 * double(-i));
  return test::known_matrix(m, n, sigma, seed);
}

}  // namespace

TEST_CASE_TEMPLATE("pissa: the factors are the principal triplets, base + s·B·A = W", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  for (const auto& shape : {std::array<Index, 3>{60, 40, 6}, {40, 60, 6}, {30, 30, 30}, {1, 9, 1}, {9, 1, 1}}) {
    const Index m = shape[0], n = shape[1], r = shape[2];  // Clang 14 cannot capture structured bindings
    CAPTURE(m);
    CAPTURE(n);
    const test::KnownMatrix known = decaying(m, n, 3);
    const Matrix<T> W(known.W);
    const auto init = pissa(W, {.rank = r, .alpha = 2.5 * double(r), .svd = {.residual_tolerance = 20 * eps}});
    CHECK(init.base_changed);
    CHECK(init.report.converged);
    CHECK(init.factors.scale == T(2.5));
    CHECK(test::split_error(init, W) < 8 * eps);

    // The oracle's truncation, and the norms the report claims.
    const auto d = test::oracle_svd(W);
    Matrix<double> best(m, n);
    double captured = 0, total = 0;
    for (std::size_t k = 0; k < d.S.size(); ++k) total += d.S[k] * d.S[k];
    for (Index k = 0; k < r; ++k) {
      captured += d.S[std::size_t(k)] * d.S[std::size_t(k)];
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < n; ++j) best(i, j) += d.S[std::size_t(k)] * d.U(i, k) * d.V(j, k);
    }
    // Subspace error ≤ residual/gap; the gap between σ_r and σ_{r+1} of `decaying` is at least 0.2, of σ₁ = 4.5.
    CHECK(test::norm(test::plus(test::update(init.factors), best, -1)) < 2000 * eps * test::norm(best));
    CHECK(init.report.captured_energy == doctest::Approx(captured).epsilon(100 * eps));
    CHECK(init.report.total_energy == doctest::Approx(total).epsilon(100 * eps));
    CHECK(init.report.residual_norm == doctest::Approx(std::sqrt(std::max(0.0, total - captured))).epsilon(1e-3));

    // Balanced: column k of B and row k of A have norm √(σ_k/s).
    for (Index k = 0; k < r; ++k) {
      double a = 0, b = 0;
      for (Index j = 0; j < n; ++j) a += std::pow(double(init.factors.A(k, j)), 2);
      for (Index i = 0; i < m; ++i) b += std::pow(double(init.factors.B(i, k)), 2);
      CHECK(a == doctest::Approx(d.S[std::size_t(k)] / 2.5).epsilon(1e3 * eps));
      CHECK(b == doctest::Approx(d.S[std::size_t(k)] / 2.5).epsilon(1e3 * eps));
    }
  }
}

TEST_CASE("pissa: any order gives the same factors up to signs of pairs") {
  const test::KnownMatrix known = decaying(50, 70, 5);
  const Matrix<float> W(known.W);
  const Matrix<float> Wt(W.view().transposed());
  const auto row = pissa(W, {.rank = 5, .alpha = 2, .svd = {.residual_tolerance = 1e-6}});
  const auto column = pissa(Wt.view().transposed(), {.rank = 5, .alpha = 2, .svd = {.residual_tolerance = 1e-6}});
  CHECK(test::deviation(test::update(row.factors), test::update(column.factors)) < 1e-4);
  CHECK(test::split_error(column, W) < 1e-6);
}

TEST_CASE("pissa: a loose SVD still leaves base + s·B·A = W") {
  const Matrix<float> W = test::random_matrix<float>(120, 90, 8);
  const auto init = pissa(W, {.rank = 7, .alpha = 3, .svd = {.energy_tolerance = 0.5, .max_passes = 4}});
  CHECK(test::split_error(init, W) < 1e-6);
  CHECK(init.report.captured_energy < init.report.total_energy);
  CHECK(init.report.residual_norm ==
        doctest::Approx(std::sqrt(init.report.total_energy - init.report.captured_energy)).epsilon(1e-4));
}

TEST_CASE("pissa: storage narrower than arithmetic") {
  const test::KnownMatrix known = decaying(64, 80, 6);
  const Matrix<float> full(known.W);
  const auto check = [&]<class S>(S, FactorStorage storage, double unit) {
    const Matrix<S> W(full);
    const PissaOptions options{.rank = 8, .alpha = 4, .factor_storage = storage};
    // Base in float: the rounding of the factors is taken up by the base, entirely.
    const auto wide = pissa<float>(W, options);
    CHECK(test::split_error(wide, W) < 1e-6);
    CHECK(wide.report.storage_error == 0);
    for (Index i = 0; i < wide.factors.A.size(); ++i)
      CHECK(float(S(wide.factors.A.data()[i])) == wide.factors.A.data()[i]);
    // Base in two bytes: one rounding of each of its elements is all that is lost.
    const auto narrow = pissa<float, S>(W, options);
    CHECK(test::split_error(narrow, W) * test::norm(W) == doctest::Approx(narrow.report.storage_error).epsilon(1e-2));
    CHECK(narrow.report.storage_error < unit * narrow.report.residual_norm);
    CHECK(test::same_bits(narrow.factors.A, wide.factors.A));
  };
  check(bf16{}, FactorStorage::bf16, 0x1p-8);
  check(f16{}, FactorStorage::f16, 0x1p-11);
}

TEST_CASE("pissa from known triplets is pissa; one SVD serves several ranks") {
  const test::KnownMatrix known = decaying(40, 30, 9);
  const Svd<double> d{known.U, known.sigma, known.V};
  for (const Index r : {1, 4, 30}) {
    const auto given = pissa_from_svd(known.W, d, {.rank = r, .alpha = 7});
    const auto found = pissa(known.W, {.rank = r, .alpha = 7, .svd = {.residual_tolerance = 1e-13}});
    CHECK(test::split_error(given, known.W) < 1e-14);
    CHECK(test::deviation(test::update(given.factors), test::update(found.factors)) < 1e-10);
  }
  CHECK_THROWS_AS((void)pissa_from_svd(known.W, Svd<double>{known.U, {1.0}, known.V}, {.rank = 1}), ShapeError);
  const Svd<double> two{test::columns(known.U, 0, 2), {2.0, 1.0}, test::columns(known.V, 0, 2)};
  CHECK_THROWS_AS((void)pissa_from_svd(known.W, two, {.rank = 3}), ArgumentError);
}

TEST_CASE("pissa: rank deficient and zero weights say that pairs are dead") {
  const test::KnownMatrix known = test::known_matrix(20, 30, {3, 2}, 4);
  const auto init = pissa(known.W, {.rank = 4, .alpha = 2});
  CHECK(init.report.notes.find("2 of 4 singular values are zero") != std::string::npos);
  CHECK(test::split_error(init, known.W) < 1e-14);
  const Matrix<float> zero(8, 9);
  const auto nothing = pissa(zero, {.rank = 3, .alpha = 2});
  CHECK(nothing.report.notes.find("3 of 3") != std::string::npos);
  CHECK(test::norm(nothing.base) == 0);
}

TEST_CASE("pissa: bad input") {
  Matrix<float> W = test::random_matrix<float>(10, 20, 1);
  CHECK_THROWS_AS((void)pissa(W, {.rank = 0}), ArgumentError);
  CHECK_THROWS_WITH_AS((void)pissa(W, {.rank = 11}), "pissa: rank must lie in [1, min(10, 20)], got 11", ArgumentError);
  CHECK_THROWS_AS((void)pissa(W, {.rank = 2, .alpha = 0}), ArgumentError);
  CHECK_THROWS_AS((void)pissa(W, {.rank = 2, .svd = {.energy_tolerance = -1}}), ArgumentError);
  W(3, 4) = NAN;
  CHECK_THROWS_AS((void)pissa(W, {.rank = 2}), NonFiniteError);
  W(3, 4) = INFINITY;
  CHECK_THROWS_AS((void)pissa(W, {.rank = 2}), NonFiniteError);
  const Matrix<float> none(0, 20);
  CHECK_THROWS_AS((void)pissa(none, {.rank = 1}), ArgumentError);
  Matrix<float> big(4, 4);
  for (Index i = 0; i < 4; ++i) big(i, i) = 1e12F;  // factors near 1e6: not for f16
  CHECK_THROWS_AS((void)pissa(big, {.rank = 2, .alpha = 2, .factor_storage = FactorStorage::f16}), ArgumentError);
}

TEST_CASE("pissa: determinism") {
  const Matrix<float> W = test::random_matrix<float>(100, 80, 8);
  const auto a = pissa(W, {.rank = 7, .svd = {.seed = 4}}), b = pissa(W, {.rank = 7, .svd = {.seed = 4}});
  CHECK(test::same_bits(a.factors.A, b.factors.A));
  CHECK(test::same_bits(a.base, b.base));
}

TEST_CASE_TEMPLATE("minor_svd: the smallest triplets, through the inverse and through the full SVD", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  // 260 columns pass through the inverse; 40 do not.
  for (const auto& shape :
       {std::array<Index, 3>{300, 260, 5}, {260, 300, 5}, {260, 260, 8}, {60, 40, 5}, {1, 7, 1}, {7, 1, 1}}) {
    const Index m = shape[0], n = shape[1], r = shape[2];  // Clang 14 cannot capture structured bindings
    CAPTURE(m);
    CAPTURE(n);
    const Index k = std::min(m, n);
    std::vector<double> sigma;
    for (Index i = 0; i < k; ++i) sigma.push_back(5 - 4.5 * double(i) / double(k));  // gaps of 4.5/k, σ_min ≈ 0.5
    const test::KnownMatrix known = test::known_matrix(m, n, sigma, 12);
    const Matrix<T> W(known.W);
    const auto d = minor_svd(W, r);
    CHECK(d.full == (k < 256));
    CHECK(d.complete);
    CHECK(minor_svd(W, r, {.certify = false}).complete == (k < 256));
    CHECK(test::orthogonality_error(d.U) < 500 * eps);
    CHECK(test::orthogonality_error(d.V) < 500 * eps);
    for (Index i = 0; i < r; ++i) {
      CHECK(d.residuals[std::size_t(i)] <= 100 * eps * 5);
      // A triplet's value is within its residual of a true one; and it must be the right one: gaps are 4.5/k.
      CHECK(std::abs(double(d.S[std::size_t(i)]) - sigma[std::size_t(k - r + i)]) < 300 * eps * 5);
    }
    // Angles are at most residual/gap.
    const double angle = 200 * eps * 5 * double(k) / 4.5 * std::sqrt(double(r));
    CHECK(test::outside(test::columns(known.U, k - r, r), d.U) < angle);
    CHECK(test::outside(test::columns(known.V, k - r, r), d.V) < angle);
  }
}

TEST_CASE("minor_svd: true triplets that are not the smallest are no certificate") {
  std::vector<double> sigma;
  for (int i = 0; i < 64; ++i) sigma.push_back(3 - 0.03 * i);
  const test::KnownMatrix known = test::known_matrix(80, 64, sigma, 5);
  MinorSvd<double> d;
  const auto take = [&](Index first) {  // three triplets, exact ones
    d.U = test::columns(known.U, first, 3);
    d.V = test::columns(known.V, first, 3);
    d.S.assign(sigma.begin() + first, sigma.begin() + first + 3);
    for (const double r : detail::triplet_residuals<double, double>(known.W.view(), d)) REQUIRE(r < 1e-13);
    return detail::none_missed<double, double>(known.W.view(), 1e-12, d);
  };
  CHECK(take(61));
  CHECK_FALSE(take(60));  // the smallest was missed
}

TEST_CASE("minor_svd: random, nearly singular and singular matrices") {
  const Matrix<double> W = test::random_matrix<double>(270, 270, 21);
  const auto all = test::oracle_singular_values(W);
  const auto d = minor_svd(W, 6);
  CHECK_FALSE(d.full);
  for (std::size_t i = 0; i < 6; ++i) CHECK(std::abs(d.S[i] - all[264 + i]) < 1e-12 * all[0]);

  std::vector<double> sigma;
  for (int i = 0; i < 257; ++i) sigma.push_back(1 + 0.01 * (257 - i));
  for (int i = 0; i < 3; ++i) sigma.push_back(0);
  const test::KnownMatrix singular = test::known_matrix(300, 260, sigma, 2);
  const auto s = minor_svd(singular.W, 5);
  for (std::size_t i = 2; i < 5; ++i) CHECK(s.S[i] < 1e-13);
  CHECK(s.S[1] == doctest::Approx(1.01));
  CHECK(test::orthogonality_error(s.U) < 1e-11);
  const Matrix<double> zero(300, 260);
  CHECK(minor_svd(zero, 2).S[0] == 0);

  // Entries whose squares leave the range of float.
  const Matrix<float> near_one = test::random_matrix<float>(300, 260, 22);
  const auto plain = minor_svd(near_one, 4);
  for (const float scale : {0x1p100F, 0x1p-100F}) {
    Matrix<float> far = near_one;
    for (Index i = 0; i < far.size(); ++i) far.data()[i] *= scale;
    const auto scaled = minor_svd(far, 4);
    for (std::size_t i = 0; i < 4; ++i) {
      CHECK(std::abs(double(scaled.S[i]) / double(scale) - double(plain.S[i])) < 1e-4);
      CHECK(scaled.residuals[i] < 1e-4 * double(scale) * 33);
    }
  }

  Matrix<double> bad = W;
  bad(1, 2) = NAN;
  CHECK_THROWS_AS((void)minor_svd(bad, 2), NonFiniteError);
  CHECK_THROWS_AS((void)minor_svd(W, 271), ArgumentError);
  CHECK_THROWS_AS((void)minor_svd(W, 2, {.tolerance = -1}), ArgumentError);
}

TEST_CASE_TEMPLATE("milora and mica: the minor subspace trains", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  std::vector<double> sigma;
  for (int i = 0; i < 30; ++i) sigma.push_back(4 - 0.12 * i);
  const test::KnownMatrix known = test::known_matrix(40, 30, sigma, 7);
  const Matrix<T> W(known.W);
  const auto init = milora(W, {.rank = 5, .alpha = 15});
  CHECK(init.factors.scale == T(3));
  CHECK(test::split_error(init, W) < 8 * eps);
  double captured = 0;
  for (int i = 25; i < 30; ++i) captured += sigma[std::size_t(i)] * sigma[std::size_t(i)];
  CHECK(init.report.captured_energy == doctest::Approx(captured).epsilon(1e4 * eps));
  CHECK(test::norm(test::update(init.factors)) == doctest::Approx(std::sqrt(captured)).epsilon(1e4 * eps));
  CHECK(test::outside(test::columns(known.U, 25, 5), init.factors.B) < 1e4 * eps);
  CHECK(init.report.notes == "full SVD");

  const auto frozen = mica(W, {.rank = 5, .alpha = 10});
  CHECK_FALSE(frozen.base_changed);
  CHECK(test::norm(frozen.factors.A) == 0);
  CHECK(test::orthogonality_error(frozen.factors.B) < 500 * eps);
  CHECK(test::outside(test::columns(known.U, 25, 5), frozen.factors.B) < 1e4 * eps);
  CHECK_THROWS_AS((void)milora(W, {.rank = 31}), ArgumentError);
  CHECK_THROWS_AS((void)mica(W, {.rank = 3, .alpha = -1}), ArgumentError);
}

TEST_CASE("lora_xs: frozen factors span the principal subspaces, the core is tiny") {
  const test::KnownMatrix known = decaying(50, 40, 3);
  const Matrix<float> W(known.W);
  const auto xs = lora_xs(W, {.rank = 6, .alpha = 12, .svd = {.residual_tolerance = 1e-6, .seed = 3}});
  CHECK(xs.scale == 2.0F);
  CHECK(test::outside(test::columns(known.U, 0, 6), xs.B) < 1e-4);
  const Matrix<float> At(xs.A.view().transposed());
  CHECK(test::orthogonality_error(At) < 1e-5);
  CHECK(test::outside(test::columns(known.V, 0, 6), At) < 1e-4);
  for (Index k = 0; k < 6; ++k) {
    double b = 0;
    for (Index i = 0; i < 50; ++i) b += double(xs.B(i, k)) * double(xs.B(i, k));
    CHECK(std::sqrt(b) == doctest::Approx(known.sigma[std::size_t(k)]).epsilon(1e-4));
  }
  CHECK(test::norm(xs.core) < 1e-5 * 6 * 2);
  CHECK(test::norm(xs.core) > 1e-5 * 6 / 2);
  // Folded: s·(B·core)·A.
  Matrix<double> middle = multiply<double>(Matrix<double>(xs.B).view(), Matrix<double>(xs.core).view());
  Matrix<double> expected = multiply<double>(middle.view(), Matrix<double>(xs.A).view());
  for (Index i = 0; i < expected.size(); ++i) expected.data()[i] *= 2;
  CHECK(test::deviation(test::update(xs.folded()), expected) < 1e-5);
  CHECK_THROWS_AS((void)lora_xs(W, {.rank = 3, .core_std = -1}), ArgumentError);
}

// SPDX-License-Identifier: Apache-2.0
// The initialisers that look at activations or gradients: CorDA, EVA, LoRA-GA.
#include <doctest/doctest.h>

#include "init/support.hpp"
#include "lowrank/init/corda.hpp"
#include "lowrank/init/eva.hpp"
#include "lowrank/init/lora_ga.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {

/// Inputs with a decaying covariance and a mean.
template <class T>
Matrix<T> activations(Index tokens, Index in, std::uint64_t seed, double mean = 0.3) {
  const Matrix<double> mix = test::random_matrix<double>(in, in, 77);
  Matrix<double> z = test::random_matrix<double>(tokens, in, seed);
  for (Index i = 0; i < tokens; ++i)
    for (Index j = 0; j < in; ++j) z(i, j) *= std::pow(0.85, double(j));
  Matrix<double> x = multiply<double>(z.view(), mix.view());
  for (Index i = 0; i < x.size(); ++i) x.data()[i] += mean;
  return Matrix<T>(x);
}

/// C⁻¹·X for a symmetric positive definite C, by Gauss elimination in long double.
Matrix<double> solve(const Matrix<double>& C, const Matrix<double>& X) {
  const Index n = C.rows(), k = X.cols();
  std::vector<long double> a(static_cast<std::size_t>(n * (n + k)));
  const auto at = [&](Index i, Index j) -> long double& { return a[std::size_t(i * (n + k) + j)]; };
  for (Index i = 0; i < n; ++i) {
    for (Index j = 0; j < n; ++j) at(i, j) = C(i, j);
    for (Index j = 0; j < k; ++j) at(i, n + j) = X(i, j);
  }
  for (Index p = 0; p < n; ++p)
    for (Index i = 0; i < n; ++i)
      if (i != p) {
        const long double f = at(i, p) / at(p, p);
        for (Index j = p; j < n + k; ++j) at(i, j) -= f * at(p, j);
      }
  Matrix<double> out(n, k);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < k; ++j) out(i, j) = double(at(i, n + j) / at(i, i));
  return out;
}

}  // namespace

TEST_CASE("activation covariance: batches add up to the whole") {
  const Matrix<double> X = activations<double>(70, 12, 1);
  ActivationCovariance<double> once(12), batches(12);
  once.add(X);
  batches.add(X.view().middle_rows(0, 30));
  batches.add(X.view().middle_rows(30, 0));
  const Matrix<double> rest(X.view().middle_rows(30, 40).transposed());
  batches.add(rest.view().transposed());  // another order
  CHECK(batches.tokens() == 70);
  const Matrix<double> a = once.damped(0.1), b = batches.damped(0.1);
  CHECK(test::deviation(a, b) < 1e-14);
  double trace = 0;
  Matrix<double> expected = multiply<double>(X.view().transposed(), X.view());
  for (Index i = 0; i < expected.size(); ++i) expected.data()[i] /= 70;
  for (Index i = 0; i < 12; ++i) trace += expected(i, i);
  for (Index i = 0; i < 12; ++i) expected(i, i) += 0.1 * trace / 12;
  CHECK(test::deviation(a, expected) < 1e-14);

  ActivationCovariance<double> empty(12);
  CHECK_THROWS_AS((void)empty.damped(0.1), ArgumentError);
  CHECK_THROWS_AS((void)once.damped(-1), ArgumentError);
  Matrix<double> bad = X;
  bad(3, 3) = NAN;
  CHECK_THROWS_AS(once.add(bad.view()), NonFiniteError);
  CHECK(test::same_bits(once.damped(0.1), a));  // nothing was added
  CHECK_THROWS_AS(once.add(X.view().middle_cols(0, 11)), ShapeError);
  CHECK_THROWS_AS(ActivationCovariance<double>(0), ArgumentError);
}

TEST_CASE_TEMPLATE("corda: the triplets of W·C, against Eigen and an explicit inverse", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  for (const auto& shape : {std::pair<Index, Index>{30, 20}, {20, 30}})
    for (const CordaMode mode : {CordaMode::instruction, CordaMode::knowledge}) {
      const Index m = shape.first, n = shape.second;
      CAPTURE(m);
      CAPTURE(int(mode));
      const Index r = 4, k = std::min(m, n);
      const Matrix<T> W = test::random_matrix<T>(m, n, 5), X = activations<T>(100, n, 6);
      ActivationCovariance<T> covariance(n);
      covariance.add(X.view());
      const auto init =
          corda(W, covariance, {.rank = r, .alpha = 10, .mode = mode, .svd = {.residual_tolerance = 50 * eps}});
      CHECK(init.factors.scale == T(2.5));
      CHECK(test::split_error(init, W) < 8 * eps);

      const Matrix<T> damped = covariance.damped(0.01);
      const Matrix<double> C(damped);
      const Matrix<double> WC = multiply<double>(Matrix<double>(W).view(), C.view());
      const auto d = test::oracle_svd(WC);
      const Index first = mode == CordaMode::instruction ? 0 : k - r;
      const Matrix<double> CinvV = solve(C, test::columns(d.V, first, r));
      Matrix<double> expected(m, n);
      double captured = 0;
      for (Index t = 0; t < r; ++t) {
        const double s = d.S[std::size_t(first + t)];
        captured += s * s;
        for (Index i = 0; i < m; ++i)
          for (Index j = 0; j < n; ++j) expected(i, j) += s * d.U(i, first + t) * CinvV(j, t);
      }
      // U of the last triplets is known to eps·σ₁/gap only, and s·B·A = U·Uᵀ·W inherits that.
      double gap = mode == CordaMode::instruction ? d.S[std::size_t(r - 1)] - d.S[std::size_t(r)]
                                                  : d.S[std::size_t(k - r - 1)] - d.S[std::size_t(k - r)];
      CHECK(test::norm(test::plus(test::update(init.factors), expected, -1)) <
            200 * eps * d.S[0] / gap * test::norm(W));
      CHECK(init.report.captured_energy == doctest::Approx(captured).epsilon(0.01));
      CHECK(init.report.total_energy == doctest::Approx(std::pow(test::norm(WC), 2)).epsilon(1e-4));
    }
}

TEST_CASE("corda: bf16 weights, degenerate activations, bad input") {
  const Matrix<float> X = activations<float>(10, 24, 6);  // fewer tokens than inputs: C is singular but for the damping
  ActivationCovariance<float> covariance(24);
  covariance.add(X.view());
  const Matrix<bf16> W = test::random_matrix<bf16>(32, 24, 5);
  for (const CordaMode mode : {CordaMode::instruction, CordaMode::knowledge}) {
    const auto init = corda<float, bf16>(W, covariance, {.rank = 3, .alpha = 2, .mode = mode});
    CHECK(test::split_error(init, W) * test::norm(W) == doctest::Approx(init.report.storage_error).epsilon(1e-2));
  }
  // No damping: W·C has rank 10, directions of zero have dead pairs and are named.
  const auto dead = corda(W, covariance, {.rank = 3, .alpha = 2, .mode = CordaMode::knowledge, .damping = 0});
  CHECK(dead.report.notes.find("3 of 3 singular values are zero") != std::string::npos);
  CHECK(test::split_error(dead, W) < 1e-6);

  ActivationCovariance<float> other(23);
  other.add(X.view().middle_cols(0, 23));
  CHECK_THROWS_AS((void)corda(W, other, {.rank = 3}), ShapeError);
  CHECK_THROWS_AS((void)corda(W, ActivationCovariance<float>(24), {.rank = 3}), ArgumentError);
  CHECK_THROWS_AS((void)corda(W, covariance, {.rank = 25}), ArgumentError);
  CHECK_THROWS_AS((void)corda(W, covariance, {.rank = 3, .damping = NAN}), ArgumentError);
}

TEST_CASE_TEMPLATE("streaming activation SVD: with room for all directions it is the SVD of everything", T, float,
                   double) {
  const double eps = std::numeric_limits<T>::epsilon();
  for (const bool centre : {false, true}) {
    CAPTURE(centre);
    const Index in = 10;
    const Matrix<T> X = activations<T>(90, in, 9, 2.0);
    ActivationSvd<T> stream(in, {.components = in, .centre = centre});
    stream.add(X.view().middle_rows(0, 1));
    stream.add(X.view().middle_rows(1, 44));
    stream.add(X.view().middle_rows(45, 0));
    stream.add(X.view().middle_rows(45, 45));
    CHECK(stream.tokens() == 90);
    Matrix<double> all(X);
    if (centre)
      for (Index j = 0; j < in; ++j) {
        double mean = 0;
        for (Index i = 0; i < 90; ++i) mean += all(i, j) / 90;
        for (Index i = 0; i < 90; ++i) all(i, j) -= mean;
      }
    const auto d = test::oracle_svd(all);
    REQUIRE(stream.singular_values().size() == 10);
    const auto explained = stream.explained();
    const double total = std::pow(test::norm(all), 2);
    CHECK(stream.total_energy() == doctest::Approx(total).epsilon(100 * eps));
    for (std::size_t i = 0; i < 10; ++i) {
      CHECK(std::abs(double(stream.singular_values()[i]) - d.S[i]) < 100 * eps * d.S[0]);
      CHECK(explained[i] == doctest::Approx(d.S[i] * d.S[i] / total).epsilon(1e-3));
    }
    // The first directions, one by one: relative gaps of this spectrum exceed 5 %.
    for (Index k = 0; k < 3; ++k) {
      double cosine = 0;
      for (Index j = 0; j < in; ++j) cosine += double(stream.directions()(j, k)) * d.V(j, k);
      CHECK(std::abs(cosine) > 1 - 1e5 * eps);
    }
  }
}

TEST_CASE("streaming activation SVD: truncated, it captures nearly what the whole would") {
  const Index in = 40, k = 8;
  ActivationSvd<float> stream(in, {.components = k, .centre = false, .seed = 1});
  Matrix<double> all(600, in);
  for (Index b = 0; b < 12; ++b) {
    const Matrix<float> X = activations<float>(50, in, 100 + std::uint64_t(b));
    stream.add(X.view());
    for (Index i = 0; i < 50; ++i)
      for (Index j = 0; j < in; ++j) all(50 * b + i, j) = double(X(i, j));
  }
  const auto d = test::oracle_svd(all);
  double best = 0, found = 0;
  for (Index i = 0; i < k; ++i) {
    best += d.S[std::size_t(i)] * d.S[std::size_t(i)];
    found += std::pow(double(stream.singular_values()[std::size_t(i)]), 2);
    CHECK(double(stream.singular_values()[std::size_t(i)]) <= d.S[std::size_t(i)] * (1 + 1e-5));
  }
  // What truncation can lose is the energy past k, 0.85^16 of the spectrum; the first directions lose next to nothing.
  CHECK(found > 0.97 * best);
  CHECK(stream.settled(1));
  CHECK_FALSE(stream.settled(k + 1));
  const auto init = eva(60, stream, {.rank = 4, .alpha = 2});
  CHECK(init.factors.scale == 0.5F);
  CHECK(test::norm(init.factors.B) == 0);
  const Matrix<float> At(init.factors.A.view().transposed());
  CHECK(test::orthogonality_error(At) < 1e-5);
  CHECK(init.report.total_energy == doctest::Approx(std::pow(test::norm(all), 2)).epsilon(1e-5));
  const auto white = eva(60, stream, {.rank = 4, .alpha = 2, .whiten = true});
  for (Index j = 0; j < in; ++j)
    CHECK(double(white.factors.A(2, j)) ==
          doctest::Approx(double(init.factors.A(2, j)) / std::sqrt(double(stream.singular_values()[2]))).epsilon(1e-5));
}

TEST_CASE("eva: bad input") {
  ActivationSvd<float> stream(10, {.components = 4});
  CHECK_THROWS_AS((void)eva(20, stream, {.rank = 1}), ArgumentError);  // nothing seen yet
  const Matrix<float> X = activations<float>(3, 10, 1);
  stream.add(X);
  CHECK_THROWS_WITH_AS((void)eva(20, stream, {.rank = 4}),
                       "eva: rank must not exceed the 3 directions found in 3 tokens, got 4", ArgumentError);
  CHECK_THROWS_AS((void)eva(2, stream, {.rank = 3}), ArgumentError);
  CHECK_THROWS_AS(ActivationSvd<float>(10, {.components = 11}), ArgumentError);
  CHECK_THROWS_AS(ActivationSvd<float>(0, {.components = 1}), ArgumentError);
  Matrix<float> bad = X;
  bad(0, 0) = INFINITY;
  CHECK_THROWS_AS(stream.add(bad.view()), NonFiniteError);
  CHECK(stream.tokens() == 3);
  CHECK_THROWS_AS(stream.add(X.view().middle_cols(0, 9)), ShapeError);
}

TEST_CASE("eva_ranks: the largest shares win") {
  CHECK(eva_ranks({{0.5, 0.2, 0.1}, {0.4, 0.3}, {0.05}}, 4) == std::vector<Index>{2, 2, 0});
  CHECK(eva_ranks({{0.5, 0.2}, {0.2, 0.2}}, 3) == std::vector<Index>{2, 1});  // ties: first layer first
  CHECK(eva_ranks({{0.5}, {0.2}}, 10) == std::vector<Index>{1, 1});
  CHECK(eva_ranks({}, 3).empty());
  CHECK_THROWS_AS((void)eva_ranks({{0.1, 0.2}}, 1), ArgumentError);
  CHECK_THROWS_AS((void)eva_ranks({{-0.1}}, 1), ArgumentError);
  CHECK_THROWS_AS((void)eva_ranks({{NAN}}, 1), NonFiniteError);
  CHECK_THROWS_AS((void)eva_ranks({{0.1}}, -1), ArgumentError);
}

TEST_CASE_TEMPLATE("lora_ga: directions of the gradient, base + s·B·A = W", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  std::vector<double> sigma;
  for (int i = 0; i < 12; ++i) sigma.push_back(std::pow(0.7, i));
  const test::KnownMatrix G = test::known_matrix(40, 30, sigma, 3);
  const Matrix<T> W = test::random_matrix<T>(40, 30, 4), gradient(G.W);
  const auto init = lora_ga(W, gradient, {.rank = 4, .alpha = 12, .gamma = 9, .svd = {.residual_tolerance = 50 * eps}});
  CHECK(init.factors.scale == T(3));
  CHECK(test::split_error(init, W) < 8 * eps);
  // A holds v₁…v₄ and B holds u₅…u₈, each of length 40^¼/√9, up to signs.
  const double length = std::pow(40.0, 0.25) / 3;
  for (Index k = 0; k < 4; ++k) {
    double a = 0, b = 0;
    for (Index j = 0; j < 30; ++j) a += double(init.factors.A(k, j)) * G.V(j, k);
    for (Index i = 0; i < 40; ++i) b += double(init.factors.B(i, k)) * G.U(i, 4 + k);
    CHECK(std::abs(a) == doctest::Approx(length).epsilon(1e4 * eps));
    CHECK(std::abs(b) == doctest::Approx(length).epsilon(1e4 * eps));
  }
  // The first step of gradient descent on A and B moves s·B·A along −s²(B·Bᵀ·G + G·Aᵀ·A)·η: with orthonormal directions
  // of length c that is −s²c²η times the best rank-2r approximation of G, as the method promises.
  const Matrix<double> A(init.factors.A), B(init.factors.B);
  const Matrix<double> BtG = multiply<double>(B.view().transposed(), G.W.view());
  const Matrix<double> GAt = multiply<double>(G.W.view(), A.view().transposed());
  const Matrix<double> first = multiply<double>(B.view(), BtG.view()), second = multiply<double>(GAt.view(), A.view());
  Matrix<double> best(40, 30);
  for (Index k = 0; k < 8; ++k)
    for (Index i = 0; i < 40; ++i)
      for (Index j = 0; j < 30; ++j) best(i, j) += length * length * sigma[std::size_t(k)] * G.U(i, k) * G.V(j, k);
  CHECK(test::norm(test::plus(test::plus(first, second), best, -1)) < 1e4 * eps * test::norm(best));

  CHECK_THROWS_AS((void)lora_ga(W, gradient, {.rank = 16}), ArgumentError);
  CHECK_THROWS_AS((void)lora_ga(W, gradient, {.rank = 4, .gamma = 0}), ArgumentError);
  CHECK_THROWS_AS((void)lora_ga(W, Matrix<T>(gradient.view().transposed()).view(), {.rank = 4}), ShapeError);
  const Matrix<T> zero(40, 30);
  CHECK_THROWS_AS((void)lora_ga(W, zero, {.rank = 4}), ArgumentError);
  Matrix<T> bad = gradient;
  bad(2, 2) = T(NAN);
  CHECK_THROWS_AS((void)lora_ga(W, bad, {.rank = 4}), NonFiniteError);
}

TEST_CASE_TEMPLATE("a covariance collected elsewhere stands for the activations", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  const Index in = 14, tokens = 80;
  const Matrix<T> X = activations<T>(tokens, in, 21), W = test::random_matrix<T>(18, in, 22);
  Matrix<T> mean = multiply<T>(X.view().transposed(), X.view());
  for (Index i = 0; i < mean.size(); ++i) mean.data()[i] /= T(tokens);
  ActivationCovariance<T> seen(in);
  seen.add(X.view());
  auto given = ActivationCovariance<T>::from_mean(mean, tokens);
  CHECK(test::deviation(given.damped(0.02), seen.damped(0.02)) < 16 * eps);
  seen.add(X.view().middle_rows(0, 20));  // and goes on from there with the right weight
  given.add(X.view().middle_rows(0, 20));
  CHECK(given.tokens() == 100);
  CHECK(test::deviation(given.damped(0.02), seen.damped(0.02)) < 16 * eps);

  const ActivationSvdOptions options{.components = 5, .centre = false};
  ActivationSvd<T> streamed(in, options);
  streamed.add(X.view());
  const auto direct = ActivationSvd<T>::from_covariance(mean, tokens, options);
  // X·Xᵀ has the squares of the singular values: what is eps·σ₁² there is eps·σ₁²/σ_k here. The subspace's angle is
  // that over the gap; both iterations stop at 1e-6·σ₁ or better, so a thousandth is far from either.
  for (std::size_t k = 0; k < 5; ++k)
    CHECK(double(direct.singular_values()[k]) == doctest::Approx(double(streamed.singular_values()[k])).epsilon(1e-3));
  CHECK(direct.total_energy() == doctest::Approx(streamed.total_energy()).epsilon(1e-5));
  CHECK(direct.tokens() == tokens);
  const Matrix<T> cross = multiply<T>(streamed.directions().transposed(), direct.directions());
  for (Index k = 0; k < 5; ++k) CHECK(std::abs(double(cross(k, k))) == doctest::Approx(1).epsilon(1e-3));
  const auto init = eva(18, direct, {.rank = 3, .alpha = 3});
  CHECK(init.factors.A.rows() == 3);

  using Covariance = ActivationCovariance<T>;
  using Directions = ActivationSvd<T>;
  CHECK_THROWS_AS((void)Covariance::from_mean(X, tokens), ShapeError);
  CHECK_THROWS_AS((void)Covariance::from_mean(mean, 0), ArgumentError);
  CHECK_THROWS_AS((void)Directions::from_covariance(mean, tokens, {.components = 15, .centre = false}), ArgumentError);
  CHECK_THROWS_AS((void)Directions::from_covariance(mean, tokens, {.components = 5}), ArgumentError);  // centred
  Matrix<T> crooked = mean;
  crooked(2, 3) += mean(2, 2);
  CHECK_THROWS_AS((void)Covariance::from_mean(crooked, tokens), ArgumentError);
  CHECK_THROWS_AS((void)Directions::from_covariance(crooked, tokens, options), ArgumentError);
  Matrix<T> below(in, in);  // a correlation beyond 1
  below(0, 1) = below(1, 0) = T(1);
  CHECK_THROWS_AS((void)Covariance::from_mean(below, tokens), ArgumentError);
  // Every pair of the first three is possible, all three together are not: the eigenvalue 1 − 2·0.6 is negative.
  for (Index i = 0; i < in; ++i)
    for (Index j = 0; j < in; ++j) below(i, j) = T(i == j ? (i < 3 ? 1 : 0.01) : i < 3 && j < 3 ? -0.6 : 0);
  CHECK_THROWS_AS((void)Directions::from_covariance(below, tokens, options), ArgumentError);
  Matrix<T> broken = mean;
  broken(1, 1) = T(NAN);
  CHECK_THROWS_AS((void)Covariance::from_mean(broken, tokens), NonFiniteError);
}

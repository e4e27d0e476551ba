// SPDX-License-Identifier: Apache-2.0
// Subspace similarity, principal angles, amplification and alignment against their definitions written out.
#include "lowrank/spectrum/subspace.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <numbers>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/spectrum/alignment.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {
template <class T>
Matrix<T> random_basis(Index m, Index k, std::uint64_t seed) {
  Matrix<T> U(m, k);
  CounterRng(seed).fill_normal(U.view());
  orthonormalise(U.view());
  return U;
}
template <class T>
MatrixView<const T> c(const Matrix<T>& m) {
  return m.view();
}
}  // namespace

TEST_CASE_TEMPLATE("phi equals its definition, and is 1 for a subspace of itself", T, float, double) {
  const auto U = random_basis<T>(60, 8, 1), V = random_basis<T>(60, 5, 2);
  const auto phi = subspace_similarity(c(U), c(V));
  REQUIRE(phi.rows() == 8);
  REQUIRE(phi.cols() == 5);
  for (Index i : {1, 4, 8})
    for (Index j : {1, 5}) {
      double sum = 0;
      for (Index a = 0; a < i; ++a)
        for (Index b = 0; b < j; ++b) {
          double d = 0;
          for (Index r = 0; r < 60; ++r) d += double(U(r, a)) * double(V(r, b));
          sum += d * d;
        }
      CHECK(phi(i - 1, j - 1) == doctest::Approx(sum / double(std::min(i, j))).epsilon(1e-5));
    }
  const auto self = subspace_similarity(c(U), c(U));
  for (Index i = 0; i < 8; ++i)
    for (Index j = 0; j < 8; ++j) CHECK(self(i, j) == doctest::Approx(1).epsilon(1e-5));
  CHECK_THROWS_AS(subspace_similarity(c(U), c(random_basis<T>(59, 5, 2))), ShapeError);
  Matrix<T> skewed = U;
  skewed(0, 0) += T(0.1);
  CHECK_THROWS_AS(subspace_similarity(c(skewed), c(V)), ArgumentError);
}

TEST_CASE("principal angles of planes built with known angles, tiny and right ones included") {
  const std::vector<double> angles{0, 1e-12, 1e-7, 0.3, std::numbers::pi / 4, 1.2, std::numbers::pi / 2};
  const Index p = Index(angles.size()), m = 40;
  const auto Q = random_basis<double>(m, 2 * p, 3);
  Matrix<double> U(m, p), V(m, p);
  for (Index j = 0; j < p; ++j)
    for (Index i = 0; i < m; ++i) {
      U(i, j) = Q(i, j);
      V(i, j) = std::cos(angles[std::size_t(j)]) * Q(i, j) + std::sin(angles[std::size_t(j)]) * Q(i, p + j);
    }
  const auto found = principal_angles(c(U), c(V));
  REQUIRE(Index(found.size()) == p);
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(std::abs(found[i] - angles[i]) < 1e-14);
  // Angles belong to the spaces, not to their bases or their order.
  const auto R = random_basis<double>(p, p, 4);
  const auto rotated = multiply<double>(U.view(), R.view());
  const auto again = principal_angles(c(V), c(rotated));
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(std::abs(again[i] - angles[i]) < 1e-14);
  double grassmann = 0, chordal = 0;
  for (const double t : angles) {
    grassmann += t * t;
    chordal += std::sin(t) * std::sin(t);
  }
  CHECK(grassmann_distance(found) == doctest::Approx(std::sqrt(grassmann)));
  CHECK(chordal_distance(found) == doctest::Approx(std::sqrt(chordal)));
  // ‖UUᵀ − VVᵀ‖_F = √2 · chordal
  double difference = 0;
  const auto PU = multiply<double>(U.view(), U.view().transposed()),
             PV = multiply<double>(V.view(), V.view().transposed());
  for (Index i = 0; i < PU.size(); ++i) difference += std::pow(PU.data()[i] - PV.data()[i], 2);
  CHECK(std::sqrt(difference / 2) == doctest::Approx(chordal_distance(found)).epsilon(1e-12));
}

TEST_CASE("spaces of different dimensions, and the whole space") {
  const auto U = random_basis<double>(12, 12, 5), V = random_basis<double>(12, 3, 6);
  for (const double t : principal_angles(c(U), c(V))) CHECK(t < 1e-14);
  for (const double t : principal_angles(c(V), c(U))) CHECK(t < 1e-14);
  CHECK(principal_angles(c(V), c(U)).size() == 3);
}

TEST_CASE_TEMPLATE("amplification and alignment equal their definitions on dense matrices", T, float, double) {
  const Index m = 30, n = 44, r = 4, K = 9;
  Matrix<T> W(m, n);
  CounterRng(7).fill_normal(W.view());
  LoraFactors<T> f{Matrix<T>(r, n), Matrix<T>(m, r), T(0.7)};
  CounterRng(8).fill_normal(f.A.view());
  CounterRng(9).fill_normal(f.B.view());
  const auto delta = svd(f);
  const auto D = multiply<T>(f.B.view(), f.A.view());
  double norm = 0, seen = 0;
  for (Index i = 0; i < D.size(); ++i) norm += std::pow(0.7 * double(D.data()[i]), 2);
  const auto oracle = test::oracle_svd(D);
  for (Index i = 0; i < r; ++i)
    for (Index j = 0; j < r; ++j) {
      double x = 0;
      for (Index a = 0; a < m; ++a)
        for (Index b = 0; b < n; ++b) x += oracle.U(a, i) * double(W(a, b)) * oracle.V(b, j);
      seen += x * x;
    }
  CHECK(amplification_factor(c(W), delta) == doctest::Approx(std::sqrt(norm / seen)).epsilon(1e-4));

  const auto full = test::oracle_svd(W);
  Svd<T> top{Matrix<T>(full.U.view().middle_cols(0, K)), {}, Matrix<T>(full.V.view().middle_cols(0, K))};
  for (Index k = 0; k < K; ++k) top.S.push_back(T(full.S[std::size_t(k)]));
  const auto a = alignment(top, delta);
  REQUIRE(Index(a.left.size()) == K);
  for (const Index k : {Index(1), K}) {
    double left = 0, right = 0, both = 0;
    for (Index i = 0; i < k; ++i) {
      for (Index b = 0; b < n; ++b) {
        double x = 0;
        for (Index q = 0; q < m; ++q) x += full.U(q, i) * 0.7 * double(D(q, b));
        left += x * x;
      }
      for (Index q = 0; q < m; ++q) {
        double x = 0;
        for (Index b = 0; b < n; ++b) x += 0.7 * double(D(q, b)) * full.V(b, i);
        right += x * x;
      }
      for (Index j = 0; j < k; ++j) {
        double x = 0;
        for (Index q = 0; q < m; ++q)
          for (Index b = 0; b < n; ++b) x += full.U(q, i) * 0.7 * double(D(q, b)) * full.V(b, j);
        both += x * x;
      }
    }
    CHECK(a.left[std::size_t(k - 1)] == doctest::Approx(left / norm).scale(0).epsilon(1e-4));
    CHECK(a.right[std::size_t(k - 1)] == doctest::Approx(right / norm).scale(0).epsilon(1e-4));
    CHECK(a.both[std::size_t(k - 1)] == doctest::Approx(both / norm).scale(0).epsilon(1e-4));
  }
  f.scale = 0;
  CHECK(amplification_factor(c(W), svd(f)) == 0);
  CHECK(alignment(top, svd(f)).left.back() == 0);
}

TEST_CASE_TEMPLATE("amplification and alignment refuse what has no answer", T, float, double) {
  const Index m = 12, n = 20, r = 3;
  Matrix<T> W(m, n);
  CounterRng(7).fill_normal(W.view());
  LoraFactors<T> f{Matrix<T>(r, n), Matrix<T>(m, r), T(0.7)};
  CounterRng(8).fill_normal(f.A.view());
  CounterRng(9).fill_normal(f.B.view());
  const Svd<T> good = svd(f);
  const auto full = test::oracle_svd(W);
  Svd<T> top{Matrix<T>(full.U.view().middle_cols(0, 4)), {1, 1, 1, 1}, Matrix<T>(full.V.view().middle_cols(0, 4))};
  REQUIRE(std::isfinite(amplification_factor(c(W), good)));
  REQUIRE_NOTHROW(alignment(top, good));
  const auto both_refuse = [&](const Svd<T>& delta, auto error, const char* what) {
    using E = decltype(error);
    CHECK_THROWS_WITH_AS(amplification_factor(c(W), delta), doctest::Contains(what), E);
    CHECK_THROWS_WITH_AS(alignment(top, delta), doctest::Contains(what), E);
  };
  Svd<T> bad = good;
  for (Index i = 0; i < bad.U.size(); ++i) bad.U.data()[i] *= 3;
  both_refuse(bad, ArgumentError(""), "columns of U of the update must be orthonormal");
  bad = good;
  for (Index i = 0; i < n; ++i) bad.V(i, 1) = bad.V(i, 0);
  both_refuse(bad, ArgumentError(""), "columns of V of the update must be orthonormal");
  for (const T x : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity()}) {
    bad = good;
    bad.U(2, 1) = x;
    both_refuse(bad, NonFiniteError(""), "U of the update");
    bad = good;
    bad.V(0, 0) = x;
    both_refuse(bad, NonFiniteError(""), "V of the update");
    bad = good;
    bad.S[1] = x;
    both_refuse(bad, NonFiniteError(""), "singular value 1");
    Matrix<T> broken = W;
    broken(3, 4) = x;
    CHECK_THROWS_WITH_AS(amplification_factor(c(broken), good), doctest::Contains("W must be finite"), NonFiniteError);
  }
  bad = good;
  bad.S[2] = T(-1);
  both_refuse(bad, ArgumentError(""), "singular value 2");
  Svd<T> tilted = top;
  for (Index i = 0; i < m; ++i) tilted.U(i, 0) *= 2;
  CHECK_THROWS_AS(alignment(tilted, good), ArgumentError);
  // An update of no rank has a basis all the same, and amplifies nothing.
  LoraFactors<T> flat = f;
  for (Index j = 0; j < n; ++j) flat.A(2, j) = flat.A(1, j);
  CHECK(std::isfinite(amplification_factor(c(W), svd(flat))));
  for (Index i = 0; i < flat.B.size(); ++i) flat.B.data()[i] = 0;
  CHECK(amplification_factor(c(W), svd(flat)) == 0);
  CHECK(alignment(top, svd(flat)).both.back() == 0);
}

// SPDX-License-Identifier: Apache-2.0
// The residual base, and OLoRA on it: every storage and order, in place, against sums in long double.
#include "lowrank/init/residual.hpp"

#include <doctest/doctest.h>

#include "lowrank/init/olora.hpp"
#include "support/compare.hpp"
#include "support/decomposition_checks.hpp"

using namespace lowrank;
using test::frobenius;

namespace {

template <class T>
LoraFactors<T> random_factors(Index m, Index n, Index r, std::uint64_t seed, T scale) {
  return {test::random_matrix<T>(r, n, seed), test::random_matrix<T>(m, r, seed + 1), scale};
}

/// W − s·B·A entry by entry in long double.
template <class S, class T>
Matrix<double> expected_residual(const MatrixView<const S>& W, const LoraFactors<T>& f) {
  Matrix<double> out(W.rows(), W.cols());
  for (Index i = 0; i < W.rows(); ++i)
    for (Index j = 0; j < W.cols(); ++j) {
      long double sum = 0;
      for (Index k = 0; k < f.rank(); ++k) sum += (long double)(f.B(i, k)) * (long double)(f.A(k, j));
      out(i, j) = double((long double)(T(W(i, j))) - (long double)(f.scale) * sum);
    }
  return out;
}

/// base == W − s·B·A to the rounding of T, and of Out, whatever the orders.
template <class S, class T, class Out>
void check_residual(Index m, Index n, Index r, bool w_col_major, bool out_col_major) {
  CAPTURE(m);
  CAPTURE(n);
  Matrix<S> storage = w_col_major ? test::random_matrix<S>(n, m, 1) : test::random_matrix<S>(m, n, 1);
  const auto W = w_col_major ? MatrixView<const S>(storage.view()).transposed() : MatrixView<const S>(storage.view());
  const auto f = random_factors<T>(m, n, r, 2, T(0.75));
  Matrix<Out> target = out_col_major ? Matrix<Out>(n, m) : Matrix<Out>(m, n);
  const auto base = out_col_major ? target.view().transposed() : target.view();
  const ResidualNorms norms = residual_base(W, f, base);
  const Matrix<double> expected = expected_residual(W, f);

  // Entries up to some 20; each carries r + 2 roundings in T and one in Out.
  const double unit_t = std::numeric_limits<T>::epsilon(),
               unit_out = sizeof(Out) == 2 ? 0x1p-8 : double(std::numeric_limits<T>::epsilon());
  double lost = 0;
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      const double d = std::abs(double(T(base(i, j))) - expected(i, j));
      CHECK(d <= double(r + 2) * unit_t * 30 + unit_out * std::abs(expected(i, j)));
      lost += d * d;
    }
  CHECK(norms.residual == doctest::Approx(frobenius(expected)).epsilon(1e-5));
  if (sizeof(Out) == 2)
    CHECK(norms.storage_error == doctest::Approx(std::sqrt(lost)).epsilon(1e-3));
  else
    CHECK(norms.storage_error == 0);
}

}  // namespace

TEST_CASE("residual base in every storage and order") {
  for (const bool w_col : {false, true})
    for (const bool out_col : {false, true}) {
      CAPTURE(w_col);
      CAPTURE(out_col);
      check_residual<float, float, float>(23, 31, 5, w_col, out_col);
      check_residual<double, double, double>(23, 31, 5, w_col, out_col);
      check_residual<bf16, float, bf16>(23, 31, 5, w_col, out_col);
      check_residual<f16, float, float>(23, 31, 5, w_col, out_col);
      check_residual<float, float, bf16>(23, 31, 5, w_col, out_col);
      check_residual<float, float, float>(1, 17, 1, w_col, out_col);
      check_residual<float, float, float>(17, 1, 1, w_col, out_col);
    }
}

TEST_CASE("more rows than one panel holds") {
  // A panel is 4 MiB: 4096 floats a row make it 256 rows.
  const Index m = 600, n = 4096;
  const auto W = test::random_matrix<float>(m, n, 3);
  const auto f = random_factors<float>(m, n, 3, 4, 0.5F);
  Matrix<float> base(m, n);
  (void)residual_base(MatrixView<const float>(W.view()), f, base.view());
  double worst = 0;
  for (const Index i : {Index(0), Index(255), Index(256), Index(511), Index(512), Index(599)})
    for (Index j = 0; j < n; ++j) {
      double sum = 0;
      for (Index k = 0; k < 3; ++k) sum += double(f.B(i, k)) * double(f.A(k, j));
      worst = std::max(worst, std::abs(double(base(i, j)) - (double(W(i, j)) - 0.5 * sum)));
    }
  CHECK(worst < 5 * 0x1p-23 * 20);
}

TEST_CASE("in place, and refused when the overlap is anything else") {
  auto W = test::random_matrix<float>(40, 50, 5);
  const Matrix<float> kept = W;
  const auto f = random_factors<float>(40, 50, 4, 6, 2.0F);
  Matrix<float> apart(40, 50);
  (void)residual_base(MatrixView<const float>(kept.view()), f, apart.view());
  (void)residual_base(MatrixView<const float>(W.view()), f, W.view());
  CHECK(test::same_bits(W, apart));
  const auto square = random_factors<float>(30, 30, 4, 6, 2.0F);
  const auto shifted = W.view().block(1, 0, 30, 30);
  CHECK_THROWS_AS((void)residual_base(MatrixView<const float>(W.view().block(0, 0, 30, 30)), square, shifted),
                  ShapeError);
}

TEST_CASE("bad input to residual_base") {
  auto W = test::random_matrix<float>(6, 7, 5);
  Matrix<float> base(6, 7);
  CHECK_THROWS_AS(
      (void)residual_base(MatrixView<const float>(W.view()), random_factors<float>(7, 6, 2, 1, 1.0F), base.view()),
      ShapeError);
  Matrix<float> wrong(7, 6);
  CHECK_THROWS_AS(
      (void)residual_base(MatrixView<const float>(W.view()), random_factors<float>(6, 7, 2, 1, 1.0F), wrong.view()),
      ShapeError);
  W(2, 3) = NAN;
  CHECK_THROWS_AS(
      (void)residual_base(MatrixView<const float>(W.view()), random_factors<float>(6, 7, 2, 1, 1.0F), base.view()),
      NonFiniteError);
  W(2, 3) = 1e6F;  // beyond f16, not beyond float
  Matrix<f16> narrow(6, 7);
  CHECK_THROWS_WITH_AS(
      (void)residual_base(MatrixView<const float>(W.view()), random_factors<float>(6, 7, 2, 1, 1.0F), narrow.view()),
      doctest::Contains("range of its storage type"), ArgumentError);
  Matrix<float> none(0, 7);
  CHECK(residual_base(MatrixView<const float>(none.view()), random_factors<float>(0, 7, 2, 1, 1.0F), none.view())
            .residual == 0);
}

TEST_CASE_TEMPLATE("olora: B has the columns of Q, base + s·B·A = W", T, float, double) {
  for (const auto& shape : {std::array<Index, 3>{40, 60, 7}, {60, 40, 7}, {9, 9, 9}, {1, 12, 1}, {12, 1, 1}}) {
    const Index m = shape[0], n = shape[1], r = shape[2];  // Clang 14 cannot capture structured bindings
    CAPTURE(m);
    CAPTURE(n);
    const auto W = test::random_matrix<T>(m, n, 11);
    const auto init = olora(W, {.rank = r, .alpha = 3 * double(r)});
    const auto& f = init.factors;
    CHECK(f.scale == T(3));
    // The oracle: modified Gram–Schmidt in long double, twice, columns in order. Unique up to signs.
    std::vector<std::vector<long double>> q;
    for (Index j = 0; j < r; ++j) {
      std::vector<long double> v(static_cast<std::size_t>(m));
      for (Index i = 0; i < m; ++i) v[std::size_t(i)] = (long double)(W(i, j));
      for (int round = 0; round < 2; ++round)
        for (const auto& u : q) {
          long double dot = 0;
          for (std::size_t i = 0; i < v.size(); ++i) dot += u[i] * v[i];
          for (std::size_t i = 0; i < v.size(); ++i) v[i] -= dot * u[i];
        }
      long double norm = 0;
      for (const long double x : v) norm += x * x;
      for (long double& x : v) x /= std::sqrt(norm);
      q.push_back(v);
    }
    const double eps = std::numeric_limits<T>::epsilon();
    for (Index j = 0; j < r; ++j) {
      double cosine = 0;
      for (Index i = 0; i < m; ++i) cosine += double(f.B(i, j)) * double(q[std::size_t(j)][std::size_t(i)]);
      // The 9×9 case has condition numbers of some hundred; the angle grows with it, its cosine with its square.
      CHECK(std::abs(std::abs(cosine) - 1) < 2000 * eps);
      for (Index i = j + 1; i < r; ++i) CHECK(f.A(i, j) == T(0));
    }
    double worst = 0, largest = 0;
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) {
        double sum = double(init.base(i, j));
        for (Index k = 0; k < r; ++k) sum += double(f.scale) * double(f.B(i, k)) * double(f.A(k, j));
        worst = std::max(worst, std::abs(sum - double(W(i, j))));
        largest = std::max(largest, std::abs(double(W(i, j))));
      }
    CHECK(worst <= 20 * double(r + 4) * eps * largest);
    CHECK(init.report.total_energy == doctest::Approx(detail::squared_norm(W.view())));
  }
}

TEST_CASE("olora: storage narrower than arithmetic is accounted for") {
  const auto W = test::random_matrix<bf16>(48, 64, 3);
  const auto init = olora<float, bf16>(W, {.rank = 8, .alpha = 4, .factor_storage = FactorStorage::bf16});
  const auto& f = init.factors;
  for (Index i = 0; i < f.A.size(); ++i) CHECK(float(bf16(f.A.data()[i])) == f.A.data()[i]);
  for (Index i = 0; i < f.B.size(); ++i) CHECK(float(bf16(f.B.data()[i])) == f.B.data()[i]);
  double lost = 0;
  for (Index i = 0; i < 48; ++i)
    for (Index j = 0; j < 64; ++j) {
      double sum = double(float(init.base(i, j)));
      for (Index k = 0; k < 8; ++k) sum += double(f.scale) * double(f.B(i, k)) * double(f.A(k, j));
      lost += std::pow(sum - double(float(W(i, j))), 2);
    }
  CHECK(init.report.storage_error == doctest::Approx(std::sqrt(lost)).epsilon(1e-3));
  CHECK(init.report.storage_error < 0x1p-8 * init.report.residual_norm);
}

TEST_CASE("olora: dependent leading columns, huge entries, bad input") {
  Matrix<double> W(6, 5);
  for (Index i = 0; i < 6; ++i) W(i, 1) = W(i, 0) = 1e200 * double(i + 1);  // column 1 repeats column 0, 2… are zero
  const auto init = olora(W, {.rank = 3, .alpha = 3});
  const Matrix<double> gram = multiply<double>(init.factors.B.view().transposed(), init.factors.B.view());
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 3; ++j) CHECK(std::abs(gram(i, j) - double(i == j)) < 1e-14);
  const Matrix<double> product = multiply<double>(init.factors.B.view(), init.factors.A.view());
  CHECK(test::deviation(product, W) < 1e-14);

  auto bad = test::random_matrix<float>(6, 5, 1);
  bad(0, 4) = INFINITY;
  CHECK_THROWS_AS((void)olora(bad, {.rank = 2}), NonFiniteError);
  bad(0, 4) = 1;
  bad(3, 0) = NAN;
  CHECK_THROWS_AS((void)olora(bad, {.rank = 2}), NonFiniteError);
  CHECK_THROWS_AS((void)olora(bad, {.rank = 6}), ArgumentError);
  CHECK_THROWS_AS((void)olora(bad, {.rank = 2, .alpha = -1}), ArgumentError);
}

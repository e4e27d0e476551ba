// SPDX-License-Identifier: Apache-2.0
// Operators against the matrices they stand for, and truncated_svd on each kind of them.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "lowrank/linalg/factor_operators.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "support/capture.hpp"
#include "support/decomposition_checks.hpp"
#include "support/oracle.hpp"

using namespace lowrank;
using namespace test;

namespace {

/// A matrix in the order asked for, with a gap between its lines.
template <class T>
struct Stored {
  Matrix<T> memory;
  MatrixView<const T> view;
  template <class U>
  Stored(const Matrix<U>& A, Order order, Index gap = 3) {
    const Index m = A.rows(), n = A.cols();
    const bool rows = order == Order::row_major;
    memory = Matrix<T>(rows ? m : n, (rows ? n : m) + gap);
    const MatrixView<T> v = view_of(memory.data(), m, n, order, memory.cols());
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) v(i, j) = T(A(i, j));
    view = v;
  }
};

/// apply, apply_adjoint, apply_gram and the norm against a dense matrix, for X and Y in both orders and many widths.
template <class T, class Op>
void check_operator(const Op& op, const Matrix<double>& A) {
  static_assert(LinearOperator<Op, T>);
  const Index m = A.rows(), n = A.cols();
  REQUIRE(Index(op.rows()) == m);
  REQUIRE(Index(op.cols()) == n);
  const double eps = double(std::numeric_limits<T>::epsilon()), norm = frobenius(A);
  // Entries of a product are sums of √n·‖A‖-sized terms at worst; 16 for operators that are several products.
  const auto unit = [&](Index k) {
    return 16 * eps * std::sqrt(double(std::max(m, n) * std::max<Index>(1, k))) * (norm + 1);
  };
  for (const Index k : {1, 2, 3, 4, 7, 16, 19, 70})
    for (const Order order : {Order::row_major, Order::col_major}) {
      CAPTURE(k);
      const Matrix<T> X = random_matrix<T>(n, k, 1), G = random_matrix<T>(m, k, 2);
      const Stored<T> x(X, order), g(G, order);
      Stored<T> y(Matrix<T>(m, k), order, 1), z(Matrix<T>(n, k), order, 2);
      const auto out = [&](Stored<T>& s) {
        return MatrixView<T>(s.memory.data(), s.view.rows(), s.view.cols(), s.view.row_stride(), s.view.col_stride());
      };
      for (Stored<T>* s : {&y, &z}) std::fill_n(s->memory.data(), s->memory.size(), T(NAN));
      op.apply(x.view, out(y));
      op.apply_adjoint(g.view, out(z));
      CHECK(max_difference(product(A, X), Matrix<double>(y.view)) <= unit(k));
      CHECK(max_difference(product(transpose(A), G), Matrix<double>(z.view)) <= unit(k));
      if constexpr (HasGram<Op, T>) {
        const bool right = op.gram_side() == GramSide::right;
        std::fill_n(y.memory.data(), y.memory.size(), T(NAN));
        std::fill_n(z.memory.data(), z.memory.size(), T(NAN));
        if (right)
          op.apply_gram(x.view, out(y), out(z));
        else
          op.apply_gram(g.view, out(z), out(y));
        const Matrix<double> B = right ? A : transpose(A);
        const Matrix<double> first = product(B, right ? X : G), second = product(transpose(B), first);
        CHECK(max_difference(first, Matrix<double>(right ? y.view : z.view)) <= unit(k));
        CHECK(max_difference(second, Matrix<double>(right ? z.view : y.view)) <= 4 * unit(k) * (norm + 1));
      }
    }
  if constexpr (HasFrobeniusNorm<Op>)
    CHECK(op.frobenius_norm_squared() == doctest::Approx(norm * norm).epsilon(64 * eps));
  CHECK(adjoint_error<T>(op, 3) < 64 * eps * std::sqrt(double(std::max(m, n))));
}

template <class T>
void check_truncated(const TruncatedSvd<T>& r, const Matrix<double>& A, Index k, double energy) {
  const auto exact = oracle_singular_values(A);
  CHECK(r.converged);
  for (Index i = 0; i < k; ++i)
    CHECK(double(r.S[std::size_t(i)]) == doctest::Approx(exact[std::size_t(i)]).epsilon(1e-4));
  if (std::isfinite(energy)) CHECK(r.total_energy == doctest::Approx(energy).epsilon(1e-5));
}

constexpr TruncatedSvdOptions precise{.energy_tolerance = 0, .residual_tolerance = 3e-6};

/// A base that yields no panels: only forward and backward.
struct PlainBase {
  DenseBase<float> inner;
  [[nodiscard]] Index rows() const { return inner.rows(); }
  [[nodiscard]] Index cols() const { return inner.cols(); }
  void forward(MatrixView<const float> X, MatrixView<float> Y, Update u) const { inner.forward(X, Y, u); }
  void backward(MatrixView<const float> X, MatrixView<float> Y, Update u) const { inner.backward(X, Y, u); }
};

}  // namespace

TEST_CASE_TEMPLATE("dense operators", T, float, double) {
  const Index shapes[][2] = {{1, 1}, {1, 40}, {40, 1}, {3, 2}, {17, 33}, {130, 70}, {300, 1100}, {513, 64}};
  for (const auto& [m, n] : shapes)
    for (const Order order : {Order::row_major, Order::col_major}) {
      CAPTURE_BOUND(m);
      CAPTURE_BOUND(n);
      const Matrix<T> A = random_matrix<T>(m, n, 5);
      const Stored<T> s(A, order);
      check_operator<T>(dense_operator<T, T>(s.view), Matrix<double>(A));
    }
}

TEST_CASE_TEMPLATE("two-byte storage is the widened matrix", S, bf16, f16) {
  for (const Order order : {Order::row_major, Order::col_major}) {
    const Stored<S> s(random_matrix<float>(190, 170, 5), order);
    const Matrix<double> A(s.view);
    check_operator<float>(dense_operator<float, S>(s.view), A);
    const auto r = truncated_svd(s.view, 6, precise);
    static_assert(std::same_as<std::remove_cvref_t<decltype(r)>, TruncatedSvd<float>>);
    check_truncated(r, A, 6, std::pow(frobenius(A), 2));
  }
}

TEST_CASE("differences of checkpoints, storages and orders mixed") {
  const Matrix<float> base = random_matrix<float>(180, 160, 1), step = random_matrix<float>(180, 160, 2);
  Matrix<float> tuned = base;
  for (Index i = 0; i < tuned.size(); ++i) tuned.data()[i] += 0.05F * step.data()[i];
  const auto difference = [](const auto& a, const auto& b) {
    Matrix<double> d(a.view.rows(), a.view.cols());
    for (Index i = 0; i < d.rows(); ++i)
      for (Index j = 0; j < d.cols(); ++j) d(i, j) = double(float(a.view(i, j)) - float(b.view(i, j)));
    return d;
  };
  for (const Order first : {Order::row_major, Order::col_major})
    for (const Order second : {Order::row_major, Order::col_major}) {
      const Stored<float> t(tuned, first), b(base, second);
      const Stored<bf16> th(tuned, first), bh(base, second);
      const Stored<f16> bf(base, second);
      check_operator<float>(difference_operator<float, float, float>(t.view, b.view), difference(t, b));
      check_operator<float>(difference_operator<float, bf16, f16>(th.view, bf.view), difference(th, bf));
      const auto op = difference_operator<float, bf16, bf16>(th.view, bh.view);
      const Matrix<double> d = difference(th, bh);
      check_truncated(truncated_svd(op, 5, precise), d, 5, std::pow(frobenius(d), 2));
    }
  const Matrix<float> other(180, 161);
  CHECK_THROWS_AS((difference_operator<float, float, float>(tuned.view(), other.view())), ShapeError);
}

TEST_CASE_TEMPLATE("scaled rows and columns, nested", T, float, double) {
  const Matrix<T> A = random_matrix<T>(150, 140, 1);
  std::vector<T> rows(150), cols(140);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = T(0.5 + double(i % 7));
  for (std::size_t i = 0; i < cols.size(); ++i) cols[i] = T(1.0 / double(1 + i % 5) - 0.3);
  Matrix<double> by_rows(A), by_cols(A), by_both(A);
  for (Index i = 0; i < 150; ++i)
    for (Index j = 0; j < 140; ++j) {
      by_rows(i, j) *= double(rows[std::size_t(i)]);
      by_cols(i, j) *= double(cols[std::size_t(j)]);
      by_both(i, j) *= double(rows[std::size_t(i)]) * double(cols[std::size_t(j)]);
    }
  for (const Order order : {Order::row_major, Order::col_major}) {
    const Stored<T> s(A, order);
    const auto op = dense_operator<T, T>(s.view);
    const std::span<const T> dr(rows), dc(cols);
    check_operator<T>(row_scaled(op, dr), by_rows);
    check_operator<T>(column_scaled(op, dc), by_cols);
    check_operator<T>(column_scaled(row_scaled(op, dr), dc), by_both);
    check_operator<T>(TransposedOperator(column_scaled(op, dc)), transpose(by_cols));
    check_truncated(truncated_svd(row_scaled(op, dr), 4, precise), by_rows, 4, std::pow(frobenius(by_rows), 2));
    CHECK_THROWS_AS(row_scaled(op, dc), ShapeError);
    CHECK_THROWS_AS(column_scaled(op, dr), ShapeError);
  }
}

TEST_CASE_TEMPLATE("products and updated weights", T, float, double) {
  const Index m = 170, n = 150, r = 9;
  LoraFactors<T> f{random_matrix<T>(r, n, 3), random_matrix<T>(m, r, 4), T(-0.7)};
  const Matrix<T> W = random_matrix<T>(m, n, 5);
  Matrix<double> update = product(f.B, f.A), sum(W);
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) sum(i, j) += (update(i, j) *= double(f.scale));
  const ProductOperator<T> product_op(f.B.view(), f.A.view(), f.scale);
  check_operator<T>(product_op, update);
  check_truncated(truncated_svd(product_op, r, precise), update, r, std::pow(frobenius(update), 2));
  CHECK_THROWS_AS(ProductOperator<T>(f.B.view(), f.B.view()), ShapeError);
  for (const Order order : {Order::row_major, Order::col_major}) {
    const Stored<T> s(W, order);
    const auto updated = updated_operator(dense_operator<T, T>(s.view), f);
    check_operator<T>(updated, sum);
    check_operator<T>(TransposedOperator(updated), transpose(sum));
    check_truncated(truncated_svd(updated, 6, precise), sum, 6, std::pow(frobenius(sum), 2));
  }
  CHECK_THROWS_AS(updated_operator(dense_operator<T, T>(W.view().transposed()), f), ShapeError);
}

TEST_CASE("frozen bases, with panels and without") {
  const Matrix<float> W = random_matrix<float>(140, 180, 5);
  const Matrix<double> exact(W);
  const DenseBase<float> panels(W.view());
  const PlainBase plain{DenseBase<float>(W.view())};
  const auto with = base_operator<float>(panels);
  const auto without = base_operator<float>(plain);
  static_assert(HasGram<decltype(with), float> && !HasGram<decltype(without), float>);
  check_operator<float>(with, exact);
  check_operator<float>(without, exact);
  check_truncated(truncated_svd(with, 5, precise), exact, 5, std::pow(frobenius(exact), 2));
  const auto r = truncated_svd(without, 5, precise);
  CHECK(std::isnan(r.total_energy));  // nobody knows it, and it says so
  check_truncated(r, exact, 5, NAN);
}

namespace {
/// An operator whose adjoint is wrong in one entry of one sign.
struct WrongAdjoint {
  using scalar = float;
  Matrix<float> A = random_matrix<float>(100, 90, 1);
  Matrix<float> B = A;
  WrongAdjoint() { B(3, 4) += 5; }
  [[nodiscard]] Index rows() const { return 100; }
  [[nodiscard]] Index cols() const { return 90; }
  void apply(MatrixView<const float> X, MatrixView<float> Y) const { gemm(1.0F, A.view(), X, Y); }
  void apply_adjoint(MatrixView<const float> X, MatrixView<float> Y) const { gemm(1.0F, B.view().transposed(), X, Y); }
};
/// One that returns NaN after a while.
struct Failing {
  using scalar = double;
  Matrix<double> A = random_matrix<double>(100, 90, 1);
  mutable int left = 5;
  [[nodiscard]] Index rows() const { return 100; }
  [[nodiscard]] Index cols() const { return 90; }
  void apply(MatrixView<const double> X, MatrixView<double> Y) const {
    gemm(1.0, A.view(), X, Y);
    if (--left == 0) Y(7, 0) = NAN;
  }
  void apply_adjoint(MatrixView<const double> X, MatrixView<double> Y) const { gemm(1.0, A.view().transposed(), X, Y); }
};
}  // namespace

TEST_CASE("a wrong adjoint and a failing operator are found out") {
  const WrongAdjoint wrong;
  CHECK_THROWS_AS(truncated_svd(wrong, 3, {.check_adjoint = true}), ArgumentError);
  CHECK(adjoint_error<float>(wrong) > 1e-3);
  CHECK_THROWS_AS(truncated_svd(Failing(), 3, {.check_adjoint = false}), NonFiniteError);
}

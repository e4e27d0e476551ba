// SPDX-License-Identifier: Apache-2.0
// Eigen types as views: same pointer, same elements, right constness, no copy; and the way back.
#include "lowrank/eigen.hpp"

#include <doctest/doctest.h>

#include "lowrank/linalg/gemm.hpp"

using lowrank::Index;
using lowrank::MatrixView;
using lowrank::Order;
using lowrank::view_of;

namespace {

template <class T, int Options>
using Dense = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Options>;

/// Element (i, j) is 100·i + j + 1, so that a wrong stride or offset shows.
template <class M>
M numbered(Index rows, Index cols) {
  M m(rows, cols);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < cols; ++j) m(i, j) = typename M::Scalar(100 * i + j + 1);
  return m;
}

/// The view and the Eigen object are the same elements at the same addresses.
template <class V, class E>
void check_same(const V& v, const E& e) {
  REQUIRE(v.rows() == e.rows());
  REQUIRE(v.cols() == e.cols());
  for (Index i = 0; i < v.rows(); ++i)
    for (Index j = 0; j < v.cols(); ++j) CHECK(&v(i, j) == &e.coeffRef(i, j));
}

template <class X>
constexpr bool accepted = lowrank::MatrixLike<X>;

}  // namespace

TEST_CASE_TEMPLATE("Eigen matrices and views of them: no copy, any order", M, Dense<float, Eigen::ColMajor>,
                   Dense<float, Eigen::RowMajor>, Dense<double, Eigen::ColMajor>, Dense<double, Eigen::RowMajor>) {
  using T = typename M::Scalar;
  const bool row_major = M::IsRowMajor;
  M m = numbered<M>(5, 7);

  SUBCASE("the whole matrix") {
    const auto v = view_of(m);
    static_assert(std::is_same_v<decltype(v), const MatrixView<T>>);
    CHECK(v.data() == m.data());
    CHECK(v.is_row_major() == row_major);
    CHECK(v.is_contiguous());
    check_same(v, m);
  }
  SUBCASE("const gives a read-only view") {
    const M& c = m;
    static_assert(std::is_same_v<decltype(view_of(c)), MatrixView<const T>>);
    check_same(view_of(c), m);
  }
  SUBCASE("blocks, also as temporaries, rows, columns") {
    const auto v = view_of(m.block(1, 2, 3, 4));
    CHECK(v.data() == &m(1, 2));
    CHECK(v.leading_dimension() == (row_major ? 7 : 5));
    CHECK_FALSE(v.is_contiguous());
    auto b = m.block(1, 2, 3, 4);
    check_same(v, b);
    check_same(view_of(m.row(3)), m.row(3));
    check_same(view_of(m.col(3)), m.col(3));
    check_same(view_of(m.topRows(2)), m.topRows(2));
    check_same(view_of(m.block(4, 6, 1, 1)), m.block(4, 6, 1, 1));
    auto nested = m.block(1, 1, 4, 5).block(1, 2, 2, 3);
    CHECK(view_of(nested).data() == &m(2, 3));
    check_same(view_of(nested), nested);
    const M& c = m;
    static_assert(std::is_same_v<decltype(view_of(c.block(1, 2, 3, 4))), MatrixView<const T>>);
  }
  SUBCASE("transposes swap the strides") {
    const auto v = view_of(m.transpose());
    CHECK(v.data() == m.data());
    CHECK(v.is_row_major() != row_major);
    for (Index i = 0; i < 7; ++i)
      for (Index j = 0; j < 5; ++j) CHECK(&v(i, j) == &m(j, i));
    check_same(view_of(m.block(1, 2, 3, 4).transpose().transpose()), m.block(1, 2, 3, 4));
  }
  SUBCASE("maps of raw memory, with an outer stride") {
    std::vector<T> raw(60, T(0));
    Eigen::Map<M, 0, Eigen::OuterStride<>> map(raw.data() + 3, 4, 5, Eigen::OuterStride<>(9));
    const auto v = view_of(map);
    CHECK(v.data() == raw.data() + 3);
    CHECK(v.leading_dimension() == 9);
    check_same(v, map);
    Eigen::Map<const M> read_only(raw.data(), 4, 5);
    static_assert(std::is_same_v<decltype(view_of(read_only)), MatrixView<const T>>);
    CHECK(view_of(Eigen::Map<M>(raw.data(), 4, 5)).data() == raw.data());
  }
  SUBCASE("references") {
    Eigen::Ref<M> whole(m);
    CHECK(view_of(whole).data() == m.data());
    Eigen::Ref<M> part(m.block(1, 2, 3, 4));
    CHECK(view_of(part).data() == &m(1, 2));
    const Eigen::Ref<const M> read_only(m);
    static_assert(std::is_same_v<decltype(view_of(read_only)), MatrixView<const T>>);
    CHECK(view_of(read_only).data() == m.data());
  }
  SUBCASE("writing through the view writes the matrix") {
    view_of(m.middleCols(2, 2))(4, 1) = T(-1);
    CHECK(m(4, 3) == T(-1));
  }
  SUBCASE("empty and one-element matrices") {
    for (const auto& [r, c] : {std::pair<Index, Index>{0, 3}, {3, 0}, {0, 0}, {1, 1}, {1, 6}, {6, 1}}) {
      M e = M::Zero(r, c);
      const auto v = view_of(e);
      CHECK(v.rows() == r);
      CHECK(v.cols() == c);
      CHECK((v.row_stride() == 1 || v.col_stride() == 1));
      CHECK(view_of(e.transpose()).rows() == c);
    }
  }
}

TEST_CASE("Eigen vectors, arrays, fixed sizes, strided vectors") {
  Eigen::VectorXf column = Eigen::VectorXf::LinSpaced(6, 1, 6);
  Eigen::RowVectorXd row = Eigen::RowVectorXd::LinSpaced(6, 1, 6);
  check_same(view_of(column), column);
  check_same(view_of(row), row);
  check_same(view_of(column.segment(2, 3)), column.segment(2, 3));

  Eigen::ArrayXXf array = Eigen::ArrayXXf::Random(3, 4);
  check_same(view_of(array), array);
  Eigen::Matrix<float, 3, 5, Eigen::RowMajor> fixed = Eigen::Matrix<float, 3, 5, Eigen::RowMajor>::Random();
  CHECK(view_of(fixed).is_row_major());
  check_same(view_of(fixed), fixed);
  Eigen::MatrixXf m = Eigen::MatrixXf::Random(4, 6);
  CHECK(view_of(m.reshaped(8, 3)).data() == m.data());

  // A vector of any spacing is a matrix with one stride of 1: the other stride is never used.
  std::vector<float> raw(40, 0.0F);
  Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<>> spaced(raw.data(), 8, Eigen::InnerStride<>(5));
  const auto v = view_of(spaced);
  check_same(v, spaced);
  CHECK(v.leading_dimension() == 5);
  CHECK_FALSE(v.is_contiguous());
  struct Named : Eigen::MatrixXf {  // a user's own subclass
    using Eigen::MatrixXf::MatrixXf;
  } named;
  named.resize(2, 3);
  CHECK(view_of(named).data() == named.data());
  static_assert(!accepted<Named>);
  check_same(view_of(m.row(2)), m.row(2));  // a row of a column-major matrix
}

TEST_CASE("an inner stride other than 1 is refused, and the message names the copy to make") {
  std::vector<float> raw(40, 0.0F);
  Eigen::Map<Eigen::MatrixXf, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> odd(
      raw.data(), 3, 4, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(10, 2));
  CHECK_THROWS_WITH_AS(view_of(odd), doctest::Contains("row stride 2 and column stride 10"), lowrank::ShapeError);
  CHECK_THROWS_WITH_AS(view_of(odd), doctest::Contains(".eval()"), lowrank::ShapeError);
}

TEST_CASE("what dangles or has no elements is refused at compile time") {
  using M = Eigen::MatrixXf;
  static_assert(accepted<M&> && accepted<const M&>);
  static_assert(!accepted<M> && !accepted<const M>);  // owning temporaries
  static_assert(accepted<decltype(std::declval<M&>().block(0, 0, 1, 1))>);
  static_assert(accepted<decltype(std::declval<M&>().transpose())>);
  static_assert(accepted<Eigen::Map<M>> && accepted<Eigen::Ref<M>>);
  static_assert(accepted<const Eigen::Ref<const M>&>);
  static_assert(!accepted<Eigen::Ref<const M>>);  // may hold a copy of its own
  static_assert(!accepted<decltype(std::declval<M&>() + std::declval<M&>())>);
  static_assert(!accepted<decltype(std::declval<M&>() * std::declval<M&>())>);
  static_assert(!accepted<decltype(std::declval<M&>().cwiseAbs())>);
  static_assert(!accepted<Eigen::MatrixXi&> && !accepted<Eigen::MatrixXcf&>);
  static_assert(lowrank::MatrixOf<M&, float> && lowrank::MatrixOf<const M&, const float>);
  static_assert(!lowrank::MatrixOf<const M&, float>);   // no writing through const
  static_assert(!lowrank::MatrixOf<M&, const double>);  // no silent conversion
  static_assert(std::is_same_v<lowrank::scalar_of<const Eigen::MatrixXd&>, double>);
}

TEST_CASE_TEMPLATE("as_eigen gives the same memory back", T, float, double) {
  SUBCASE("any order") {
    std::vector<T> raw(63);
    for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = T(i);
    for (const Order order : {Order::row_major, Order::col_major}) {
      const MatrixView<T> v = view_of(raw.data() + 2, 4, 5, order, 7);
      auto e = lowrank::as_eigen(v);
      check_same(v, e);
      auto read_only = lowrank::as_eigen(MatrixView<const T>(v));
      static_assert(std::is_same_v<decltype(read_only.data()), const T*>);
      check_same(v, read_only);
    }
  }
  SUBCASE("one order, checked") {
    std::vector<T> raw(63, T(1));
    const MatrixView<T> row = view_of(raw.data(), 4, 5, Order::row_major, 7);
    const MatrixView<T> col = view_of(raw.data(), 4, 5, Order::col_major, 7);
    check_same(row, lowrank::as_eigen<Order::row_major>(row));
    check_same(col, lowrank::as_eigen<Order::col_major>(col));
    CHECK_THROWS_WITH_AS(lowrank::as_eigen<Order::col_major>(row), doctest::Contains("expected a column-major view"),
                         lowrank::ShapeError);
    CHECK_THROWS_AS(lowrank::as_eigen<Order::row_major>(col), lowrank::ShapeError);
    // A single row or column fits both orders when its elements are adjacent.
    const MatrixView<T> one_row = row.row(2), one_col = col.col(2);
    check_same(one_row, lowrank::as_eigen<Order::row_major>(one_row));
    check_same(one_col, lowrank::as_eigen<Order::col_major>(one_col));
    check_same(row.col(2), lowrank::as_eigen<Order::row_major>(row.col(2)));
    check_same(row.block(1, 1, 1, 1), lowrank::as_eigen<Order::col_major>(row.block(1, 1, 1, 1)));
  }
  SUBCASE("a Matrix, writable and not") {
    lowrank::Matrix<T> m(3, 5);
    auto e = lowrank::as_eigen(m);
    e.setConstant(T(2));
    e(1, 4) = T(7);
    CHECK(e.data() == m.data());
    CHECK(m(1, 4) == T(7));
    CHECK(m(2, 2) == T(2));
    const lowrank::Matrix<T>& c = m;
    static_assert(std::is_same_v<decltype(lowrank::as_eigen(c).data()), const T*>);
    CHECK(lowrank::as_eigen(lowrank::Matrix<T>().view()).size() == 0);
  }
}

TEST_CASE_TEMPLATE("a Matrix copies an Eigen matrix explicitly, and widens", M, Dense<float, Eigen::ColMajor>,
                   Dense<float, Eigen::RowMajor>) {
  M m = numbered<M>(3, 4);
  const lowrank::Matrix<double> wide(m.block(1, 1, 2, 3));
  CHECK(wide.rows() == 2);
  CHECK(wide(1, 2) == 204.0);
  const lowrank::Matrix<float> flipped(m.transpose());
  CHECK(flipped(3, 2) == m(2, 3));
}

TEST_CASE("gemm on Eigen matrices of mixed orders equals Eigen's product") {
  const Dense<float, Eigen::ColMajor> a = Dense<float, Eigen::ColMajor>::Random(9, 6);
  const Dense<float, Eigen::RowMajor> b = Dense<float, Eigen::RowMajor>::Random(11, 6);
  Dense<float, Eigen::ColMajor> c(9, 11);
  lowrank::gemm(1.0F, view_of(a), view_of(b.transpose()), view_of(c));
  CHECK((c.cast<double>() - a.cast<double>() * b.cast<double>().transpose()).cwiseAbs().maxCoeff() < 6 * 6 * 1.2e-7);
}

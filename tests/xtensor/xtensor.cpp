// SPDX-License-Identifier: Apache-2.0
// xtensor types of any dimension as views: same pointer plus offset, right strides, no copy; and the way back.
#include "lowrank/xtensor.hpp"

#include <doctest/doctest.h>

#include <complex>
#include <vector>

#if __has_include(<xtensor/misc/xcomplex.hpp>)
#include <xtensor/misc/xcomplex.hpp>
#else
#include <xtensor/xcomplex.hpp>
#endif

#include "lowrank/linalg/base.hpp"

using lowrank::Index;
using lowrank::MatrixView;
using lowrank::Order;
using lowrank::ShapeError;
using lowrank::view_of;

namespace {

using xt::all;
using xt::range;
using RowMajor2 = xt::xtensor<float, 2, xt::layout_type::row_major>;
using ColMajor2 = xt::xtensor<float, 2, xt::layout_type::column_major>;
using Dynamic = xt::xarray<float>;
using DynamicLayout = xt::xarray<double, xt::layout_type::dynamic>;

template <class X>
X numbered(std::size_t rows, std::size_t cols) {
  X x = X::from_shape({rows, cols});
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < cols; ++j) x(i, j) = typename X::value_type(100 * i + j + 1);
  return x;
}

xt::xtensor<float, 3> batch(std::size_t b, std::size_t s, std::size_t in) {
  xt::xtensor<float, 3> x = xt::xtensor<float, 3>::from_shape({b, s, in});
  for (std::size_t i = 0; i < x.size(); ++i) x.flat(i) = float(i);
  return x;
}

/// The view and a two-dimensional xtensor are the same elements at the same addresses.
template <class V, class X>
void check_same(const V& v, X& x) {
  REQUIRE(v.rows() == Index(x.shape()[0]));
  REQUIRE(v.cols() == Index(x.shape()[1]));
  CHECK((v.row_stride() == 1 || v.col_stride() == 1));
  for (Index i = 0; i < v.rows(); ++i)
    for (Index j = 0; j < v.cols(); ++j) CHECK(&v(i, j) == &x(std::size_t(i), std::size_t(j)));
}

/// The view holds [batch, sequence, in] as tokens in order, at the same addresses.
template <class V, class X>
void check_tokens(const V& v, X& x) {
  const std::size_t b = x.shape()[0], s = x.shape()[1], in = x.shape()[2];
  REQUIRE(v.rows() == Index(b * s));
  REQUIRE(v.cols() == Index(in));
  for (std::size_t i = 0; i < b; ++i)
    for (std::size_t t = 0; t < s; ++t)
      for (std::size_t k = 0; k < in; ++k) CHECK(&v(Index(i * s + t), Index(k)) == &x(i, t, k));
}

template <class X>
constexpr bool accepted = lowrank::MatrixLike<X>;

}  // namespace

TEST_CASE_TEMPLATE("two dimensions: containers and views, no copy", X, RowMajor2, ColMajor2, Dynamic) {
  X x = numbered<X>(5, 7);
  SUBCASE("the container") {
    const auto v = view_of(x);
    static_assert(std::is_same_v<decltype(v), const MatrixView<float>>);
    CHECK(v.data() == x.data());
    CHECK(v.is_contiguous());
    CHECK(v.is_row_major() == (x.layout() == xt::layout_type::row_major));
    check_same(v, x);
    const X& c = x;
    static_assert(std::is_same_v<decltype(view_of(c)), MatrixView<const float>>);
  }
  SUBCASE("views carry an offset") {
    auto part = xt::view(x, range(1, 4), range(2, 6));
    CHECK(view_of(part).data() == &x(1, 2));
    check_same(view_of(part), part);
    CHECK(view_of(xt::view(x, range(1, 4), range(2, 6))).data() == &x(1, 2));  // a temporary view owns nothing
    auto nested = xt::view(part, range(1, 3), range(1, 3));
    CHECK(view_of(nested).data() == &x(2, 3));
    check_same(view_of(nested), nested);
    auto every_other_row = xt::view(x, range(0, 5, 2), all());
    if (x.layout() == xt::layout_type::row_major)
      check_same(view_of(every_other_row), every_other_row);
    else
      CHECK_THROWS_AS(view_of(every_other_row), ShapeError);
  }
  SUBCASE("a row and a column by index are one-dimensional: one row") {
    auto row = xt::view(x, 3, all());
    CHECK(view_of(row).rows() == 1);
    CHECK(view_of(row).cols() == 7);
    auto col = xt::view(x, all(), 3);
    const auto v = view_of(col);
    CHECK(v.cols() == 5);
    for (Index i = 0; i < 5; ++i) CHECK(&v(0, i) == &x(std::size_t(i), 3));
  }
  SUBCASE("strided views and transposes") {
    auto part = xt::strided_view(x, {range(1, 5), range(3, 7)});
    CHECK(view_of(part).data() == &x(1, 3));
    check_same(view_of(part), part);
    auto t = xt::transpose(x);
    CHECK(view_of(t).data() == x.data());
    check_same(view_of(t), t);
  }
  SUBCASE("writing through the view writes the container") {
    view_of(xt::view(x, range(2, 4), all()))(1, 6) = -1.0F;
    CHECK(x(3, 6) == -1.0F);
  }
}

TEST_CASE("extents of 1 have stride 0 in xtensor, and empty ones anything") {
  for (const auto& [r, c] :
       {std::pair<std::size_t, std::size_t>{1, 6}, {6, 1}, {1, 1}, {0, 4}, {4, 0}, {0, 0}, {0, 1}}) {
    RowMajor2 row = RowMajor2::from_shape({r, c});
    ColMajor2 col = ColMajor2::from_shape({r, c});
    check_same(view_of(row), row);
    check_same(view_of(col), col);
    auto whole = xt::view(row, all(), all());
    check_same(view_of(whole), whole);
  }
  RowMajor2 x = numbered<RowMajor2>(5, 7);
  auto one_row = xt::view(x, range(2, 3), all());
  check_same(view_of(one_row), one_row);
  auto one_col = xt::view(x, all(), range(2, 3));
  check_same(view_of(one_col), one_col);
  CHECK(view_of(one_col).leading_dimension() == 7);
}

TEST_CASE("[batch, sequence, in] reads as (batch·sequence) x in") {
  auto x = batch(3, 4, 5);
  const auto v = view_of(x);
  CHECK(v.data() == x.data());
  CHECK(v.is_contiguous());
  check_tokens(v, x);

  SUBCASE("some of the batch, some of the features") {
    auto part = xt::view(x, range(1, 3), all(), range(1, 4));
    check_tokens(view_of(part), part);
    CHECK(view_of(part).leading_dimension() == 5);
    auto one = xt::view(x, 2);
    CHECK(view_of(one).rows() == 4);
    CHECK(view_of(one).data() == &x(2, 0, 0));
  }
  SUBCASE("extents of 1 anywhere") {
    for (const auto& s : {std::array<std::size_t, 3>{1, 4, 5}, {3, 1, 5}, {3, 4, 1}, {1, 1, 5}, {1, 4, 1}, {3, 1, 1}}) {
      auto y = batch(s[0], s[1], s[2]);
      check_tokens(view_of(y), y);
    }
    // One token of each sequence: the sequence extent is 1, so the batch stride is the row stride.
    auto first_tokens = xt::view(x, all(), range(0, 1), all());
    check_tokens(view_of(first_tokens), first_tokens);
    CHECK(view_of(first_tokens).leading_dimension() == 20);
    auto last_tokens = xt::view(x, all(), 3, all());  // [batch, in]
    CHECK(view_of(last_tokens).data() == &x(0, 3, 0));
    CHECK(view_of(last_tokens).leading_dimension() == 20);
  }
  SUBCASE("empty batches") {
    auto y = batch(0, 4, 5);
    CHECK(view_of(y).rows() == 0);
    CHECK(view_of(y).cols() == 5);
    auto z = batch(3, 4, 0);
    CHECK(view_of(z).rows() == 12);
  }
  SUBCASE("a slice of the sequence is not evenly spaced") {
    auto part = xt::view(x, all(), range(1, 3), all());
    CHECK_THROWS_WITH_AS(view_of(part), doctest::Contains("shape (3, 2, 5) with strides (20, 5, 1)"), ShapeError);
    CHECK_THROWS_WITH_AS(view_of(part), doctest::Contains("xt::eval"), ShapeError);
    auto copy = xt::xtensor<float, 3>(part);
    check_tokens(view_of(copy), copy);
  }
  SUBCASE("a column-major batch interleaves tokens and features") {
    xt::xtensor<float, 3, xt::layout_type::column_major> y = x;
    CHECK_THROWS_AS(view_of(y), ShapeError);
  }
  SUBCASE("a transposed batch does not read as tokens in order") {
    auto t = xt::transpose(x, {1, 0, 2});
    CHECK_THROWS_AS(view_of(t), ShapeError);
  }
  SUBCASE("four dimensions and dynamic ones") {
    xt::xarray<double> y = xt::arange<double>(2 * 3 * 4 * 5).reshape({2, 3, 4, 5});
    const MatrixView<double> w = lowrank::token_view(y);
    CHECK(w.rows() == 24);
    CHECK(w(17, 3) == y(1, 1, 1, 3));
    CHECK(&w(23, 4) == &y(1, 2, 3, 4));
  }
  SUBCASE("one dimension is one row, none is an error") {
    xt::xtensor<float, 1> y = xt::arange<float>(6);
    CHECK(view_of(y).rows() == 1);
    CHECK(view_of(y).cols() == 6);
    xt::xarray<float> scalar = 3.0F;
    CHECK_THROWS_AS(view_of(scalar), ShapeError);
  }
}

TEST_CASE("a convolution's weight is folded as files fold it, or refused with both readings") {
  const xt::xtensor<float, 4> kernel = xt::arange<float>(8 * 3 * 3 * 3).reshape({8, 3, 3, 3});
  CHECK_THROWS_WITH_AS(
      (void)view_of(kernel),
      "view_of(xtensor): an array of shape (8, 3, 3, 3) may be tokens, 72x3, or a convolution's weight, "
      "8x27 as files fold it: say which, token_view(x) or weight_view(x)",
      ShapeError);
  const MatrixView<const float> w = lowrank::weight_view(kernel);
  REQUIRE(w.rows() == 8);
  REQUIRE(w.cols() == 27);
  for (std::size_t o = 0; o < 8; ++o)
    for (std::size_t i = 0; i < 3; ++i)
      for (std::size_t y = 0; y < 3; ++y)
        for (std::size_t x = 0; x < 3; ++x) CHECK(&w(Index(o), Index(9 * i + 3 * y + x)) == &kernel(o, i, y, x));
  CHECK(&lowrank::token_view(kernel)(71, 2) == &kernel(7, 2, 2, 2));
  CHECK(lowrank::token_view(kernel).rows() == 72);

  xt::xarray<double> conv1d = xt::arange<double>(4 * 2 * 5).reshape({4, 2, 5});
  const MatrixView<double> narrow = lowrank::weight_view(conv1d);
  CHECK(narrow.cols() == 10);
  CHECK(&narrow(3, 7) == &conv1d(3, 1, 2));
  auto some = xt::view(kernel, range(2, 5), all(), all(), all());  // some of the output channels
  CHECK(&lowrank::weight_view(some)(1, 4) == &kernel(3, 0, 1, 1));
  auto inputs = xt::view(kernel, all(), range(0, 2), all(), all());
  CHECK(lowrank::weight_view(inputs).leading_dimension() == 27);
  CHECK(lowrank::weight_view(inputs).cols() == 18);
  auto cut = xt::view(kernel, all(), all(), range(0, 2), all());
  CHECK_THROWS_WITH_AS((void)lowrank::weight_view(cut),
                       doctest::Contains("the trailing dimensions of an array of shape (8, 3, 2, 3)"), ShapeError);
  const xt::xtensor<float, 4, xt::layout_type::column_major> turned = kernel;
  CHECK_THROWS_AS((void)lowrank::weight_view(turned), ShapeError);
  const xt::xtensor<float, 4> pointwise = xt::ones<float>({6, 4, 1, 1});
  CHECK(lowrank::weight_view(pointwise).cols() == 4);
  CHECK(lowrank::weight_view(pointwise).is_contiguous());
  RowMajor2 plain = xt::ones<float>({3, 4});
  CHECK(lowrank::weight_view(plain).data() == view_of(plain).data());
  CHECK(lowrank::weight_view(plain).cols() == 4);
}

TEST_CASE("strides nobody supports") {
  RowMajor2 x = numbered<RowMajor2>(6, 8);
  auto sparse = xt::view(x, range(0, 6, 2), range(0, 8, 2));
  CHECK_THROWS_WITH_AS(view_of(sparse), doctest::Contains("one stride must be 1"), ShapeError);
  CHECK_THROWS_WITH_AS(view_of(sparse), doctest::Contains("xt::eval"), ShapeError);
  auto reversed = xt::view(x, all(), range(7, xt::placeholders::_, -1));
  CHECK_THROWS_AS(view_of(reversed), ShapeError);
}

TEST_CASE("adaptors over memory of others") {
  std::vector<float> raw(60);
  for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = float(i);
  SUBCASE("a pointer") {
    const std::vector<std::size_t> shape{4, 5};
    auto a = xt::adapt(raw.data() + 3, 20, xt::no_ownership(), shape);
    CHECK(view_of(a).data() == raw.data() + 3);
    check_same(view_of(a), a);
    CHECK(view_of(xt::adapt(raw.data() + 3, 20, xt::no_ownership(), shape)).rows() == 4);  // owns nothing
    const float* read_only = raw.data();
    auto c = xt::adapt(read_only, 20, xt::no_ownership(), shape);
    static_assert(std::is_same_v<decltype(view_of(c)), MatrixView<const float>>);
    CHECK(view_of(c).data() == raw.data());
  }
  SUBCASE("a pointer with strides") {
    const std::array<std::size_t, 2> shape{4, 5};
    const std::array<std::ptrdiff_t, 2> strides{9, 1};
    auto a = xt::adapt(raw.data(), 20, xt::no_ownership(), shape, strides);
    CHECK(view_of(a).leading_dimension() == 9);
    check_same(view_of(a), a);
  }
  SUBCASE("a container") {
    auto a = xt::adapt(raw, std::array<std::size_t, 2>{6, 10});
    CHECK(view_of(a).data() == raw.data());
    check_same(view_of(a), a);
  }
  SUBCASE("fixed shapes") {
    xt::xtensor_fixed<double, xt::xshape<2, 3>> f{{1, 2, 3}, {4, 5, 6}};
    check_same(view_of(f), f);
  }
}

TEST_CASE("what dangles or has no elements is refused at compile time") {
  static_assert(accepted<RowMajor2&> && accepted<const RowMajor2&>);
  static_assert(!accepted<RowMajor2> && !accepted<Dynamic> && !accepted<DynamicLayout>);
  using View = decltype(xt::view(std::declval<RowMajor2&>(), range(0, 2), all()));
  using OwningView = decltype(xt::view(std::declval<RowMajor2>(), range(0, 2), all()));
  using Strided = decltype(xt::strided_view(std::declval<RowMajor2&>(), {range(0, 2)}));
  using OwningStrided = decltype(xt::strided_view(std::declval<RowMajor2>(), {range(0, 2)}));
  static_assert(accepted<View> && accepted<View&> && accepted<Strided>);
  static_assert(!accepted<OwningView> && !accepted<OwningStrided>);
  static_assert(accepted<OwningView&>);
  using Adaptor = decltype(xt::adapt(std::declval<std::vector<float>&>(), std::array<std::size_t, 2>{}));
  using OwningAdaptor = decltype(xt::adapt(std::declval<std::vector<float>>(), std::array<std::size_t, 2>{}));
  static_assert(accepted<Adaptor> && !accepted<OwningAdaptor>);
  using Picked = decltype(xt::view(std::declval<RowMajor2&>(), xt::keep(0, 2), all()));
  static_assert(!accepted<Picked> && !accepted<Picked&>);
  static_assert(!accepted<decltype(std::declval<RowMajor2&>() + std::declval<RowMajor2&>())>);
  using Complex = xt::xtensor<std::complex<float>, 2>;
  static_assert(!accepted<decltype(xt::real(std::declval<Complex&>()))>);  // strides count complex numbers there
  static_assert(!accepted<Complex&> && !accepted<xt::xtensor<int, 2>&>);
}

TEST_CASE("as_xtensor gives the same memory back") {
  SUBCASE("views of both orders") {
    std::vector<float> raw(63);
    for (std::size_t i = 0; i < raw.size(); ++i) raw[i] = float(i);
    for (const Order order : {Order::row_major, Order::col_major})
      for (const auto& [r, c] : {std::pair<Index, Index>{4, 5}, {1, 5}, {4, 1}, {1, 1}, {0, 5}}) {
        const MatrixView<float> v = view_of(raw.data() + 2, r, c, order, 7);
        auto x = lowrank::as_xtensor(v);
        check_same(v, x);
        auto read_only = lowrank::as_xtensor(MatrixView<const float>(v));
        check_same(v, read_only);
        const auto back = view_of(x);
        CHECK(back.rows() == r);
        CHECK((back.empty() || back.data() == v.data()));
      }
  }
  SUBCASE("a Matrix") {
    lowrank::Matrix<double> m(3, 5);
    auto x = lowrank::as_xtensor(m);
    x.fill(2.0);
    x(1, 4) = 7.0;
    CHECK(m(1, 4) == 7.0);
    CHECK(m(2, 0) == 2.0);
    x *= 3.0;
    CHECK(m(1, 4) == 21.0);
    const lowrank::Matrix<double>& c = m;
    CHECK(xt::sum(lowrank::as_xtensor(c))() == 14 * 6.0 + 21.0);
  }
}

TEST_CASE("batched activations go through a frozen weight without a copy") {
  auto x = batch(2, 3, 4);
  RowMajor2 w = numbered<RowMajor2>(5, 4);
  xt::xtensor<float, 3> y = xt::xtensor<float, 3>::from_shape({2, 3, 5});
  const lowrank::DenseBase<float> base(view_of(w));
  base.forward(view_of(x), view_of(y));
  for (std::size_t b = 0; b < 2; ++b)
    for (std::size_t s = 0; s < 3; ++s)
      for (std::size_t o = 0; o < 5; ++o) {
        float sum = 0;  // small integers: exact in float
        for (std::size_t i = 0; i < 4; ++i) sum += x(b, s, i) * w(o, i);
        CHECK(y(b, s, o) == sum);
      }
}

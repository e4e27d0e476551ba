// SPDX-License-Identifier: Apache-2.0
// The product against a naive one in double: all orders, storages, awkward shapes, updates; and what it must not touch.
#include "lowrank/linalg/gemm.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/base.hpp"

using lowrank::bf16;
using lowrank::f16;
using lowrank::Index;
using lowrank::Matrix;
using lowrank::MatrixView;
using lowrank::Order;
using lowrank::Update;

namespace {

constexpr double poison = -12345.0;

/// A matrix inside a larger buffer: gaps between lines and a margin around, filled with a value that must survive.
template <class T>
struct Padded {
  std::vector<T> raw;
  MatrixView<T> view;

  Padded(Index m, Index n, Order order, std::uint64_t seed, Index gap = 3) {
    const Index inner = order == Order::row_major ? n : m, outer = order == Order::row_major ? m : n, ld = inner + gap;
    raw.assign(std::size_t(outer * ld + 16), T(poison));
    view = lowrank::view_of(raw.data() + 8, m, n, order, std::max<Index>(ld, 1));
    lowrank::CounterRng(seed).fill_normal(view);
  }
  Padded(const Padded&) = delete;

  /// Whether everything outside the matrix is as it was.
  [[nodiscard]] bool margin_untouched() const {
    std::vector<bool> inside(raw.size());
    for (Index i = 0; i < view.rows(); ++i)
      for (Index j = 0; j < view.cols(); ++j) inside[std::size_t(&view(i, j) - raw.data())] = true;
    for (std::size_t k = 0; k < raw.size(); ++k)
      if (!inside[k] && double(raw[k]) != double(T(poison))) return false;
    return true;
  }
};

/// The largest |C - (accumulate·C₀ + α·A·B)| over the forward error bound of summing k products in T in any order:
/// γ(k + 2)·(|C₀| + |α|·|A|·|B|), γ(n) = n·u/(1 - n·u), u half an ulp of 1. At most 1 for a correct product.
template <class T, class VA, class VB, class VC>
double error_over_bound(double alpha, const VA& a, const VB& b, const VC& c0, const MatrixView<T>& c) {
  const double u = std::numeric_limits<T>::epsilon() / 2, k = double(a.cols() + 2), gamma = k * u / (1 - k * u);
  double worst = 0;
  for (Index i = 0; i < c.rows(); ++i)
    for (Index j = 0; j < c.cols(); ++j) {
      // Products of doubles need more than double to judge sums of doubles.
      long double sum = c0(i, j), size = std::abs(double(c0(i, j)));
      for (Index l = 0; l < a.cols(); ++l) {
        const long double term = static_cast<long double>(alpha) * double(a(i, l)) * double(b(l, j));
        sum += term;
        size += std::abs(term);
      }
      const double error = std::abs(double(sum - static_cast<long double>(c(i, j))));
      worst = std::max(worst, size == 0 ? (error == 0 ? 0.0 : 1e9) : error / (gamma * double(size)));
    }
  return worst;
}

struct Shape {
  Index m, k, n;
};
/// Nothing, one, less than a vector, one off the register tile, the few-rows path and just above it, past a cache
/// block.
const std::vector<Shape> product_shapes{{0, 3, 4},  {3, 0, 4},    {3, 4, 0},   {1, 1, 1},   {1, 7, 5},    {5, 1, 7},
                                        {2, 17, 3}, {3, 31, 33},  {4, 16, 64}, {4, 65, 63}, {5, 64, 4},   {6, 13, 32},
                                        {7, 40, 7}, {13, 5, 31},  {14, 9, 33}, {15, 3, 95}, {29, 33, 17}, {33, 257, 65},
                                        {64, 1, 1}, {1, 300, 70}, {70, 300, 1}};

constexpr Order orders[] = {Order::row_major, Order::col_major};

/// C = product through gemm's inner entry, operands stored as SA and SB.
template <class T, class SA, class SB>
void check_product(const Shape& s, Order oa, Order ob, Order oc, T alpha, Update update) {
  const Padded<SA> a(s.m, s.k, oa, 1);
  const Padded<SB> b(s.k, s.n, ob, 2);
  Padded<T> c(s.m, s.n, oc, 3);
  Matrix<double> before(c.view);
  if (update == Update::assign) {
    before.set_zero();
    // Whatever assign overwrites may be NaN: 0·NaN must not get through.
    for (Index i = 0; i < s.m; ++i)
      for (Index j = 0; j < s.n; ++j) c.view(i, j) = std::numeric_limits<T>::quiet_NaN();
  }
  lowrank::detail::product<T, SA, SB>(alpha, a.view, MatrixView<const SB>(b.view).transposed(),
                                      update == Update::accumulate, c.view);
  CAPTURE(s.m);
  CAPTURE(s.k);
  CAPTURE(s.n);
  CAPTURE(int(oa));
  CAPTURE(int(ob));
  CAPTURE(int(oc));
  CAPTURE(alpha);
  CAPTURE(int(update));
  REQUIRE(error_over_bound<T>(double(alpha), a.view, b.view, before.view(), c.view) <= 1.0);
  REQUIRE(c.margin_untouched());
  REQUIRE(a.margin_untouched());
}

template <class T, class SA, class SB>
void check_all_products() {
  for (const Shape& s : product_shapes)
    for (const Order oa : orders)
      for (const Order ob : orders)
        for (const Order oc : orders)
          for (const Update update : {Update::assign, Update::accumulate})
            check_product<T, SA, SB>(s, oa, ob, oc, oa == ob ? T(1) : T(-0.75), update);
}

template <class A, class B>
bool same_bits(const A& a, const B& b) {
  for (Index i = 0; i < a.rows(); ++i)
    for (Index j = 0; j < a.cols(); ++j)
      if (a(i, j) != b(i, j)) return false;
  return true;
}

}  // namespace

TEST_CASE("products of full-width operands: all orders, shapes and updates") {
  SUBCASE("float") { check_all_products<float, float, float>(); }
  SUBCASE("double") { check_all_products<double, double, double>(); }
}

TEST_CASE("products with a two-byte operand on either side: widening is exact") {
  SUBCASE("right bf16") { check_all_products<float, float, bf16>(); }
  SUBCASE("right f16") { check_all_products<float, float, f16>(); }
  SUBCASE("left bf16") { check_all_products<float, bf16, float>(); }
  SUBCASE("left f16") { check_all_products<float, f16, float>(); }
}

TEST_CASE_TEMPLATE("gemm and multiply: one size past every block", T, float, double) {
  const Index k = lowrank::detail::block_depth<T> + 1, n = lowrank::detail::kernel_cols<T> * 3 + 1;
  const Padded<T> a(lowrank::detail::block_rows<T> + 3, k, Order::row_major, 4);
  const Padded<T> b(k, n, Order::col_major, 5);
  const Matrix<T> c = lowrank::multiply<T>(a.view, b.view);
  const Matrix<double> zero(c.rows(), c.cols());
  CHECK(error_over_bound<T>(1.0, a.view, b.view, zero.view(), MatrixView<T>(Matrix<T>(c).view())) <= 1.0);
  // Columns past a block of the right operand, with a short depth.
  const Index wide = lowrank::detail::block_cols<T> + 5;
  const Padded<T> p(7, 3, Order::row_major, 6), q(3, wide, Order::row_major, 7);
  Padded<T> r(7, wide, Order::row_major, 8);
  lowrank::gemm(T(2), p.view, q.view, r.view);
  const Matrix<double> nothing(7, wide);
  CHECK(error_over_bound<T>(2.0, p.view, q.view, nothing.view(), r.view) <= 1.0);
  CHECK(r.margin_untouched());
}

TEST_CASE_TEMPLATE("known products, exactly", T, float, double) {
  // Small integers: every sum is exact, so the product must be too.
  for (const Index d : {1, 2, 5, 16, 31, 47}) {
    Matrix<T> a(d, d + 2), b(d + 2, d + 1);
    for (Index i = 0; i < a.rows(); ++i)
      for (Index j = 0; j < a.cols(); ++j) a(i, j) = T((3 * i + 5 * j) % 7 - 3);
    for (Index i = 0; i < b.rows(); ++i)
      for (Index j = 0; j < b.cols(); ++j) b(i, j) = T((2 * i + 7 * j) % 5 - 2);
    const Matrix<T> c = lowrank::multiply<T>(a.view(), b.view());
    for (Index i = 0; i < c.rows(); ++i)
      for (Index j = 0; j < c.cols(); ++j) {
        long sum = 0;
        for (Index l = 0; l < a.cols(); ++l) sum += ((3 * i + 5 * l) % 7 - 3) * ((2 * l + 7 * j) % 5 - 2);
        REQUIRE(c(i, j) == T(sum));
      }
  }
}

TEST_CASE_TEMPLATE("alpha 0 and depth 0: C is cleared, or left alone", T, float, double) {
  const Padded<T> a(5, 6, Order::row_major, 1), b(6, 7, Order::row_major, 2);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  for (const Order order : orders) {
    Padded<T> c(5, 7, order, 3);
    const Matrix<T> before(c.view);
    lowrank::gemm(T(0), a.view, b.view, c.view, Update::accumulate);
    lowrank::gemm(T(1), a.view.middle_cols(0, 0), b.view.middle_rows(0, 0), c.view, Update::accumulate);
    CHECK(same_bits(before, c.view));
    c.view(2, 3) = nan;
    lowrank::gemm(T(0), a.view, b.view, c.view);
    CHECK(same_bits(Matrix<T>(5, 7), c.view));
    c.view(2, 3) = nan;
    lowrank::gemm(T(1), a.view.middle_cols(0, 0), b.view.middle_rows(0, 0), c.view);
    CHECK(same_bits(Matrix<T>(5, 7), c.view));
    CHECK(c.margin_untouched());
  }
}

TEST_CASE("NaN and infinity of the operands come through, and only where they belong") {
  for (const Index m : {2, 20}) {
    Matrix<float> a(m, 40), b(40, 50), c(m, 50);
    lowrank::CounterRng(1).fill_normal(a.view());
    lowrank::CounterRng(2).fill_normal(b.view());
    a(1, 39) = std::numeric_limits<float>::quiet_NaN();
    b(3, 49) = std::numeric_limits<float>::infinity();
    lowrank::gemm(1.0F, a.view(), b.view(), c.view());
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < 50; ++j) {
        CHECK(std::isnan(c(i, j)) == (i == 1));
        if (i != 1) CHECK(std::isinf(c(i, j)) == (j == 49));
      }
  }
}

#if defined(_OPENMP) && !defined(LOWRANK_USE_BLAS)
TEST_CASE_TEMPLATE("one thread and two give the same bits", T, float, double) {
  const int threads = omp_get_max_threads();
  for (const Shape& s : {Shape{3, 5000, 333}, Shape{4, 700, 1001}, Shape{200, 300, 17}, Shape{37, 300, 301},
                         Shape{14, 600, 777}, Shape{301, 64, 129}, Shape{1, 999, 4001}})
    for (const Order oa : orders)
      for (const Order ob : orders) {
        const Padded<T> a(s.m, s.k, oa, 1), b(s.k, s.n, ob, 2);
        Padded<T> one(s.m, s.n, Order::row_major, 3), more(s.m, s.n, Order::row_major, 3);
        omp_set_num_threads(1);
        lowrank::gemm(T(0.5), a.view, b.view, one.view, Update::accumulate);
        for (const int t : {2, 3, 5}) {
          Padded<T> again(s.m, s.n, Order::row_major, 3);
          omp_set_num_threads(t);
          lowrank::gemm(T(0.5), a.view, b.view, again.view, Update::accumulate);
          CAPTURE(s.m);
          CAPTURE(s.k);
          CAPTURE(s.n);
          CAPTURE(int(oa));
          CAPTURE(int(ob));
          CAPTURE(t);
          CHECK(same_bits(one.view, again.view));
          CHECK(again.margin_untouched());
        }
        omp_set_num_threads(threads);
      }
}
#endif

TEST_CASE("gemm refuses sizes that disagree and outputs that overlap an input") {
  Matrix<float> a(3, 4), b(4, 5), c(3, 5);
  CHECK_THROWS_WITH_AS(lowrank::gemm(1.0F, a.view(), a.view(), c.view()), "gemm: B must be 4x5, got 3x4",
                       lowrank::ShapeError);
  CHECK_THROWS_WITH_AS(lowrank::gemm(1.0F, b.view(), Matrix<float>(5, 5).view(), c.view()),
                       "gemm: C must be 4x5, got 3x5", lowrank::ShapeError);
  CHECK_THROWS_AS(lowrank::multiply<float>(a.view(), a.view()), lowrank::ShapeError);
  Matrix<float> square(6, 6);
  CHECK_THROWS_WITH_AS(lowrank::gemm(1.0F, square.view(), square.view(), square.view()),
                       doctest::Contains("must not overlap"), lowrank::ArgumentError);
  CHECK_THROWS_AS(
      lowrank::gemm(1.0F, square.view().block(0, 0, 3, 3), b.view().block(0, 0, 3, 3), square.view().block(2, 2, 3, 3)),
      lowrank::ArgumentError);
  // Columns of one buffer beside each other, as q, k and v often lie, do not overlap.
  CHECK_NOTHROW(lowrank::gemm(1.0F, square.view().block(0, 0, 6, 3), b.view().block(0, 0, 3, 3),
                              square.view().block(0, 3, 6, 3)));
}

TEST_CASE_TEMPLATE("a dense base is a frozen base: forward X·Wᵀ, backward G·W", S, float, bf16, f16) {
  static_assert(lowrank::FrozenBase<lowrank::DenseBase<float, S>, float>);
  static_assert(lowrank::PackableBase<lowrank::DenseBase<float, S>, float>);
  for (const Order order : orders)
    for (const Index tokens : {0, 1, 3, 21}) {
      const Padded<S> w(19, 23, order, 1);
      const lowrank::DenseBase<float, S> base{MatrixView<const S>(w.view)};
      CHECK((base.rows() == 19 && base.cols() == 23 && base.weight().data() == w.view.data()));
      const Padded<float> x(tokens, 23, Order::row_major, 2), g(tokens, 19, Order::row_major, 3);
      Padded<float> y(tokens, 19, Order::row_major, 4), dx(tokens, 23, Order::row_major, 5);
      const Matrix<double> y0(y.view), dx0(tokens, 23);
      base.forward(x.view, y.view, Update::accumulate);
      base.backward(g.view, dx.view);
      CHECK(error_over_bound<float>(1.0, x.view, w.view.transposed(), y0.view(), y.view) <= 1.0);
      CHECK(error_over_bound<float>(1.0, g.view, w.view, dx0.view(), dx.view) <= 1.0);
    }
  // It may own its matrix; moving it does not move the elements.
  Matrix<S> w(3, 2);
  w(2, 1) = S(1.5F);
  lowrank::DenseBase<float, S> base(std::move(w));
  const S* p = base.weight().data();
  const lowrank::DenseBase<float, S> moved = std::move(base);
  CHECK((moved.weight().data() == p && float(moved.weight()(2, 1)) == 1.5F));
  Matrix<float> x(4, 3), y(4, 3);
  CHECK_THROWS_WITH_AS(moved.forward(x.view(), y.view()), doctest::Contains("X must be 4x2, got 4x3"),
                       lowrank::ShapeError);
  CHECK_THROWS_AS(moved.backward(x.view(), y.view()), lowrank::ShapeError);
}

TEST_CASE("[X | T]·[W | B]ᵀ is one product with the depths joined") {
  namespace d = lowrank::detail;
  const Index block = d::block_depth<float>;
  for (const Index k1 : {Index(1), Index(9), block - 1, block, block + 5})
    for (const Index k2 : {1, 4, 16}) {
      const Padded<float> x(11, k1, Order::row_major, 1), t(11, k2, Order::row_major, 2);
      const Padded<bf16> w(37, k1, Order::row_major, 3);
      const Padded<float> b(37, k2, Order::col_major, 4);
      Padded<float> y(11, 37, Order::row_major, 5);
      d::gemm_packed(1.0F, d::DepthConcat<d::DenseSource<float>, d::DenseSource<float>>{{x.view}, {t.view}},
                     d::DepthConcat<d::DenseSource<float, bf16>, d::DenseSource<float>>{{w.view}, {b.view}}, false,
                     y.view);
      Matrix<double> left(11, k1 + k2), right(k1 + k2, 37);
      for (Index l = 0; l < k1 + k2; ++l) {
        for (Index i = 0; i < 11; ++i) left(i, l) = l < k1 ? x.view(i, l) : t.view(i, l - k1);
        for (Index j = 0; j < 37; ++j) right(l, j) = l < k1 ? double(float(w.view(j, l))) : b.view(j, l - k1);
      }
      const Matrix<double> zero(11, 37);
      CHECK(error_over_bound<float>(1.0, left.view(), right.view(), zero.view(), y.view) <= 1.0);
      CHECK(y.margin_untouched());
    }
}

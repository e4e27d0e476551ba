// SPDX-License-Identifier: Apache-2.0
// MatrixView: strides of every degenerate shape, blocks, transposes, overlap, runs; and what the constructor refuses.
#include <doctest/doctest.h>

#include <array>
#include <set>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/core/view_of.hpp"

using lowrank::Index;
using lowrank::MatrixView;
using lowrank::Order;
using lowrank::ShapeError;
using lowrank::view_of;
using lowrank::detail::overlap;

namespace {

struct Grid {
  float* p;
  Index r, c;
};
struct OwningGrid {
  std::array<float, 6> p;
};

template <class T>
std::set<const T*> addresses(const MatrixView<T>& v) {
  std::set<const T*> s;
  for (Index i = 0; i < v.rows(); ++i)
    for (Index j = 0; j < v.cols(); ++j) s.insert(&v(i, j));
  return s;
}

}  // namespace

template <>
struct lowrank::ViewTraits<Grid> {
  static constexpr bool owning = false;
  static MatrixView<float> view(const Grid& g) { return {g.p, g.r, g.c, g.c, 1}; }
};
template <>
struct lowrank::ViewTraits<OwningGrid> {
  static constexpr bool owning = true;
  static MatrixView<float> view(OwningGrid& g) { return {g.p.data(), 2, 3, 3, 1}; }
  static MatrixView<const float> view(const OwningGrid& g) { return {g.p.data(), 2, 3, 3, 1}; }
};

TEST_CASE("a stride along an extent of 0 or 1 may be anything and comes out regular") {
  std::vector<float> raw(64);
  for (const Index odd : {Index(-3), Index(0), Index(1), Index(2), Index(17)}) {
    CAPTURE(odd);
    // One row with adjacent elements is row-major, with a leading dimension that says "contiguous".
    const MatrixView<float> row(raw.data(), 1, 6, odd, 1);
    CHECK(row.is_row_major());
    CHECK(row.is_contiguous());
    CHECK(row.leading_dimension() == 6);
    const MatrixView<float> col(raw.data(), 6, 1, 1, odd);
    CHECK(col.is_contiguous());
    CHECK(&col(5, 0) == raw.data() + 5);
    // Spaced vectors: the unused stride becomes the 1.
    const MatrixView<float> spaced_row(raw.data(), 1, 6, odd, 4);
    CHECK(spaced_row.order() == Order::col_major);
    CHECK(spaced_row.leading_dimension() == 4);
    CHECK_FALSE(spaced_row.is_contiguous());
    CHECK(&spaced_row(0, 5) == raw.data() + 20);
    const MatrixView<float> spaced_col(raw.data(), 6, 1, 4, odd);
    CHECK(spaced_col.order() == Order::row_major);
    CHECK(spaced_col.leading_dimension() == 4);
    CHECK(&spaced_col(5, 0) == raw.data() + 20);
    for (const auto& [r, c] : {std::pair<Index, Index>{1, 1}, {0, 0}, {0, 1}, {1, 0}}) {
      const MatrixView<float> tiny(raw.data(), r, c, odd, odd);
      CHECK((tiny.row_stride() == 1 && tiny.col_stride() == 1));
      CHECK(tiny.is_contiguous());
    }
  }
  CHECK(MatrixView<float>(nullptr, 0, 5, 5, 1).empty());
  CHECK(MatrixView<float>(nullptr, 5, 0, 0, 1).empty());
  CHECK(MatrixView<float>().size() == 0);
}

TEST_CASE("what no view can express is a ShapeError that says what came") {
  std::vector<float> raw(64);
  CHECK_THROWS_WITH_AS(MatrixView<float>(raw.data(), -1, 2, 2, 1), doctest::Contains("negative, got -1x2"), ShapeError);
  // The core knows no other library's way to copy; the front ends end the sentence.
  CHECK_THROWS_WITH_AS(MatrixView<float>(raw.data(), 3, 4, 8, 2),
                       "MatrixView: one stride must be 1 (rows or columns contiguous), got row stride 8 and column "
                       "stride 2; copy the matrix into contiguous storage first",
                       ShapeError);
  CHECK_THROWS_WITH_AS(MatrixView<float>(raw.data(), 3, 4, 3, 1), doctest::Contains("leading dimension 3 is shorter"),
                       ShapeError);
  CHECK_THROWS_AS(MatrixView<float>(raw.data(), 3, 4, 1, 2), ShapeError);
  CHECK_THROWS_AS(MatrixView<float>(raw.data(), 3, 4, 0, 1), ShapeError);   // a broadcast row
  CHECK_THROWS_AS(MatrixView<float>(raw.data(), 3, 4, -4, 1), ShapeError);  // upside down
  CHECK_THROWS_AS(MatrixView<float>(raw.data(), 1, 4, 1, 0), ShapeError);   // a broadcast element
  CHECK_THROWS_WITH_AS(MatrixView<float>(nullptr, 3, 4, 4, 1), doctest::Contains("null pointer for a 3x4"), ShapeError);
  const MatrixView<float> v(raw.data(), 3, 4, 5, 1);
  CHECK_THROWS_WITH_AS((void)v.block(1, 1, 3, 2), doctest::Contains("(1, 1) of 3x2 does not fit in 3x4"), ShapeError);
  CHECK_THROWS_AS((void)v.block(-1, 0, 1, 1), ShapeError);
  CHECK_THROWS_AS((void)v.block(0, 0, 1, -1), ShapeError);
  CHECK_THROWS_AS((void)v.col(4), ShapeError);
  CHECK_THROWS_AS((void)v.middle_rows(2, 2), ShapeError);
  CHECK_NOTHROW((void)v.block(3, 4, 0, 0));
}

TEST_CASE("blocks and transposes address the same elements") {
  std::vector<double> raw(100);
  for (const Order order : {Order::row_major, Order::col_major}) {
    const MatrixView<double> v = view_of(raw.data(), 6, 7, order, 9);
    const auto b = v.block(1, 2, 4, 3), t = b.transposed();
    CHECK(b.leading_dimension() == 9);
    CHECK(t.order() != b.order());
    for (Index i = 0; i < 4; ++i)
      for (Index j = 0; j < 3; ++j) {
        CHECK(&b(i, j) == &v(1 + i, 2 + j));
        CHECK(&t(j, i) == &b(i, j));
      }
    CHECK(&v.row(3)(0, 5) == &v(3, 5));
    CHECK(&v.col(3)(5, 0) == &v(5, 3));
    const MatrixView<const double> read_only = v;
    CHECK(read_only.data() == v.data());
    CHECK(read_only.order() == v.order());
  }
  static_assert(!std::is_convertible_v<MatrixView<const double>, MatrixView<double>>);
}

TEST_CASE("for_each_run visits every element once, in runs that are contiguous") {
  std::vector<float> raw(200, 0.0F);
  for (const Order order : {Order::row_major, Order::col_major})
    for (const auto& [r, c] : {std::pair<Index, Index>{5, 7}, {1, 7}, {7, 1}, {1, 1}, {0, 7}, {7, 0}})
      for (const Index extra : {Index(0), Index(3)}) {
        const MatrixView<float> v =
            view_of(raw.data(), r, c, order, (order == Order::row_major ? c : r) + extra + (r * c == 0));
        std::set<const float*> seen;
        Index runs = 0, visited = 0;
        lowrank::detail::for_each_run(v, [&](const float* p, Index n) {
          ++runs;
          visited += n;
          for (Index i = 0; i < n; ++i) seen.insert(p + i);
        });
        CHECK(visited == v.size());
        CHECK(seen == addresses(v));
        if (v.is_contiguous()) CHECK(runs <= 1);
      }
}

TEST_CASE("overlap agrees with the sets of addresses for views of one buffer") {
  constexpr Index m = 9, n = 11;
  std::vector<float> raw(m * n);
  const MatrixView<float> whole = view_of(raw.data(), m, n);
  const lowrank::CounterRng rng(3);
  int disjoint = 0, shared = 0;
  for (std::uint64_t k = 0; k < 4000; ++k) {
    const auto draw = [&](int d, Index limit) {
      return Index(rng.below(8 * k + std::uint64_t(d), std::uint64_t(limit)));
    };
    const Index i0 = draw(0, m), j0 = draw(1, n), i1 = draw(2, m), j1 = draw(3, n);
    MatrixView<float> a = whole.block(i0, j0, 1 + draw(4, m - i0), 1 + draw(5, n - j0));
    MatrixView<float> b = whole.block(i1, j1, 1 + draw(6, m - i1), 1 + draw(7, n - j1));
    if (k % 2 == 1) a = a.transposed(), b = b.transposed();
    const auto in_a = addresses(a);
    bool truth = false;
    for (const float* p : addresses(b)) truth = truth || in_a.contains(p);
    ++(truth ? shared : disjoint);
    REQUIRE(overlap(a, b) == truth);
    REQUIRE(overlap(b, a) == truth);
    // Different strides: conservative, never a missed overlap.
    if (truth) REQUIRE(overlap(a.transposed(), b));
  }
  CHECK(disjoint > 100);
  CHECK(shared > 100);

  // Lines that wrap: b starts in the gap after a's columns and runs into the next line's.
  std::vector<float> gap(60);
  const MatrixView<float> a = view_of(gap.data(), 4, 4, Order::row_major, 10);
  CHECK_FALSE(overlap(a, view_of(gap.data() + 4, 4, 6, Order::row_major, 10)));
  CHECK(overlap(a, view_of(gap.data() + 4, 4, 7, Order::row_major, 10)));
  CHECK_FALSE(overlap(a, view_of(gap.data() + 34, 2, 7, Order::row_major, 10)));
  CHECK(overlap(view_of(gap.data() + 7, 4, 6, Order::row_major, 10),
                view_of(gap.data() + 10, 4, 4, Order::row_major, 10)));

  CHECK_FALSE(overlap(whole.block(0, 0, 0, 3), whole));
  std::vector<double> other(20);
  CHECK_FALSE(overlap(whole, view_of(other.data(), 4, 5)));
  const auto as_bytes = MatrixView<const char>(reinterpret_cast<const char*>(raw.data()) + 5, 1, 3, 3, 1);
  CHECK(overlap(whole, as_bytes));
}

TEST_CASE("view_of a raw buffer") {
  std::vector<float> raw(60);
  CHECK(view_of(raw.data(), 3, 4).leading_dimension() == 4);
  CHECK(view_of(raw.data(), 3, 4, Order::col_major).leading_dimension() == 3);
  CHECK(view_of(raw.data(), 3, 4, Order::row_major, 10).leading_dimension() == 10);
  CHECK(view_of(raw.data(), 0, 0).empty());
  const float* read_only = raw.data();
  static_assert(std::is_same_v<decltype(view_of(read_only, 3, 4)), MatrixView<const float>>);
  CHECK_THROWS_AS(view_of(raw.data(), 3, 4, Order::row_major, 3), ShapeError);
  static_assert(MatrixView<const float>().size() == 0);
}

TEST_CASE("a user's container needs one trait") {
  std::array<float, 6> raw{1, 2, 3, 4, 5, 6};
  CHECK(view_of(Grid{raw.data(), 2, 3})(1, 2) == 6);
  OwningGrid grid{raw};
  CHECK(view_of(grid).data() == grid.p.data());
  static_assert(lowrank::MatrixLike<Grid> && lowrank::MatrixLike<OwningGrid&> &&
                lowrank::MatrixLike<const OwningGrid&>);
  static_assert(!lowrank::MatrixLike<OwningGrid>);
  static_assert(!lowrank::MatrixLike<int> && !lowrank::MatrixLike<std::vector<float>&>);
  static_assert(lowrank::MatrixOf<OwningGrid&, float> && !lowrank::MatrixOf<const OwningGrid&, float>);
  static_assert(lowrank::MatrixOf<const OwningGrid&, const float>);
  static_assert(std::is_same_v<lowrank::scalar_of<const OwningGrid&>, float>);
}

// SPDX-License-Identifier: Apache-2.0
// Matrix and Buffer: ownership, growth, alignment, conversion; factors, scales, errors and the parallel loop.
#include "lowrank/core/matrix.hpp"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <limits>
#include <new>
#include <numeric>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/core/version.hpp"

using lowrank::Buffer;
using lowrank::Index;
using lowrank::Matrix;
using lowrank::Order;
using lowrank::view_of;

TEST_CASE_TEMPLATE("a Buffer is aligned, grows, and never shrinks", T, float, double, std::uint8_t, lowrank::bf16) {
  Buffer<T> b;
  CHECK(b.data() == nullptr);
  CHECK(b.size() == 0);
  b.resize(100);
  const T* first = b.data();
  CHECK(reinterpret_cast<std::uintptr_t>(first) % 64 == 0);
  b.resize(7);
  CHECK(b.size() == 7);
  b.resize(100);
  CHECK(b.data() == first);  // steady state: no new memory for anything seen before
  b.resize(0);
  b.resize(99);
  CHECK(b.data() == first);
  b.resize(101);
  CHECK(b.size() == 101);
  CHECK(b.end() - b.begin() == 101);
}

TEST_CASE("a Buffer copies deeply, moves, and survives self-assignment") {
  Buffer<double> a(5);
  std::iota(a.begin(), a.end(), 1.0);
  Buffer<double> b = a;
  b[0] = -1;
  CHECK(a[0] == 1);
  const double* p = a.data();
  Buffer<double> c = std::move(a);
  CHECK(c.data() == p);
  a = b;  // a moved-from buffer can be used again
  CHECK(a[0] == -1);
  const Buffer<double>& same = a;
  a = same;
  CHECK((a.size() == 5 && a[4] == 5));
  Buffer<double> empty;
  b = empty;
  CHECK(b.size() == 0);
}

TEST_CASE_TEMPLATE("a Matrix starts as zeros, row-major, without gaps", T, float, double, lowrank::bf16) {
  Matrix<T> m(3, 5);
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 5; ++j) {
      CHECK(float(m(i, j)) == 0.0F);
      CHECK(&m(i, j) == m.data() + i * 5 + j);
    }
  CHECK(m.view().is_contiguous());
  CHECK(m.view().is_row_major());
  CHECK((m.rows() == 3 && m.cols() == 5 && m.size() == 15 && !m.empty()));
  const Matrix<T>& c = m;
  static_assert(std::is_same_v<decltype(c.view()), lowrank::MatrixView<const T>>);
  for (const auto& [r, n] : {std::pair<Index, Index>{0, 5}, {5, 0}, {0, 0}}) {
    const Matrix<T> e(r, n);
    CHECK((e.empty() && e.view().rows() == r && e.view().cols() == n));
  }
  CHECK(view_of(Matrix<T>(4, 1).view()).rows() == 4);
}

TEST_CASE("sizes no memory holds are refused before anything is allocated") {
  CHECK_THROWS_WITH_AS(Matrix<float>(-1, 2), doctest::Contains("got -1x2"), lowrank::ShapeError);
  CHECK_THROWS_AS(Matrix<float>(2, -1), lowrank::ShapeError);
  const Index huge = Index(1) << 40;
  CHECK_THROWS_WITH_AS(Matrix<double>(huge, huge), doctest::Contains("do not fit in memory"), lowrank::ShapeError);
  CHECK_THROWS_AS(Matrix<double>(std::numeric_limits<Index>::max(), 1), lowrank::ShapeError);
  CHECK(Matrix<double>(0, huge).empty());
}

TEST_CASE("resize keeps the memory, assign copies and converts from any order") {
  Matrix<float> m(8, 8);
  const float* p = m.data();
  m.resize(2, 3);
  CHECK(m.data() == p);
  std::vector<float> raw{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  m.assign(view_of(raw.data(), 2, 3, Order::col_major, 4));
  CHECK((m(0, 0) == 1 && m(1, 0) == 2 && m(0, 1) == 5 && m(1, 2) == 10));
  const Matrix<double> wide(m);
  CHECK(wide(1, 2) == 10.0);
  const Matrix<lowrank::bf16> narrow(wide);
  CHECK(float(narrow(1, 1)) == 6.0F);
  const Matrix<float> back(narrow.view().transposed());
  CHECK((back.rows() == 3 && back(2, 1) == 10.0F));
}

TEST_CASE("copies are deep, moves are cheap") {
  Matrix<float> a(2, 2);
  a(0, 0) = 3;
  Matrix<float> b = a;
  b(0, 0) = 4;
  CHECK(a(0, 0) == 3);
  const float* p = a.data();
  const Matrix<float> c = std::move(a);
  CHECK(c.data() == p);
  static_assert(!lowrank::MatrixLike<Matrix<float>> && lowrank::MatrixLike<Matrix<float>&>);
}

TEST_CASE("scales and the checks of factors") {
  CHECK(lowrank::lora_scale(32, 16) == 2.0);
  CHECK(lowrank::rslora_scale(32, 16) == 8.0);
  for (const double alpha : {0.0, -1.0, double(INFINITY), double(NAN)}) {
    CHECK_THROWS_AS(lowrank::lora_scale(alpha, 4), lowrank::ArgumentError);
    CHECK_THROWS_AS(lowrank::rslora_scale(alpha, 4), lowrank::ArgumentError);
  }
  CHECK_THROWS_WITH_AS(lowrank::lora_scale(1, 0), doctest::Contains("rank must be at least 1, got 0"),
                       lowrank::ArgumentError);
  lowrank::LoraFactors<float> f{Matrix<float>(2, 5), Matrix<float>(7, 2), 0.5F};
  CHECK((f.rank() == 2 && f.in_features() == 5 && f.out_features() == 7));
  CHECK_NOTHROW(lowrank::detail::check_factors("here", f));
  f.scale = INFINITY;
  CHECK_THROWS_AS(lowrank::detail::check_factors("here", f), lowrank::ArgumentError);
  f = {Matrix<float>(2, 5), Matrix<float>(7, 3), 1.0F};
  CHECK_THROWS_WITH_AS(lowrank::detail::check_factors("here", f), doctest::Contains("got B 7x3 and A 2x5"),
                       lowrank::ShapeError);
  CHECK_NOTHROW(lowrank::detail::check_rank("here", 3, 3, 8));
  CHECK_THROWS_AS(lowrank::detail::check_rank("here", 0, 3, 8), lowrank::ArgumentError);
  CHECK_THROWS_WITH_AS(lowrank::detail::check_rank("here", 4, 3, 8), doctest::Contains("[1, min(3, 8)], got 4"),
                       lowrank::ArgumentError);
}

TEST_CASE("errors share one base and say where, what was expected and what came") {
  CHECK_THROWS_WITH_AS(lowrank::detail::expect_shape("f", "Y", 2, 3, 4, 5), "f: Y must be 4x5, got 2x3",
                       lowrank::ShapeError);
  CHECK_NOTHROW(lowrank::detail::expect_shape("f", "Y", 4, 5, 4, 5));
  const lowrank::IoError io("model.safetensors", "weight", "unknown dtype");
  CHECK(std::string(io.what()) == "model.safetensors: 'weight': unknown dtype");
  CHECK((io.path() == "model.safetensors" && io.key() == "weight"));
  CHECK(std::string(lowrank::IoError("a", "empty file").what()) == "a: empty file");
  static_assert(std::is_base_of_v<lowrank::Error, lowrank::ShapeError>);
  static_assert(std::is_base_of_v<lowrank::ArgumentError, lowrank::NonFiniteError>);
  static_assert(std::is_base_of_v<std::runtime_error, lowrank::Error>);
  CHECK(lowrank::detail::text("x ", 3, " ", 2.5, " ", true, " ", std::string("s")) == "x 3 2.5 true s");
}

TEST_CASE("parallel_ranges covers every index once, whatever the grain") {
  for (const Index n : {Index(0), Index(1), Index(2), Index(3), Index(1000), Index(1001)})
    for (const Index grain : {Index(0), Index(1), Index(7), Index(5000)}) {
      std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
      lowrank::parallel_ranges(n, grain, [&](Index begin, Index end) {
        for (Index i = begin; i < end; ++i) ++visits[std::size_t(i)];
      });
      for (const auto& v : visits) CHECK(v == 1);
    }
  std::atomic<int> parts = 0;
  lowrank::parallel_parts(5, [&](int p, int of) {
    CHECK((p >= 0 && p < of && of == 5));
    ++parts;
  });
  CHECK(parts == 5);
  CHECK(lowrank::max_threads() >= 1);
}

TEST_CASE("the version text is made of the version numbers") {
  CHECK(std::string(lowrank::version) ==
        lowrank::detail::text(LOWRANK_VERSION_MAJOR, ".", LOWRANK_VERSION_MINOR, ".", LOWRANK_VERSION_PATCH));
}

TEST_CASE("what a part of a parallel loop throws arrives, and only after every part has ended") {
#if defined(_OPENMP)
  const int threads = omp_get_max_threads();
  omp_set_num_threads(4);
#endif
  std::array<std::atomic<int>, 40> seen{};
  const auto run = [&](auto thrown) {
    for (auto& s : seen) s = 0;
    lowrank::parallel_ranges(40, 1, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        ++seen[std::size_t(i)];
        if (i == end - 1) throw thrown;  // every part throws; one arrives
      }
    });
  };
  CHECK_THROWS_WITH_AS(run(lowrank::ArgumentError("of a part")), "of a part", lowrank::ArgumentError);
  CHECK_THROWS_AS(run(std::bad_alloc()), std::bad_alloc);
  CHECK_THROWS_AS(run(42), int);
#if defined(_OPENMP)
  for (const auto& s : seen) CHECK(s == 1);
#endif
  // One part of many.
  CHECK_THROWS_AS(lowrank::parallel_parts(4,
                                          [](int p, int) {
                                            if (p == 2) throw lowrank::ShapeError("two");
                                          }),
                  lowrank::ShapeError);
  std::atomic<int> sum = 0;
  lowrank::parallel_parts(4, [&](int p, int) { sum += p; });  // nothing is left of it
  CHECK(sum == 6);
#if defined(_OPENMP)
  omp_set_num_threads(threads);
#endif
}

TEST_CASE("a matrix that was moved from is empty, and refused by its shape") {
  Matrix<float> a(3, 4), b;
  a(1, 2) = 5;
  const Matrix<float> c(std::move(a));
  CHECK(c(1, 2) == 5);
  CHECK(a.rows() == 0);  // NOLINT(bugprone-use-after-move): that is the test
  CHECK(a.cols() == 0);
  Matrix<float> d(2, 2);
  b = std::move(d);
  CHECK(b.size() == 4);
  CHECK(d.empty());
  b = std::move(d);  // over what was there
  CHECK(b.empty());
  CHECK(c.view()(1, 2) == 5);
  Matrix<float> e(c);
  CHECK(e.size() == c.size());
  e = c;
  CHECK(e(1, 2) == 5);
}

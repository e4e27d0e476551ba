// SPDX-License-Identifier: Apache-2.0
// Codes and scales against the slow reference and the numpy fixture: lengths, layouts, orders, types, threads, odd
// values.
#include "lowrank/quant/quantise.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cstring>

#include "quant/reference.hpp"
#include "support/capture.hpp"
#include "support/compare.hpp"
#include "support/fixture.hpp"

using namespace lowrank;

namespace {

/// The fixture's input: a hash of the index (see reference.py).
std::vector<float> hashed(Index n) {
  std::vector<float> x(static_cast<std::size_t>(n));
  for (Index i = 0; i < n; ++i) {
    std::uint64_t h = (std::uint64_t(i) * 2654435761U + 12345U) & 0xffffffffU;
    h = ((h ^ (h >> 15)) * 2246822519U) & 0xffffffffU;
    const auto unit = float(double(h >> 8) / 8388608.0 - 1);
    const Index block = i / 64;
    float v = unit * (float(1 + block % 7) * 0.125F);
    if (block == 3) v = 0;
    if (i % 97 == 0) v = -0.0F;
    x[std::size_t(i)] = v;
  }
  return x;
}

template <class Values>
Index mismatches(const Matrix<double>& want, const Values& got) {
  Index wrong = want.size() != Index(got.size());
  for (Index i = 0; i < std::min(want.size(), Index(got.size())); ++i)
    wrong += float(want.data()[i]) != float(got[std::size_t(i)]);
  return wrong;
}

/// Codes, scales and values of q against the reference.
void check_against_reference(const Matrix<float>& W, const QuantisedMatrix<float>& q) {
  const auto want = reference::quantise(W, q.codebook(), q.options().block_size, q.options().blocking);
  REQUIRE(q.absmax().size() == want.absmax.size());
  CHECK(std::memcmp(q.absmax().data(), want.absmax.data(), want.absmax.size() * 4) == 0);
  CHECK(std::ranges::equal(q.zeros(), want.zeros));
  Index wrong = 0;
  const Matrix<float> values = q.dequantise();
  for (Index i = 0; i < W.rows(); ++i)
    for (Index j = 0; j < W.cols(); ++j) {
      const std::size_t k = std::size_t(i * W.cols() + j);
      wrong += q.code(i, j) != want.codes[k];
      wrong += std::bit_cast<std::uint32_t>(values(i, j)) != std::bit_cast<std::uint32_t>(want.values[k]);
      wrong += std::bit_cast<std::uint32_t>(q(i, j)) != std::bit_cast<std::uint32_t>(want.values[k]);
    }
  CHECK(wrong == 0);
}

/// One of every kind and width there is.
std::vector<Codebook> every_codebook() {
  std::vector<Codebook> all{Codebook::fp4(), Codebook::int8(), Codebook::dynamic8()};
  for (int bits = 1; bits <= 8; ++bits) {
    if (bits >= 2) all.push_back(Codebook::normal_float(bits));
    all.push_back(Codebook::uniform(bits));
    all.push_back(Codebook::uniform_asymmetric(bits));
  }
  const float six[] = {-0.5F, -0.125F, 0.0F, 0.3F, 0.31F, 1.0F}, three[] = {-1.0F, 0.0F, 0.25F};
  all.emplace_back(six, CodebookOptions{.name = "six"});
  all.emplace_back(three, CodebookOptions{.name = "three"});
  std::vector<float> many;
  for (int i = -99; i <= 100; ++i) many.push_back(float(i * std::abs(i)) / 10000.0F);
  all.emplace_back(many, CodebookOptions{.name = "two hundred"});
  return all;
}

}  // namespace

TEST_CASE("codes, scales and values of the numpy reference, to the bit") {
  const test::Fixture f("../quant/data/bitsandbytes.txt");
  const std::vector<float> x = hashed(6 * 64 + 37);
  const MatrixView<const float> W(x.data(), 1, Index(x.size()), Index(x.size()), 1);
  for (const auto& [name, book] :
       {std::pair<std::string, Codebook>{"nf4", Codebook::nf4()}, {"fp4", Codebook::fp4()}}) {
    CAPTURE_BOUND(name);
    const auto q = quantise(W, {.codebook = book});
    CHECK(mismatches(f[name + "_codes"], q.codes()) == 0);
    CHECK(mismatches(f[name + "_absmax"], q.absmax()) == 0);
    const Matrix<float> values = q.dequantise();
    CHECK(mismatches(f[name + "_values"], std::span(values.data(), std::size_t(values.size()))) == 0);
  }
}

TEST_CASE("int8 by rows, to the bit") {
  const test::Fixture f("../quant/data/bitsandbytes.txt");
  std::vector<float> x = hashed(12 * 32);
  for (float& v : x)
    if (v == 0) v = 0.25F;
  const auto q =
      quantise(view_of(std::as_const(x).data(), 12, 32), {.codebook = Codebook::int8(), .blocking = Blocking::row});
  REQUIRE(q.codes().size() == 12 * 32);
  Index wrong = 0;
  const Matrix<float> values = q.dequantise();
  for (Index i = 0; i < 12 * 32; ++i) {
    wrong += f["int8_codes"].data()[i] != double(std::int8_t(q.codes()[std::size_t(i)]));
    wrong += float(f["int8_values"].data()[i]) != values.data()[i];
  }
  CHECK(wrong == 0);
}

TEST_CASE("double quantisation, the second level to the bit") {
  const test::Fixture f("../quant/data/bitsandbytes.txt");
  const std::vector<float> x = hashed(300 * 64);
  const auto q = quantise(view_of(x.data(), 300, 64), {.double_quantise = true});
  REQUIRE(q.is_double_quantised());
  CHECK(q.absmax().empty());
  CHECK(mismatches(f["nested_codes"], q.nested().codes) == 0);
  CHECK(mismatches(f["nested_absmax"], q.nested().absmax) == 0);
  CHECK(q.nested().offset == float(f["nested_offset"](0, 0)));
  Index wrong = 0;
  for (Index b = 0; b < 300; ++b) wrong += q.scale(b) != float(f["nested_scales"](0, b));
  CHECK(wrong == 0);
  // The block of zeros keeps its zeros although its scale is no longer zero.
  for (Index j = 0; j < 64; ++j) CHECK(q(3, j) == 0);
  CHECK(q.bits_per_weight() == doctest::Approx(4 + 8.0 / 64 + (2 + 256 + 1) * 32.0 / (300 * 64)));
}

TEST_CASE("every block length, every codebook, every layout") {
  for (const Codebook& book : every_codebook()) {
    CAPTURE(book.name());
    for (Index n = 1; n <= 130; ++n) {
      CAPTURE(n);
      Matrix<float> W = test::random_matrix<float>(1, n, std::uint64_t(n));
      check_against_reference(W, quantise(W, {.codebook = book, .block_size = 32}));
      for (Index j = 0; j < n; ++j) W(0, j) = 2 + (n % 2 != 0 ? 1.0F : -1.0F) * W(0, j) * W(0, j);  // lopsided blocks
      check_against_reference(W, quantise(W, {.codebook = book, .block_size = 32}));
    }
    for (const auto& [rows, cols] :
         {std::pair<Index, Index>{5, 33}, {7, 64}, {3, 129}, {130, 1}, {2, 200}, {4, 1024}}) {
      const Matrix<float> W = test::random_matrix<float>(rows, cols, 3);
      for (const Blocking blocking : {Blocking::flat, Blocking::restart_rows, Blocking::row})
        for (const Index size : {Index(32), Index(64), Index(4096)})
          check_against_reference(W, quantise(W, {.codebook = book, .block_size = size, .blocking = blocking}));
    }
  }
}

TEST_CASE("all bf16 inputs through every codebook") {
  // Every finite bf16 within [−1, 1] beside a 1 (scaled exactly), beside a −1 and a 1, and every finite bf16 in blocks
  // of its neighbours; up to where the levels of int8 and affine blocks reach the end of float.
  for (const Codebook& book : every_codebook()) {
    CAPTURE(book.name());
    const float most = book.kind() == CodebookKind::table ? std::numeric_limits<float>::max() : 1e36F;
    Matrix<float> unit(2048, 32), all(2048, 32);
    for (Index k = 0; k < 65536; ++k) {
      const float x = float(bf16::from_bits(std::uint16_t(k)));
      all.data()[k] = std::fabs(x) <= most ? x : 1.0F;
      unit.data()[k] = std::fabs(x) <= 1 ? x : 0.5F;
    }
    check_against_reference(all, quantise(all, {.codebook = book, .block_size = 32}));
    for (Index i = 0; i < unit.rows(); ++i) unit(i, 0) = 1;
    check_against_reference(unit, quantise(unit, {.codebook = book, .block_size = 32}));
    for (Index i = 0; i < unit.rows(); ++i) unit(i, 31) = -1;
    check_against_reference(unit, quantise(unit, {.codebook = book, .block_size = 32}));
  }
}

TEST_CASE("zeros, minus zero, denormals, the largest floats") {
  Matrix<float> W(1, 192);
  const float tiny = std::numeric_limits<float>::denorm_min(), huge = std::numeric_limits<float>::max();
  for (Index j = 0; j < 32; ++j) W(0, j) = -0.0F;
  for (Index j = 32; j < 64; ++j) W(0, j) = float(j - 48) * tiny;
  for (Index j = 64; j < 96; ++j) W(0, j) = float(j - 80) * 1e-39F;
  for (Index j = 96; j < 128; ++j) W(0, j) = (j % 2 != 0 ? -1 : 1) * huge / float(j - 95);
  for (Index j = 128; j < 160; ++j) W(0, j) = j % 5 == 0 ? -0.0F : float(j) * 1e-20F;
  for (const Codebook& book : every_codebook()) {
    CAPTURE(book.name());
    if (book.kind() != CodebookKind::table)  // their levels reach beyond what they are the levels of
      for (Index j = 96; j < 128; ++j) W(0, j) *= 0x1p-10F;
    check_against_reference(W, quantise(W, {.codebook = book, .block_size = 32}));
  }
}

TEST_CASE("levels that would not be finite are refused with the block") {
  Matrix<float> W = test::random_matrix<float>(1, 192, 1);
  W(0, 70) = 3e38F;
  W(0, 71) = -3e38F;
  const auto refuses = [&](const Codebook& book) {
    CAPTURE(book.name());
    CHECK_THROWS_WITH_AS(quantise(W, {.codebook = book}),
                         doctest::Contains("must be finite in float, block 1 spans -3.0"), NonFiniteError);
  };
  refuses(Codebook::uniform_asymmetric(1));  // the step itself
  refuses(Codebook::uniform_asymmetric(2));  // the lowest level, two steps below zero
  refuses(Codebook::int8());                 // 127·absmax
  const Matrix<float> fits = quantise(W, {.codebook = Codebook::nf4()}).dequantise();
  CHECK(fits(0, 70) == 3e38F);
  // Whatever the widths and signs: a result has finite values, or there is none.
  int refused = 0;
  for (int bits = 1; bits <= 8; ++bits)
    for (float low = -3.4e38F; low < 0; low += 1.7e37F)
      for (const float high : {0.0F, 1.0F, 1e38F, 2.2e38F, 3.4e38F}) {
        W(0, 70) = high;
        W(0, 71) = low;
        try {
          const Matrix<float> V = quantise(W, {.codebook = Codebook::uniform_asymmetric(bits)}).dequantise();
          Index wrong = 0;
          for (Index j = 0; j < 192; ++j) wrong += !std::isfinite(V(0, j));
          CHECK(wrong == 0);
        } catch (const NonFiniteError&) {
          ++refused;
        }
      }
  CHECK(refused > 0);
  CHECK(refused < 8 * 20 * 5);
}

TEST_CASE("the input's type and order do not matter, nor does the number of threads") {
  const Matrix<float> W = test::random_matrix<float>(70, 130, 5);
  Matrix<bf16> half(70, 130);
  Matrix<float> rounded(70, 130), columns(130, 70), wide(70, 200);
  Matrix<double> twice(W);
  for (Index i = 0; i < 70; ++i)
    for (Index j = 0; j < 130; ++j) {
      half(i, j) = bf16(W(i, j));
      rounded(i, j) = float(half(i, j));
      columns(j, i) = W(i, j);
      wide(i, j) = W(i, j);
    }
  for (const Blocking blocking : {Blocking::flat, Blocking::restart_rows, Blocking::row}) {
    const QuantiseOptions o{.blocking = blocking};
    const auto same = [](const auto& a, const auto& b) {
      return std::ranges::equal(a.codes(), b.codes()) && std::ranges::equal(a.absmax(), b.absmax());
    };
    const auto q = quantise(W, o);
    CHECK(same(q, quantise(view_of(columns).transposed(), o)));
    CHECK(same(q, quantise(view_of(wide).middle_cols(0, 130), o)));
    const auto q64 = quantise(twice, o);
    static_assert(std::is_same_v<decltype(q64), const QuantisedMatrix<double>>);
    CHECK(same(q, q64));
    CHECK(same(quantise(half, o), quantise(rounded, o)));
#if defined(_OPENMP)
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    const auto single = quantise(W, o);
    omp_set_num_threads(threads);
    CHECK(same(q, single));
#endif
  }
}

TEST_CASE_TEMPLATE("the values of a quantised matrix are quantised to themselves", T, float, double) {
  for (std::uint64_t seed = 1; seed <= 4; ++seed) {
    Matrix<T> W = test::random_matrix<T>(33, 257, seed);
    for (Index j = 0; j < 257; ++j) {
      W(3, j) = std::abs(W(3, j));  // one-sided blocks, and lopsided ones
      W(4, j) = -std::abs(W(4, j));
      W(5, j) += 3;
      W(6, j) -= 1;
      W(7, j) *= T(1e-30);
      W(8, j) = T(int(4 * W(8, j))) / 2;  // ties
      W(9, j) = 0;
    }
    std::vector<QuantiseOptions> all{{},
                                     {.codebook = Codebook::fp4()},
                                     {.codebook = Codebook::nf2(), .block_size = 128},
                                     {.codebook = Codebook::nf3(), .blocking = Blocking::restart_rows},
                                     {.codebook = Codebook::nf4(), .blocking = Blocking::row},
                                     {.codebook = Codebook::nf2(), .scale_search = 8}};
    for (int bits = 1; bits <= 8; ++bits) {
      if (bits >= 2) all.push_back({.codebook = Codebook::normal_float(bits)});
      all.push_back({.codebook = Codebook::uniform(bits)});
      for (const Blocking blocking : {Blocking::flat, Blocking::restart_rows, Blocking::row})
        all.push_back({.codebook = Codebook::uniform_asymmetric(bits), .block_size = 32, .blocking = blocking});
    }
    for (const QuantiseOptions& o : all) {
      CAPTURE(o.codebook.name());
      const Matrix<T> once = quantise(W, o).dequantise();
      const Matrix<T> again = quantise(once, o).dequantise();
      CHECK(test::same_bits(once, again));
    }
    // int8 multiplies by 1/127 rounded, as bitsandbytes does, so the scale may move by a unit; the codes stay.
    const QuantiseOptions int8{.codebook = Codebook::int8(), .blocking = Blocking::row};
    const auto q = quantise(W, int8);
    const Matrix<T> values = q.dequantise();
    const auto again = quantise(values, int8);
    CHECK(std::ranges::equal(q.codes(), again.codes()));
    for (Index b = 0; b < 33; ++b) CHECK(std::abs(q.scale(b) - again.scale(b)) <= 2 * 0x1p-23F * q.scale(b));
  }
}

TEST_CASE("a table that reaches 1 on one side only: block by block, where a value reaches the scale") {
  const float lopsided[] = {-0.5F, 0.0F, 1.0F};
  for (const Codebook& book : {Codebook(lopsided), Codebook::dynamic8()}) {
    CAPTURE(book.name());
    const Matrix<float> W = test::random_matrix<float>(64, 32, 9);
    const QuantiseOptions o{.codebook = book, .block_size = 32};
    const auto q = quantise(W, o);
    const Matrix<float> once = q.dequantise(), again = quantise(once, o).dequantise();
    Index same = 0, changed = 0;
    for (Index b = 0; b < 64; ++b) {
      float reached = 0;
      bool equal = true;
      for (Index j = 0; j < 32; ++j) {
        reached = std::max(reached, std::fabs(once(b, j)));
        equal = equal && once(b, j) == again(b, j);
      }
      if (reached == q.scale(b)) {
        ++same;
        CHECK(equal);
      } else {  // the largest magnitude lies on the short side, and the scale shrinks to it
        ++changed;
        CHECK(quantise(once, o).scale(b) == reached);
      }
    }
    CHECK(same > 10);
    CHECK(changed > 0);
  }
}

TEST_CASE("under double quantisation the codes are quantised to themselves, the scales within a step of their map") {
  // The second quantisation sees scales that are levels of the first map, about another mean: they move again.
  const Matrix<float> W = test::random_matrix<float>(33, 257, 9);
  const QuantiseOptions o{.double_quantise = true};
  const auto q = quantise(W, o);
  const Matrix<float> values = q.dequantise();
  const auto again = quantise(values, o);
  CHECK(std::ranges::equal(q.codes(), again.codes()));
  const Codebook map = Codebook::dynamic8();
  float gap = 0, spread = 0;
  for (std::size_t i = 1; i < 256; ++i) gap = std::max(gap, map.values()[i] - map.values()[i - 1]);
  for (Index b = 0; b < q.layout().block_count(); ++b)
    spread = std::max(spread, std::fabs(q.scale(b) - again.nested().offset));
  Index moved = 0;
  for (Index b = 0; b < q.layout().block_count(); ++b) {
    CHECK(std::fabs(again.scale(b) - q.scale(b)) <= gap / 2 * spread + 4 * 0x1p-24F * q.scale(b));
    moved += again.scale(b) != q.scale(b);
  }
  CHECK(moved > 0);
}

TEST_CASE("uniform: error at most half a step, zero exact, symmetric and not") {
  for (int bits = 2; bits <= 8; ++bits) {
    CAPTURE(bits);
    Matrix<float> W = test::random_matrix<float>(4, 256, 11);
    for (Index j = 0; j < 256; ++j) W(1, j) = std::fabs(W(1, j)) + 3;  // one-sided
    W(2, 5) = 0;
    for (const bool asymmetric : {false, true}) {
      const auto q =
          quantise(W, {.codebook = asymmetric ? Codebook::uniform_asymmetric(bits) : Codebook::uniform(bits)});
      const Matrix<float> V = q.dequantise();
      CHECK(V(2, 5) == 0);
      for (Index i = 0; i < W.rows(); ++i)
        for (Index j0 = 0; j0 < 256; j0 += 64) {
          float low = 0, high = 0, worst = 0;
          for (Index j = j0; j < j0 + 64; ++j) {
            low = std::min(low, W(i, j));
            high = std::max(high, W(i, j));
            worst = std::max(worst, std::fabs(W(i, j) - V(i, j)));
          }
          const float step =
              asymmetric ? (high - low) / float((1 << bits) - 1) : std::max(high, -low) / float((1 << (bits - 1)) - 1);
          // The integer zero shifts an asymmetric grid by up to half a step against [low, high].
          CHECK(worst <= step * (asymmetric ? 1.001F : 0.501F));
        }
    }
  }
}

TEST_CASE("published error of normal weights") {
  // bitsandbytes' own targets for randn(1024, 1024), blocks of 64; 1e6 samples make the mean good to about 1e-4.
  const Matrix<float> W = test::random_matrix<float>(1024, 1024, 1);
  const auto mean_error = [&](const QuantiseOptions& o) {
    const Matrix<float> V = quantise(W, o).dequantise();
    double sum = 0;
    for (Index i = 0; i < W.size(); ++i) sum += std::fabs(double(W.data()[i]) - double(V.data()[i]));
    return sum / double(W.size());
  };
  CHECK(mean_error({}) == doctest::Approx(0.0728).epsilon(0.003));
  CHECK(mean_error({.codebook = Codebook::fp4()}) == doctest::Approx(0.0965).epsilon(0.003));
  CHECK(mean_error({.double_quantise = true}) < 0.0732);
}

TEST_CASE("a scale search never raises the squared error and lowers it at two bits") {
  Matrix<float> W = test::random_matrix<float>(32, 256, 2);
  for (Index k = W.size() / 2; k < W.size(); ++k) W.data()[k] *= W.data()[k] * W.data()[k];  // and heavy tails
  const auto error = [&](const QuantiseOptions& o) {
    const Matrix<float> V = quantise(W, o).dequantise();
    std::vector<double> blocks(static_cast<std::size_t>(W.size() / 64));
    for (Index i = 0; i < W.size(); ++i) {
      const double d = double(W.data()[i]) - double(V.data()[i]);
      blocks[std::size_t(i / 64)] += d * d;
    }
    return blocks;
  };
  for (const Codebook& book : {Codebook::nf2(), Codebook::nf3(), Codebook::nf4(), Codebook::fp4(), Codebook::uniform(2),
                               Codebook::uniform(3), Codebook::uniform(4), Codebook::normal_float(6)}) {
    CAPTURE(book.name());
    const auto plain = error({.codebook = book}), searched = error({.codebook = book, .scale_search = 16});
    double a = 0, b = 0, normal_a = 0, normal_b = 0;
    for (std::size_t k = 0; k < plain.size(); ++k) {
      CHECK(searched[k] <= plain[k] * (1 + 1e-5));  // errors are compared in float
      (k < plain.size() / 2 ? normal_a : a) += plain[k];
      (k < plain.size() / 2 ? normal_b : b) += searched[k];
    }
    CHECK(b < a);
    CHECK(normal_b < normal_a);
    if (book.name() == "nf2") CHECK(normal_b < 0.6 * normal_a);
  }
}

TEST_CASE("what cannot be quantised says where") {
  Matrix<float> W = test::random_matrix<float>(8, 64, 1);
  CHECK_THROWS_AS(quantise(W, {.block_size = 0}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.block_size = 48}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.block_size = 16}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.block_size = 8192}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.block_size = -64}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.double_quantise = true, .double_block_size = 0}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.scale_search = -1}), ArgumentError);
  CHECK_THROWS_AS(quantise(W, {.codebook = Codebook::int8(), .scale_search = 4}), ArgumentError);
  for (const float bad :
       {std::nanf(""), std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity()}) {
    W(5, 7) = bad;
    CHECK_THROWS_WITH_AS(quantise(W), doctest::Contains("W must be finite, got "), NonFiniteError);
    CHECK_THROWS_WITH_AS(quantise(W), doctest::Contains("(5, 7), block 5"), NonFiniteError);
    CHECK_THROWS_AS(quantise(W, {.codebook = Codebook::uniform_asymmetric(4)}), NonFiniteError);
  }
  Matrix<double> wide(2, 64);
  wide(1, 3) = 1e300;
  CHECK_THROWS_WITH_AS(quantise(wide), doctest::Contains("(1, 3)"), NonFiniteError);
  for (const auto& [r, c] : {std::pair<Index, Index>{0, 5}, {5, 0}, {0, 0}}) {
    const Matrix<float> empty(r, c);
    const auto q = quantise(empty);
    CHECK(q.codes().empty());
    CHECK(q.dequantise().size() == 0);
    CHECK(q.bits_per_weight() == 0);
  }
}

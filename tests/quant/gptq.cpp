// SPDX-License-Identifier: Apache-2.0
// GPTQ against its definition written out slowly (the inverse of what remains of H, a column at a time), its report
// against the error computed from the definition, and what must hold for any weight.
#include "lowrank/quant/gptq.hpp"

#include <doctest/doctest.h>

#include <bit>

#include "quant/reference.hpp"
#include "support/capture.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

/// H = XᵀX / tokens of inputs whose directions have standard deviations 1, 2^-decay, 3^-decay …
Matrix<double> gram(Index n, std::uint64_t seed, double decay = 0.7, Index tokens = 0) {
  if (tokens == 0) tokens = 2 * n;
  const Matrix<double> Z = test::random_matrix<double>(tokens, n, seed),
                       C = test::random_matrix<double>(n, n, seed + 1);
  Matrix<double> X(tokens, n), H(n, n);
  for (Index t = 0; t < tokens; ++t)
    for (Index k = 0; k < n; ++k)
      for (Index j = 0; j < n; ++j) X(t, j) += Z(t, k) * std::pow(double(k + 1), -decay) * C(k, j);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j)
      for (Index t = 0; t < tokens; ++t) H(i, j) += X(t, i) * X(t, j) / double(tokens);
  return H;
}

Matrix<double> damped(const Matrix<double>& H, double damping) {
  Matrix<double> D = H;
  double mean = 0;
  for (Index i = 0; i < H.rows(); ++i) mean += H(i, i) / double(H.rows());
  for (Index i = 0; i < H.rows(); ++i) D(i, i) += damping * mean;
  return D;
}

/// Gauss–Jordan, on a positive definite matrix.
Matrix<double> inverse(Matrix<double> A) {
  const Index n = A.rows();
  Matrix<double> B(n, n);
  for (Index i = 0; i < n; ++i) B(i, i) = 1;
  for (Index k = 0; k < n; ++k) {
    const double pivot = A(k, k);
    for (Index j = 0; j < n; ++j) {
      A(k, j) /= pivot;
      B(k, j) /= pivot;
    }
    for (Index i = 0; i < n; ++i) {
      if (i == k) continue;
      const double f = A(i, k);
      for (Index j = 0; j < n; ++j) {
        A(i, j) -= f * A(k, j);
        B(i, j) -= f * B(k, j);
      }
    }
  }
  return B;
}

/// A value relative to its block's scale, its code, and how far the value is from where the code would change.
struct Coded {
  unsigned code;
  double value, margin;
};
Coded code(const Codebook& book, double w, BlockScale s) {
  if (book.kind() == CodebookKind::table) {
    const float inverse = 1.0F / s.scale, x = float(w) * inverse;
    const unsigned c = s.scale == 0 ? 0 : reference::nearest(book, x);
    double margin = 1;
    for (const float t : book.thresholds()) margin = std::min(margin, std::abs(double(x) - double(t)));
    return {c, double(book.values()[c] * s.scale), s.scale == 0 ? 1 : margin};
  }
  const bool int8 = book.kind() == CodebookKind::int8;
  const double x = int8 ? w * 127 / double(s.scale) : w / double(s.scale) + double(s.zero);
  const double r = std::clamp(std::nearbyint(x), int8 ? -127.0 : 0.0, int8 ? 127.0 : std::pow(2.0, book.bits()) - 1);
  const double value = int8 ? double(float(r) * s.scale * (1.0F / 127.0F)) : double((float(r) - s.zero) * s.scale);
  return {unsigned(std::uint8_t(std::int8_t(r < 128 ? r : r - 256))), value, 0.5 - std::abs(x - r)};
}

BlockScale block_scale(const Codebook& book, const std::vector<double>& w, Index first, Index length) {
  float low = 0, high = 0;
  for (Index k = first; k < first + length; ++k) {
    low = std::min(low, float(w[std::size_t(k)]));
    high = std::max(high, float(w[std::size_t(k)]));
  }
  if (book.kind() != CodebookKind::affine) return {std::max(-low, high), 0};
  const auto scale = float((double(high) - double(low)) / ((1 << book.bits()) - 1));
  return {scale, float(std::nearbyint(-double(low) / double(scale)))};
}

/// What the definition makes of one row: optimal brain quantisation in a given order (eq. 2 and 3 of the paper).
struct Row {
  std::vector<unsigned> codes;
  std::vector<double> margins;
};
/// The first column of the inverse of H over the columns not yet coded, for each step; by inverting what remains, or
/// for larger sizes by eliminating from one inverse.
std::vector<std::vector<double>> remaining_inverses(const Matrix<double>& H) {
  const Index n = H.rows();
  std::vector<std::vector<double>> columns;
  Matrix<double> all = n > 72 ? inverse(H) : Matrix<double>();
  for (Index k = 0; k < n; ++k) {
    std::vector<double> column(static_cast<std::size_t>(n - k));
    if (n <= 72) {
      const Matrix<double> rest = inverse(Matrix<double>(H.view().block(k, k, n - k, n - k)));
      for (Index i = k; i < n; ++i) column[std::size_t(i - k)] = rest(i - k, 0);
    } else {
      for (Index i = k; i < n; ++i) column[std::size_t(i - k)] = all(i, k);
      for (Index i = k + 1; i < n; ++i)
        for (Index j = k + 1; j < n; ++j) all(i, j) -= all(i, k) * all(k, j) / all(k, k);
    }
    columns.push_back(column);
  }
  return columns;
}

/// Compares a result with the definition. A row is compared up to its first value that lies within `tie` (of the
/// block's scale) of where two codes meet: rounding may decide there, and everything after follows. Returns how many
/// rows ended so.
template <class T, class S>
Index compare_with_definition(const Matrix<S>& W, const Matrix<double>& H, const GptqOptions& o, double tie) {
  const Index m = W.rows(), n = W.cols();
  GptqOptions own = o;
  own.compare_plain = false;
  const auto result = gptq(W, H, own);
  const QuantisedMatrix<T>& q = result.base;
  const auto plain = quantise(W, o.quantise);
  const Codebook& book = o.quantise.codebook;
  std::vector<Index> order(static_cast<std::size_t>(n));
  for (Index j = 0; j < n; ++j) order[std::size_t(j)] = j;
  if (o.by_activation)
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return H(a, a) > H(b, b); });
  Matrix<double> D = damped(H, o.damping), P(n, n);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j) P(i, j) = D(order[std::size_t(i)], order[std::size_t(j)]);
  const auto inverses = remaining_inverses(P);
  const Index size = q.layout().block_size;
  const bool flat = o.quantise.blocking == Blocking::flat;
  Index ended = 0, wrong = 0;
  for (Index i = 0; i < m; ++i) {
    std::vector<double> w;
    for (const Index j : order) w.push_back(double(W(i, j)));
    BlockScale scale;
    for (Index k = 0; k < n; ++k) {
      const Index j = order[std::size_t(k)];
      const Index block = flat ? (i * n + j) / size : i * q.layout().blocks_per_segment() + j / size;
      if (o.fixed_scales)
        scale = plain.block_scale(block);
      else if (j % size == 0)
        scale = block_scale(book, w, j, std::min(size, n - j));
      const Coded c = code(book, w[std::size_t(k)], scale);
      const double got_scale = double(q.block_scale(block).scale);
      wrong += std::abs(got_scale - double(scale.scale)) > tie * std::abs(double(scale.scale));
      if (q.code(i, j) != c.code) {
        wrong += !(c.margin < tie);
        ++ended;
        break;
      }
      const auto& inv = inverses[std::size_t(k)];
      const double error = (w[std::size_t(k)] - c.value) / inv[0];
      for (Index l = k; l < n; ++l) w[std::size_t(l)] -= error * inv[std::size_t(l - k)];
    }
  }
  CHECK(wrong == 0);
  return ended;
}

/// Σ over rows of e·D·eᵀ, and each row's own.
template <class T, class S>
std::vector<double> losses(const Matrix<S>& W, const QuantisedMatrix<T>& q, const Matrix<double>& D) {
  std::vector<double> rows;
  const Matrix<T> Q = q.dequantise();
  for (Index i = 0; i < W.rows(); ++i) {
    double sum = 0;
    for (Index a = 0; a < W.cols(); ++a)
      for (Index b = 0; b < W.cols(); ++b)
        sum += (double(W(i, a)) - double(Q(i, a))) * D(a, b) * (double(W(i, b)) - double(Q(i, b)));
    rows.push_back(sum);
  }
  return rows;
}
double root_of_sum(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v;
  return std::sqrt(sum);
}

double distance(const Matrix<float>& W, const Matrix<float>& Q) {
  double sum = 0;
  for (Index k = 0; k < W.size(); ++k) sum += std::pow(double(W.data()[k]) - double(Q.data()[k]), 2);
  return std::sqrt(sum);
}

template <class T>
bool same(const QuantisedMatrix<T>& a, const QuantisedMatrix<T>& b) {
  return std::ranges::equal(a.codes(), b.codes()) && std::ranges::equal(a.zeros(), b.zeros()) &&
         std::ranges::equal(a.absmax(), b.absmax(), [](float x, float y) {
           return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y);
         });
}

std::vector<Codebook> all_books() {
  return {Codebook::nf2(),
          Codebook::nf3(),
          Codebook::nf4(),
          Codebook::fp4(),
          Codebook::uniform(1),
          Codebook::uniform(3),
          Codebook::normal_float(6),
          Codebook::uniform_asymmetric(2),
          Codebook::uniform_asymmetric(4),
          Codebook::int8()};
}

std::string message_of(auto&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "nothing was thrown";
}
bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("the codes of the definition, in double") {
  Index rows = 0, ended = 0;
  for (const Codebook& book : all_books()) {
    CAPTURE(book.name());
    for (const auto& [m, n] : {std::pair<Index, Index>{6, 40}, {1, 64}, {5, 33}, {3, 1}}) {
      CAPTURE_BOUND(n);
      const Matrix<double> W = test::random_matrix<double>(m, n, std::uint64_t(n)), H = gram(n, std::uint64_t(n + m));
      for (const Blocking blocking : {Blocking::restart_rows, Blocking::row}) {
        const QuantiseOptions q{.codebook = book, .block_size = 32, .blocking = blocking};
        const GptqOptions ways[] = {{.quantise = q},
                                    {.quantise = q, .fixed_scales = true},
                                    {.quantise = q, .damping = 0.1, .fixed_scales = true, .by_activation = true}};
        for (const GptqOptions& o : ways) {
          ended += compare_with_definition<double>(W, H, o, 1e-6);
          rows += m;
        }
      }
    }
  }
  // Values within 1e-6 of one of some ten thresholds: about one row of 40 in 2500.
  CHECK(rows > 500);
  CHECK(ended <= 3);
}

TEST_CASE("past a batch, blocks shorter and longer than one, the same in float") {
  for (const Index size : {32, 128, 256}) {
    CAPTURE(size);
    for (const Index n : {Index(160), Index(290)}) {
      const Matrix<double> W = test::random_matrix<double>(4, n, 5);
      const Matrix<float> narrow(W.view());
      const Matrix<double> H = gram(n, 6, 0.5);
      const GptqOptions o{.quantise = {.block_size = size, .blocking = Blocking::restart_rows}};
      CHECK(compare_with_definition<double>(W, H, o, 1e-6) <= 1);
      // Float: sums of n terms of errors below a half step each, in units of the scale.
      CHECK(compare_with_definition<float>(narrow, H, o, 1e-4) <= 2);
    }
  }
}

TEST_CASE("more rows than a tile, and blocks across row ends with fixed scales") {
  const Matrix<double> H = gram(48, 11);
  const Matrix<double> W = test::random_matrix<double>(70, 48, 12);
  CHECK(compare_with_definition<double>(W, H, {.quantise = {.block_size = 32}, .fixed_scales = true}, 1e-6) <= 1);
  CHECK(compare_with_definition<double>(
            W, H, {.quantise = {.block_size = 64}, .fixed_scales = true, .by_activation = true}, 1e-6) <= 1);
  const Matrix<double> H64 = gram(64, 13), V = test::random_matrix<double>(37, 64, 14);
  CHECK(compare_with_definition<double>(V, H64, {}, 1e-6) <= 1);
}

TEST_CASE("uncorrelated inputs: the codes and scales of quantise, to the bit") {
  Matrix<float> one(72, 72), uneven(72, 72);
  for (Index i = 0; i < 72; ++i) {
    one(i, i) = 1;
    uneven(i, i) = float(1 + i % 5);
  }
  Matrix<float> W = test::random_matrix<float>(35, 72, 3);
  for (Index j = 0; j < 72; ++j) {
    W(2, j) = 0;                               // blocks of zeros
    W(3, j) = W(3, j) * 0x1p-126F * 0x1p-20F;  // and of denormals, where the reciprocal of the scale overflows
    W(4, j) = j == 70 ? 1.0F : -0.0F;
  }
  for (const Codebook& book : all_books()) {
    CAPTURE(book.name());
    for (const Blocking blocking : {Blocking::flat, Blocking::restart_rows, Blocking::row})
      for (const int search : {0, 8})
        for (const bool fixed : {false, true}) {
          if (search > 0 && book.kind() != CodebookKind::table) continue;
          if (blocking == Blocking::flat && !fixed) continue;  // 72 is no multiple of 32
          const QuantiseOptions q{.codebook = book, .block_size = 32, .blocking = blocking, .scale_search = search};
          const auto plain = quantise(W, q);
          for (const Matrix<float>* H : {&one, &uneven})
            for (const bool compare : {false, true}) {
              const auto r = gptq(W, *H, {.quantise = q, .fixed_scales = fixed, .compare_plain = compare});
              CHECK(same(r.base, plain));
              CHECK(r.report.frobenius == doctest::Approx(r.report.plain_frobenius).epsilon(1e-6));
            }
          CHECK(same(gptq(W, uneven, {.quantise = q, .fixed_scales = true, .by_activation = true}).base, plain));
        }
  }
}

TEST_CASE("correlated inputs: the weighted error falls, and the report says by how much") {
  int draws = 0;
  for (std::uint64_t seed = 1; seed <= 30; ++seed) {
    CAPTURE(seed);
    const Index m = 8, n = 64;
    const Matrix<float> W = test::random_matrix<float>(m, n, seed);
    const Matrix<double> H = gram(n, 100 + seed, 0.2 + 0.03 * double(seed % 10), seed % 2 ? 2 * n : n / 2);
    const Matrix<double> D = damped(H, 0.01);
    for (const Codebook& book : {Codebook::nf2(), Codebook::nf3(), Codebook::nf4(), Codebook::uniform(3)})
      for (const bool fixed : {false, true}) {
        CAPTURE(book.name());
        const GptqOptions o{.quantise = {.codebook = book, .scale_search = 16}, .fixed_scales = fixed};
        const auto r = gptq(W, H, o);
        const auto plain = quantise(W, o.quantise);
        const auto own = losses(W, r.base, D), theirs = losses(W, plain, D);
        for (Index i = 0; i < m; ++i) CHECK(own[std::size_t(i)] <= theirs[std::size_t(i)] * (1 + 1e-5));
        // Sums of n terms in float, added up in double.
        CHECK(r.report.weighted == doctest::Approx(root_of_sum(own)).epsilon(1e-5));
        CHECK(r.report.plain_weighted == doctest::Approx(root_of_sum(theirs)).epsilon(1e-5));
        CHECK(r.report.frobenius == doctest::Approx(distance(W, r.base.dequantise())).epsilon(1e-6));
        CHECK(r.report.plain_frobenius == doctest::Approx(distance(W, plain.dequantise())).epsilon(1e-6));
        // Without the comparison row by row it must hold for the whole all the same.
        GptqOptions alone = o;
        alone.compare_plain = false;
        const auto bare = gptq(W, H, alone);
        CHECK(std::isnan(bare.report.plain_weighted));
        CHECK(bare.report.weighted < r.report.plain_weighted);
        CHECK(bare.report.weighted == doctest::Approx(root_of_sum(losses(W, bare.base, D))).epsilon(1e-5));
        ++draws;
      }
  }
  CHECK(draws == 240);
}

TEST_CASE("a row that quantise does better is quantise's") {
  // Two bits, scales fixed by one outlier a block: what is fed forward then has nowhere to go.
  Index kept = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    Matrix<float> W = test::random_matrix<float>(16, 32, seed, 0.05);
    for (Index i = 0; i < 16; ++i) W(i, Index(seed) % 32) = 1;
    const Matrix<double> H = gram(32, seed, 0.1), D = damped(H, 0.01);
    const GptqOptions o{.quantise = {.codebook = Codebook::nf2(), .block_size = 32}};
    const auto r = gptq(W, H, o);
    const auto own = losses(W, r.base, D), theirs = losses(W, quantise(W, o.quantise), D);
    for (std::size_t i = 0; i < 16; ++i) CHECK(own[i] <= theirs[i] * (1 + 1e-5));
    CHECK(r.report.weighted <= r.report.plain_weighted);
    kept += r.report.plain_rows;
  }
  CHECK(kept > 0);
}

TEST_CASE("double quantisation, orders, storage types, threads") {
  const Index m = 67, n = 192;
  const Matrix<float> W = test::random_matrix<float>(m, n, 21);
  const Matrix<double> H = gram(n, 22, 0.5), D = damped(H, 0.01);
  const GptqOptions nested{.quantise = {.double_quantise = true}, .fixed_scales = true};
  const auto r = gptq(W, H, nested);
  REQUIRE(r.base.is_double_quantised());
  const auto plain = quantise(W, nested.quantise);
  CHECK(r.base.nested().codes == plain.nested().codes);
  CHECK(root_of_sum(losses(W, r.base, D)) < 0.9 * root_of_sum(losses(W, plain, D)));

  const auto want = gptq(W, H);
  Matrix<float> turned(n, m);
  Matrix<double> H_turned(n, n);
  for (Index j = 0; j < n; ++j)
    for (Index i = 0; i < std::max(m, n); ++i) {
      if (i < m) turned(j, i) = W(i, j);
      if (i < n) H_turned(j, i) = H(i, j);
    }
  CHECK(same(gptq(turned.view().transposed(), H_turned.view().transposed()).base, want.base));
  CHECK(same(gptq(W, GptqFactor<float>(H)).base, want.base));

  Matrix<bf16> half(m, n);
  Matrix<float> widened(m, n);
  for (Index k = 0; k < W.size(); ++k) widened.data()[k] = float(half.data()[k] = bf16(W.data()[k]));
  CHECK(same(gptq(half, H).base, gptq(widened, H).base));
#if defined(_OPENMP)
  const int before = omp_get_max_threads();
  for (const int threads : {1, 2, 3, 5}) {
    omp_set_num_threads(threads);
    const auto again = gptq(W, H);
    CHECK(same(again.base, want.base));
    CHECK(again.report.weighted == want.report.weighted);
  }
  omp_set_num_threads(before);
#endif
}

TEST_CASE("nothing to quantise") {
  const Matrix<double> H = gram(64, 1);
  const auto no_rows = gptq(Matrix<float>(0, 64).view(), H.view());
  CHECK(no_rows.base.rows() == 0);
  CHECK(no_rows.report.weighted == 0);
  const Matrix<float> none(0, 0);
  CHECK(gptq(Matrix<float>(3, 0).view(), none).base.cols() == 0);
  const auto zeros = gptq(Matrix<float>(3, 64).view(), H.view());
  CHECK(zeros.report.weighted == 0);
  CHECK(zeros.report.plain_rows == 0);
}

TEST_CASE("bad input") {
  const Matrix<float> W = test::random_matrix<float>(4, 64, 1);
  Matrix<double> H = gram(64, 2);
  const Matrix<double> small = gram(32, 1), oblong(64, 63), zero(64, 64);
  CHECK_THROWS_AS(gptq(W, small), ShapeError);
  CHECK(has(message_of([&] { gptq(W, small); }), "64x64"));
  CHECK_THROWS_AS(gptq(W, oblong), ShapeError);
  CHECK_THROWS_AS(GptqFactor<float>{oblong}, ShapeError);
  CHECK_THROWS_AS(gptq(W, GptqFactor<float>(small)), ShapeError);
  CHECK(has(message_of([&] { gptq(W, GptqFactor<float>(small)); }), "64x64"));
  CHECK_THROWS_AS(gptq(W, zero), ArgumentError);  // nothing to damp with
  CHECK_THROWS_AS(gptq(W, H, {.damping = -0.1}), ArgumentError);
  CHECK_THROWS_AS(gptq(W, H, {.damping = NAN}), ArgumentError);
  CHECK_THROWS_AS(gptq(W, H, {.quantise = {.block_size = 48}}), ArgumentError);
  CHECK_THROWS_AS(gptq(W, H, {.quantise = {.block_size = 128}}), ArgumentError);  // runs on over row ends
  CHECK(has(message_of([&] { gptq(W, H, {.quantise = {.block_size = 128}}); }), "restart_rows"));
  CHECK_THROWS_AS(gptq(W, H, {.quantise = {.double_quantise = true}}), ArgumentError);
  CHECK(has(message_of([&] { gptq(W, H, {.by_activation = true}); }), "fixed_scales"));
  CHECK_THROWS_AS(gptq(W, H, {.quantise = {.codebook = Codebook::int8(), .scale_search = 4}}), ArgumentError);

  Matrix<double> bad = H;
  bad(3, 5) += 1;
  CHECK(has(message_of([&] { gptq(W, bad); }), "symmetric"));
  bad = H;
  bad(5, 3) = NAN;
  CHECK_THROWS_AS(gptq(W, bad), NonFiniteError);
  CHECK(has(message_of([&] { gptq(W, bad); }), "(5, 3)"));
  bad = H;
  bad(7, 7) = INFINITY;
  CHECK_THROWS_AS(gptq(W, bad), NonFiniteError);
  bad = H;
  bad(9, 9) = -bad(9, 9);
  CHECK(has(message_of([&] { gptq(W, bad); }), "positive definite"));
  // Fewer tokens than inputs, and no damping: singular, up to the rounding of H.
  Matrix<double> single(64, 64);
  for (Index i = 0; i < 64; ++i)
    for (Index j = 0; j < 64; ++j) single(i, j) = 1;
  CHECK(has(message_of([&] { gptq(W, single, {.damping = 0}); }), "raise damping"));
  CHECK_NOTHROW(gptq(W, single));

  Matrix<float> broken = W;
  broken(2, 40) = NAN;
  CHECK_THROWS_AS(gptq(broken, H), NonFiniteError);
  CHECK(has(message_of([&] { gptq(broken, H); }), "(2, 40)"));
  // Finite weights whose corrections are not.
  Matrix<float> huge(4, 64);
  CounterRng(1).fill_normal(huge.view(), 0, 1);
  for (float& x : std::span(huge.data(), 4 * 64)) x = x > 0 ? 3.4e38F : 1.2e38F;
  const Matrix<double> steep = gram(64, 3, 2.0);
  CHECK_THROWS_AS(gptq(huge, steep, {.quantise = {.codebook = Codebook::nf2()}, .damping = 1e-6}), NonFiniteError);
}

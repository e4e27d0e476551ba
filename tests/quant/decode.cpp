// SPDX-License-Identifier: Apache-2.0
// Codes to values from arrays nobody quantised: every byte, every path, any stream, and arrays that do not fit.
#include <doctest/doctest.h>

#include <bit>
#include <limits>

#include "quant/reference.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

std::vector<Codebook> all_codebooks() {
  std::vector<Codebook> all{Codebook::nf4(), Codebook::fp4(), Codebook::int8(), Codebook::dynamic8()};
  for (int bits = 1; bits <= 8; ++bits) {
    if (bits >= 2) all.push_back(Codebook::normal_float(bits));
    all.push_back(Codebook::uniform(bits));
    all.push_back(Codebook::uniform_asymmetric(bits));
  }
  return all;
}

float expected(const Codebook& book, unsigned code, float scale, float zero) {
  switch (book.kind()) {
    case CodebookKind::table:
      return book.values()[code] * scale;
    case CodebookKind::affine:
      return (float(code) - zero) * scale;
    default:
      return (float(std::int8_t(code)) * scale) * (1.0F / 127.0F);
  }
}

/// Bytes of a stream, pseudo-random.
std::vector<std::uint8_t> random_bytes(Index n, std::uint64_t seed) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(n));
  const CounterRng rng(seed);
  for (Index i = 0; i < n; ++i) bytes[std::size_t(i)] = std::uint8_t(rng.bits(std::uint64_t(i)));
  return bytes;
}

bool same(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b); }

}  // namespace

TEST_CASE("packing is a big-endian bit stream and comes back") {
  for (int bits = 1; bits <= 8; ++bits)
    for (Index n = 0; n <= 70; ++n) {
      const std::vector<std::uint8_t> random = random_bytes(n, std::uint64_t(bits));
      std::vector<std::uint8_t> codes(random), packed(std::size_t(n * bits + 7) / 8 + 1, 0xAB);
      for (auto& c : codes) c = std::uint8_t(c & ((1 << bits) - 1));
      detail::pack_codes(bits, codes.data(), n, packed.data());
      CHECK(packed.back() == 0xAB);  // not a byte too many
      Index wrong = 0;
      for (Index i = 0; i < n; ++i) {
        wrong += reference::code_at(bits, packed.data(), i) != codes[std::size_t(i)];
        wrong += detail::code_at(bits, packed.data(), i) != codes[std::size_t(i)];
      }
      for (Index b = n * bits; b < (n * bits + 7) / 8 * 8; ++b) wrong += reference::bit_at(packed.data(), b);
      CHECK(wrong == 0);
    }
}

TEST_CASE("all 256 bytes through every codebook, by every path, from every start") {
  std::vector<std::uint8_t> stream(256 + detail::code_padding);
  for (std::size_t i = 0; i < 256; ++i) stream[i] = std::uint8_t(i * 167);
  for (const Codebook& book : all_codebooks()) {
    CAPTURE(book.name());
    const BlockScale s{0.37F, book.kind() == CodebookKind::affine ? 3.0F : 0.0F};
    const Index codes = 256 * 8 / book.bits();
    const auto run = [&]<detail::Path P>() {
      Index wrong = 0;
      for (Index first = 0; first < 9; ++first)
        for (const Index n : {codes - first, Index(1), Index(15), Index(16), Index(17), Index(100)}) {
          std::vector<float> out(std::size_t(n) + 1, -99.0F);
          detail::decode_span<P>(book, stream.data(), first, n, s, out.data());
          for (Index i = 0; i < n; ++i)
            wrong += !same(out[std::size_t(i)],
                           expected(book, reference::code_at(book.bits(), stream.data(), first + i), s.scale, s.zero));
          wrong += out.back() != -99.0F;
        }
      CHECK(wrong == 0);
    };
    run.operator()<detail::Path::portable>();
    run.operator()<detail::native_path>();
  }
}

TEST_CASE("the portable encoder and the native one agree") {
  const Matrix<float> W = test::random_matrix<float>(1, 1000, 4);
  for (const Codebook& book : all_codebooks()) {
    if (book.kind() != CodebookKind::table) continue;
    CAPTURE(book.name());
    const detail::Encoder<detail::Path::portable> portable(book);
    const detail::Encoder<detail::native_path> native(book);
    for (Index n = 1; n <= 1000; n += n < 140 ? 1 : 97) {
      const float absmax = std::bit_cast<float>(detail::largest_magnitude_bits(W.data(), n));
      std::vector<std::uint8_t> a(1100), b(1100);
      portable.table_block(W.data(), n, absmax, a.data());
      native.table_block(W.data(), n, absmax, b.data());
      CHECK(a == b);
    }
  }
}

TEST_CASE("any stream is well-defined: random codes, scales and shapes") {
  const CounterRng rng(77);
  const auto books = all_codebooks();
  for (std::uint64_t round = 0; round < 400; ++round) {
    const auto draw = [&](std::uint64_t k, std::uint64_t n) { return Index(rng.bits(round * 16 + k) % n); };
    const Codebook& book = books[std::size_t(draw(0, books.size()))];
    const QuantiseOptions o{.codebook = book, .block_size = Index(32) << draw(1, 8), .blocking = Blocking(draw(2, 3))};
    const Index rows = draw(3, 40), cols = draw(4, 300);
    const BlockLayout layout = BlockLayout::of("test", rows, cols, o.block_size, o.blocking, book.bits());
    CAPTURE(book.name());
    CAPTURE(rows);
    CAPTURE(cols);
    const auto codes = random_bytes(layout.code_bytes(), round), zeros = random_bytes(layout.block_count(), round + 1);
    const auto nested_codes = random_bytes(layout.block_count(), round + 2);
    std::vector<float> absmax(static_cast<std::size_t>(layout.block_count()));
    for (float& a : absmax) a = float(rng.uniform(std::uint64_t(&a - absmax.data()) + 1000 * round));
    const auto map = Codebook::dynamic8();
    const std::vector<float> nested_absmax(static_cast<std::size_t>((layout.block_count() + 255) / 256), 0.25F);
    QuantisedParts parts{.codes = codes};
    if (book.kind() == CodebookKind::affine) parts.zeros = zeros;
    const bool nested = draw(5, 2) == 1 && layout.block_count() > 0;
    if (nested) {
      parts.nested_codes = nested_codes;
      parts.nested_absmax = nested_absmax;
      parts.nested_values = map.values();
      parts.nested_offset = 0.5F;
    } else {
      parts.absmax = absmax;
    }
    const QuantisedMatrix<float> q(rows, cols, o, parts);
    CHECK(q.is_double_quantised() == nested);
    const Matrix<float> values = q.dequantise();
    Index wrong = 0;
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j) {
        // Where element (i, j) lies, from the definition.
        const bool flat = o.blocking == Blocking::flat;
        const Index element = flat ? i * cols + j : j, size = o.blocking == Blocking::row ? cols : o.block_size;
        const Index per_row = (cols + size - 1) / size, row_bytes = (cols * book.bits() + 7) / 8;
        const Index block = element / size + (flat ? 0 : i * per_row);
        const unsigned code = reference::code_at(book.bits(), codes.data() + (flat ? 0 : i * row_bytes), element);
        const float scale =
            nested ? float(map.values()[nested_codes[std::size_t(block)]] * 0.25F) + 0.5F : absmax[std::size_t(block)];
        const float zero = parts.zeros.empty() ? 0 : float(zeros[std::size_t(block)]);
        wrong += !same(values(i, j), expected(book, code, scale, zero));
        wrong += q.code(i, j) != code;
      }
    CHECK(wrong == 0);
    CHECK(std::ranges::equal(q.codes(), codes));
  }
}

TEST_CASE("lengths are compared before anything is allocated") {
  // Codes of these shapes would fill the memory of any machine.
  for (const Index n : {Index(1) << 18, Index(1) << 29})
    for (const Blocking blocking : {Blocking::flat, Blocking::restart_rows, Blocking::row}) {
      const QuantiseOptions o{.blocking = blocking};
      CHECK_THROWS_WITH_AS(QuantisedMatrix<float>(n, n, o, {}), doctest::Contains("codes must have"), ShapeError);
    }
  CHECK_THROWS_AS(QuantisedMatrix<float>(Index(1) << 31, Index(1) << 31, {}, {}), ShapeError);
  CHECK_THROWS_AS(QuantisedMatrix<float>(std::numeric_limits<Index>::max(), 1, {}, {}), ShapeError);
}

TEST_CASE("arrays that do not fit are refused") {
  const Matrix<float> W = test::random_matrix<float>(4, 64, 1);
  const auto q = quantise(W);
  const auto nested = quantise(W, {.double_quantise = true});
  const auto make = [&](auto&& change, Index rows = 4, Index cols = 64, QuantiseOptions o = {}) {
    QuantisedParts p{.codes = q.codes(), .absmax = q.absmax()};
    change(p);
    return QuantisedMatrix<float>(rows, cols, std::move(o), p);
  };
  const auto as_is = [](QuantisedParts&) {};
  CHECK_NOTHROW(make(as_is));
  CHECK_THROWS_AS(make(as_is, 4, 65), ShapeError);
  CHECK_THROWS_AS(make(as_is, -4, 64), ShapeError);
  CHECK_THROWS_AS(make(as_is, Index(1) << 40, Index(1) << 40), ShapeError);
  CHECK_THROWS_AS(make(as_is, 4, 64, {.block_size = 128}), ShapeError);
  CHECK_THROWS_AS(make(as_is, 4, 64, {.block_size = 0}), ArgumentError);
  CHECK_THROWS_AS(make(as_is, 4, 64, {.blocking = Blocking(9)}), ArgumentError);
  CHECK_THROWS_AS(make(as_is, 4, 64, {.codebook = Codebook::uniform_asymmetric(4)}), ShapeError);  // no zeros
  CHECK_THROWS_AS(make([](auto& p) { p.codes = p.codes.first(127); }), ShapeError);
  CHECK_THROWS_AS(make([](auto& p) { p.codes = {}; }), ShapeError);
  CHECK_THROWS_AS(make([](auto& p) { p.absmax = p.absmax.first(3); }), ShapeError);
  CHECK_THROWS_AS(make([](auto& p) { p.absmax = {}; }), ShapeError);
  CHECK_THROWS_AS(make([](auto& p) { p.zeros = p.codes.first(4); }), ShapeError);
  const float bad[] = {1, 2, std::numeric_limits<float>::infinity(), 3}, negative[] = {1, 2, -1, 3};
  CHECK_THROWS_WITH_AS(make([&](auto& p) { p.absmax = bad; }), doctest::Contains("block 2"), NonFiniteError);
  CHECK_THROWS_WITH_AS(make([&](auto& p) { p.absmax = negative; }), doctest::Contains("block 2"), ArgumentError);

  const NestedScales& n = nested.nested();
  const auto make_nested = [&](auto&& change) {
    QuantisedParts p{.codes = q.codes(),
                     .nested_codes = n.codes,
                     .nested_absmax = n.absmax,
                     .nested_values = n.values,
                     .nested_offset = n.offset};
    change(p);
    return QuantisedMatrix<float>(4, 64, {}, p);
  };
  CHECK_NOTHROW(make_nested(as_is));
  CHECK_THROWS_AS(make_nested([&](auto& p) { p.absmax = q.absmax(); }), ArgumentError);
  CHECK_THROWS_AS(make_nested([](auto& p) { p.nested_codes = p.nested_codes.first(3); }), ShapeError);
  CHECK_THROWS_AS(make_nested([](auto& p) { p.nested_values = p.nested_values.first(255); }), ShapeError);
  CHECK_THROWS_AS(make_nested([](auto& p) { p.nested_absmax = {}; }), ShapeError);
  CHECK_THROWS_AS(make_nested([](auto& p) { p.nested_block_size = 0; }), ArgumentError);
  CHECK_NOTHROW(make_nested([](auto& p) { p.nested_block_size = std::numeric_limits<Index>::max(); }));
  CHECK_THROWS_AS(make_nested([](auto& p) { p.nested_offset = std::nanf(""); }), NonFiniteError);
  CHECK_THROWS_AS(make_nested([&](auto& p) { p.nested_absmax = std::span(bad).subspan(2, 1); }), NonFiniteError);

  std::vector<float> row(64), shorter(63);
  CHECK_THROWS_AS(q.row(4, row), ShapeError);
  CHECK_THROWS_AS(q.row(-1, row), ShapeError);
  CHECK_THROWS_AS(q.row(0, shorter), ShapeError);
  CHECK_THROWS_AS((void)q(4, 0), ShapeError);
  CHECK_THROWS_AS((void)q(0, -1), ShapeError);
  const Index ids[] = {0, 4};
  Matrix<float> out(2, 64);
  CHECK_THROWS_AS(q.lookup(ids, out.view()), ShapeError);
  Matrix<float> wrong(4, 63);
  CHECK_THROWS_AS(q.dequantise(wrong.view()), ShapeError);
}

// SPDX-License-Identifier: Apache-2.0
// QuantisedArrays: codes, scales and zeros of a matrix, and where each element's are; values in float.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/quant/block_layout.hpp"
#include "lowrank/quant/detail/decode.hpp"
#include "lowrank/quant/scale_table.hpp"

namespace lowrank {

struct QuantiseOptions {
  Codebook codebook = Codebook::nf4();
  /// Elements that share a scale: a power of two, 32 … 4096.
  Index block_size = 64;
  Blocking blocking = Blocking::flat;
  /// Keep the scales in bytes too, `double_block_size` of them to a second scale.
  bool double_quantise = false;
  Index double_block_size = 256;
  /// Besides the largest magnitude, try this many smaller scales for each block (down to half) and keep the one with
  /// the least squared error. 0 is what bitsandbytes does; 16 lowers the error of 2- and 3-bit tables markedly. Tables
  /// only.
  int scale_search = 0;
};

/// A quantised matrix as plain arrays, the way files hold it. Everything is copied.
struct QuantisedParts {
  /// Packed codes, see BlockLayout.
  std::span<const std::uint8_t> codes = {};
  /// One scale a block; empty when the scales are quantised themselves.
  std::span<const float> absmax = {};
  /// Double quantisation: a byte a block, a float for each `nested_block_size` of them, the 256 values, the offset.
  std::span<const std::uint8_t> nested_codes = {};
  std::span<const float> nested_absmax = {}, nested_values = {};
  float nested_offset = 0;
  Index nested_block_size = 256;
  /// Affine codebooks: the zero of each block.
  std::span<const std::uint8_t> zeros = {};
};

namespace detail {
template <class S>
class BlockQuantiser;
}  // namespace detail

/// W, out×in, as codes of 1 … 8 bits and a scale for each block of elements: what a QuantisedMatrix keeps, whatever the
/// type it computes in.
///
/// value(i, j) = table[code(i, j)] · scale(block of (i, j)), in float. **Cost** memory: codes and scales only (4.5 bits
/// a weight for NF4 in blocks of 64, 4.13 double-quantised).
class QuantisedArrays {
 public:
  QuantisedArrays() = default;

  /// From arrays somebody else made; see QuantisedMatrix. Lengths are compared with the layout before anything is
  /// allocated.
  [[gnu::cold]] QuantisedArrays(const char* where, Index rows, Index cols, QuantiseOptions options,
                                const QuantisedParts& parts)
      : QuantisedArrays(where, rows, cols, std::move(options)) {
    expect_length(where, "codes", parts.codes.size(), layout_.code_bytes());
    expect_length(where, "zeros", parts.zeros.size(), is_affine() ? layout_.block_count() : 0);
    const bool nested = !parts.nested_codes.empty();
    if (nested && !parts.absmax.empty())
      throw ArgumentError(detail::text(where, ": give either absmax or nested scales, not both"));
    options_.double_quantise = nested;
    if (nested) {
      options_.double_block_size = parts.nested_block_size;
      take_nested(where, parts);
    } else {
      expect_length(where, "absmax", parts.absmax.size(), layout_.block_count());
      for (std::size_t b = 0; b < parts.absmax.size(); ++b) expect_scale(where, "absmax", b, parts.absmax[b]);
      scales_ = detail::ScaleTable(std::vector<float>(parts.absmax.begin(), parts.absmax.end()));
    }
    zeros_.assign(parts.zeros.begin(), parts.zeros.end());
    clear_codes();
    std::copy(parts.codes.begin(), parts.codes.end(), codes_.begin());
  }

  /// Zeros of a shape.
  [[nodiscard]] static QuantisedArrays zero(const char* where, Index rows, Index cols, QuantiseOptions options) {
    QuantisedArrays q(where, rows, cols, std::move(options));
    q.clear_codes();
    const std::vector<float> none(std::size_t(q.layout_.block_count()), 0.0F);
    q.set_scales(none);
    if (q.is_affine()) q.zeros_.assign(none.size(), 0);
    return q;
  }

  [[nodiscard]] Index rows() const noexcept { return layout_.rows; }
  [[nodiscard]] Index cols() const noexcept { return layout_.cols; }
  [[nodiscard]] const Codebook& codebook() const noexcept { return options_.codebook; }
  [[nodiscard]] const QuantiseOptions& options() const noexcept { return options_; }
  [[nodiscard]] const BlockLayout& layout() const noexcept { return layout_; }

  // ---- the arrays, as a file wants them
  // ------------------------------------------------------------------------------
  [[nodiscard]] std::span<const std::uint8_t> codes() const noexcept {
    return {codes_.data(), std::size_t(layout_.code_bytes())};
  }
  /// One scale a block; empty when double-quantised.
  [[nodiscard]] std::span<const float> absmax() const noexcept { return scales_.plain(); }
  [[nodiscard]] bool is_double_quantised() const noexcept { return scales_.is_nested(); }
  /// The second level; meaningful when is_double_quantised().
  [[nodiscard]] const NestedScales& nested() const noexcept { return scales_.nested(); }
  /// Affine codebooks: the zero of each block; empty otherwise.
  [[nodiscard]] std::span<const std::uint8_t> zeros() const noexcept { return zeros_; }
  /// The scale a block is decoded with, whichever way it is kept.
  [[nodiscard]] float scale(Index block) const noexcept { return scales_[block]; }
  /// The code of element (i, j).
  [[nodiscard]] unsigned code(Index i, Index j) const noexcept {
    const Position p = position(i, j);
    return detail::code_at(layout_.bits, p.stream, p.offset);
  }

  /// Bytes of codes, scales and zeros.
  [[nodiscard]] Index storage_bytes() const noexcept {
    return layout_.code_bytes() + scales_.bytes() + Index(zeros_.size());
  }
  [[nodiscard]] double bits_per_weight() const noexcept {
    const double n = double(rows()) * double(cols());
    return n > 0 ? 8.0 * double(storage_bytes()) / n : 0.0;
  }

  // ---- for kernels
  // ---------------------------------------------------------------------------------------------------
  /// Values (row, col) … (row, col + n − 1), unchecked.
  [[gnu::noinline]] void decode_row(Index row, Index col, Index n, float* out) const {
    Index block, offset, byte;
    locate(row, col, block, offset, byte);
    detail::decode_blocks(
        options_.codebook, codes_.data() + byte, block_bytes_, layout_.block_size, offset, n,
        [&](Index b) { return block_scale(block + b); }, out);
  }
  [[gnu::noinline]] void decode_row(Index row, Index col, Index n, double* out) const {
    float values[256];
    for (Index k = 0; k < n; k += 256) {
      const Index m = std::min<Index>(256, n - k);
      decode_row(row, col + k, m, values);
      for (Index i = 0; i < m; ++i) out[k + i] = double(values[i]);
    }
  }
  /// What turns the codes of a block into values.
  [[nodiscard]] BlockScale block_scale(Index block) const noexcept {
    return {scales_[block], zeros_.empty() ? 0.0F : float(zeros_[std::size_t(block)])};
  }
  /// The scales of blocks [block, block + n), see ScaleTable::range.
  [[nodiscard]] const float* scales(Index block, Index n, float* buffer) const noexcept {
    return scales_.range(block, n, buffer);
  }
  /// The first byte of a row; only when layout().rows_start_blocks().
  [[nodiscard]] const std::uint8_t* row_stream(Index row) const noexcept { return codes_.data() + row * row_bytes_; }
  [[nodiscard]] Index row_block(Index row) const noexcept { return row * row_blocks_; }

 private:
  template <class>
  friend class detail::BlockQuantiser;
  struct Position {
    const std::uint8_t* stream;
    Index offset;
  };

  /// Options and layout alone.
  [[gnu::cold]] QuantisedArrays(const char* where, Index rows, Index cols, QuantiseOptions options)
      : options_(std::move(options)),
        layout_(BlockLayout::of(where, rows, cols, options_.block_size, options_.blocking, options_.codebook.bits())) {
    if (options_.double_block_size < 32 || options_.double_block_size > 4096)
      throw ArgumentError(
          detail::text(where, ": double_block_size must lie in [32, 4096], got ", options_.double_block_size));
    if (options_.scale_search < 0 || options_.scale_search > 256)
      throw ArgumentError(detail::text(where, ": scale_search must lie in [0, 256], got ", options_.scale_search));
    if (options_.scale_search > 0 && codebook().kind() != CodebookKind::table)
      throw ArgumentError(detail::text(where, ": scale_search needs a table, not ", codebook().name()));
    block_bytes_ = layout_.bytes(layout_.block_size);
    const bool flat = layout_.blocking == Blocking::flat;
    row_blocks_ = flat ? layout_.cols / layout_.block_size : layout_.blocks_per_segment();
    row_bytes_ = flat ? row_blocks_ * block_bytes_ : layout_.bytes_per_segment();
  }

  void clear_codes() {
    codes_.resize(layout_.code_bytes() + detail::code_padding);
    std::fill(codes_.begin(), codes_.end(), std::uint8_t(0));
  }

  /// Block number, offset within it, and the byte the block starts with, of element (row, col).
  void locate(Index row, Index col, Index& block, Index& offset, Index& byte) const noexcept {
    if (layout_.blocking == Blocking::row) {
      block = row;
      offset = col;
      byte = row * row_bytes_;
      return;
    }
    const int shift = std::countr_zero(std::uint64_t(layout_.block_size));  // block sizes are powers of two
    const bool flat = layout_.blocking == Blocking::flat;
    const Index element = flat ? row * layout_.cols + col : col;
    offset = element & (layout_.block_size - 1);
    block = element >> shift;
    byte = block * block_bytes_;
    if (!flat) {
      block += row * row_blocks_;
      byte += row * row_bytes_;
    }
  }
  [[nodiscard]] Position position(Index row, Index col) const noexcept {
    Index block, offset, byte;
    locate(row, col, block, offset, byte);
    return {codes_.data() + byte, offset};
  }
  [[nodiscard]] bool is_affine() const noexcept { return codebook().kind() == CodebookKind::affine; }

  void set_scales(const std::vector<float>& scales) {
    scales_ = options_.double_quantise ? detail::ScaleTable::quantised(scales, options_.double_block_size)
                                       : detail::ScaleTable(scales);
  }
  static void expect_length(const char* where, const char* what, std::size_t got, Index want) {
    if (Index(got) != want)
      throw ShapeError(detail::text(where, ": ", what, " must have ", want, " elements, got ", got));
  }
  static void expect_scale(const char* where, const char* what, std::size_t b, float s) {
    if (!std::isfinite(s)) throw NonFiniteError(detail::text(where, ": ", what, " of block ", b, " is not finite"));
    if (s < 0)
      throw ArgumentError(detail::text(where, ": ", what, " of block ", b, " must not be negative, got ", double(s)));
  }
  [[gnu::cold, gnu::noinline]] void take_nested(const char* where, const QuantisedParts& p) {
    if (p.nested_block_size < 1)
      throw ArgumentError(detail::text(where, ": nested_block_size must be positive, got ", p.nested_block_size));
    expect_length(where, "nested_codes", p.nested_codes.size(), layout_.block_count());
    expect_length(where, "nested_values", p.nested_values.size(), 256);
    expect_length(where, "nested_absmax", p.nested_absmax.size(),
                  layout_.block_count() / p.nested_block_size + (layout_.block_count() % p.nested_block_size != 0));
    for (std::size_t b = 0; b < p.nested_absmax.size(); ++b)
      expect_scale(where, "nested_absmax", b, p.nested_absmax[b]);
    NestedScales n{{p.nested_codes.begin(), p.nested_codes.end()},
                   {p.nested_absmax.begin(), p.nested_absmax.end()},
                   {p.nested_values.begin(), p.nested_values.end()},
                   p.nested_offset,
                   p.nested_block_size};
    scales_ = detail::ScaleTable(std::move(n));
    // A second-level scale may come out slightly below zero, as in bitsandbytes; it must only be a number.
    for (Index b = 0; b < scales_.count(); ++b)
      if (!std::isfinite(scales_[b]))
        throw NonFiniteError(detail::text(where, ": the nested scale of block ", b, " is not finite"));
  }

  QuantiseOptions options_;
  BlockLayout layout_;
  Buffer<std::uint8_t> codes_;
  detail::ScaleTable scales_;
  std::vector<std::uint8_t> zeros_;
  Index block_bytes_ = 32, row_blocks_ = 0, row_bytes_ = 0;
};

}  // namespace lowrank

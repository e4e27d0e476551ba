// SPDX-License-Identifier: Apache-2.0
// The blocks of a dense matrix to codes, scales and zeros, on all threads.
#pragma once

#include <atomic>
#include <limits>

#include "lowrank/core/threads.hpp"
#include "lowrank/quant/detail/block_scale.hpp"
#include "lowrank/quant/quantised_arrays.hpp"

namespace lowrank {
namespace detail {

/// Quantises W into arrays of its shape.
template <class S>
class BlockQuantiser {
 public:
  BlockQuantiser(QuantisedArrays& q, MatrixView<const S> W) : q_(q), W_(W), layout_(q.layout_) {}

  void run() {
    const Index blocks = layout_.block_count();
    scales_.resize(std::size_t(blocks));
    if (q_.is_affine()) q_.zeros_.resize(std::size_t(blocks));
    const Index grain = std::max<Index>(1, 16384 / layout_.block_size);
    parallel_ranges(blocks, grain, [&](Index b0, Index b1) {
      Buffer<float> staged(layout_.block_size);
      for (Index b = b0; b < b1; ++b) encode(b, staged.data());
    });
    if (const Index bad = first_bad_.load(); bad < blocks) report(bad);
    q_.set_scales(scales_);
    if (q_.is_double_quantised())
      for (Index b = 0; b < blocks; ++b)
        if (!levels_finite(q_.block_scale(b))) [[unlikely]]
          report(b);
  }

 private:
  void encode(Index b, float* staged) {
    const auto block = layout_.block(b);
    const float* x = elements(block, staged);
    const Index n = block.length;
    std::uint8_t* out = q_.codes_.data() + block.byte;
    const std::uint32_t magnitude = largest_magnitude_bits(x, n);
    if (magnitude >= 0x7f800000U) [[unlikely]]
      return mark_bad(b);
    const auto absmax = std::bit_cast<float>(magnitude);
    float& scale = scales_[std::size_t(b)];
    const BlockScale chosen = choose_(x, n, absmax, out);
    scale = chosen.scale;
    if (!levels_finite(chosen)) [[unlikely]]
      return mark_bad(b);
    switch (q_.codebook().kind()) {
      case CodebookKind::table:
        encoder_.table_block(x, n, scale, out);
        break;
      case CodebookKind::int8:
        encoder_.int8_block(x, n, scale, out);
        break;
      case CodebookKind::affine:
        q_.zeros_[std::size_t(b)] = std::uint8_t(chosen.zero);
        encoder_.affine_block(x, n, scale, int(chosen.zero), out);
        break;
    }
  }

  void mark_bad(Index b) {
    Index seen = first_bad_.load();
    while (b < seen && !first_bad_.compare_exchange_weak(seen, b)) {
    }
  }
  /// Whether every level of the block is finite: (code − zero)·scale, code·scale before the division by 127, and a
  /// scale that was rounded itself may leave the range of float although W does not.
  [[nodiscard]] bool levels_finite(BlockScale s) const {
    switch (q_.codebook().kind()) {
      case CodebookKind::affine:
        return std::isfinite(s.scale * std::max(s.zero, float((1 << layout_.bits) - 1) - s.zero));
      case CodebookKind::int8:
        return std::isfinite(s.scale * 127.0F);
      case CodebookKind::table:
        break;
    }
    return std::isfinite(s.scale);
  }

  /// The block as consecutive floats: W's own memory where it is that already, `staged` otherwise.
  const float* elements(const BlockLayout::Block& block, float* staged) const {
    Index i = layout_.row_of(block.segment, block.first), j = layout_.col_of(block.first);
    const bool one_run = W_.is_row_major() && (j + block.length <= layout_.cols || W_.is_contiguous());
    if constexpr (std::same_as<S, float>)
      if (one_run) return &W_(i, j);
    float* out = staged;
    for (Index left = block.length; left > 0; ++i, j = 0) {
      const Index m = one_run ? left : std::min(left, layout_.cols - j);
      const S* source = W_.data() + i * W_.row_stride() + j * W_.col_stride();
      const Index stride = W_.col_stride();
      if (stride == 1)
        for (Index k = 0; k < m; ++k) out[k] = float(source[k]);
      else
        for (Index k = 0; k < m; ++k) out[k] = float(source[k * stride]);
      out += m;
      left -= m;
    }
    return staged;
  }
  [[noreturn]] void report(Index b) const {
    const auto block = layout_.block(b);
    float low = 0, high = 0;
    for (Index k = 0; k < block.length; ++k) {
      const Index i = layout_.row_of(block.segment, block.first + k), j = layout_.col_of(block.first + k);
      const auto x = double(W_(i, j));
      if (!std::isfinite(float(x)))
        throw NonFiniteError(text("quantise: W must be finite", std::isfinite(x) ? " in float" : "", ", got ", x,
                                  " at (", i, ", ", j, "), block ", b));
      low = std::min(low, float(x));
      high = std::max(high, float(x));
    }
    throw NonFiniteError(text("quantise: the levels of ", q_.codebook().name(), " must be finite in float, block ", b,
                              " spans ", double(low), " to ", double(high)));
  }

  QuantisedArrays& q_;
  MatrixView<const S> W_;
  const BlockLayout& layout_;
  Encoder<> encoder_{q_.codebook()};
  ScaleChooser choose_{encoder_, q_.codebook(), q_.options_.scale_search};
  std::vector<float> scales_;
  std::atomic<Index> first_bad_{std::numeric_limits<Index>::max()};
};

}  // namespace detail
}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// The scales of the blocks: floats, or (double quantisation) bytes on a second level of blocks.
#pragma once

#include <span>
#include <vector>

#include "lowrank/quant/detail/encode.hpp"

namespace lowrank {

/// The second level of double quantisation: scale = values[code]·absmax[block / block_size] + offset.
struct NestedScales {
  std::vector<std::uint8_t> codes;
  std::vector<float> absmax;
  std::vector<float> values;  ///< 256 of them
  float offset = 0;
  Index block_size = 256;
};

namespace detail {

/// One scale for each block, whichever way they are kept.
class ScaleTable {
 public:
  ScaleTable() = default;
  explicit ScaleTable(std::vector<float> scales) : plain_(std::move(scales)), count_(Index(plain_.size())) {}
  explicit ScaleTable(NestedScales nested) : nested_(std::move(nested)), count_(Index(nested_.codes.size())) {
    const auto size = std::uint64_t(nested_.block_size);
    if (std::has_single_bit(size)) shift_ = std::countr_zero(size);
  }

  /// Quantises scales a second time, as bitsandbytes' compress_statistics: offset = their mean, the rest on the dynamic
  /// 8-bit map in blocks. The mean is taken in double; theirs, summed in float, may differ in its last bits.
  [[gnu::cold, gnu::noinline]] static ScaleTable quantised(const std::vector<float>& scales, Index block_size) {
    NestedScales n;
    n.block_size = block_size;
    const Codebook map = Codebook::dynamic8();
    n.values.assign(map.values().begin(), map.values().end());
    double sum = 0;
    for (const float s : scales) sum += double(s);
    n.offset = scales.empty() ? 0.0F : float(sum / double(scales.size()));
    const Encoder<> encoder(map);
    n.codes.resize(scales.size());
    std::vector<float> centred;
    for (Index b = 0; b < Index(scales.size()); b += block_size) {
      const Index m = std::min(block_size, Index(scales.size()) - b);
      centred.assign(std::size_t(m), 0.0F);
      for (Index i = 0; i < m; ++i) centred[std::size_t(i)] = scales[std::size_t(b + i)] - n.offset;
      const float absmax = std::bit_cast<float>(largest_magnitude_bits(centred.data(), m));
      encoder.table_block(centred.data(), m, absmax, n.codes.data() + b);
      n.absmax.push_back(absmax);
    }
    return ScaleTable(std::move(n));
  }

  [[nodiscard]] bool is_nested() const noexcept { return !nested_.values.empty(); }
  [[nodiscard]] const std::vector<float>& plain() const noexcept { return plain_; }
  [[nodiscard]] const NestedScales& nested() const noexcept { return nested_; }
  [[nodiscard]] Index count() const noexcept { return count_; }

  [[nodiscard]] float operator[](Index b) const noexcept {
    if (!is_nested()) return plain_[std::size_t(b)];
    float product = nested_.values[nested_.codes[std::size_t(b)]] *
                    nested_.absmax[std::size_t(shift_ >= 0 ? b >> shift_ : b / nested_.block_size)];
    // A product and a sum, each rounded to float as bitsandbytes has them: the compiler must not fuse them into one.
    asm("" : "+m"(product));
    return product + nested_.offset;
  }
  /// Scales [b, b + n) as consecutive floats: their own memory, or decoded into `buffer`, which holds n.
  [[nodiscard]] const float* range(Index b, Index n, float* buffer) const noexcept {
    if (!is_nested()) return plain_.data() + b;
    for (Index i = 0; i < n; ++i) buffer[i] = (*this)[b + i];
    return buffer;
  }
  [[nodiscard]] Index bytes() const noexcept {
    if (!is_nested()) return Index(plain_.size() * sizeof(float));
    return Index(nested_.codes.size() + (nested_.absmax.size() + nested_.values.size() + 1) * sizeof(float));
  }

 private:
  std::vector<float> plain_;
  NestedScales nested_;
  Index count_ = 0;
  int shift_ = -1;  ///< of a second-level block size that is a power of two
};

}  // namespace detail
}  // namespace lowrank

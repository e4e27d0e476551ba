// SPDX-License-Identifier: Apache-2.0
// Codes and values of a column: each element in a block, hence with a scale, of its own.
#pragma once

#include "lowrank/quant/detail/decode.hpp"

namespace lowrank::detail {

/// Codes L elements at a time, each with the scale its lane was given, to the same codes as quantise chooses.
template <int L>
class LaneCoder {
 public:
  /// `zero_code`: what elements of a table's block with scale 0 get. Both references are kept.
  LaneCoder(const Encoder<>& encoder, const Codebook& book, unsigned zero_code)
      : encoder_(encoder), book_(book), zero_code_(zero_code) {
    for (int l = 0; l < L; ++l) set(l, {1, 0});
  }

  void set(int lane, BlockScale s) {
    const float unit = book_.kind() == CodebookKind::int8 ? 127.0F : 1.0F;
    scale_[lane] = s.scale;
    zero_[lane] = s.zero;
    factor_[lane] = unit / s.scale;
    const bool odd = s.scale == 0 || !std::isfinite(factor_[lane]);
    odd_count_ += int(odd) - int(odd_[lane]);
    odd_[lane] = odd;
  }

  /// codes[l] = the nearest code to x[l], values[l] what it decodes to. x beyond the range of its block gets the
  /// outermost code, NaN any.
  void operator()(const float* x, std::uint8_t* codes, float* values) const {
    float v[L];
    switch (book_.kind()) {
      case CodebookKind::table:
        for (int l = 0; l < L; ++l) v[l] = bounded(x[l] * factor_[l], 2);
        encoder_.nearest_codes(v, L, 1, codes);
        break;
      case CodebookKind::int8:
        for (int l = 0; l < L; ++l) v[l] = bounded(__builtin_rintf(x[l] * factor_[l]), 127);
        for (int l = 0; l < L; ++l) codes[l] = std::uint8_t(std::int8_t(v[l]));
        break;
      case CodebookKind::affine: {
        const auto largest = float((1 << book_.bits()) - 1);
        for (int l = 0; l < L; ++l) v[l] = bounded(__builtin_rintf(x[l] / scale_[l]), 256) + zero_[l];
        for (int l = 0; l < L; ++l) codes[l] = std::uint8_t(std::clamp(v[l], 0.0F, largest));
        break;
      }
    }
    if (odd_count_ > 0) [[unlikely]]
      for (int l = 0; l < L; ++l)
        if (odd_[l]) codes[l] = odd_code(l, x[l]);
    const float* table = book_.values().data();
    for (int l = 0; l < L; ++l) values[l] = (table[codes[l]] - zero_[l]) * scale_[l];
    if (book_.kind() == CodebookKind::int8)
      for (int l = 0; l < L; ++l) values[l] *= int8_unit;
  }

 private:
  /// x within ±limit, −limit for NaN: what may be converted to an integer.
  static float bounded(float x, float limit) { return x > -limit ? std::min(x, limit) : -limit; }

  /// Blocks of scale 0, and those so small that the reciprocal overflows and quantise divides instead.
  std::uint8_t odd_code(int l, float x) const {
    const float s = scale_[l];
    switch (book_.kind()) {
      case CodebookKind::table:
        return s == 0 ? std::uint8_t(zero_code_) : book_.nearest(bounded(x / s, 2));
      case CodebookKind::int8:
        return s == 0 ? std::uint8_t(0)
                      : std::uint8_t(std::int8_t(bounded(float(std::nearbyint(double(x) * (127.0 / double(s)))), 127)));
      case CodebookKind::affine:
        break;
    }
    if (s == 0) return std::uint8_t(zero_[l]);
    return std::uint8_t(
        std::clamp(bounded(__builtin_rintf(x / s), 256) + zero_[l], 0.0F, float((1 << book_.bits()) - 1)));
  }

  const Encoder<>& encoder_;
  const Codebook& book_;
  unsigned zero_code_;
  float scale_[L] = {}, factor_[L] = {}, zero_[L] = {};
  bool odd_[L] = {};
  int odd_count_ = 0;
};

}  // namespace lowrank::detail

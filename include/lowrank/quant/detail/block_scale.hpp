// SPDX-License-Identifier: Apache-2.0
// How the scale of a block is chosen: its largest magnitude, its range, or the least squared error of a few candidates.
#pragma once

#include <limits>

#include "lowrank/quant/detail/decode.hpp"

namespace lowrank::detail {

/// The scale (and, for affine codebooks, the zero) of one block after another.
class ScaleChooser {
 public:
  /// `search` as in QuantiseOptions::scale_search; both arguments are kept by reference.
  ScaleChooser(const Encoder<>& encoder, const Codebook& book, int search)
      : encoder_(encoder), book_(book), search_(search) {}

  /// For x[0, n) of largest magnitude `absmax`, finite. `scratch` has room for the codes and may be overwritten.
  BlockScale operator()(const float* x, Index n, float absmax, std::uint8_t* scratch) const {
    if (book_.kind() == CodebookKind::affine) return affine(x, n);
    return {search_ > 0 && absmax > 0 ? searched(x, n, absmax, scratch) : absmax, 0};
  }

 private:
  /// The range of the block, with zero in it, over the steps there are.
  ///
  /// That quotient is lowered by units in the last place, mostly none, until its outermost levels, rounded to float,
  /// are what the ends of the block become and have that very quotient again. Then quantising the levels gives the same
  /// scale, zero and codes. Of 256 neighbouring floats one has eight trailing zero bits, with which levels are exact.
  BlockScale affine(const float* x, Index n) const {
    float low = 0, high = 0;
    for (Index i = 0; i < n; ++i) {
      low = std::min(low, x[i]);
      high = std::max(high, x[i]);
    }
    const int largest = (1 << book_.bits()) - 1;
    const auto step = [&](float from, float to) { return float((double(to) - double(from)) / largest); };
    const auto zero_of = [&](float scale) {  // what the encoder makes of `low`, so that `low` gets code 0
      return scale > 0 ? std::clamp(-__builtin_rintf(low / scale), 0.0F, float(largest)) : 0.0F;
    };
    const float first = step(low, high);
    if (!std::isfinite(first)) return {first, 0};  // the caller refuses the block
    float scale = first;
    for (int tries = 0; tries < 512 && scale > 0; ++tries, scale = std::nextafter(scale, 0.0F)) {
      const float zero = zero_of(scale);
      if (__builtin_rintf(high / scale) + zero < float(largest)) continue;  // the last code would not be used
      if (step(-zero * scale, (float(largest) - zero) * scale) == scale) return {scale, zero};
    }
    return {first, zero_of(first)};  // not among denormals
  }
  /// The clipping point among absmax·(1 − i/2k), i = 0 … k, with the least squared error.
  [[gnu::noinline]] float searched(const float* x, Index n, float absmax, std::uint8_t* scratch) const {
    float best = absmax, values[256];
    double least = std::numeric_limits<double>::infinity();
    for (int i = 0; i <= search_; ++i) {
      const auto candidate = float(double(absmax) * (1 - double(i) / (2.0 * search_)));
      encoder_.table_block(x, n, candidate, scratch);
      double error = 0;
      for (Index j = 0; j < n; j += 256) {
        const Index m = std::min<Index>(256, n - j);
        decode_span<Path::portable>(book_, scratch, j, m, {candidate, 0}, values);
        float sum = 0;
        for (Index l = 0; l < m; ++l) sum += (x[j + l] - values[l]) * (x[j + l] - values[l]);
        error += double(sum);
      }
      if (error < least) {
        least = error;
        best = candidate;
      }
    }
    return best;
  }

  const Encoder<>& encoder_;
  const Codebook& book_;
  int search_;
};

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Quantisation written a second time, slowly: loops over everything, distances in long double, a bit at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "lowrank/quant/quantise.hpp"

namespace reference {

using lowrank::Blocking;
using lowrank::Codebook;
using lowrank::CodebookKind;
using lowrank::Index;

/// The level nearest to x, of equally near ones the lowest code. Midpoints round to float as the library documents.
inline unsigned nearest(const Codebook& book, float x) {
  if (book.name() == "nf4") {  // where bitsandbytes' kernel decides, as its source spells it
    static const float kernel[] = {-0.8480964004993439F,   -0.6106329262256622F,  -0.4599952697753906F,
                                   -0.33967943489551544F,  -0.23460740596055984F, -0.13791173323988914F,
                                   -0.045525018125772476F, 0.03979014977812767F,  0.1202552504837513F,
                                   0.2035212516784668F,    0.2920137718319893F,   0.3893125355243683F,
                                   0.5016634166240692F,    0.6427869200706482F,   0.8614784181118011F};
    unsigned code = 0;
    for (const float t : kernel) code += x > t;
    return code;
  }
  if (book.name() == "fp4") {  // ascending; a value on a midpoint goes down, and what is above zero to the second zero
    static const unsigned ascending[] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
    unsigned rank = 0;
    for (unsigned k = 0; k + 1 < 16; ++k) {
      const double low = double(book.values()[ascending[k]]), high = double(book.values()[ascending[k + 1]]);
      rank += x > float((low + high) / 2);
    }
    return ascending[rank];
  }
  unsigned best = 0;
  for (unsigned c = 1; c < unsigned(book.values().size()); ++c) {
    if (c >= unsigned(book.levels())) continue;
    const double a = double(book.values()[best]), b = double(book.values()[c]);
    if (a == b) continue;
    const auto middle = float((a + b) / 2);
    const bool wins = a < b ? (best < c ? x > middle : x >= middle) : (best < c ? x < middle : x <= middle);
    if (wins) best = c;
  }
  return best;
}

inline int bit_at(const std::uint8_t* stream, Index bit) { return stream[bit / 8] >> (7 - bit % 8) & 1; }

inline unsigned code_at(int bits, const std::uint8_t* stream, Index i) {
  unsigned code = 0;
  for (int b = 0; b < bits; ++b) code = code << 1 | unsigned(bit_at(stream, i * bits + b));
  return code;
}

struct Quantised {
  std::vector<unsigned> codes;  // one an element, row by row
  std::vector<float> absmax;
  std::vector<unsigned> zeros;  // affine codebooks only
  std::vector<float> values;
};

/// A block of a table: every element relative to the scale, the nearest level.
inline void table_block(const Codebook& book, const float* x, Index n, Quantised& out) {
  float a = 0;
  for (Index i = 0; i < n; ++i) a = std::max(a, std::fabs(x[i]));
  out.absmax.push_back(a);
  const volatile float inverse = 1.0F / a;
  for (Index i = 0; i < n; ++i) {
    const volatile float scaled = std::isfinite(inverse) ? x[i] * inverse : x[i] / a;
    const unsigned c = nearest(book, a == 0 ? 0.0F : float(scaled));
    out.codes.push_back(c);
    out.values.push_back(book.values()[c] * a);
  }
}

/// A block of int8: x·(127/absmax) to the nearest integer, even on a tie; back as (code·absmax)·(1/127).
inline void int8_block(const float* x, Index n, Quantised& out) {
  float a = 0;
  for (Index i = 0; i < n; ++i) a = std::max(a, std::fabs(x[i]));
  out.absmax.push_back(a);
  const volatile float factor = 127.0F / a;
  for (Index i = 0; i < n; ++i) {
    const volatile float scaled = x[i] * factor;
    const double position = a == 0 ? 0.0 : std::isfinite(factor) ? double(scaled) : double(x[i]) * (127.0 / double(a));
    const int code = int(std::nearbyint(position));
    out.codes.push_back(unsigned(code) & 255U);
    const volatile float product = float(code) * a;
    out.values.push_back(product * (1.0F / 127.0F));
  }
}

/// The integer x stands at on a grid of `scale`, ties to even, and where code `code` stands.
inline int place(float x, float scale) {
  const volatile float q = x / scale;
  return int(std::nearbyint(double(std::fmin(std::fmax(q, -256.0F), 256.0F))));
}
inline float level(int code, int zero, float scale) {
  const volatile float v = float(code - zero) * scale;
  return v;
}

/// A block of 2^bits evenly spaced levels: the greatest scale not above range / steps, at most 511 floats below it,
/// whose outermost levels are used and span that very scale again; range / steps itself when there is none.
inline void affine_block(const Codebook& book, const float* x, Index n, Quantised& out) {
  const int last = (1 << book.bits()) - 1;
  float low = 0, high = 0;
  for (Index i = 0; i < n; ++i) {
    low = std::fmin(low, x[i]);
    high = std::fmax(high, x[i]);
  }
  const auto first = float((double(high) - double(low)) / last);
  const auto zero_of = [&](float s) { return std::min(std::max(-place(low, s), 0), last); };
  float scale = first;
  bool found = false;
  for (int k = 0; k < 512 && !found && scale > 0 && std::isfinite(first); ++k) {
    const int zero = zero_of(scale);
    const double span = double(level(last, zero, scale)) - double(level(0, zero, scale));
    found = place(high, scale) + zero >= last && float(span / last) == scale;
    if (!found) scale = std::nextafter(scale, 0.0F);
  }
  if (!found) scale = first;
  const int zero = scale > 0 ? zero_of(scale) : 0;
  out.absmax.push_back(scale);
  out.zeros.push_back(unsigned(zero));
  for (Index i = 0; i < n; ++i) {
    const int code = scale > 0 ? std::min(std::max(place(x[i], scale) + zero, 0), last) : zero;
    out.codes.push_back(unsigned(code));
    out.values.push_back(level(code, zero, scale));
  }
}

inline Quantised quantise(const lowrank::Matrix<float>& W, const Codebook& book, Index block_size, Blocking blocking) {
  Quantised out;
  const Index rows = W.rows(), cols = W.cols();
  const bool flat = blocking == Blocking::flat;
  if (blocking == Blocking::row) block_size = cols;
  const Index segments = flat ? 1 : rows, length = flat ? rows * cols : cols;
  for (Index s = 0; s < segments; ++s)
    for (Index first = 0; first < length; first += block_size) {
      const Index n = std::min(block_size, length - first);
      const float* x = W.data() + s * length + first;
      if (book.kind() == CodebookKind::table)
        table_block(book, x, n, out);
      else if (book.kind() == CodebookKind::int8)
        int8_block(x, n, out);
      else
        affine_block(book, x, n, out);
    }
  return out;
}

}  // namespace reference

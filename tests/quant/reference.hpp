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
  unsigned best = 0;
  for (unsigned c = 1; c < unsigned(book.values().size()); ++c) {
    if (book.name() == "fp4" && c == 8) continue;  // the second zero is never written
    if (c >= unsigned(book.levels()) && book.name() != "fp4") continue;
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
  std::vector<float> values;
};

/// Table codebooks only.
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
      float a = 0;
      for (Index i = 0; i < n; ++i) a = std::max(a, std::fabs(x[i]));
      out.absmax.push_back(a);
      const volatile float inverse = 1.0F / a;
      for (Index i = 0; i < n; ++i) {
        const volatile float scaled = std::isfinite(inverse) ? x[i] * inverse : x[i] / a;
        const unsigned c = a == 0 ? 0 : nearest(book, scaled);
        out.codes.push_back(c);
        out.values.push_back(book.values()[c] * a);
      }
    }
  return out;
}

}  // namespace reference

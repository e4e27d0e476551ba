// SPDX-License-Identifier: Apache-2.0
// Codes of 1 … 8 bits to and from a big-endian bit stream, one byte a code on the other side.
#pragma once

#include <cstdint>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank::detail {

/// Packs n codes from a byte boundary on; the unused low bits of the last byte are zero.
[[gnu::noinline]] inline void pack_codes(int bits, const std::uint8_t* codes, Index n, std::uint8_t* out) {
  if (bits == 8) {
    for (Index i = 0; i < n; ++i) out[i] = codes[i];
    return;
  }
  if (bits == 4) {
    for (Index i = 0; i < n / 2; ++i) out[i] = std::uint8_t(codes[2 * i] << 4 | codes[2 * i + 1]);
    if (n % 2 != 0) out[n / 2] = std::uint8_t(codes[n - 1] << 4);
    return;
  }
  Index i = 0;
  if (bits == 2) {
    for (; i + 4 <= n; i += 4)
      *out++ = std::uint8_t(codes[i] << 6 | codes[i + 1] << 4 | codes[i + 2] << 2 | codes[i + 3]);
  } else if (bits == 3) {
    for (; i + 8 <= n; i += 8, out += 3) {
      const std::uint8_t* c = codes + i;
      const int word = c[0] << 21 | c[1] << 18 | c[2] << 15 | c[3] << 12 | c[4] << 9 | c[5] << 6 | c[6] << 3 | c[7];
      out[0] = std::uint8_t(word >> 16);
      out[1] = std::uint8_t(word >> 8);
      out[2] = std::uint8_t(word);
    }
  }
  std::uint64_t word = 0;
  int held = 0;
  for (; i < n; ++i) {
    word = word << bits | codes[i];
    held += bits;
    for (; held >= 8; held -= 8) *out++ = std::uint8_t(word >> (held - 8));
  }
  if (held > 0) *out = std::uint8_t(word << (8 - held));
}

/// Code number i of a stream; reads only the bytes the code lies in.
inline unsigned code_at(int bits, const std::uint8_t* stream, Index i) {
  const Index byte = i / 8 * bits + (i % 8) * bits / 8;
  const int bit = int(i % 8) * bits % 8, end = bit + bits;
  if (end <= 8) return unsigned(stream[byte] >> (8 - end)) & ((1U << bits) - 1);
  return unsigned((stream[byte] << 8 | stream[byte + 1]) >> (16 - end)) & ((1U << bits) - 1);
}

}  // namespace lowrank::detail

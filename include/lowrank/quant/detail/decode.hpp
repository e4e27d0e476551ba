// SPDX-License-Identifier: Apache-2.0
// Codes to values: a portable path by small tables, and register lookups for AVX-512 that products can fuse.
#pragma once

#include <cstring>

#include "lowrank/quant/block_layout.hpp"
#include "lowrank/quant/detail/encode.hpp"

namespace lowrank::detail {

/// Code streams are followed by this many readable bytes, so that a vector of codes may be loaded at the very end.
inline constexpr Index code_padding = 16;

/// 1/127 as bitsandbytes multiplies by it, after the scale.
inline constexpr float int8_unit = 1.0F / 127.0F;

/// One value, as every kernel below computes it: subtract, multiply, never fused.
inline float decode_value(const Codebook& book, unsigned code, BlockScale s) {
  const float v = (book.values()[code] - s.zero) * s.scale;
  return book.kind() == CodebookKind::int8 ? v * int8_unit : v;
}

/// Values of n codes from a byte boundary on, by table lookups of whole groups.
[[gnu::noinline]] inline void decode_portable(const Codebook& book, const std::uint8_t* stream, Index n, BlockScale s,
                                              float* out) {
  const int bits = book.bits();
  Index i = 0;
  if (bits >= 2 && bits <= 4) {
    // Copy groups of ready values, then scale them as vectors; 64 at a time stay in L1.
    constexpr Index step = 64;
    const float* groups = book.group_table();
    float values[step];
    for (; i + step <= n; i += step, stream += step / 8 * bits) {
      if (bits == 4) {
        for (Index b = 0; b < 32; ++b) std::memcpy(values + 2 * b, groups + 2 * stream[b], 8);
      } else if (bits == 2) {
        for (Index b = 0; b < 16; ++b) std::memcpy(values + 4 * b, groups + 4 * stream[b], 16);
      } else {
        for (Index b = 0; b < 8; ++b) {
          const unsigned word = unsigned(stream[3 * b] << 16 | stream[3 * b + 1] << 8 | stream[3 * b + 2]);
          for (unsigned g = 0; g < 4; ++g)
            std::memcpy(values + 8 * b + 2 * g, groups + 2 * ((word >> (18 - 6 * g)) & 63U), 8);
        }
      }
      for (Index k = 0; k < step; ++k) out[i + k] = (values[k] - s.zero) * s.scale;
    }
    for (Index k = 0; i < n; ++i, ++k) out[i] = decode_value(book, code_at(bits, stream, k), s);
    return;
  }
  for (; i < n; ++i) out[i] = decode_value(book, code_at(bits, stream, i), s);
}

#if defined(LOWRANK_QUANT_AVX512)
/// Sixteen consecutive codes of `Bits` bits, one in each 32-bit lane with other codes above them: a register lookup of
/// a repeated table only looks at the low four bits. The stream must start at a multiple of eight codes.
template <int Bits>
inline __m512i codes16(const std::uint8_t* stream) {
  if constexpr (Bits == 2) {
    std::int32_t word;
    std::memcpy(&word, stream, 4);
    const __m512i shifts = _mm512_setr_epi32(6, 4, 2, 0, 14, 12, 10, 8, 22, 20, 18, 16, 30, 28, 26, 24);
    return _mm512_maskz_srlv_epi32(0xffff, _mm512_set1_epi32(word), shifts);
  } else {
    std::int64_t word;
    std::memcpy(&word, stream, 8);
    if constexpr (Bits == 4) {
      // The byte of each pair to its two lanes, then the high nibble down for the first of the two.
      const __m512i bytes = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
      const __m512i shifts = _mm512_setr_epi32(4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0);
      return _mm512_maskz_srlv_epi32(0xffff, _mm512_maskz_shuffle_epi8(~__mmask64(0), _mm512_set1_epi64(word), bytes),
                                     shifts);
    } else {
      static_assert(Bits == 3);
      const int a = 0x00000102, b = 0x00030405;  // three bytes, big-endian
      const __m512i bytes = _mm512_setr_epi32(a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b);
      const __m512i shifts = _mm512_setr_epi32(21, 18, 15, 12, 9, 6, 3, 0, 21, 18, 15, 12, 9, 6, 3, 0);
      return _mm512_maskz_srlv_epi32(0xffff, _mm512_maskz_shuffle_epi8(~__mmask64(0), _mm512_set1_epi64(word), bytes),
                                     shifts);
    }
  }
}

/// Decoders of one block: constructed from its scale, called with the stream of sixteen codes.
template <int Bits>
struct LookupDecoder {
  static constexpr int bits = Bits;
  __m512 table;
  LookupDecoder(const Codebook& book, BlockScale s)
      : table(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(book.table16()), _mm512_set1_ps(s.zero)),
                            _mm512_set1_ps(s.scale))) {}
  __m512 operator()(const std::uint8_t* stream) const {
    return _mm512_maskz_permutexvar_ps(0xffff, codes16<Bits>(stream), table);
  }
};
struct Table8Decoder {
  static constexpr int bits = 8;
  const float* values;
  __m512 scale;
  Table8Decoder(const Codebook& book, BlockScale s) : values(book.values().data()), scale(_mm512_set1_ps(s.scale)) {}
  __m512 operator()(const std::uint8_t* stream) const {
    const __m512i codes = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream)));
    return _mm512_mul_ps(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, codes, values, 4), scale);
  }
};
struct Affine8Decoder {
  static constexpr int bits = 8;
  __m512 zero, scale;
  Affine8Decoder(const Codebook&, BlockScale s) : zero(_mm512_set1_ps(s.zero)), scale(_mm512_set1_ps(s.scale)) {}
  __m512 operator()(const std::uint8_t* stream) const {
    const __m512i codes = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream)));
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_cvtepi32_ps(0xffff, codes), zero), scale);
  }
};
struct Int8Decoder {
  static constexpr int bits = 8;
  __m512 scale;
  Int8Decoder(const Codebook&, BlockScale s) : scale(_mm512_set1_ps(s.scale)) {}
  __m512 operator()(const std::uint8_t* stream) const {
    const __m512i codes = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(stream)));
    return _mm512_mul_ps(_mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, codes), scale), _mm512_set1_ps(int8_unit));
  }
};

/// Calls f.operator()<Decoder>() for the codebook's register decoder; false when it has none (1, 5, 6, 7 bits).
template <class F>
bool with_decoder(const Codebook& book, F&& f) {
  switch (book.bits()) {
    case 2:
      f.template operator()<LookupDecoder<2>>();
      return true;
    case 3:
      f.template operator()<LookupDecoder<3>>();
      return true;
    case 4:
      f.template operator()<LookupDecoder<4>>();
      return true;
    case 8:
      if (book.kind() == CodebookKind::table)
        f.template operator()<Table8Decoder>();
      else if (book.kind() == CodebookKind::affine)
        f.template operator()<Affine8Decoder>();
      else
        f.template operator()<Int8Decoder>();
      return true;
    default:
      return false;
  }
}
template <class Decoder>
inline void decode_vectors(const Decoder& decode, const std::uint8_t* stream, Index n, float* out) {
  Index i = 0;
  for (; i + 16 <= n; i += 16, stream += 2 * Decoder::bits) _mm512_storeu_ps(out + i, decode(stream));
  if (i < n) _mm512_mask_storeu_ps(out + i, __mmask16((1 << (n - i)) - 1), decode(stream));
}
#endif

/// Values of codes [first, first + n) of a block's stream, which may start within a byte.
template <Path P = native_path>
inline void decode_span(const Codebook& book, const std::uint8_t* stream, Index first, Index n, BlockScale s,
                        float* out) {
  for (; first % 8 != 0 && n > 0; ++first, --n) *out++ = decode_value(book, code_at(book.bits(), stream, first), s);
  if (n == 0) return;
  stream += first / 8 * book.bits();
#if defined(LOWRANK_QUANT_AVX512)
  if constexpr (P == Path::avx512)
    if (with_decoder(book, [&]<class D>() { decode_vectors(D(book, s), stream, n, out); })) return;
#endif
  decode_portable(book, stream, n, s, out);
}

/// Values of n consecutive elements, `offset` within the block that `stream` starts; scales(b) of the b-th block from
/// there. The codebook is looked at once, not once a block.
template <Path P = native_path, class Scales>
inline void decode_blocks(const Codebook& book, const std::uint8_t* stream, Index block_bytes, Index block_size,
                          Index offset, Index n, Scales&& scales, float* out) {
  const auto each_block = [&](auto&& decode) {
    for (Index b = 0; n > 0; ++b, stream += block_bytes) {
      const Index m = std::min(n, block_size - offset);
      decode(stream, offset, m, scales(b), out);
      out += m;
      n -= m;
      offset = 0;
    }
  };
#if defined(LOWRANK_QUANT_AVX512)
  if constexpr (P == Path::avx512)
    if (with_decoder(book, [&]<class D>() {
          each_block([&](const std::uint8_t* s, Index first, Index m, BlockScale scale, float* to) {
            if (first % 8 != 0) return decode_span<P>(book, s, first, m, scale, to);
            decode_vectors(D(book, scale), s + first / 8 * D::bits, m, to);
          });
        }))
      return;
#endif
  each_block([&](const std::uint8_t* s, Index first, Index m, BlockScale scale, float* to) {
    decode_span<Path::portable>(book, s, first, m, scale, to);
  });
}

}  // namespace lowrank::detail

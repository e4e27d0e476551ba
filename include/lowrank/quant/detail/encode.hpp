// SPDX-License-Identifier: Apache-2.0
// One block to codes: its scale, then the nearest code of every element. A portable path, and one for AVX-512.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "lowrank/core/half.hpp"
#include "lowrank/linalg/detail/simd.hpp"
#include "lowrank/quant/codebook.hpp"
#include "lowrank/quant/detail/bit_packing.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LOWRANK_QUANT_AVX512 1
#include <immintrin.h>
#endif

namespace lowrank::detail {

/// Which implementation of a kernel: tests run every one the build has, everything else the native one.
enum class Path { portable, avx512 };
#if defined(LOWRANK_QUANT_AVX512)
inline constexpr Path native_path = Path::avx512;
#else
inline constexpr Path native_path = Path::portable;
#endif

/// The largest magnitude of n floats as bits: magnitudes of floats order as integers do, and infinity and NaN are the
/// largest, so one integer maximum finds both the scale and what is not finite.
inline std::uint32_t largest_magnitude_bits(const float* x, Index n) {
  using I = typename VecOf<std::int32_t, vector_bytes>::type;
  constexpr int L = lanes<float>;
  I largest{};
  Index i = 0;
  for (; i + L <= n; i += L) {
    const I magnitude = load<I>(x + i) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  std::int32_t result = 0;
  for (int l = 0; l < L; ++l) result = std::max(result, std::int32_t(largest[l]));
  for (; i < n; ++i) result = std::max(result, std::bit_cast<std::int32_t>(x[i]) & 0x7fffffff);
  return std::uint32_t(result);
}

/// Ranks (how many thresholds lie strictly below x·factor) of at most 16 levels, one byte each. Counting comparisons
/// vectorises on anything; no table is looked up.
[[gnu::noinline]] inline void ranks_portable(const Codebook& book, const float* x, int n, float factor,
                                             std::uint8_t* out) {
  using V = Vec<float>;
  using I = typename VecOf<std::int32_t, vector_bytes>::type;
  using B = typename VecOf<std::uint8_t, lanes<float>>::type;
  constexpr int L = lanes<float>;
  const auto t = book.thresholds();
  const auto count = t.size();
  int i = 0;
  for (; i + L <= n; i += L) {
    const V v = load<V>(x + i) * factor;
    I rank{};
    for (std::size_t k = 0; k < count; ++k) rank -= v > t[k];
    const B bytes = __builtin_convertvector(rank, B);
    std::memcpy(out + i, &bytes, sizeof bytes);
  }
  for (; i < n; ++i) {
    const float v = x[i] * factor;
    unsigned rank = 0;
    for (std::size_t k = 0; k < count; ++k) rank += v > t[k];
    out[i] = std::uint8_t(rank);
  }
}

#if defined(LOWRANK_QUANT_AVX512)
// The maskz_ forms with a full mask are the plain instructions; GCC 12 implements the unmasked intrinsics with an
// undefined operand it then warns about.

/// Four steps of a binary search, the thresholds of each step looked up in a register by the steps before.
class RankSearch {
 public:
  explicit RankSearch(const Codebook& book) {
    const auto t = book.thresholds();
    alignas(64) float step[4][16];
    for (std::size_t s = 0; s < 4; ++s)
      for (std::size_t i = 0; i < 16; ++i) {
        const std::size_t width = 8U >> s, at = (i & ~(2 * width - 1)) + width - 1;
        step[s][i] = at < t.size() ? t[at] : INFINITY;
      }
    for (std::size_t s = 0; s < 4; ++s) step_[s] = _mm512_load_ps(step[s]);
    alignas(64) std::uint32_t code[16];
    for (std::size_t i = 0; i < 16; ++i) code[i] = book.order()[std::min(i, book.order().size() - 1)];
    code_ = _mm512_load_si512(code);
    for (std::size_t i = 0; i < book.order().size(); ++i) permuted_ = permuted_ || book.order()[i] != i;
  }
  /// Codes of 16 values.
  [[nodiscard]] __m512i operator()(__m512 v) const {
    __m512i rank = _mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(v, step_[0], _CMP_GT_OQ), 8);
    for (int s = 1; s < 4; ++s) {
      const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_maskz_permutexvar_ps(0xffff, rank, step_[s]), _CMP_GT_OQ);
      rank = _mm512_mask_add_epi32(rank, above, rank, _mm512_set1_epi32(8 >> s));
    }
    return permuted_ ? _mm512_maskz_permutexvar_epi32(0xffff, rank, code_) : rank;
  }

 private:
  __m512 step_[4];
  __m512i code_;
  bool permuted_ = false;
};

/// 64 values to 32 bytes of 4-bit codes.
inline void encode64_avx512(const RankSearch& search, const float* x, __m512 factor, std::uint8_t* out) {
  const auto codes = [&](int i) {
    return _mm512_maskz_cvtepi32_epi8(0xffff, search(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), factor)));
  };
  __m512i all = _mm512_castsi128_si512(codes(0));
  all = _mm512_inserti32x4(all, codes(1), 1);
  all = _mm512_inserti32x4(all, codes(2), 2);
  all = _mm512_inserti32x4(all, codes(3), 3);
  // Pairs of bytes (first, second) become first·16 + second.
  const __m512i pairs = _mm512_maddubs_epi16(all, _mm512_set1_epi16(0x0110));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_maskz_cvtepi16_epi8(0xffffffff, pairs));
}
#endif

/// Everything the blocks of one call share.
template <Path P = native_path>
class Encoder {
 public:
  explicit Encoder(const Codebook& book) : book_(book), search_(searcher(book)) {}

  /// The codes of x[0, n), packed from a byte boundary on; `absmax` is their largest magnitude (or the clipping point).
  /// A block of zeros gets the code of zero throughout.
  [[gnu::noinline]] void table_block(const float* x, Index n, float absmax, std::uint8_t* out) const {
    const int bits = book_.bits();
    if (absmax == 0) return fill_block(n, book_.nearest(0.0F), out);
    const float factor = 1.0F / absmax;
    if (!std::isfinite(factor)) return tiny_block(x, n, absmax, out);
    Index i = 0;
#if defined(LOWRANK_QUANT_AVX512)
    if constexpr (P == Path::avx512) {
      const __m512 f = _mm512_set1_ps(factor);
      if (bits == 4 && book_.levels() <= 16)
        for (; i + 64 <= n; i += 64, out += 32) encode64_avx512(search_, x + i, f, out);
    }
#endif
    std::uint8_t codes[chunk];
    for (; i < n; i += chunk) {
      const Index m = std::min(chunk, n - i);
      nearest_codes(x + i, m, factor, codes);
      pack_codes(bits, codes, m, out);
      out += m / 8 * bits;
    }
  }

  /// round(x·127/absmax), ties to even.
  [[gnu::noinline]] static void int8_block(const float* x, Index n, float absmax, std::uint8_t* out) {
    const float factor = 127.0F / absmax;
    if (absmax == 0 || !std::isfinite(factor)) {
      const double wide = absmax == 0 ? 0.0 : 127.0 / double(absmax);
      for (Index i = 0; i < n; ++i) out[i] = std::uint8_t(std::int8_t(std::nearbyint(double(x[i]) * wide)));
      return;
    }
    for (Index i = 0; i < n; ++i) out[i] = std::uint8_t(std::int8_t(__builtin_rintf(x[i] * factor)));
  }

  /// clamp(round(x/scale) + zero), ties to even.
  [[gnu::noinline]] void affine_block(const float* x, Index n, float scale, int zero, std::uint8_t* out) const {
    const int bits = book_.bits(), largest = (1 << bits) - 1;
    if (scale == 0) return fill_block(n, zero, out);
    std::uint8_t codes[chunk];
    for (Index i = 0; i < n; i += chunk) {
      const Index m = std::min(chunk, n - i);
      for (Index k = 0; k < m; ++k) {
        const float q = std::clamp(__builtin_rintf(x[i + k] / scale), -256.0F, 256.0F);
        codes[k] = std::uint8_t(std::clamp(int(q) + zero, 0, largest));
      }
      pack_codes(bits, codes, m, out);
      out += m / 8 * bits;
    }
  }

  /// The same code throughout.
  [[gnu::cold, gnu::noinline]] void fill_block(Index n, int code, std::uint8_t* out) const {
    std::uint8_t codes[chunk];
    std::memset(codes, code, sizeof codes);
    for (Index i = 0; i < n; i += chunk) {
      const Index m = std::min(chunk, n - i);
      pack_codes(book_.bits(), codes, m, out);
      out += m / 8 * book_.bits();
    }
  }

  /// The codes of at most a chunk of values x·factor, one byte each; tables only.
  [[gnu::noinline]] void nearest_codes(const float* x, Index n, float factor, std::uint8_t* codes) const {
    if (book_.levels() > 16) return many_levels(x, n, factor, codes);
    Index i = 0;
#if defined(LOWRANK_QUANT_AVX512)
    if constexpr (P == Path::avx512) {
      const __m512 f = _mm512_set1_ps(factor);
      for (; i < n; i += 16) {
        const auto mask = __mmask16(n - i >= 16 ? 0xffff : (1 << (n - i)) - 1);
        const __m512i c = search_(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), f));
        _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, c);
      }
      return;
    }
#endif
    ranks_portable(book_, x, int(n), factor, codes);  // at most a chunk
    for (; i < n; ++i) codes[i] = book_.order()[codes[i]];
  }

  static constexpr Index chunk = 512;

 private:
#if defined(LOWRANK_QUANT_AVX512)
  using Search = RankSearch;
  static Search searcher(const Codebook& book) { return RankSearch(book); }
#else
  struct Search {};
  static Search searcher(const Codebook&) { return {}; }
#endif

  [[gnu::noinline]] void many_levels(const float* x, Index n, float factor, std::uint8_t* codes) const {
    const float* t = book_.thresholds().data();
    const auto last = unsigned(book_.levels() - 1);
    for (Index i = 0; i < n; ++i) {
      const float v = x[i] * factor;
      const int bucket =
          std::clamp(int((std::clamp(v, -1.0F, 1.0F) + 1.0F) * (Codebook::buckets / 2)), 0, Codebook::buckets - 1);
      unsigned rank = book_.bucket_table()[bucket];
      while (rank < last && v > t[rank]) ++rank;
      codes[i] = book_.order()[rank];
    }
  }
  /// A block so small that 1/absmax overflows: divide instead, element by element.
  [[gnu::cold, gnu::noinline]] void tiny_block(const float* x, Index n, float absmax, std::uint8_t* out) const {
    std::uint8_t codes[chunk];
    for (Index i = 0; i < n; i += chunk) {
      const Index m = std::min(chunk, n - i);
      for (Index k = 0; k < m; ++k) codes[k] = book_.nearest(x[i + k] / absmax);
      pack_codes(book_.bits(), codes, m, out);
      out += m / 8 * book_.bits();
    }
  }
  const Codebook& book_;
  Search search_;
};

}  // namespace lowrank::detail

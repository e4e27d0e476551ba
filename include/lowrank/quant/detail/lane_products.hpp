// SPDX-License-Identifier: Apache-2.0
// Products of few vectors with 2- and 4-bit codes for AVX-512, without unpacking: one shift and one lookup for 16
// values.
//
// 64 bytes of codes are loaded as they lie, sixteen lanes of 32 bits with 8 (16) codes each. Shifting all lanes by the
// same amount brings code e of every lane down, where a register lookup sees it. Those sixteen codes are not
// neighbours, so the vector they meet is kept permuted the same way; that is done once a product, not once a row.
// Scales change from lane to lane, not from lane to code, so they multiply sums of lanes.
#pragma once

#include "lowrank/linalg/detail/few_rows.hpp"
#include "lowrank/quant/quantised_arrays.hpp"

#if defined(LOWRANK_QUANT_AVX512)

namespace lowrank::detail {

template <int Bits>
struct LaneGroup {
  static constexpr int per_lane = 32 / Bits;    ///< codes in a lane
  static constexpr Index size = 16 * per_lane;  ///< codes in 64 bytes
  /// How far code e of a lane lies above its lowest bits (bytes in order, the first code of a byte highest).
  static constexpr unsigned shift(int e) {
    constexpr int per_byte = 8 / Bits;
    return unsigned(8 * (e / per_byte) + 8 - Bits * (e % per_byte + 1));
  }
  /// x[lane·per_lane + e] to out[e·16 + lane], group by group.
  static void permute(const float* x, Index n, float* out) {
    for (Index g = 0; g < n; g += size)
      for (int e = 0; e < per_lane; ++e)
        for (int lane = 0; lane < 16; ++lane) out[g + e * 16 + lane] = x[g + lane * per_lane + e];
  }
  /// x (+)= the permutation undone.
  static void unpermute(const float* in, Index n, bool accumulate, float* x) {
    for (Index g = 0; g < n; g += size)
      for (int lane = 0; lane < 16; ++lane)
        for (int e = 0; e < per_lane; ++e) {
          float& out = x[g + lane * per_lane + e];
          const float v = in[g + e * 16 + lane];
          out = accumulate ? out + v : v;
        }
  }
  /// Calls f(e, values) for the values of code e of every lane, e = 0 … per_lane − 1, all unrolled.
  template <class F>
  static void for_codes(__m512i codes, __m512 table, F&& f) {
    [&]<int... E>(std::integer_sequence<int, E...>) {
      (f(std::integral_constant<int, E>{},
         _mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, codes, shift(E)), table)),
       ...);
    }
    (std::make_integer_sequence<int, per_lane>{});
  }
};

/// Whether the lane products take this matrix: whole groups a row, one table for all blocks.
inline bool has_lane_products(const QuantisedArrays& w) {
  const Codebook& book = w.codebook();
  if (book.kind() != CodebookKind::table || (book.bits() != 2 && book.bits() != 4)) return false;
  return w.layout().rows_start_blocks() && w.cols() % (512 / book.bits()) == 0;
}

/// The scales of the lanes of each group, from the scales of a row's blocks.
template <int Bits>
class LaneScales {
 public:
  explicit LaneScales(const QuantisedArrays& w) {
    constexpr Index size = LaneGroup<Bits>::size;
    const Index block_size = w.layout().block_size;
    // Divided once, here: a division a group would cost as much as the group's sixteen lookups.
    if (w.layout().blocking == Blocking::row)
      shift_ = 63;
    else if (block_size >= size)
      shift_ = std::countr_zero(std::uint64_t(block_size / size));
    else
      blocks_ = int(size / block_size);
  }
  /// The first block of a group, counted within its row.
  [[nodiscard]] Index block(Index group) const { return blocks_ == 1 ? group >> shift_ : group * blocks_; }

  /// `scales` of the row's blocks from `first` on.
  [[nodiscard]] __m512 operator()(const float* scales, Index group, Index first) const {
    const float* s = scales + block(group) - first;
    if (blocks_ == 1) return _mm512_set1_ps(*s);
    if (blocks_ == 2) return _mm512_mask_mov_ps(_mm512_set1_ps(s[0]), 0xff00, _mm512_set1_ps(s[1]));
    __m512 v = _mm512_set1_ps(*s);
    for (int b = 1; b < blocks_; ++b)
      v = _mm512_mask_mov_ps(v, __mmask16(0xffffU << (b * 16 / blocks_)), _mm512_set1_ps(s[b]));
    return v;
  }

 private:
  int blocks_ = 1;  ///< blocks in a group when they are smaller than it
  int shift_ = 0;   ///< groups in a block, as a power of two
};

/// C(i, j) = accumulate·C(i, j) + x_i · W(j, ·) for J rows of W from j and MR permuted vectors `ldx` apart. `buffer`
/// holds the scales of J rows.
template <int Bits, int MR, int J>
void lane_dot(const float* x, Index ldx, const QuantisedArrays& w, const LaneScales<Bits>& lane_scales, bool accumulate,
              MatrixView<float> c, Index j, float* buffer) {
  using Group = LaneGroup<Bits>;
  const __m512 table = _mm512_loadu_ps(w.codebook().table16());
  const Index groups = w.cols() / Group::size, blocks = w.row_block(1);
  const float* scales[J];
  const std::uint8_t* stream[J];
  __m512 acc[MR][J];
  for (int r = 0; r < J; ++r) {
    scales[r] = w.scales(w.row_block(j + r), blocks, buffer + r * blocks);
    stream[r] = w.row_stream(j + r);
    for (int i = 0; i < MR; ++i) acc[i][r] = _mm512_setzero_ps();
  }
  for (Index g = 0; g < groups; ++g, x += Group::size) {
    LOWRANK_UNROLL
    for (int r = 0; r < J; ++r) {
      __m512 partial[MR];
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) partial[i] = _mm512_setzero_ps();
      Group::for_codes(_mm512_loadu_si512(stream[r] + 64 * g), table, [&](auto e, __m512 v) {
        LOWRANK_UNROLL
        for (int i = 0; i < MR; ++i)
          partial[i] = _mm512_fmadd_ps(_mm512_loadu_ps(x + i * ldx + 16 * decltype(e)::value), v, partial[i]);
      });
      const __m512 s = lane_scales(scales[r], g, 0);
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) acc[i][r] = _mm512_fmadd_ps(partial[i], s, acc[i][r]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int r = 0; r < J; ++r) {
      const float sum = sum_lanes<float>(acc[i][r]);
      float& out = c(i, j + r);
      out = accumulate ? out + sum : sum;
    }
}

/// out_i += Σ_r p(i, k + r)·W(k + r, ·) over K rows of W from k, groups [g0, g1), MR permuted outputs `ldo` apart.
template <int Bits, int MR, int K>
void lane_axpy(MatrixView<const float> p, Index k, const QuantisedArrays& w, const LaneScales<Bits>& lane_scales,
               Index g0, Index g1, float* out, Index ldo, float* buffer) {
  using Group = LaneGroup<Bits>;
  const __m512 table = _mm512_loadu_ps(w.codebook().table16());
  const Index first = lane_scales.block(g0), blocks = w.row_block(1) - first;
  const float* scales[K];
  const std::uint8_t *stream[K], *next[K];
  float x[MR][K];
  for (int r = 0; r < K; ++r) {
    scales[r] = w.scales(w.row_block(k + r) + first, blocks, buffer + r * blocks);
    stream[r] = w.row_stream(k + r);
    next[r] = w.row_stream(std::min(k + r + K, w.rows() - 1));
    for (int i = 0; i < MR; ++i) x[i][r] = p(i, k + r);
  }
  for (Index g = g0; g < g1; ++g, out += Group::size) {
    __m512 acc[MR][Group::per_lane];
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) LOWRANK_UNROLL
    for (int e = 0; e < Group::per_lane; ++e) acc[i][e] = _mm512_loadu_ps(out + i * ldo + 16 * e);
    for (int r = 0; r < K; ++r) {
      // Each row is a short run of lines far from the last: too short for the hardware to see it coming.
      __builtin_prefetch(next[r] + 64 * g);
      const __m512 s = lane_scales(scales[r], g, first);
      __m512 factor[MR];
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) factor[i] = _mm512_mul_ps(s, _mm512_set1_ps(x[i][r]));
      Group::for_codes(_mm512_loadu_si512(stream[r] + 64 * g), table, [&](auto e, __m512 v) {
        LOWRANK_UNROLL
        for (int i = 0; i < MR; ++i)
          acc[i][decltype(e)::value] = _mm512_fmadd_ps(factor[i], v, acc[i][decltype(e)::value]);
      });
    }
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) LOWRANK_UNROLL
    for (int e = 0; e < Group::per_lane; ++e) _mm512_storeu_ps(out + i * ldo + 16 * e, acc[i][e]);
  }
}

/// C = accumulate·C + P·Wᵀ, P and C with contiguous rows.
template <int Bits>
void lane_forward(MatrixView<const float> p, const QuantisedArrays& w, bool accumulate, MatrixView<float> c) {
  thread_local Buffer<float> permuted;
  const Index n = w.cols();
  permuted.resize(p.rows() * n);
  for (Index i = 0; i < p.rows(); ++i) LaneGroup<Bits>::permute(&p(i, 0), n, permuted.data() + i * n);
  const float* x = permuted.data();  // the calling thread's, read by all
  const LaneScales<Bits> scales(w);
  parallel_ranges(w.rows(), std::max<Index>(16, few_rows_grain / n), [&](Index j0, Index j1) {
    thread_local Buffer<float> buffer;
    buffer.resize(4 * w.row_block(1));
    in_row_groups(c.rows(), [&]<int MR>(Index i) {
      const auto ci = c.middle_rows(i, MR);
      constexpr int J = MR == 4 ? 2 : 4;
      Index j = j0;
      for (; j + J <= j1; j += J) lane_dot<Bits, MR, J>(x + i * n, n, w, scales, accumulate, ci, j, buffer.data());
      for (; j < j1; ++j) lane_dot<Bits, MR, 1>(x + i * n, n, w, scales, accumulate, ci, j, buffer.data());
    });
  });
}

/// C = accumulate·C + P·W, P and C with contiguous rows.
template <int Bits>
void lane_backward(MatrixView<const float> p, const QuantisedArrays& w, bool accumulate, MatrixView<float> c) {
  using Group = LaneGroup<Bits>;
  const LaneScales<Bits> scales(w);
  const Index groups = w.cols() / Group::size;
  const Index grain = std::max<Index>(1, few_rows_grain / std::max<Index>(1, w.rows() * Group::size));
  parallel_ranges(groups, grain, [&](Index g0, Index g1) {
    thread_local Buffer<float> permuted, buffer;
    const Index n = (g1 - g0) * Group::size;
    buffer.resize(8 * w.row_block(1));
    const auto tokens = [&]<int MR>(Index i) {
      permuted.resize(MR * n);
      std::fill(permuted.begin(), permuted.end(), 0.0F);
      const auto pi = p.middle_rows(i, MR);
      Index k = 0;
      for (; k + 8 <= w.rows(); k += 8)
        lane_axpy<Bits, MR, 8>(pi, k, w, scales, g0, g1, permuted.data(), n, buffer.data());
      for (; k < w.rows(); ++k) lane_axpy<Bits, MR, 1>(pi, k, w, scales, g0, g1, permuted.data(), n, buffer.data());
      for (int t = 0; t < MR; ++t)
        Group::unpermute(permuted.data() + t * n, n, accumulate, &c(i + t, g0 * Group::size));
    };
    // As many tokens at a time as leave their accumulators in registers: 8 vectors each for 4 bits, 16 for 2.
    constexpr int most = Bits == 4 ? 2 : 1;
    Index i = 0;
    for (; i + most <= c.rows(); i += most) tokens.template operator()<most>(i);
    for (; i < c.rows(); ++i) tokens.template operator()<1>(i);
  });
}

}  // namespace lowrank::detail
#endif

// SPDX-License-Identifier: Apache-2.0
// Products with quantised weights: few tokens decode in registers, many decode a panel at a time into the packed
// product.
#pragma once

#include "lowrank/linalg/gemm.hpp"
#include "lowrank/quant/detail/lane_products.hpp"

namespace lowrank {
namespace detail {

/// What QuantisedSource packs.
template <class T, bool Transposed>
[[gnu::noinline]] void pack_quantised(const QuantisedArrays& q, int width, Index i0, Index count, Index k0, Index kc,
                                      T* out) {
  if constexpr (Transposed) {
    // A step of the depth is a run of a row of W.
    for (Index k = 0; k < kc; ++k, out += width) {
      q.decode_row(k0 + k, i0, count, out);
      for (Index i = count; i < width; ++i) out[i] = T(0);
    }
  } else {
    // Decode a strip of each row, then let the dense packing transpose it. Strips start at multiples of 64 columns,
    // so that no block is entered in the middle of a byte whatever k0 is.
    constexpr Index strip = 64;
    T rows[std::max(kernel_cols<T>, kernel_rows) * strip];
    for (Index k = k0; k < k0 + kc;) {
      const Index begin = k & ~(strip - 1), end = std::min(begin + strip, k0 + kc);
      for (Index i = 0; i < count; ++i) q.decode_row(i0 + i, begin, end - begin, rows + i * strip);
      const DenseSource<T> dense{MatrixView<const T>(rows, width, strip, strip, 1)};
      dense.pack(width, 0, count, k - begin, end - k, out + (k - k0) * width);
      k = end;
    }
  }
}

/// W (rows = out, depth = in) or Wᵀ (rows = in, depth = out) as an operand of the packed product.
template <class T, bool Transposed>
struct QuantisedSource {
  const QuantisedArrays* q;

  [[nodiscard]] Index rows() const { return Transposed ? q->cols() : q->rows(); }
  [[nodiscard]] Index depth() const { return Transposed ? q->rows() : q->cols(); }
  void pack(int width, Index i0, Index count, Index k0, Index kc, T* out) const {
    pack_quantised<T, Transposed>(*q, width, i0, count, k0, kc, out);
  }
};

/// C = accumulate·C + P·Wᵀ for MR rows of P and rows [j0, j1) of W, by decoding into a buffer that stays in L1.
template <int MR, class T>
void quantised_dot(MatrixView<const T> p, const QuantisedArrays& w, bool accumulate, MatrixView<T> c, Index j0,
                   Index j1) {
  constexpr Index J = 4, strip = 1024;
  T rows[J * strip];
  for (Index j = j0; j < j1; j += J) {
    const Index n = std::min(J, j1 - j);
    for (Index k = 0; k < w.cols(); k += strip) {
      const Index m = std::min(strip, w.cols() - k);
      for (Index r = 0; r < n; ++r) w.decode_row(j + r, k, m, rows + r * strip);
      few_rows_dot<MR, T, T>(T(1), p.middle_cols(k, m), rows, strip, accumulate || k > 0, c.middle_cols(j, n), 0, n);
    }
  }
}

/// C(:, j0 … j1) += P·W for MR rows of P, by decoding into a buffer that stays in L1.
template <int MR, class T>
void quantised_axpy(MatrixView<const T> p, const QuantisedArrays& w, MatrixView<T> c, Index j0, Index j1) {
  constexpr Index K = 8, strip = 512;
  T rows[K * strip];
  for (Index k = 0; k < w.rows(); k += K) {
    const Index n = std::min(K, w.rows() - k);
    for (Index j = j0; j < j1; j += strip) {
      const Index m = std::min(strip, j1 - j);
      for (Index r = 0; r < n; ++r) w.decode_row(k + r, j, m, rows + r * strip);
      few_rows_axpy<MR, T, T>(T(1), p.middle_cols(k, n), rows, strip, c.middle_cols(j, m), 0, m);
    }
  }
}

#if defined(LOWRANK_QUANT_AVX512)
/// The lanes of a vector of 16 that lie within `left` elements.
inline __mmask16 lanes_within(Index left) { return __mmask16(left >= 16 ? 0xffff : (1 << left) - 1); }

/// quantised_dot with codes decoded in registers: four rows of W share the loads of P.
template <class Decoder, int MR>
void quantised_dot_avx512(MatrixView<const float> p, const QuantisedArrays& w, bool accumulate, MatrixView<float> c,
                          Index j0, Index j1) {
  const Index cols = w.cols(), size = w.layout().block_size;
  const auto rows = [&]<int J>(Index j) {
    __m512 acc[MR][J];
    for (int i = 0; i < MR; ++i)
      for (int r = 0; r < J; ++r) acc[i][r] = _mm512_setzero_ps();
    const std::uint8_t* stream[J];
    for (int r = 0; r < J; ++r) stream[r] = w.row_stream(j + r);
    Index block = 0;
    for (Index k0 = 0; k0 < cols; k0 += size, ++block) {
      const Index k1 = std::min(cols, k0 + size);
      const auto decoders = [&]<int... R>(std::integer_sequence<int, R...>) {
        return std::array<Decoder, J>{Decoder(w.codebook(), w.block_scale(w.row_block(j + R) + block))...};
      }
      (std::make_integer_sequence<int, J>{});
      for (Index k = k0; k < k1; k += 16) {
        const __mmask16 mask = lanes_within(k1 - k);
        __m512 x[MR];
        LOWRANK_UNROLL
        for (int i = 0; i < MR; ++i) x[i] = _mm512_maskz_loadu_ps(mask, p.data() + i * p.row_stride() + k);
        LOWRANK_UNROLL
        for (int r = 0; r < J; ++r) {
          const __m512 v = decoders[std::size_t(r)](stream[r]);
          stream[r] += 2 * Decoder::bits;
          LOWRANK_UNROLL
          for (int i = 0; i < MR; ++i) acc[i][r] = _mm512_fmadd_ps(x[i], v, acc[i][r]);
        }
      }
    }
    for (int i = 0; i < MR; ++i)
      for (int r = 0; r < J; ++r) {
        const float sum = sum_lanes<float>(acc[i][r]);
        float& out = c(i, j + r);
        out = accumulate ? out + sum : sum;
      }
  };
  Index j = j0;
  for (; j + 4 <= j1; j += 4) rows.template operator()<4>(j);
  for (; j < j1; ++j) rows.template operator()<1>(j);
}

/// quantised_axpy with codes decoded in registers: eight rows of W share the loads and stores of C. j0 starts a block.
template <class Decoder, int MR>
void quantised_axpy_avx512(MatrixView<const float> p, const QuantisedArrays& w, MatrixView<float> c, Index j0,
                           Index j1) {
  const Index size = w.layout().block_size;
  const auto rows = [&]<int K>(Index k) {
    __m512 x[MR][K];
    const std::uint8_t* stream[K];
    for (int r = 0; r < K; ++r) {
      stream[r] = w.row_stream(k + r) + w.layout().bytes(j0);
      for (int i = 0; i < MR; ++i) x[i][r] = _mm512_set1_ps(p(i, k + r));
    }
    Index block = j0 / size;
    for (Index b0 = j0; b0 < j1; b0 += size, ++block) {
      const Index b1 = std::min(j1, b0 + size);
      const auto decoders = [&]<int... R>(std::integer_sequence<int, R...>) {
        return std::array<Decoder, K>{Decoder(w.codebook(), w.block_scale(w.row_block(k + R) + block))...};
      }
      (std::make_integer_sequence<int, K>{});
      for (Index j = b0; j < b1; j += 16) {
        const __mmask16 mask = lanes_within(b1 - j);
        __m512 acc[MR];
        LOWRANK_UNROLL
        for (int i = 0; i < MR; ++i) acc[i] = _mm512_maskz_loadu_ps(mask, &c(i, j));
        LOWRANK_UNROLL
        for (int r = 0; r < K; ++r) {
          const __m512 v = decoders[std::size_t(r)](stream[r]);
          stream[r] += 2 * Decoder::bits;
          LOWRANK_UNROLL
          for (int i = 0; i < MR; ++i) acc[i] = _mm512_fmadd_ps(x[i][r], v, acc[i]);
        }
        LOWRANK_UNROLL
        for (int i = 0; i < MR; ++i) _mm512_mask_storeu_ps(&c(i, j), mask, acc[i]);
      }
    }
  };
  Index k = 0;
  for (; k + 8 <= w.rows(); k += 8) rows.template operator()<8>(k);
  for (; k < w.rows(); ++k) rows.template operator()<1>(k);
}
#endif

/// C = accumulate·C + P·Wᵀ for few rows of P; P and C have contiguous rows.
template <Path Kernel = native_path, class T>
void quantised_few_forward(MatrixView<const T> p, const QuantisedArrays& w, bool accumulate, MatrixView<T> c) {
#if defined(LOWRANK_QUANT_AVX512)
  if constexpr (Kernel == Path::avx512 && std::same_as<T, float>)
    if (has_lane_products(w))
      return w.codebook().bits() == 4 ? lane_forward<4>(p, w, accumulate, c) : lane_forward<2>(p, w, accumulate, c);
#endif
  const Index grain = std::max<Index>(16, few_rows_grain / std::max<Index>(1, w.cols()));
  parallel_ranges(w.rows(), grain, [&](Index j0, Index j1) {
    in_row_groups(c.rows(), [&]<int MR>(Index i) {
      const auto pi = p.middle_rows(i, MR);
      const auto ci = c.middle_rows(i, MR);
#if defined(LOWRANK_QUANT_AVX512)
      if constexpr (Kernel == Path::avx512 && std::same_as<T, float>)
        if (w.layout().rows_start_blocks() &&
            with_decoder(w.codebook(), [&]<class D>() { quantised_dot_avx512<D, MR>(pi, w, accumulate, ci, j0, j1); }))
          return;
#endif
      quantised_dot<MR>(pi, w, accumulate, ci, j0, j1);
    });
  });
}

/// C = accumulate·C + P·W for few rows of P; P and C have contiguous rows.
template <Path Kernel = native_path, class T>
void quantised_few_backward(MatrixView<const T> p, const QuantisedArrays& w, bool accumulate, MatrixView<T> c) {
#if defined(LOWRANK_QUANT_AVX512)
  if constexpr (Kernel == Path::avx512 && std::same_as<T, float>)
    if (has_lane_products(w))
      return w.codebook().bits() == 4 ? lane_backward<4>(p, w, accumulate, c) : lane_backward<2>(p, w, accumulate, c);
#endif
  // Threads own whole blocks of columns, cut at the same places for any number of threads.
  const Index unit = std::clamp<Index>(w.layout().blocking == Blocking::row ? 64 : w.layout().block_size, 64, 4096);
  const Index units = (w.cols() + unit - 1) / unit;
  const Index grain = std::max<Index>(1, few_rows_grain / std::max<Index>(1, w.rows() * unit));
  parallel_ranges(units, grain, [&](Index u0, Index u1) {
    const Index j0 = u0 * unit, j1 = std::min(w.cols(), u1 * unit);
    if (!accumulate)
      for (Index i = 0; i < c.rows(); ++i) std::fill_n(&c(i, j0), j1 - j0, T(0));
    in_row_groups(c.rows(), [&]<int MR>(Index i) {
      const auto pi = p.middle_rows(i, MR);
      const auto ci = c.middle_rows(i, MR);
#if defined(LOWRANK_QUANT_AVX512)
      if constexpr (Kernel == Path::avx512 && std::same_as<T, float>)
        if (w.layout().rows_start_blocks() &&
            with_decoder(w.codebook(), [&]<class D>() { quantised_axpy_avx512<D, MR>(pi, w, ci, j0, j1); }))
          return;
#endif
      quantised_axpy<MR>(pi, w, ci, j0, j1);
    });
  });
}

/// C = accumulate·C + P·Qᵀ with a packable Q, C in either order.
template <class T>
void packed_product(MatrixView<const T> p, const std::type_identity_t<AnySource<T>>& q, bool accumulate,
                    MatrixView<T> c) {
  if (c.is_row_major())
    gemm_packed(T(1), DenseSource<T>{p}, q, accumulate, c);
  else
    gemm_packed(T(1), q, DenseSource<T>{p}, accumulate, c.transposed());
}

template <class T>
bool nothing_to_multiply(MatrixView<T> c, Index depth, Update update) {
  if (c.empty()) return true;
  if (depth > 0) return false;
  if (update == Update::assign) for_each_run(c, [](T* x, Index n) { std::fill_n(x, n, T(0)); });
  return true;
}

/// Y = X·Wᵀ or Y += X·Wᵀ; shapes fit.
template <class T>
void quantised_forward(MatrixView<const T> X, const QuantisedArrays& w, MatrixView<T> Y, Update update) {
  if (nothing_to_multiply(Y, w.cols(), update)) return;
  const bool accumulate = update == Update::accumulate;
  if (X.rows() <= few_rows_limit && X.is_row_major() && Y.is_row_major())
    return quantised_few_forward(X, w, accumulate, Y);
  packed_product(X, QuantisedSource<T, false>{&w}, accumulate, Y);
}

/// dX = G·W or dX += G·W; shapes fit.
template <class T>
void quantised_backward(MatrixView<const T> G, const QuantisedArrays& w, MatrixView<T> dX, Update update) {
  if (nothing_to_multiply(dX, w.rows(), update)) return;
  const bool accumulate = update == Update::accumulate;
  if (G.rows() <= few_rows_limit && G.is_row_major() && dX.is_row_major())
    return quantised_few_backward(G, w, accumulate, dX);
  packed_product(G, QuantisedSource<T, true>{&w}, accumulate, dX);
}

}  // namespace detail
}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template void quantised_forward(MatrixView<const float>, const QuantisedArrays&, MatrixView<float>, Update);
extern template void quantised_forward(MatrixView<const double>, const QuantisedArrays&, MatrixView<double>, Update);
extern template void quantised_backward(MatrixView<const float>, const QuantisedArrays&, MatrixView<float>, Update);
extern template void quantised_backward(MatrixView<const double>, const QuantisedArrays&, MatrixView<double>, Update);
extern template void pack_quantised<float, false>(const QuantisedArrays&, int, Index, Index, Index, Index, float*);
extern template void pack_quantised<float, true>(const QuantisedArrays&, int, Index, Index, Index, Index, float*);
extern template void pack_quantised<double, false>(const QuantisedArrays&, int, Index, Index, Index, Index, double*);
extern template void pack_quantised<double, true>(const QuantisedArrays&, int, Index, Index, Index, Index, double*);
}  // namespace lowrank::detail
#endif

// SPDX-License-Identifier: Apache-2.0
// The Gram matrix WᵀW in double, from a weight in any storage; products of bf16, f16 and float are exact there.
#pragma once

#include "lowrank/core/matrix.hpp"
#include "lowrank/linalg/detail/packed_gemm.hpp"

namespace lowrank::detail {

/// A dense matrix stored as S, read as double and scaled: an operand of a product in double.
template <class S>
struct ScaledSource {
  MatrixView<const S> m;
  double scale;

  [[nodiscard]] Index rows() const { return m.rows(); }
  [[nodiscard]] Index depth() const { return m.cols(); }

  void pack(int width, Index i0, Index count, Index k0, Index kc, double* out) const {
    const S* src = m.data() + i0 * m.row_stride() + k0 * m.col_stride();
    constexpr int L = lanes<double>, B = transpose_bytes / int(sizeof(double));
    if (m.row_stride() == 1) {
      const Index ld = m.col_stride();
      for (Index k = 0; k < kc; ++k, src += ld, out += width) {
        Index i = 0;
        for (; i + L <= count; i += L) store(out + i, widen<L>(src + i));
        for (; i < count; ++i) out[i] = scale * double(src[i]);
        for (; i < width; ++i) out[i] = 0;
      }
      return;
    }
    const Index ld = m.row_stride(), whole = count / B * B;
    for (Index i = 0; i < whole; i += B) {
      const S* p = src + i * ld;
      Index k = 0;
      for (; k + B <= kc; k += B) {
        VecOf<double, transpose_bytes>::type r[B];
        for (int b = 0; b < B; ++b) r[b] = widen<B>(p + b * ld + k);
        transpose_square<B>(r);
        for (int b = 0; b < B; ++b) store(out + (k + b) * width + i, r[b]);
      }
      for (; k < kc; ++k)
        for (int b = 0; b < B; ++b) out[k * width + i + b] = scale * double(p[b * ld + k]);
    }
    for (Index i = whole; i < width; ++i)
      for (Index k = 0; k < kc; ++k) out[k * width + i] = i < count ? scale * double(src[i * ld + k]) : 0.0;
  }

 private:
  template <int N>
  auto widen(const S* p) const {
    using V = typename VecOf<double, N * 8>::type;
    if constexpr (std::same_as<S, double>)
      return scale * load<V>(p);
    else
      return scale * __builtin_convertvector(load_as<float, N>(p), V);
  }
};

/// The upper triangle of (scale·W)ᵀ·(scale·W); below it, unspecified. W m×n in any order, G n×n row-major.
/// **Cost** m·n² flops, W read once a block of 1024 columns of G, nothing but panels copied.
template <class S>
void gram_upper(MatrixView<const S> W, double scale, MatrixView<double> G) {
  const ScaledSource<S> columns{W.transposed(), scale};
  gemm_packed_upper(1.0, columns, columns, false, G);
}

/// WᵀW whole, n×n. **Cost** as gram_upper.
template <class S>
Matrix<double> gram(MatrixView<const S> W) {
  Matrix<double> G(W.cols(), W.cols());
  if (W.empty()) return G;
  gram_upper(W, 1.0, G.view());
  constexpr Index tile = 64;  // a column of one tile stays in cache while it is read across
  parallel_ranges((W.cols() + tile - 1) / tile, 1, [&](Index t0, Index t1) {
    for (Index i0 = t0 * tile; i0 < std::min(t1 * tile, W.cols()); i0 += tile)
      for (Index j0 = 0; j0 <= i0; j0 += tile)
        for (Index i = i0; i < std::min(i0 + tile, W.cols()); ++i)
          for (Index j = j0; j < std::min(j0 + tile, i); ++j) G(i, j) = G(j, i);
  });
  return G;
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Panel sources: what a packed product reads its operands from. Packing is where bf16 widens and two matrices become
// one.
#pragma once

#include <algorithm>
#include <concepts>

#include "lowrank/core/half.hpp"
#include "lowrank/core/matrix_view.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

/// Bytes of the vectors blocks are transposed in: wider than what the build targets would change the ABI.
inline constexpr int transpose_bytes = std::min(32, vector_bytes);

/// An operand of C(i, j) = Σ_k P(i, k)·Q(j, k), seen as `rows` vectors of length `depth`. It can write itself into a
/// panel of W rows, k by k: out[k·W + i] = P(i0 + i, k0 + k) for i < count, and zeros for count ≤ i < W.
template <class S, class T>
concept PanelSource = requires(const S& s, Index i, T* out) {
  { s.rows() } -> std::convertible_to<Index>;
  { s.depth() } -> std::convertible_to<Index>;
  s.template pack<8>(i, i, i, i, out);
};

/// A dense matrix, rows × depth, in any order, stored as S, read as T.
template <class T, class S = T>
struct DenseSource {
  MatrixView<const S> m;

  [[nodiscard]] Index rows() const { return m.rows(); }
  [[nodiscard]] Index depth() const { return m.cols(); }

  template <int W>
  void pack(Index i0, Index count, Index k0, Index kc, T* out) const {
    const S* src = m.data() + i0 * m.row_stride() + k0 * m.col_stride();
    if (m.row_stride() == 1)
      pack_rows_contiguous<W>(src, m.col_stride(), count, kc, out);
    else
      pack_depth_contiguous<W>(src, m.row_stride(), count, kc, out);
  }

 private:
  /// P(·, k) is contiguous: a copy a step of k.
  template <int W>
  static void pack_rows_contiguous(const S* src, Index ld, Index count, Index kc, T* out) {
    if (count == W) {
      for (Index k = 0; k < kc; ++k, src += ld, out += W)
        for (int i = 0; i < W; ++i) out[i] = T(src[i]);
    } else {
      for (Index k = 0; k < kc; ++k, src += ld, out += W) {
        for (Index i = 0; i < count; ++i) out[i] = T(src[i]);
        for (Index i = count; i < W; ++i) out[i] = T(0);
      }
    }
  }
  /// P(i, ·) is contiguous: transpose blocks of 8 floats or 4 doubles a side in registers (half that without AVX), odd
  /// ends one by one.
  template <int W>
  static void pack_depth_contiguous(const S* src, Index ld, Index count, Index kc, T* out) {
    constexpr int B = int(transpose_bytes / sizeof(T));
    const int whole = int(count) / B * B;
    for (int i = 0; i < whole; i += B) {
      const S* p = src + i * ld;
      Index k = 0;
      for (; k + B <= kc; k += B) {
        typename VecOf<T, transpose_bytes>::type r[B];
        for (int b = 0; b < B; ++b) r[b] = load_as<T, B>(p + b * ld + k);
        transpose_square<B>(r);
        for (int b = 0; b < B; ++b) store(out + (k + b) * W + i, r[b]);
      }
      for (; k < kc; ++k)
        for (int b = 0; b < B; ++b) out[k * W + i + b] = T(p[b * ld + k]);
    }
    for (int r = whole; r < W; ++r) {
      T* column = out + r;
      for (Index k = 0; k < kc; ++k, column += W) *column = r < count ? T(src[r * ld + k]) : T(0);
    }
  }
};

/// [P₁ | P₂]: two sources of equally many rows side by side along the depth. X·Wᵀ + T·Bᵀ is one product of [X | T] with
/// [W | B], so the low-rank term rides on the big product's accumulators instead of passing over Y again.
template <class P1, class P2>
struct DepthConcat {
  P1 first;
  P2 second;

  [[nodiscard]] Index rows() const { return first.rows(); }
  [[nodiscard]] Index depth() const { return first.depth() + second.depth(); }

  template <int W, class T>
  void pack(Index i0, Index count, Index k0, Index kc, T* out) const {
    const Index split = std::clamp<Index>(first.depth() - k0, 0, kc);
    if (split > 0) first.template pack<W>(i0, count, k0, split, out);
    if (split < kc) second.template pack<W>(i0, count, k0 + split - first.depth(), kc - split, out + split * W);
  }
};

}  // namespace lowrank::detail

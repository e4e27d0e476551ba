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

/// Columns of the register tile of the packed product: kernel_vectors vectors.
template <class T>
inline constexpr int kernel_vectors = 2;
template <class T>
inline constexpr int kernel_cols = kernel_vectors<T>* lanes<T>;

/// An operand of C(i, j) = Σ_k P(i, k)·Q(j, k), seen as `rows` vectors of length `depth`. It can write itself into a
/// panel of `width` rows, k by k: out[k·width + i] = P(i0 + i, k0 + k) for i < count, and zeros for count ≤ i < width.
template <class S, class T>
concept PanelSource = requires(const S& s, Index i, int width, T* out) {
  { s.rows() } -> std::convertible_to<Index>;
  { s.depth() } -> std::convertible_to<Index>;
  s.pack(width, i, i, i, i, out);
};

/// Any panel source behind one type, so that a program holds one packed product a scalar, not one for every pair of
/// sources. Refers to the source, which must outlive it.
template <class T>
class AnySource {
 public:
  template <class S>
  requires(PanelSource<S, T> && !std::same_as<S, AnySource>) AnySource(const S& source)  // NOLINT: implicit on purpose
      : source_(&source), rows_(source.rows()), depth_(source.depth()), pack_(&pack_as<S>) {}

  [[nodiscard]] Index rows() const { return rows_; }
  [[nodiscard]] Index depth() const { return depth_; }
  void pack(int width, Index i0, Index count, Index k0, Index kc, T* out) const {
    pack_(source_, width, i0, count, k0, kc, out);
  }

 private:
  template <class S>
  static void pack_as(const void* source, int width, Index i0, Index count, Index k0, Index kc, T* out) {
    static_cast<const S*>(source)->pack(width, i0, count, k0, kc, out);
  }
  const void* source_;
  Index rows_, depth_;
  void (*pack_)(const void*, int, Index, Index, Index, Index, T*);
};

/// Vectors that lie side by side, P(·, k) contiguous and `ld` apart: a copy a step of k.
template <class T, class S>
[[gnu::noinline]] void pack_side_by_side(const S* src, Index ld, int width, Index count, Index kc, T* out) {
  const auto whole = [&]<int W>() {
    for (Index k = 0; k < kc; ++k, src += ld, out += W)
      for (int i = 0; i < W; ++i) out[i] = T(src[i]);
  };
  // The two widths nearly all panels have; the loops of the others are of odd ends.
  if (count == width && width == kernel_cols<T>) return whole.template operator()<kernel_cols<T>>();
  if (count == width && width == kernel_rows) return whole.template operator()<kernel_rows>();
  for (Index k = 0; k < kc; ++k, src += ld, out += width)
    for (int i = 0; i < width; ++i) out[i] = i < count ? T(src[i]) : T(0);
}

/// Vectors `ld` apart, each contiguous: transposes blocks of 8 floats or 4 doubles a side in registers (half that
/// without AVX), odd ends one by one.
template <class T, class S>
[[gnu::noinline]] void pack_end_to_end(const S* src, Index ld, int width, Index count, Index kc, T* out) {
  constexpr int B = int(transpose_bytes / sizeof(T));
  const int whole = int(count) / B * B;
  for (int i = 0; i < whole; i += B) {
    const S* p = src + i * ld;
    Index k = 0;
    for (; k + B <= kc; k += B) {
      typename VecOf<T, transpose_bytes>::type r[B];
      for (int b = 0; b < B; ++b) r[b] = load_as<T, B>(p + b * ld + k);
      transpose_square<B>(r);
      for (int b = 0; b < B; ++b) store(out + (k + b) * width + i, r[b]);
    }
    for (; k < kc; ++k)
      for (int b = 0; b < B; ++b) out[k * width + i + b] = T(p[b * ld + k]);
  }
  for (int r = whole; r < width; ++r) {
    T* column = out + r;
    for (Index k = 0; k < kc; ++k, column += width) *column = r < count ? T(src[r * ld + k]) : T(0);
  }
}

/// A dense matrix, rows × depth, in any order, stored as S, read as T.
template <class T, class S = T>
struct DenseSource {
  MatrixView<const S> m;

  [[nodiscard]] Index rows() const { return m.rows(); }
  [[nodiscard]] Index depth() const { return m.cols(); }
  void pack(int width, Index i0, Index count, Index k0, Index kc, T* out) const {
    const S* src = m.data() + i0 * m.row_stride() + k0 * m.col_stride();
    if (m.row_stride() == 1)
      pack_side_by_side(src, m.col_stride(), width, count, kc, out);
    else
      pack_end_to_end(src, m.row_stride(), width, count, kc, out);
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

  template <class T>
  void pack(int width, Index i0, Index count, Index k0, Index kc, T* out) const {
    const Index split = std::clamp<Index>(first.depth() - k0, 0, kc);
    if (split > 0) first.pack(width, i0, count, k0, split, out);
    if (split < kc) second.pack(width, i0, count, k0 + split - first.depth(), kc - split, out + split * width);
  }
};

}  // namespace lowrank::detail

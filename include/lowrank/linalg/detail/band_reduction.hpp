// SPDX-License-Identifier: Apache-2.0
// A symmetric matrix to a symmetric band by orthogonal transforms: the first, product-rich stage of the spectrum.
#pragma once

#include <algorithm>

#include "lowrank/linalg/qr.hpp"

namespace lowrank::detail {

/// A symmetric matrix of which only the upper triangle is stored, as an operand of a product.
struct SymmetricSource {
  MatrixView<const double> upper;  // row-major

  [[nodiscard]] Index rows() const { return upper.rows(); }
  [[nodiscard]] Index depth() const { return upper.rows(); }

  void pack(int width, Index i0, Index count, Index k0, Index kc, double* out) const {
    // Left of the diagonal block element (i, k) is read as (k, i), whose rows run along the panel; right of it as it
    // is.
    const Index left = std::clamp<Index>(i0 - k0, 0, kc), middle = std::clamp<Index>(i0 + count - k0, 0, kc);
    if (left > 0) DenseSource<double>{upper.transposed()}.pack(width, i0, count, k0, left, out);
    for (Index k = left; k < middle; ++k)
      for (Index i = 0; i < width; ++i) {
        const Index a = std::min(i0 + i, k0 + k), b = std::max(i0 + i, k0 + k);
        out[k * width + i] = i < count ? upper(a, b) : 0.0;
      }
    if (middle < kc) DenseSource<double>{upper}.pack(width, i0, count, k0 + middle, kc - middle, out + middle * width);
  }
};

/// A (symmetric, upper triangle stored, row-major) = Q·B·Qᵀ with B of half-bandwidth b: afterwards the upper triangle
/// holds B in its first b superdiagonals; the rest is overwritten.
///
/// **Cost** 4/3·n³ flops, a product with A and a symmetric rank-2b update for every b columns.
/// **Numerics** backward error of order eps·‖A‖.
/// **Source** Dongarra, Hammarling & Sorensen, "Block reduction of matrices to condensed forms", J. Comput. Appl. Math.
/// 27 (1989); Bischof, Lang & Sun, ACM TOMS 26 (2000).
[[gnu::cold]] inline void reduce_to_band(MatrixView<double> A, Index b) {
  const Index n = A.rows();
  Buffer<double> scratch(2 * b * n + 5 * b * b);
  QrScratch<double> qr;
  for (Index j = 0; j + b + 1 < n; j += b) {
    const Index rest = n - j - b, k = std::min(b, rest);  // rest > 1
    const auto view = [&, at = scratch.data()](Index rows, Index cols) mutable {
      const auto v = view_of(at, rows, cols);
      at += rows * cols;
      return v;
    };
    auto take = view;
    const auto R = take(k, k), F = take(k, k), M = take(k, k), N = take(k, k), X = take(k, rest), Z = take(k, rest);
    // The panel right of the band, transposed, is tall; its R stays in the band, its reflectors replace it.
    const auto Vt = A.block(j, j + b, k, rest);
    const auto V = Vt.transposed();
    qr_recursive<double>(V, R, F, qr);
    if (k < b)  // the last panel: fewer reflectors than rows, which must all be transformed
      apply_block_reflector<double>(V, F, true, A.block(j + k, j + b, b - k, rest).transposed(), qr.block);
    const auto A2 = A.block(j + b, j + b, rest, rest);
    // Z = A₂VF − ½·V·(Fᵀ·Vᵀ·A₂·V·F); A₂ ← A₂ − V·Zᵀ − Z·Vᵀ. X and Z hold transposes.
    gemm_packed(1.0, DenseSource<double>{Vt}, SymmetricSource{A2}, false, X);
    product<double, double, double>(1.0, F.transposed(), X.transposed(), false, Z);
    product<double, double, double>(1.0, Z, Vt, false, N);               // (Vᵀ·A₂·V·F)ᵀ
    product<double, double, double>(-0.5, N, F.transposed(), false, M);  // −½·(Fᵀ·Vᵀ·A₂·V·F)ᵀ
    product<double, double, double>(1.0, M, V, true, Z);
    gemm_packed_upper(-1.0, DepthConcat<DenseSource<double>, DenseSource<double>>{{V}, {Z.transposed()}},
                      DepthConcat<DenseSource<double>, DenseSource<double>>{{Z.transposed()}, {V}}, true, A2);
    // V's place in A becomes the band again: Rᵀ is lower triangular.
    for (Index r = 0; r < k; ++r)
      for (Index c = 0; c < rest; ++c) A(j + r, j + b + c) = c <= r ? R(c, r) : 0.0;
  }
}

}  // namespace lowrank::detail

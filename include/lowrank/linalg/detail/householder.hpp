// SPDX-License-Identifier: Apache-2.0
// Householder reflectors, one at a time and in blocks: the orthogonal transforms every decomposition here is made of.
#pragma once

#include <cmath>

#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/gemm.hpp"

namespace lowrank::detail {

/// Finds H = I − τ·v·vᵀ with v₀ = 1 and H·x = β·e₁; x becomes (β, v₁, …, v_{n−1}) and τ is returned.
///
/// τ = 0 (H = I) when x is a multiple of e₁ already. Norms run in double, and columns of doubles near the bottom of the
/// range are scaled up first, so H is orthogonal to eps whatever the size of x.
template <class T>
[[gnu::noinline]] T make_reflector(Index n, T* x) {
  if (n <= 1) return T(0);
  double tail = norm2(n - 1, x + 1);
  if (tail == 0) return T(0);
  double alpha = double(x[0]), unscale = 1;
  if constexpr (std::same_as<T, double>) {
    if (std::hypot(alpha, tail) < 1e-290) [[unlikely]] {
      for (Index i = 0; i < n; ++i) x[i] *= 0x1p600;
      alpha = x[0];
      tail = norm2(n - 1, x + 1);
      unscale = 0x1p-600;
    }
  }
  const double beta = -std::copysign(std::hypot(alpha, tail), alpha), pivot = alpha - beta;
  const double inverse = 1 / pivot;
  for (Index i = 1; i < n; ++i) x[i] = T(double(x[i]) * inverse);
  x[0] = T(beta * unscale);
  return T((beta - alpha) / beta);
}

/// The k×k upper triangular factor of the compact WY form H₁···H_k = I − V·T·Vᵀ; V m×k with its zeros and ones in
/// place.
/// **Source** Schreiber & Van Loan, SIAM J. Sci. Stat. Comput. 10 (1989).
template <class T>
[[gnu::noinline]] void compact_wy(MatrixView<const T> V, const T* tau, MatrixView<T> F) {
  const Index k = V.cols();
  product<T, T, T>(T(1), V.transposed(), V.transposed(), false, F);
  for (Index j = 0; j < k; ++j) {
    // Column j above the diagonal: −τ_j·F(0:j, 0:j)·(V₀…ⱼ₋₁ᵀ v_j); row i only needs the not yet overwritten rows ≥ i.
    for (Index i = 0; i < j; ++i) {
      T sum = 0;
      for (Index l = i; l < j; ++l) sum += F(i, l) * F(l, j);
      F(i, j) = -tau[j] * sum;
    }
    F(j, j) = tau[j];
    for (Index i = j + 1; i < k; ++i) F(i, j) = T(0);
  }
}

/// C ← (I − V·F·Vᵀ)·C, or with Fᵀ (the inverse transform). V m×k, F k×k, C m×n in any order.
template <class T>
[[gnu::cold]] void apply_block_reflector(MatrixView<const T> V, MatrixView<const T> F, bool inverse, MatrixView<T> C,
                                         Buffer<T>& scratch) {
  const Index k = V.cols(), n = C.cols();
  if (k == 0 || n == 0) return;
  scratch.resize(2 * k * n);
  const Order order = C.order();
  const MatrixView<T> W = view_of(scratch.data(), k, n, order), FW = view_of(scratch.data() + k * n, k, n, order);
  product<T, T, T>(T(1), V.transposed(), C.transposed(), false, W);
  product<T, T, T>(T(1), inverse ? F.transposed() : F, W.transposed(), false, FW);
  product<T, T, T>(T(-1), V, FW.transposed(), true, C);
}

/// Rows of Zt become the first columns of H₀·H₁···H_{r−1}. Row i of `reflectors` is v_i: zeros, a 1 at i + offset, the
/// rest.
///
/// **Shapes** reflectors r×dim, Zt k×dim, row-major. **Cost** 4·r·k·dim flops at most, 4/3·dim³ when all three are
/// equal.
template <class T>
[[gnu::cold]] void form_orthogonal(MatrixView<const T> reflectors, const T* tau, Index offset, MatrixView<T> Zt) {
  constexpr Index block = 32;
  const Index r = reflectors.rows(), dim = reflectors.cols(), k = Zt.rows();
  for (Index i = 0; i < k; ++i) {
    std::fill_n(&Zt(i, 0), dim, T(0));
    if (i < dim) Zt(i, i) = T(1);
  }
  Matrix<T> F(block, block);
  Buffer<T> scratch;
  for (Index i0 = (r - 1) / block * block; i0 >= 0 && r > 0; i0 -= block) {
    // Columns left of the block's first row are still those of the identity, which its reflectors do not touch.
    const Index count = std::min(block, r - i0), first = i0 + offset;
    if (first >= k) continue;
    const auto V = reflectors.block(i0, first, count, dim - first).transposed();
    const auto Fb = F.view().block(0, 0, count, count);
    compact_wy<T>(V, tau + i0, Fb);
    apply_block_reflector<T>(V, Fb, false, Zt.block(first, first, k - first, dim - first).transposed(), scratch);
  }
}

}  // namespace lowrank::detail

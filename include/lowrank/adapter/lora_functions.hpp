// SPDX-License-Identifier: Apache-2.0
// Forward and backward of a frozen weight plus s·B·A, as functions on views. LoraLinear is these with memory attached.
//
// X tokens×in, W out×in (frozen), A r×in, B out×r, Y tokens×out, G = ∂L/∂Y tokens×out.
//   T = s·X·Aᵀ             tokens×r, kept from forward to backward, scale folded in
//   Y = X·Wᵀ + T·Bᵀ
//   U = s·G·B              tokens×r, shared by dA and dX
//   dB = Gᵀ·T   dA = Uᵀ·X   dX = G·W + U·A
#pragma once

#include <optional>

#include "lowrank/adapter/dropout.hpp"
#include "lowrank/adapter/layer.hpp"

namespace lowrank {

namespace detail {

#if defined(LOWRANK_USE_BLAS)
template <class Base>
inline constexpr bool base_product_is_faster = false;
template <class T>
inline constexpr bool base_product_is_faster<DenseBase<T, T>> = true;  // base.forward() goes to BLAS
#else
template <class Base>
inline constexpr bool base_product_is_faster = false;
#endif

/// C = accumulate·C + [P₁ | P₂]·[Q₁ | Q₂]ᵀ in one packed product, C in either order.
template <class T, class P1, class P2, class Q1, class Q2>
void concat_product(const P1& p1, const P2& p2, const Q1& q1, const Q2& q2, bool accumulate, MatrixView<T> c) {
  const DepthConcat<P1, P2> p{p1, p2};
  const DepthConcat<Q1, Q2> q{q1, q2};
  if (c.is_row_major())
    gemm_packed(T(1), p, q, accumulate, c);
  else
    gemm_packed(T(1), q, p, accumulate, c.transposed());
}

/// Whether the low-rank term may ride inside the base's product: the base must be packable, the product big enough to
/// be packed at all, and nobody else's product preferred.
template <class Base, class T>
bool rides_along(MatrixView<const T> x) {
  return PackableBase<Base, T> && !base_product_is_faster<Base> && x.rows() > few_rows_limit;
}

/// What lora_backward asks of its arguments. A layer with gradients of its own asks first: nothing is written after a
/// throw. `masked`: whether the caller comes with a mask.
template <class T, class Base>
void expect_lora_backward(const char* where, const Base& base, Index rank, MatrixView<const T> X, MatrixView<const T> G,
                          const LoraWorkspace<T>& ws, const std::optional<MatrixView<T>>& dX, bool masked) {
  expect_backward<T>(where, X, G, dX, base.cols(), base.rows());
  if (dX) expect_apart_from_base(where, "dX", *dX, base);
  if (ws.tokens != X.rows() || ws.masked != masked || ws.reduced.cols() != rank)
    throw ArgumentError(text(
        where, ": the workspace must hold the forward pass of these ", X.rows(), " tokens at rank ", rank,
        masked ? " with dropout" : "", ", it holds ",
        ws.tokens < 0 ? "none" : text(ws.tokens, " at rank ", ws.reduced.cols(), ws.masked ? " with dropout" : "")));
}

}  // namespace detail

/// Y = X·Wᵀ + s·(X̃·Aᵀ)·Bᵀ, X̃ the input after dropout (X itself when `mask` is empty).
///
/// **Shapes** at the top of the file; every matrix in any order. **Cost** 2·tokens·(out·in + r·(in + out)) flops; the
/// low-rank term shares the accumulators of the big product where the base allows it, so Y is written once.
/// **Throws** ShapeError on sizes that disagree, ArgumentError when Y overlaps X or a dense W.
template <Real T, FrozenBase<T> Base>
void lora_forward(const Base& base, std::type_identity_t<MatrixView<const T>> A,
                  std::type_identity_t<MatrixView<const T>> B, T scale, std::type_identity_t<MatrixView<const T>> X,
                  std::type_identity_t<MatrixView<T>> Y, LoraWorkspace<T>& ws,
                  const std::optional<DropoutMask>& mask = std::nullopt) {
  const Index r = A.rows(), in = base.cols(), out = base.rows(), tokens = X.rows();
  detail::expect_operands<T>("lora_forward", "X", X, in, "Y", Y, out);
  detail::expect_apart_from_base("lora_forward", "Y", Y, base);
  detail::expect_shape("lora_forward", "A", A.rows(), A.cols(), r, in);
  detail::expect_shape("lora_forward", "B", B.rows(), B.cols(), out, r);

  MatrixView<const T> dropped = X;
  if (mask) {
    ws.dropped.resize(tokens, in);
    mask->for_each(tokens, in, [&](Index i, Index j, double f) { ws.dropped(i, j) = T(f) * X(i, j); });
    dropped = ws.dropped.view();
  }
  ws.layer.reset();
  ws.tokens = tokens;
  ws.masked = mask.has_value();
  ws.reduced.resize(tokens, r);
  detail::product<T, T, T>(scale, dropped, A, false, ws.reduced.view());

  if constexpr (PackableBase<Base, T>)
    if (detail::rides_along<Base, T>(X))
      return detail::concat_product(detail::DenseSource<T>{X}, detail::DenseSource<T>{ws.reduced.view()}, base.panels(),
                                    detail::DenseSource<T>{B}, false, Y);
  base.forward(X, Y, Update::assign);
  detail::product<T, T, T>(T(1), MatrixView<const T>(ws.reduced.view()), B, true, Y);
}

/// Gradients of a forward pass made with the same workspace: dA = Uᵀ·X̃, dB = Gᵀ·T, and dX = G·W + U·A (masked as X was)
/// unless `dX` is absent, as for a model's first layer.
///
/// dX may be the very memory of X: dA is taken before dX is written. **Cost** 2·tokens·(out·in + 2·r·(out + in)) flops:
/// four products with r, none of W's size but dX's own. **Throws** ShapeError on sizes that disagree; ArgumentError
/// when `ws` does not hold a forward pass of as many tokens, or dX overlaps G or a dense W. Nothing is written then.
template <Real T, FrozenBase<T> Base>
void lora_backward(const Base& base, std::type_identity_t<MatrixView<const T>> A,
                   std::type_identity_t<MatrixView<const T>> B, T scale, std::type_identity_t<MatrixView<const T>> X,
                   std::type_identity_t<MatrixView<const T>> G, LoraWorkspace<T>& ws,
                   std::type_identity_t<MatrixView<T>> dA, std::type_identity_t<MatrixView<T>> dB,
                   std::optional<std::type_identity_t<MatrixView<T>>> dX, BackwardOptions options = {},
                   const std::optional<DropoutMask>& mask = std::nullopt) {
  const Index r = A.rows(), in = base.cols(), out = base.rows(), tokens = X.rows();
  detail::expect_shape("lora_backward", "A", A.rows(), A.cols(), r, in);
  detail::expect_shape("lora_backward", "B", B.rows(), B.cols(), out, r);
  detail::expect_shape("lora_backward", "dA", dA.rows(), dA.cols(), r, in);
  detail::expect_shape("lora_backward", "dB", dB.rows(), dB.cols(), out, r);
  detail::expect_lora_backward<T>("lora_backward", base, r, X, G, ws, dX, mask.has_value());

  const bool add = options.gradients == Update::accumulate;
  const MatrixView<const T> kept = ws.reduced.view();
  const MatrixView<const T> dropped = mask ? MatrixView<const T>(ws.dropped.view()) : X;
  ws.U.resize(tokens, r);
  const MatrixView<const T> U = ws.U.view();
  detail::product<T, T, T>(scale, G, B.transposed(), false, ws.U.view());
  detail::product<T, T, T>(T(1), G.transposed(), kept.transposed(), add, dB);
  detail::product<T, T, T>(T(1), U.transposed(), dropped.transposed(), add, dA);
  if (!dX) return;

  if (mask) {
    base.backward(G, *dX, options.dx);
    detail::product<T, T, T>(T(1), U, A.transposed(), false, ws.dropped.view());
    mask->for_each(tokens, in, [&](Index i, Index j, double f) { (*dX)(i, j) += T(f) * ws.dropped(i, j); });
    ws.tokens = -1;  // X̃ is gone: a second backward needs a new forward
    return;
  }
  if constexpr (PackableBase<Base, T>)
    if (detail::rides_along<Base, T>(X))
      return detail::concat_product(detail::DenseSource<T>{G}, detail::DenseSource<T>{U}, base.panels_transposed(),
                                    detail::DenseSource<T>{A.transposed()}, options.dx == Update::accumulate, *dX);
  base.backward(G, *dX, options.dx);
  detail::product<T, T, T>(T(1), U, A.transposed(), true, *dX);
}

}  // namespace lowrank

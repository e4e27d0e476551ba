// SPDX-License-Identifier: Apache-2.0
// LoRA-GA: factors whose first step moves W the way full fine-tuning would, from the gradient of a first batch.
#pragma once

#include "lowrank/init/pissa.hpp"

namespace lowrank {

struct LoraGaOptions {
  /// r; 2·r ≤ min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// γ of the scale out^¼/√γ.
  double gamma = 16;
  /// Type the factors will be stored in; the base is formed from the rounded ones.
  FactorStorage factor_storage = FactorStorage::native;
  /// Accuracy of the SVD of the gradient; svd.seed is that of its start vectors.
  TruncatedSvdOptions svd = {};
};

/// LoRA-GA: with the weight gradient G = U·S·Vᵀ, A = c·V(:, 1…r)ᵀ, B = c·U(:, r+1…2r), c = out^¼/√γ, and base = W −
/// s·B·A.
///
/// The first step then changes s·B·A along the best rank-2r approximation of G that two factors can give.
/// **Shapes** W out×in and G = ∂L/∂W out×in, any order, storages of one arithmetic type; base out×in stored as `Base`,
/// `lora_ga<float, bf16>(W, G)`.
/// **Scale** s = α/r or α/√r; c does not depend on the size of G, only on its directions.
/// **Throws** ArgumentError: 2·rank above min(out, in), α, γ, svd options, a zero gradient, factors outside the
/// range of their storage type; ShapeError: G's shape is not W's; NonFiniteError. **Cost** a truncated SVD of G of rank
/// 2r, and 2·out·in·r flops for the base.
/// **Numerics** base + s·B·A = W to rounding. `captured_energy` and `total_energy` are those of G at rank 2r.
/// **Source** Wang, Yu and Li, "LoRA-GA", arXiv 2407.05000, Algorithm 1 (there d_out^¼/√γ, our c).
template <class Factor = void, class Base = void, MatrixLike X, MatrixLike Y>
requires FactorScalarOf<Factor, X> && BaseStorageOf<Base, X> InitialisedFrom<X, Base> lora_ga(
    X&& weight, Y&& gradient, const LoraGaOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  static_assert(std::is_same_v<T, arithmetic_of<scalar_of<Y>>>,
                "lora_ga: weight and gradient must share their type of arithmetic (double, or float and narrower)");
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  const MatrixView<const scalar_of<Y>> G = view_of(gradient);
  const Index r = options.rank;
  detail::expect_shape("lora_ga", "the gradient", G.rows(), G.cols(), W.rows(), W.cols());
  if (r < 1 || 2 * r > std::min(W.rows(), W.cols()))
    throw ArgumentError(
        detail::text("lora_ga: twice the rank must lie in [2, min(", W.rows(), ", ", W.cols(), ")], got rank ", r));
  if (!(options.gamma > 0) || !std::isfinite(options.gamma))
    throw ArgumentError(detail::text("lora_ga: gamma must be positive and finite, got ", options.gamma));
  InitialisedFrom<X, Base> result;
  result.factors.scale = T(detail::scale_of<T>(options));

  const TruncatedSvd<T> d = truncated_svd(G, 2 * r, options.svd);
  if (!(d.S[0] > 0)) throw ArgumentError("lora_ga: the gradient must not be zero");
  const T c = T(std::pow(double(W.rows()), 0.25) / std::sqrt(options.gamma));
  result.factors.A.resize(r, W.cols());
  result.factors.B.resize(W.rows(), r);
  for (Index i = 0; i < r; ++i)
    for (Index j = 0; j < W.cols(); ++j) result.factors.A(i, j) = c * d.V(j, i);
  for (Index i = 0; i < W.rows(); ++i)
    for (Index j = 0; j < r; ++j) result.factors.B(i, j) = c * d.U(i, r + j);
  detail::split_weight("lora_ga", W, options.factor_storage, result);
  result.report.captured_energy = d.captured_energy;
  result.report.total_energy = d.total_energy;
  result.report.passes = d.passes;
  result.report.converged = d.converged;
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// A trained adapter that stands on a residual base (PiSSA, OLoRA, ...) as an adapter of the original weight.
#pragma once

#include "lowrank/adapter/combine.hpp"

namespace lowrank {

/// The adapter of W that does what `trained` does on the base W − s₀·B₀·A₀:
/// ΔW = s₁·B₁·A₁ − s₀·B₀·A₀ = [s₁B₁, −s₀B₀]·[A₁; A₀], of rank at most r₁ + r₀, truncated to `rank`.
///
/// **Shapes** both pairs out×in; 1 ≤ rank ≤ min(r₁ + r₀, out, in); 0 asks for all of it. **Scale** each pair brings its
/// own s; the result has `scale` (1 unless given), with balanced factors. `initial` must be the factors the base was
/// formed from: the rounded ones when they were stored in a narrower type.
/// **Throws** ShapeError: shapes differ; ArgumentError: rank out of range, scale not positive and finite;
/// NonFiniteError.
/// **Cost** O((out + in)(r₁+r₀)²). **Numerics** `sum_norm` = ‖ΔW‖_F and `distance` = √Σ_{i>rank}σ_i² are exact to
/// rounding of the larger of the two terms: ΔW is their difference, often much smaller than either.
/// **Source** Meng et al., "PiSSA", arXiv 2404.02948, appendix on converting to LoRA.
template <Real T>
Combined<T> undo_residual(const LoraFactors<T>& trained, const LoraFactors<T>& initial, Index rank = 0,
                          double scale = 1) {
  const std::vector<Weighted<T>> list{{trained, 1}, {initial, -1}};
  detail::check_combination("undo_residual", list);
  if (!(scale > 0) || !std::isfinite(scale))
    throw ArgumentError(detail::text("undo_residual: the scale must be positive and finite, got ", scale));
  const Svd<T> d = detail::svd_of_sum(list);
  const Index most = Index(d.S.size());
  if (rank == 0) rank = most;
  if (rank < 1 || rank > most)
    throw ArgumentError(detail::text("undo_residual: rank must lie in [1, ", most, "] (or be 0 for all), got ", rank));
  Combined<T> out;
  out.factors = detail::leading_factors(d, rank, scale);
  out.sum_norm = detail::tail_norm(d.S, 0);
  out.distance = detail::tail_norm(d.S, rank);
  return out;
}

}  // namespace lowrank

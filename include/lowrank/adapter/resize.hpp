// SPDX-License-Identifier: Apache-2.0
// An adapter at a smaller rank: fixed, or chosen by energy, by cumulative σ, or by the ratio to σ₁.
#pragma once

#include <optional>

#include "lowrank/adapter/combine.hpp"
#include "lowrank/init/rank_choice.hpp"

namespace lowrank {

/// How the new rank is found from the singular values of ΔW.
enum class ResizeRule {
  rank,        ///< value = r
  energy,      ///< smallest r with Σ_{i≤r}σ_i² ≥ value·Σσ²
  cumulative,  ///< smallest r with Σ_{i≤r}σ_i ≥ value·Σσ
  ratio        ///< number of σ_i > σ₁/value
};

struct ResizeOptions {
  ResizeRule rule = ResizeRule::energy;
  double value = 0.99;
  /// Never more than this; 0: no limit but the adapter's own rank.
  Index max_rank = 0;
  /// s of the result; absent: the adapter's own.
  std::optional<double> scale = std::nullopt;
};

template <Real T>
struct Resized {
  LoraFactors<T> factors;
  /// The singular values of ΔW, all of them.
  std::vector<T> sigma;
  /// ‖ΔW‖_F and ‖ΔW − ΔW_r‖_F.
  double norm = 0, error = 0;
};

namespace detail {

template <class T>
Index resized_rank(std::span<const T> S, const ResizeOptions& o) {
  const auto fail = [](const char* what, double v) {
    throw ArgumentError(text("resize_adapter: ", what, ", got ", v));
  };
  const Index all = Index(S.size());
  Index r = 0;
  switch (o.rule) {
    case ResizeRule::rank:
      if (!(o.value >= 1) || o.value != std::floor(o.value) || o.value > 1e9)
        fail("the rank must be a whole number of at least 1", o.value);
      r = std::min<Index>(all, Index(o.value));
      break;
    case ResizeRule::energy:
      if (!(o.value > 0 && o.value <= 1)) fail("the energy fraction must lie in (0, 1]", o.value);
      r = rank_for_energy(S, o.value).rank;
      break;
    case ResizeRule::cumulative: {
      if (!(o.value > 0 && o.value <= 1)) fail("the cumulative fraction must lie in (0, 1]", o.value);
      double total = 0, sum = 0;
      for (const T s : S) total += double(s);
      while (r < all && sum < o.value * total * (1 - 1e-15)) sum += double(S[std::size_t(r++)]);
      break;
    }
    case ResizeRule::ratio:
      if (!(o.value >= 1) || !std::isfinite(o.value)) fail("the ratio must be finite and at least 1", o.value);
      while (r<all&& double(S[std::size_t(r)]) * o.value> double(S[0])) ++r;
      break;
  }
  if (o.max_rank < 0) fail("max_rank must not be negative", double(o.max_rank));
  if (o.max_rank > 0) r = std::min(r, o.max_rank);
  return std::max<Index>(r, 1);  // a zero update still needs a row
}

}  // namespace detail

/// ΔW = s·B·A cut to a smaller rank, from its exact SVD; the best approximation of that rank.
///
/// **Shapes** A r×in, B out×r; the result has rank 1 … min(r, out, in). A wish above that is met by all there is.
/// **Scale** ΔW keeps its size: with `scale` given, the factors absorb the change. **Throws** ArgumentError: a value
/// outside its rule's domain, a scale not positive and finite; ShapeError; NonFiniteError. **Cost** O((out + in)·r²).
/// **Numerics** `error` = √Σ_{i>r}σ_i², exact. A ratio of 1 keeps the singular values strictly above σ₁, none, hence
/// rank 1.
template <Real T>
Resized<T> resize_adapter(const LoraFactors<T>& factors, const ResizeOptions& options = {}) {
  const std::vector<Weighted<T>> one{{factors, 1}};
  detail::check_combination("resize_adapter", one);
  if (factors.rank() < 1) throw ArgumentError("resize_adapter: the adapter has rank 0");
  const double scale = options.scale.value_or(double(factors.scale));
  if (!(scale > 0) || !std::isfinite(scale))
    throw ArgumentError(detail::text("resize_adapter: the scale must be positive and finite, got ", scale));
  Svd<T> d = svd(factors);
  Resized<T> out;
  const Index r = detail::resized_rank<T>(d.S, options);
  out.factors = detail::leading_factors(d, r, scale);
  out.norm = detail::tail_norm(d.S, 0);
  out.error = detail::tail_norm(d.S, r);
  out.sigma = std::move(d.S);
  return out;
}

}  // namespace lowrank

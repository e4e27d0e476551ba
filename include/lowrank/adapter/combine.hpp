// SPDX-License-Identifier: Apache-2.0
// Several adapters of one weight as one: exactly (cat), truncated (svd), or as PEFT's linear does, with its cross
// terms.
#pragma once

#include <string>
#include <vector>

#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/qr.hpp"

namespace lowrank {

/// One adapter and what becomes of every combination of several.
template <Real T>
struct Combined {
  LoraFactors<T> factors;
  /// ‖Σ w_i·ΔW_i‖_F, the exact weighted sum.
  double sum_norm = 0;
  /// ‖s·B·A − Σ w_i·ΔW_i‖_F: what truncation lost, or what cross terms and sparsification moved.
  double distance = 0;
  /// What a reader must know besides.
  std::string notes;
};

/// An adapter and its weight in a combination. The adapter is looked at, not copied.
template <Real T>
struct Weighted {
  const LoraFactors<T>& adapter;
  double weight = 1;
};

namespace detail {

template <Real T>
void check_combination(const char* where, const std::vector<Weighted<T>>& list) {
  if (list.empty()) throw ArgumentError(text(where, ": needs at least one adapter"));
  for (const auto& [f, w] : list) {
    check_factors(where, f);
    expect_shape(where, "every adapter's update", f.out_features(), f.in_features(),
                 list.front().adapter.out_features(), list.front().adapter.in_features());
    if (!std::isfinite(w)) throw ArgumentError(text(where, ": weights must be finite, got ", w));
    expect_finite(where, "A", f.A.view());
    expect_finite(where, "B", f.B.view());
  }
}

/// [c₁B₁ … c_kB_k] and [A₁; …; A_k], c_i = w_i·s_i split evenly over both sides so that neither is lopsided; scale 1.
template <Real T>
LoraFactors<T> stack(const std::vector<Weighted<T>>& list) {
  Index rank = 0;
  for (const auto& item : list) rank += item.adapter.rank();
  const Index m = list.front().adapter.out_features(), n = list.front().adapter.in_features();
  LoraFactors<T> out;
  out.A.resize(rank, n);
  out.B.resize(m, rank);
  Index at = 0;
  for (const auto& [f, w] : list) {
    const double c = w * double(f.scale), root = std::sqrt(std::abs(c));
    for (Index k = 0; k < f.rank(); ++k)
      for (Index j = 0; j < n; ++j) out.A(at + k, j) = T(root * double(f.A(k, j)));
    for (Index i = 0; i < m; ++i)
      for (Index k = 0; k < f.rank(); ++k) out.B(i, at + k) = T(std::copysign(root, c) * double(f.B(i, k)));
    at += f.rank();
  }
  return out;
}

/// The weighted updates as terms of a sum: copies of the adapters with w_i·s_i for scale.
template <Real T>
std::vector<LoraFactors<T>> weighted_terms(const std::vector<Weighted<T>>& list) {
  std::vector<LoraFactors<T>> terms;
  for (const auto& [f, w] : list) {
    terms.push_back(f);
    terms.back().scale = T(w * double(f.scale));
  }
  return terms;
}
template <Real T>
Svd<T> svd_of_sum(const std::vector<Weighted<T>>& list) {
  const std::vector<LoraFactors<T>> terms = weighted_terms(list);
  return svd(std::span<const LoraFactors<T>>(terms));
}
/// ‖Σ w_i·ΔW_i‖_F, from the factors, never the dense sum.
template <Real T>
double weighted_sum_norm(const std::vector<Weighted<T>>& list) {
  const std::vector<LoraFactors<T>> terms = weighted_terms(list);
  return frobenius_norm(std::span<const LoraFactors<T>>(terms));
}

/// ‖factors − Σ w_i·ΔW_i‖_F.
template <Real T>
double distance_to_sum(const LoraFactors<T>& factors, const std::vector<Weighted<T>>& list) {
  std::vector<Weighted<T>> all(list);
  all.push_back({factors, -1});
  return weighted_sum_norm(all);
}

/// √Σ_{i≥r} σ_i².
template <class Values>
double tail_norm(const Values& S, Index r) {
  double sum = 0;
  for (std::size_t i = std::size_t(r); i < S.size(); ++i) sum += double(S[i]) * double(S[i]);
  return std::sqrt(sum);
}

/// The leading `rank` triplets as balanced factors.
template <Real T>
LoraFactors<T> leading_factors(const Svd<T>& d, Index rank, double scale) {
  LoraFactors<T> f;
  balanced_factors<T>(d.U.view().middle_cols(0, rank), d.S, d.V.view().middle_cols(0, rank), scale, f);
  return f;
}

}  // namespace detail

/// The exact weighted sum by concatenation: B = [B₁ … B_k], A = [A₁; …; A_k], rank Σr_i.
///
/// **Shapes** all adapters out×in, ranks may differ. **Scale** each w_i·s_i is split evenly over its A and B; the
/// result has s = 1. **Throws** ArgumentError: no adapter, a weight that is not finite; ShapeError: different shapes;
/// NonFiniteError.
/// **Cost** a copy, and O((out + in)(Σr)²) for the report. **Numerics** exact up to the rounding of each element.
template <Real T>
Combined<T> combine_cat(const std::vector<Weighted<T>>& list) {
  detail::check_combination("combine_cat", list);
  Combined<T> out;
  out.factors = detail::stack(list);
  out.sum_norm = detail::weighted_sum_norm(list);
  out.distance = detail::distance_to_sum(out.factors, list);
  return out;
}

/// The best rank-r approximation of the weighted sum Σ w_i·s_i·B_i·A_i, from the exact SVD of the stacked factors.
///
/// **Shapes** all adapters out×in; 1 ≤ rank ≤ min(Σr_i, out, in). **Scale** result s = 1, factors balanced.
/// **Throws** as combine_cat; ArgumentError for a rank out of range. **Cost** O((out + in)(Σr)² + (Σr)³), never out·in.
/// **Numerics** `distance` is √Σ_{i>r}σ_i², exact; no other adapter of rank r is closer (Eckart and Young).
template <Real T>
Combined<T> combine_svd(const std::vector<Weighted<T>>& list, Index rank) {
  detail::check_combination("combine_svd", list);
  const Svd<T> d = detail::svd_of_sum(list);
  const Index most = Index(d.S.size());
  if (rank < 1 || rank > most)
    throw ArgumentError(detail::text("combine_svd: rank must lie in [1, ", most, "], got ", rank));
  Combined<T> out;
  out.factors = detail::leading_factors(d, rank, 1);
  out.sum_norm = detail::tail_norm(d.S, 0);
  out.distance = detail::tail_norm(d.S, rank);
  return out;
}

/// PEFT's "linear": B = Σ √|w_i·s_i|·sign·B_i and A = Σ √|w_i·s_i|·A_i, summed separately. NOT the weighted sum of
/// updates.
///
/// B·A holds the cross terms √(w_i s_i w_j s_j)·B_i·A_j, i ≠ j, which no adapter ever trained; `distance` says how
/// large they are. combine_cat and combine_svd have none. Kept because published adapters were made this way.
/// **Shapes** all adapters out×in of one rank r; the result has rank r, s = 1. The sign of w_i·s_i goes to B.
/// **Throws** as combine_cat; ShapeError when ranks differ. **Cost** O((out + in)·r·k), and the report.
template <Real T>
Combined<T> combine_linear(const std::vector<Weighted<T>>& list) {
  detail::check_combination("combine_linear", list);
  const LoraFactors<T>& first = list.front().adapter;
  Combined<T> out;
  out.factors.scale = T(1);
  out.factors.A = Matrix<T>(first.rank(), first.in_features());
  out.factors.B = Matrix<T>(first.out_features(), first.rank());
  for (const auto& [f, w] : list) {
    if (f.rank() != first.rank())
      throw ShapeError(detail::text("combine_linear: all adapters must have one rank, got ", first.rank(), " and ",
                                    f.rank(), "; combine_svd and combine_cat take any"));
    const double c = w * double(f.scale);
    const T root = T(std::sqrt(std::abs(c))), signed_root = T(std::copysign(std::sqrt(std::abs(c)), c));
    for (Index i = 0; i < f.A.size(); ++i) out.factors.A.data()[i] += root * f.A.data()[i];
    for (Index i = 0; i < f.B.size(); ++i) out.factors.B.data()[i] += signed_root * f.B.data()[i];
  }
  out.sum_norm = detail::weighted_sum_norm(list);
  out.distance = detail::distance_to_sum(out.factors, list);
  out.notes =
      detail::text("cross terms B_i*A_j included: off the weighted sum by ", out.distance, " of ", out.sum_norm);
  return out;
}

}  // namespace lowrank

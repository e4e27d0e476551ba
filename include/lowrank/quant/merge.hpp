// SPDX-License-Identifier: Apache-2.0
// What survives of an update when a weight is stored again in few bits: numbers first, and a refusal when it is too
// little.
#pragma once

#include <cmath>
#include <span>
#include <utility>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/gemm.hpp"
#include "lowrank/linalg/update_rows.hpp"
#include "lowrank/quant/detail/merge_simulation.hpp"
#include "lowrank/quant/merge_tally.hpp"
#include "lowrank/quant/quantise.hpp"

namespace lowrank {

/// A merged weight and what the merge did to the update.
template <Real T>
struct RequantisedMerge {
  QuantisedMatrix<T> base;
  MergeReport report;
};

/// Merges an adapter into a quantised weight: dequantise, add s·B·A, quantise with the same options.
///
/// **Shapes** factors of the base's shape. **Throws** ShapeError; NonFiniteError when the sum is not finite;
/// ArgumentError for a `min_correlation` outside [−1, 1]; MergeRefused, with the report, when intended and effective ΔW
/// correlate less than `min_correlation` and `allow_lossy` is not set.
/// **Cost** 2·out·in·r flops, some passes over the dense weight, which is formed once; a refusal costs a pass a storage
/// tried.
/// **Numerics** effective ΔW = dequantised after − dequantised before; in 4 bits the steps between levels are often
/// larger than the update, which then vanishes or turns into noise: that is what the report shows and the refusal
/// prevents.
template <Real T>
RequantisedMerge<T> requantise_merge(const QuantisedMatrix<T>& base, const LoraFactors<T>& f,
                                     const RequantiseOptions& options = {}) {
  detail::check_merge_shapes("requantise_merge", f, base.rows(), base.cols());
  detail::check_merge_options("requantise_merge", options);
  Matrix<T> merged = base.dequantise();
  gemm(f.scale, f.B.view(), f.A.view(), merged.view(), Update::accumulate);
  RequantisedMerge<T> result{QuantisedMatrix<T>::zero(base.rows(), base.cols(), base.options()), {}};
  result.base.assign(std::as_const(merged).view());
  const auto load = [&](Index i, T* out) { base.decode_row(i, 0, base.cols(), out); };
  result.report = detail::simulate_merge(f, load, [&](Index i, const T*, T* after) {
    result.base.decode_row(i, 0, base.cols(), after);
    Index changed = 0;
    for (Index j = 0; j < base.cols(); ++j) changed += result.base.code(i, j) != base.code(i, j);
    return changed;
  });
  if (result.report.correlation < options.min_correlation) {
    result.report.suggestion = detail::wider_storage<T>(f, options, true, true, load);
    refuse_if_lost("requantise_merge", result.report, options);
  }
  return result;
}

/// What merging an adapter into a weight stored as S (bf16, f16, float, double) would do to it. Changes nothing.
///
/// **Shapes** W out×in in any order, factors of its shape. **Throws** ShapeError; ArgumentError for a
/// `min_correlation` outside [−1, 1]. **Cost** 2·out·in·r flops and a pass over W.
/// **Numerics** effective ΔW = S(w + δ) − w with the sum in T.
template <Real T, MatrixLike W>
MergeReport merge_report(W&& weight, const LoraFactors<T>& f, const RequantiseOptions& options = {}) {
  const auto w = view_of(weight);
  using S = typename decltype(w)::value_type;
  detail::check_merge_shapes("merge_report", f, w.rows(), w.cols());
  detail::check_merge_options("merge_report", options);
  const auto load = [&](Index i, T* out) {
    for (Index j = 0; j < w.cols(); ++j) out[j] = T(w(i, j));
  };
  MergeReport report = detail::simulate_narrow<S>(f, load);
  if (report.correlation < options.min_correlation)
    report.suggestion = detail::wider_storage<T>(f, options, !std::is_same_v<S, bf16>, !std::is_same_v<S, f16>, load);
  return report;
}

/// W ← S(W + s·B·A) in W's own storage, unless that would lose the update.
///
/// **Shapes**, **Cost** as merge_report. **Throws** as merge_report; NonFiniteError when a sum leaves S's range;
/// MergeRefused below `min_correlation` without `allow_lossy`. W is unchanged after a throw.
template <Real T, MatrixLike W>
MergeReport checked_merge(W&& weight, const LoraFactors<T>& f, const RequantiseOptions& options = {}) {
  const auto w = view_of(weight);
  using S = typename decltype(w)::value_type;
  MergeReport report = merge_report<T>(w, f, options);
  if (!std::isfinite(report.effective_norm))
    throw NonFiniteError("checked_merge: the merged weight is not finite in its storage type");
  refuse_if_lost("checked_merge", report, options);
  for_update_rows(f, [&](Index i, std::span<const T> delta) {
    for (Index j = 0; j < w.cols(); ++j) w(i, j) = S(T(w(i, j)) + delta[std::size_t(j)]);
  });
  return report;
}

}  // namespace lowrank

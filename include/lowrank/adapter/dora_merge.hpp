// SPDX-License-Identifier: Apache-2.0
// DoRA's adapter as plain data, and what LoRA's merge.hpp and quant/merge.hpp do, for it.
//
// W out×in, n_i = ‖(W + s·B·A)_i‖ (row norms), m out. Merged: diag(m/n)·(W + s·B·A).
#pragma once

#include <cmath>
#include <span>
#include <vector>

#include "lowrank/adapter/merge.hpp"
#include "lowrank/linalg/update_rows.hpp"
#include "lowrank/quant/merge.hpp"

namespace lowrank {

/// A DoRA adapter: the factors of the direction and the magnitude of every row. Another type than LoraFactors, so that
/// no function takes it for a LoRA adapter and leaves the magnitudes out.
///
/// **Shapes** A r×in, B out×r, magnitude of out elements. **Scale** s is the factors' own; the magnitudes have none.
template <Real T>
struct DoraFactors {
  LoraFactors<T> lora;
  std::vector<T> magnitude;

  [[nodiscard]] Index rank() const noexcept { return lora.rank(); }
  [[nodiscard]] Index in_features() const noexcept { return lora.in_features(); }
  [[nodiscard]] Index out_features() const noexcept { return lora.out_features(); }
};

namespace detail {

template <class T>
void check_dora(const char* where, const DoraFactors<T>& f, Index rows, Index cols) {
  check_factors(where, f.lora);
  expect_shape(where, "B*A", f.out_features(), f.in_features(), rows, cols);
  expect_shape(where, "the magnitude", Index(f.magnitude.size()), Index(1), rows, Index(1));
}

/// ‖w_i + δ‖ in double.
template <class S, class T>
double row_norm(MatrixView<S> w, Index i, std::span<const T> delta) {
  double square = 0;
  for (Index j = 0; j < w.cols(); ++j) {
    const double x = double(w(i, j)) + double(delta[std::size_t(j)]);
    square += x * x;
  }
  return std::sqrt(square);
}

/// m/n; a row of zeros has no direction to give the magnitude to, and stays.
inline double dora_factor(double magnitude, double norm) { return norm == 0 ? 0.0 : magnitude / norm; }

/// Calls f(row, δ of the row, m/n) for every row, a panel of rows at a time, on all threads.
template <class T, class S, class F>
void for_dora_rows(MatrixView<S> w, const DoraFactors<T>& factors, F&& f) {
  for_update_rows(factors.lora, [&](Index i, std::span<const T> delta) {
    f(i, delta, dora_factor(double(factors.magnitude[std::size_t(i)]), row_norm(w, i, delta)));
  });
}

/// The report of storing the merged weight as Stored in place of w.
template <class Stored, class T, class S>
MergeReport simulate_dora(MatrixView<const S> w, const DoraFactors<T>& factors) {
  MergeTally tally(w.rows(), w.cols());
  for_dora_rows(w, factors, [&](Index i, std::span<const T> delta, double factor) {
    for (Index j = 0; j < w.cols(); ++j) {
      const double before = double(w(i, j)), exact = factor * (before + double(delta[std::size_t(j)]));
      const double after = double(Stored(T(exact)));
      tally.add(i, before, after, exact - before);
    }
  });
  return tally.report();
}

}  // namespace detail

/// n_i = ‖(W + s·B·A)_i‖ for every row of W: what DoRA divides by, and the magnitudes that a fresh adapter starts with.
///
/// **Shapes** W out×in in any order and storage, factors of its shape; out norms. **Throws** ShapeError when the
/// factors are not of W's shape, ArgumentError for a scale that is not finite. **Cost** 2·out·in·r flops and a pass
/// over W, a panel of rows at a time. **Numerics** summed in double.
template <Real T, MatrixLike W>
std::vector<double> dora_row_norms(W&& weight, const LoraFactors<T>& f) {
  const MatrixView<const scalar_of<W>> w = view_of(weight);
  detail::check_factors("dora_row_norms", f);
  detail::expect_shape("dora_row_norms", "B*A", f.out_features(), f.in_features(), w.rows(), w.cols());
  std::vector<double> norms(std::size_t(w.rows()), 0.0);
  for_update_rows(f, [&](Index i, std::span<const T> delta) { norms[std::size_t(i)] = detail::row_norm(w, i, delta); });
  return norms;
}

/// diag(m/n)·(W + s·B·A) as a new matrix; W may be stored in two bytes, the result is formed and returned in T.
///
/// **Shapes** W out×in in any order. **Throws** ShapeError when factors or magnitude are not of W's shape. **Cost**
/// 2·out·in·r flops. **Numerics** what the layer computes unmerged, up to rounding in T; a row of zeros stays zero.
template <Real T, MatrixLike W>
Matrix<T> merged_weight(W&& weight, const DoraFactors<T>& f) {
  const MatrixView<const scalar_of<W>> w = view_of(weight);
  detail::check_dora("merged_weight", f, w.rows(), w.cols());
  Matrix<T> merged;
  merged.resize(w.rows(), w.cols());
  detail::for_dora_rows(w, f, [&](Index i, std::span<const T> delta, double factor) {
    for (Index j = 0; j < w.cols(); ++j) merged(i, j) = T(factor * (double(w(i, j)) + double(delta[std::size_t(j)])));
  });
  return merged;
}

/// Replaces W by diag(m/n)·(W + s·B·A) in its own storage and keeps the original; see MergedWeight.
///
/// **Throws** ShapeError when factors or magnitude are not of W's shape; ArgumentError when an element leaves the range
/// of W's storage; NonFiniteError when one is not finite. W is then unchanged. **Cost** 2·out·in·r flops and two
/// copies.
template <Real T, MatrixLike W>
MergedWeight<scalar_of<W>> merge_into(W&& weight, const DoraFactors<T>& f) {
  const MatrixView<scalar_of<W>> w = view_of(weight);
  return detail::put_merged(w, merged_weight<T>(w, f), "diag(m/n)*(W + s*B*A)");
}

/// What merging a DoRA adapter into a weight stored as S (bf16, f16, float, double) would do to it. Changes nothing.
/// The update is the whole change of W, diag(m/n)·(W + s·B·A) − W.
///
/// **Shapes** W out×in in any order. **Throws** ShapeError; ArgumentError for a `min_correlation` outside [−1, 1].
/// **Cost** 2·out·in·r flops and a pass over W, a panel of rows at a time; as much again for each storage tried.
template <Real T, MatrixLike W>
MergeReport merge_report(W&& weight, const DoraFactors<T>& f, const RequantiseOptions& options = {}) {
  using S = scalar_of<W>;
  const MatrixView<const S> w = view_of(weight);
  detail::check_dora("merge_report", f, w.rows(), w.cols());
  detail::check_merge_options("merge_report", options);
  MergeReport report = detail::simulate_dora<S, T, S>(w, f);
  if (report.correlation >= options.min_correlation) return report;
  const auto holds = [&](const MergeReport& r) {
    return r.correlation >= options.min_correlation && std::isfinite(r.effective_norm);
  };
  report.suggestion = "float, or keep the adapter apart";
  if constexpr (!std::is_same_v<S, bf16>)
    if (holds(detail::simulate_dora<bf16, T, S>(w, f))) report.suggestion = "bf16";
  if constexpr (!std::is_same_v<S, f16>)
    if (report.suggestion != "bf16" && holds(detail::simulate_dora<f16, T, S>(w, f))) report.suggestion = "f16";
  return report;
}

/// W ← S(diag(m/n)·(W + s·B·A)) in W's own storage, unless that would lose the update.
///
/// **Throws** as merge_report; NonFiniteError when an element leaves S's range; MergeRefused below `min_correlation`
/// without `allow_lossy`. W is unchanged after a throw. **Cost** merge_report's and 2·out·in·r flops; no copy of W.
template <Real T, MatrixLike W>
MergeReport checked_merge(W&& weight, const DoraFactors<T>& f, const RequantiseOptions& options = {}) {
  const MatrixView<scalar_of<W>> w = view_of(weight);
  MergeReport report = merge_report<T>(w, f, options);
  if (!std::isfinite(report.effective_norm) || !std::isfinite(report.intended_norm))
    throw NonFiniteError("checked_merge: the merged weight is not finite in its storage type");
  refuse_if_lost("checked_merge", report, options);
  detail::for_dora_rows(w, f, [&](Index i, std::span<const T> delta, double factor) {
    for (Index j = 0; j < w.cols(); ++j)
      w(i, j) = scalar_of<W>(T(factor * (double(w(i, j)) + double(delta[std::size_t(j)]))));
  });
  return report;
}

}  // namespace lowrank

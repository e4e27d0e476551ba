// SPDX-License-Identifier: Apache-2.0
// What survives of an update when a weight is stored again in few bits: numbers first, and a refusal when it is too
// little.
#pragma once

#include <string>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/gemm.hpp"
#include "lowrank/linalg/update_rows.hpp"
#include "lowrank/quant/quantise.hpp"

namespace lowrank {

/// Intended update ΔW = s·B·A against the effective one, new stored weight − old stored weight.
struct MergeReport {
  double changed_share = 0;  ///< share of stored values (codes, or bf16/f16 bits) that differ, 0 … 1
  double correlation = 0;    ///< ⟨intended, effective⟩ / (‖intended‖·‖effective‖); 1 for ΔW = 0
  double lost = 0;  ///< ‖effective − intended‖_F / ‖intended‖_F; 1 when nothing was merged, may exceed 1
  double intended_norm = 0;   ///< ‖ΔW‖_F
  double effective_norm = 0;  ///< ‖new − old‖_F
  double weight_norm = 0;     ///< ‖old‖_F
  std::string suggestion;     ///< the narrowest storage tried that would hold the update; empty when none was needed
};

struct RequantiseOptions {
  /// The least correlation of intended and effective ΔW that is accepted.
  double min_correlation = 0.9;
  /// Merge whatever is lost; the report still says what was.
  bool allow_lossy = false;
};

/// A merge that would have lost the update. Nothing was changed; `report()` says what it would have done.
class MergeRefused : public Error {
 public:
  MergeRefused(const std::string& what, MergeReport report) : Error(what), report_(std::move(report)) {}
  [[nodiscard]] const MergeReport& report() const noexcept { return report_; }

 private:
  MergeReport report_;
};

/// A merged weight and what the merge did to the update.
template <Real T>
struct RequantisedMerge {
  QuantisedMatrix<T> base;
  MergeReport report;
};

namespace detail {

/// Sums over all elements of one merge, in double, one set a row so that they do not depend on threads.
class MergeSums {
 public:
  explicit MergeSums(Index rows) : rows_(std::size_t(rows)) {}

  /// Element by element: the stored weight before and after, and the intended difference.
  void add(Index row, double before, double after, double intended) {
    Row& r = rows_[std::size_t(row)];
    const double effective = after - before;
    r.weight += before * before;
    r.intended += intended * intended;
    r.effective += effective * effective;
    r.both += intended * effective;
    r.lost += (effective - intended) * (effective - intended);
  }
  void count_changed(Index row, Index n) { rows_[std::size_t(row)].changed += double(n); }

  [[nodiscard]] MergeReport report(double elements) const {
    Row t;
    for (const Row& r : rows_) {
      t.weight += r.weight;
      t.intended += r.intended;
      t.effective += r.effective;
      t.both += r.both;
      t.lost += r.lost;
      t.changed += r.changed;
    }
    MergeReport m;
    m.changed_share = elements > 0 ? t.changed / elements : 0;
    m.intended_norm = std::sqrt(t.intended);
    m.effective_norm = std::sqrt(t.effective);
    m.weight_norm = std::sqrt(t.weight);
    const double norms = m.intended_norm * m.effective_norm;
    // Nothing intended and nothing done is a perfect merge; something intended and nothing done is none at all.
    m.correlation = norms > 0 ? t.both / norms : (m.intended_norm == m.effective_norm ? 1.0 : 0.0);
    m.lost = m.intended_norm > 0 ? std::sqrt(t.lost) / m.intended_norm : (m.effective_norm > 0 ? INFINITY : 0.0);
    return m;
  }

 private:
  struct Row {
    double weight = 0, intended = 0, effective = 0, both = 0, lost = 0, changed = 0;
  };
  std::vector<Row> rows_;
};

/// The report of storing old + ΔW as `store(row, old row, new row, n)` leaves it in place of the new row and counts
/// changes; `load(row, out)` gives the old row.
template <class T, class Load, class Store>
MergeReport simulate_merge(const LoraFactors<T>& f, Load&& load, Store&& store) {
  const Index m = f.out_features(), n = f.in_features();
  MergeSums sums(m);
  for_update_rows(f, [&](Index i, std::span<const T> delta) {
    // Reused from row to row; merging is not a steady-state operation, but it runs over billions of elements.
    thread_local std::vector<T> before, after;
    before.resize(std::size_t(n));
    after.resize(std::size_t(n));
    load(i, before.data());
    for (Index j = 0; j < n; ++j) after[std::size_t(j)] = before[std::size_t(j)] + delta[std::size_t(j)];
    sums.count_changed(i, store(i, before.data(), after.data()));
    for (Index j = 0; j < n; ++j)
      sums.add(i, double(before[std::size_t(j)]), double(after[std::size_t(j)]), double(delta[std::size_t(j)]));
  });
  return sums.report(double(m) * double(n));
}

template <class S, class T>
MergeReport simulate_narrow(const LoraFactors<T>& f, const auto& load) {
  return simulate_merge(f, load, [&](Index, const T* before, T* after) {
    Index changed = 0;
    for (Index j = 0; j < f.in_features(); ++j) {
      after[j] = T(S(after[j]));
      changed += after[j] != before[j];
    }
    return changed;
  });
}

/// The narrowest of bf16, f16 and float in which the update of these old values would correlate well enough.
template <class T>
std::string wider_storage(const LoraFactors<T>& f, const RequantiseOptions& o, bool try_bf16, bool try_f16,
                          const auto& load) {
  if (try_bf16 && simulate_narrow<bf16>(f, load).correlation >= o.min_correlation) return "bf16";
  if (try_f16) {
    const MergeReport r = simulate_narrow<f16>(f, load);
    if (r.correlation >= o.min_correlation && std::isfinite(r.effective_norm)) return "f16";
  }
  return "float, or keep the adapter apart";
}

inline void check_merge_options(const char* where, const RequantiseOptions& o) {
  if (!(o.min_correlation >= -1 && o.min_correlation <= 1))
    throw ArgumentError(text(where, ": min_correlation must lie in [-1, 1], got ", o.min_correlation));
}
[[noreturn]] inline void refuse(const char* where, const MergeReport& r, const RequantiseOptions& o) {
  throw MergeRefused(
      text(where, ": the stored update would correlate ", r.correlation, " with the intended one, less than ",
           o.min_correlation, " (", 100 * r.changed_share, " % of the stored codes or values change, lost norm ",
           r.lost, "); store it as ", r.suggestion, ", or set allow_lossy"),
      r);
}
template <class T>
void check_merge_shapes(const char* where, const LoraFactors<T>& f, Index rows, Index cols) {
  check_factors(where, f);
  expect_shape(where, "B*A", f.out_features(), f.in_features(), rows, cols);
}

}  // namespace detail

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
    if (!options.allow_lossy) detail::refuse("requantise_merge", result.report, options);
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
  if (report.correlation < options.min_correlation && !options.allow_lossy)
    detail::refuse("checked_merge", report, options);
  for_update_rows(f, [&](Index i, std::span<const T> delta) {
    for (Index j = 0; j < w.cols(); ++j) w(i, j) = S(T(w(i, j)) + delta[std::size_t(j)]);
  });
  return report;
}

}  // namespace lowrank

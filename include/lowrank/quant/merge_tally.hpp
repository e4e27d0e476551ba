// SPDX-License-Identifier: Apache-2.0
// What survived of an update in the storage it was merged into: the report, the tally it is made of, and the refusal.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "lowrank/core/errors.hpp"
#include "lowrank/core/matrix_view.hpp"

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

/// Tallies a merge element by element, in double: what a MergeReport of a merge of one's own is made of.
///
///     MergeTally tally(m, n);
///     for_update_rows(factors, [&](Index i, std::span<const float> delta) {
///       for (Index j = 0; j < n; ++j) tally.add(i, W(i, j), store(i, j, W(i, j) + delta[j]), delta[j]);
///     });
///     refuse_if_lost("my_merge", tally.report(), options);
///
/// **Shapes** m×n, the weight's. **Cost** six sums a row. **Numerics** one set of sums a row, added up in order by
/// `report`: threads that take different rows need no lock, and the report does not depend on how many there were.
class MergeTally {
 public:
  /// **Throws** ShapeError on a negative size.
  MergeTally(Index rows, Index cols) : elements_(double(rows) * double(cols)) {
    if (rows < 0 || cols < 0)
      throw ShapeError(detail::text("MergeTally: sizes must not be negative, got ", detail::shape_text(rows, cols)));
    rows_.resize(std::size_t(rows));
  }

  /// One element: the value stored before and after the merge, and the intended difference. It counts as changed when
  /// the two differ.
  void add(Index row, double before, double after, double intended) noexcept {
    add_value(row, before, after, intended);
    rows_[std::size_t(row)].changed += double(before != after);
  }
  /// The same where what is stored is not the value but a code: whether that changed is said by `count_changed`.
  void add_value(Index row, double before, double after, double intended) noexcept {
    Row& r = rows_[std::size_t(row)];
    const double effective = after - before;
    r.weight += before * before;
    r.intended += intended * intended;
    r.effective += effective * effective;
    r.both += intended * effective;
    r.lost += (effective - intended) * (effective - intended);
  }
  /// n more stored values of this row differ.
  void count_changed(Index row, Index n) noexcept { rows_[std::size_t(row)].changed += double(n); }

  /// The report, without a suggestion.
  [[nodiscard]] MergeReport report() const {
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
    m.changed_share = elements_ > 0 ? t.changed / elements_ : 0;
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
  double elements_ = 0;
};

/// Throws MergeRefused when a merge would keep less of the update than the options ask for; does nothing when
/// `allow_lossy` is set. `where` names the function that merges, `report.suggestion` what would hold the update.
inline void refuse_if_lost(const char* where, const MergeReport& report, const RequantiseOptions& options) {
  if (report.correlation >= options.min_correlation || options.allow_lossy) return;
  throw MergeRefused(
      detail::text(where, ": the stored update would correlate ", report.correlation,
                   " with the intended one, less than ", options.min_correlation, " (", 100 * report.changed_share,
                   " % of the stored codes or values change, lost norm ", report.lost, ")",
                   report.suggestion.empty() ? "" : "; store it as " + report.suggestion, ", or set allow_lossy"),
      report);
}

}  // namespace lowrank

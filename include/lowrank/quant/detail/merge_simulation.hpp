// SPDX-License-Identifier: Apache-2.0
// Merges that are only played through: what a storage would keep of an update.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/update_rows.hpp"
#include "lowrank/quant/merge_tally.hpp"

namespace lowrank::detail {

/// The report of storing old + ΔW as `store(row, old row, new row, n)` leaves it in place of the new row and counts
/// changes; `load(row, out)` gives the old row.
template <class T, class Load, class Store>
MergeReport simulate_merge(const LoraFactors<T>& f, Load&& load, Store&& store) {
  const Index m = f.out_features(), n = f.in_features();
  MergeTally tally(m, n);
  for_update_rows(f, [&](Index i, std::span<const T> delta) {
    // Reused from row to row; merging is not a steady-state operation, but it runs over billions of elements.
    thread_local std::vector<T> before, after;
    before.resize(std::size_t(n));
    after.resize(std::size_t(n));
    load(i, before.data());
    for (Index j = 0; j < n; ++j) after[std::size_t(j)] = before[std::size_t(j)] + delta[std::size_t(j)];
    tally.count_changed(i, store(i, before.data(), after.data()));
    for (Index j = 0; j < n; ++j)
      tally.add_value(i, double(before[std::size_t(j)]), double(after[std::size_t(j)]), double(delta[std::size_t(j)]));
  });
  return tally.report();
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
template <class T>
void check_merge_shapes(const char* where, const LoraFactors<T>& f, Index rows, Index cols) {
  check_factors(where, f);
  expect_shape(where, "B*A", f.out_features(), f.in_features(), rows, cols);
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Who does which matrix: a whole checkpoint spread over workers so that none waits long for another.
#pragma once

#include <algorithm>
#include <numeric>
#include <span>
#include <vector>

#include "lowrank/core/errors.hpp"
#include "lowrank/core/matrix_view.hpp"

namespace lowrank {

/// Assigns jobs of known cost to workers: largest first, each to the worker with the least so far.
///
/// **Shapes** the result has one worker number in [0, workers) a job. **Throws** ArgumentError unless workers ≥ 1 and
/// costs are not negative. **Cost** O(jobs·(log jobs + workers)). **Numerics** deterministic, ties go to the earlier
/// job and the lower worker; the longest worker has at most 4/3 of the best possible.
/// **Source** Graham, SIAM J. Appl. Math. 17 (1969), longest processing time first.
inline std::vector<int> balance_jobs(std::span<const double> costs, int workers) {
  if (workers < 1) throw ArgumentError(detail::text("balance_jobs: needs at least one worker, got ", workers));
  for (const double c : costs)
    if (!(c >= 0)) throw ArgumentError(detail::text("balance_jobs: costs must not be negative, got ", c));
  std::vector<std::size_t> order(costs.size());
  std::iota(order.begin(), order.end(), std::size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
  std::vector<double> load(static_cast<std::size_t>(workers), 0.0);
  std::vector<int> owner(costs.size());
  for (const std::size_t job : order) {
    const auto least = std::min_element(load.begin(), load.end());
    *least += costs[job];
    owner[job] = int(least - load.begin());
  }
  return owner;
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// Which rank: by energy, by spectral error, by a noise floor, and many ranks at once under a budget of parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>
#include <span>
#include <vector>

#include "lowrank/spectrum/noise.hpp"

namespace lowrank {

/// A rank, and whether the singular values at hand were enough to know it.
struct RankChoice {
  /// The smallest rank that satisfies the criterion; when `reached` is false, the number of values given, a lower
  /// bound.
  Index rank = 0;
  /// False when a truncated list of singular values ended before the criterion was met.
  bool reached = true;
  /// What the chosen rank attains: the captured energy fraction, or the first singular value left out.
  double attained = 0;
};

/// The smallest r with Σ_{i≤r} σ_i² ≥ τ·E.
///
/// **Shapes** σ sorted descending, all of them or the leading ones; `total_energy` E = ‖W‖_F² is needed (≥ 0) when the
/// list is truncated, otherwise pass a negative number and Σσ² is taken. **Throws** ArgumentError: τ outside (0, 1], an
/// unsorted list, a total below the sum of the list by more than rounding; NonFiniteError. **Cost** O(k).
/// **Numerics** Rayleigh–Ritz values never exceed the true ones, so a rank *reached* from them is an upper bound of the
/// true energy rank: the energy is there. τ = 1 asks for all of the energy up to 1e-15 of it, as sums round.
template <SingularValueList S>
RankChoice rank_for_energy(const S& sigma, double tau, double total_energy = -1) {
  const auto list = detail::sigma_span(sigma);
  detail::check_sigma("rank_for_energy", list);
  if (!(tau > 0 && tau <= 1))
    throw ArgumentError(detail::text("rank_for_energy: the fraction must lie in (0, 1], got ", tau));
  double sum = 0;
  for (const auto s : list) sum += double(s) * double(s);
  if (total_energy < 0) total_energy = sum;
  if (!(total_energy >= sum * (1 - 1e-6)) || !std::isfinite(total_energy))
    throw ArgumentError(detail::text("rank_for_energy: the total energy ", total_energy,
                                     " must be finite and at least that of the values given, ", sum));
  RankChoice choice;
  double captured = 0;
  const double wanted = tau * total_energy * (1 - 1e-15);
  while (captured < wanted && choice.rank < Index(list.size())) {
    const double s = double(list[std::size_t(choice.rank++)]);
    captured += s * s;
  }
  choice.reached = captured >= wanted;
  choice.attained = total_energy > 0 ? captured / total_energy : 1;
  return choice;
}

/// The smallest r with ‖W − W_r‖₂ = σ_{r+1} ≤ ε, ε absolute; pass ε·σ₁ for a relative one.
///
/// **Shapes** σ sorted descending; `full_rank` = min(m, n) tells if the list is complete (then σ beyond it is 0).
/// **Throws** ArgumentError: ε negative or not finite, an unsorted list, a list longer than full_rank. **Cost** O(k).
/// **Source** Eckart and Young, Psychometrika 1 (1936); Mirsky, Q. J. Math. 11 (1960).
template <SingularValueList S>
RankChoice rank_for_spectral_error(const S& sigma, double epsilon, Index full_rank) {
  const auto list = detail::sigma_span(sigma);
  detail::check_sigma("rank_for_spectral_error", list);
  if (!(epsilon >= 0) || !std::isfinite(epsilon))
    throw ArgumentError(
        detail::text("rank_for_spectral_error: the error must be finite and not negative, got ", epsilon));
  if (Index(list.size()) > full_rank)
    throw ArgumentError(detail::text("rank_for_spectral_error: got ", list.size(),
                                     " singular values of a matrix that has ", full_rank));
  RankChoice choice;
  choice.rank = std::find_if(list.begin(), list.end(), [&](auto s) { return double(s) <= epsilon; }) - list.begin();
  choice.reached = choice.rank < Index(list.size()) || Index(list.size()) == full_rank;
  choice.attained = choice.rank < Index(list.size()) ? double(list[std::size_t(choice.rank)]) : 0.0;
  if (!choice.reached) choice.attained = std::numeric_limits<double>::quiet_NaN();
  return choice;
}

/// The number of singular values that noise does not explain: σ_i > noise·(√m + √n), `noise` the standard deviation of
/// independent noise on the entries.
///
/// **Shapes** σ sorted descending; m×n the matrix. **Throws** ArgumentError: noise negative or not finite, an unsorted
/// list. `reached` is false when every value of a truncated list is above the edge. **Cost** O(k).
/// **Numerics** see noise_edge for how sharp the edge is. **Source** the upper Marchenko–Pastur edge.
template <SingularValueList S>
RankChoice rank_above_noise(const S& sigma, Index m, Index n, double noise) {
  return rank_for_spectral_error(sigma, noise_edge(m, n, noise), std::min(m, n));
}

/// One matrix among many that share a budget: its shape and its leading singular values, sorted descending.
struct BudgetItem {
  Index rows = 0, cols = 0;
  std::vector<double> sigma = {};
};

struct BudgetOptions {
  /// Parameters to spend: Σ r_i·(m_i + n_i) ≤ parameters.
  Index parameters = 0;
  /// Every matrix gets at least this rank (their cost must fit in the budget) and at most that.
  Index min_rank = 0;
  Index max_rank = std::numeric_limits<Index>::max();
};

struct BudgetResult {
  std::vector<Index> ranks;
  Index parameters = 0;
  /// Σ of the σ² kept.
  double captured = 0;
  /// No choice of ranks within the budget captures more than this: the optimum of the relaxation to fractional ranks.
  double upper_bound = 0;
  /// σ²/(m+n) of the first value that did not fit; 0 when all fitted.
  double water_level = 0;
};

/// Ranks for many matrices under one budget of parameters, by water-filling: the values with the largest σ²/(m + n)
/// win.
///
/// A unit of rank on an m×n matrix costs m + n parameters and captures its next σ². Taking units in falling order of
/// σ²/(m+n) solves the relaxed problem exactly; whole ranks lose at most the one unit that is cut, and smaller units
/// are tried after it. `upper_bound − captured` says how far from optimal the answer can be.
/// **Throws** ArgumentError: min_rank above max_rank or above the values a matrix brings, a budget below the cost of
/// min_rank; NonFiniteError. **Cost** O(Σr·log(matrices)). **Numerics** ties go to the matrix that comes first.
/// **Source** the greedy bound for the knapsack problem, Dantzig, Operations Research 5 (1957).
inline BudgetResult ranks_under_budget(std::span<const BudgetItem> items, const BudgetOptions& options) {
  BudgetResult result;
  if (options.min_rank < 0 || options.min_rank > options.max_rank)
    throw ArgumentError(detail::text("ranks_under_budget: need 0 <= min_rank <= max_rank, got ", options.min_rank,
                                     " and ", options.max_rank));
  struct Unit {
    double value;
    std::size_t item;
  };
  const auto worse = [](const Unit& a, const Unit& b) {
    return a.value < b.value || (a.value == b.value && a.item > b.item);
  };
  std::priority_queue<Unit, std::vector<Unit>, decltype(worse)> queue(worse);
  const auto cost = [&](std::size_t i) { return items[i].rows + items[i].cols; };
  const auto offer = [&](std::size_t i) {
    const Index r = result.ranks[i];
    if (r < std::min<Index>(options.max_rank, Index(items[i].sigma.size())) && items[i].sigma[std::size_t(r)] > 0)
      queue.push({items[i].sigma[std::size_t(r)] * items[i].sigma[std::size_t(r)] / double(cost(i)), i});
  };
  for (std::size_t i = 0; i < items.size(); ++i) {
    const BudgetItem& item = items[i];
    detail::check_sigma<double>("ranks_under_budget", item.sigma);
    if (item.rows < 1 || item.cols < 1)
      throw ArgumentError(detail::text("ranks_under_budget: matrix ", i, " must not be empty, got ",
                                       detail::shape_text(item.rows, item.cols)));
    if (options.min_rank > Index(item.sigma.size()))
      throw ArgumentError(detail::text("ranks_under_budget: matrix ", i, " brings ", item.sigma.size(),
                                       " singular values, fewer than min_rank ", options.min_rank));
    result.ranks.push_back(options.min_rank);
    result.parameters += options.min_rank * cost(i);
    for (Index r = 0; r < options.min_rank; ++r)
      result.captured += item.sigma[std::size_t(r)] * item.sigma[std::size_t(r)];
  }
  if (result.parameters > options.parameters)
    throw ArgumentError(detail::text("ranks_under_budget: min_rank ", options.min_rank, " on every matrix costs ",
                                     result.parameters, " parameters, the budget is ", options.parameters));
  for (std::size_t i = 0; i < items.size(); ++i) offer(i);

  bool cut = false;
  while (!queue.empty()) {
    const Unit unit = queue.top();
    queue.pop();
    const double energy = unit.value * double(cost(unit.item));
    if (result.parameters + cost(unit.item) > options.parameters) {
      // The relaxed optimum takes the fraction of this unit that still fits, and nothing after it.
      if (!cut) {
        result.upper_bound = result.captured + unit.value * double(options.parameters - result.parameters);
        result.water_level = unit.value;
      }
      cut = true;
      continue;  // this matrix is closed; a cheaper one may still fit
    }
    result.parameters += cost(unit.item);
    result.captured += energy;
    ++result.ranks[unit.item];
    offer(unit.item);
  }
  if (!cut) result.upper_bound = result.captured;
  return result;
}

}  // namespace lowrank

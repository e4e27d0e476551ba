// SPDX-License-Identifier: Apache-2.0
// When a Krylov iteration may stop: the estimates of what is missing, the tolerances, and when to look again.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lowrank/linalg/truncated_svd_result.hpp"

namespace lowrank::detail {

/// What one look at the Ritz pairs found. θ are eigenvalues of MᵀM, r the residuals ‖MᵀM·v − θ·v‖.
struct RitzLook {
  double energy = 0;          ///< Σθ over the k leading ones
  double missing = 0;         ///< what the residuals say is missing of it
  double worst_residual = 0;  ///< the largest residual of a triplet, relative to σ₁
  bool full = false;          ///< the space is exhausted: what it holds is exact
};

/// Decides from looks at the Ritz pairs. Holds no matrix.
///
/// **Numerics** the deficit is an estimate; what is returned is measured anew from the triplets themselves.
class StoppingRule {
 public:
  /// Passes that are enough for anything, when the caller names no number.
  static constexpr Index passes_by_default = 1000;
  /// A tolerance below this many eps cannot be told from rounding.
  static constexpr double resolved_eps = 4;
  /// Directions not met yet may be worth several times what the residuals see (measured: up to 3 times).
  static constexpr double unseen = 4;
  /// Looks at the energy before its growth can be judged; the first steps of a warm start say little about directions
  /// that the start does not hold, so it is watched for one look more.
  static constexpr Index looks_cold = 2, looks_warm = 3;
  /// Above this relative deficit the residuals miss directions that are not in the space yet; below it they bound what
  /// is missing (measured: 1 to 4 times the truth).
  static constexpr double residuals_suffice = 2e-3;
  /// The slowest geometric decay believed: the sum of what follows is at most 1/(1 − 0.97) ≈ 33 times the last gain.
  static constexpr double slowest_decay = 0.97;
  /// The slowest progress a pass, on a logarithmic scale, that the next look is planned by.
  static constexpr double slowest_rate = 1e-3;
  /// Passes that a refinement and its measurement take at least, and those that one more step and the end take.
  static constexpr Index refinement_passes = 8, last_passes = 4;

  StoppingRule(const TruncatedSvdOptions& options, double eps, bool warm)
      : energy_tolerance_(options.energy_tolerance),
        residual_tolerance_(options.residual_tolerance),
        eps_(eps),
        most_(options.max_passes > 0 ? options.max_passes : passes_by_default),
        warm_(warm) {}

  [[nodiscard]] bool met() const noexcept { return energy_met_ && residual_met_; }
  [[nodiscard]] double deficit() const noexcept { return deficit_; }
  [[nodiscard]] Index most_passes() const noexcept { return most_; }
  [[nodiscard]] bool last_step(Index passes) const noexcept { return passes + last_passes > most_; }

  /// The answer is exact, whatever the looks said.
  void take_exact() {
    deficit_ = 0;
    energy_met_ = residual_met_ = true;
  }

  /// A look after `passes` passes.
  [[gnu::cold]] void look(const RitzLook& now, Index passes) {
    const double before = deficit_, steps = double(std::max<Index>(1, passes - pass_of_look_));
    estimate_deficit(now.energy, now.energy > 0 ? now.missing / now.energy : 0, steps);
    if (now.full) deficit_ = 0;
    // Below some eps the estimates mean nothing; what is left is for the refinement.
    const double residual_goal = std::max(residual_tolerance_, resolved_eps * eps_);
    const double energy_goal = std::max(energy_tolerance_, resolved_eps * eps_);
    residual_met_ = now.full || residual_tolerance_ == 0 || now.worst_residual <= residual_goal;
    energy_met_ = now.full || energy_tolerance_ == 0 || deficit_ <= energy_goal;
    rate_ = distance_ = 0;
    if (looks_ > 2 && !energy_met_) progress(before, deficit_, energy_goal, steps);
    if (looks_ > 1 && !residual_met_) progress(worst_, now.worst_residual, residual_goal, steps);
    worst_ = now.worst_residual;
    pass_of_look_ = passes;
  }

  /// Steps until the next look: as many as the tolerances seem to need at the speed of the last ones, else a quarter of
  /// the basis.
  [[nodiscard]] Index steps_to_go(Index settled, Index block) const {
    Index steps = std::max<Index>(1, settled / (4 * block));
    if (rate_ > 0) steps = std::clamp<Index>(Index(std::ceil(distance_ / rate_)), 1, 2 * steps);
    return steps;
  }

  /// Whether the triplets, as measured, have the residuals asked for.
  [[nodiscard]] bool triplets_met(const std::vector<double>& sigma, const std::vector<double>& residual) const {
    return *std::max_element(residual.begin(), residual.end()) <= residual_tolerance_ * sigma[0];
  }
  /// Whether triplets that miss the tolerance should be refined: the squares met it, and there are passes left.
  [[nodiscard]] bool refine(const std::vector<double>& sigma, const std::vector<double>& residual, Index passes) const {
    return residual_tolerance_ > 0 && residual_met_ && !triplets_met(sigma, residual) &&
           passes + refinement_passes < most_;
  }

  /// `converged` and `stopped`, from the tolerances as asked for. The iteration stops at a few eps; what is below that
  /// was not reached, except by a zero matrix.
  template <class Result>
  void settle(const std::vector<double>& sigma, const std::vector<double>& residual, Index passes,
              Result& result) const {
    const bool resolved = energy_tolerance_ == 0 || energy_tolerance_ >= resolved_eps * eps_ || sigma[0] == 0;
    const bool triplets = residual_tolerance_ == 0 || triplets_met(sigma, residual);
    result.converged = energy_met_ && resolved && triplets;
    const bool cut_short = !energy_met_ || (!triplets && (!residual_met_ || passes + refinement_passes >= most_));
    result.stopped = result.converged ? StopReason::met : cut_short ? StopReason::passes : StopReason::scalar_limit;
  }

 private:
  /// The energy still missing. Once it is small the residuals bound it well; before that they miss directions not seen
  /// yet, and its growth, as a geometric series through the gains of the last two intervals, says more. The larger of
  /// the two then.
  void estimate_deficit(double energy, double from_residuals, double steps) {
    deficit_ = from_residuals;
    if (looks_ < (warm_ ? looks_warm : looks_cold)) deficit_ *= unseen;
    if (looks_ >= 1 && energy > 0) {
      const double gain = std::max(0.0, energy - energy_) / energy;
      if (looks_ >= 2 && gain_ > 0) {
        const double ratio = std::pow((gain / steps) / (gain_ / steps_), 2 / (steps + steps_));
        const double decay = std::clamp(std::pow(ratio, steps), 0.0, slowest_decay);
        if (from_residuals > residuals_suffice) deficit_ = std::max(deficit_, gain * decay / (1 - decay));
      }
      gain_ = gain;
      steps_ = steps;
    }
    energy_ = energy;
    ++looks_;
  }
  /// How far to go and how fast, on a logarithmic scale, for the slower of the two criteria.
  void progress(double was, double is, double goal, double steps) {
    if (!(was > 0) || !(is > 0)) return;
    const double rate = std::log(was / is) / steps, distance = std::log(is / goal);
    if (rate_ == 0 || distance * rate_ > distance_ * rate) {
      rate_ = std::max(rate, slowest_rate);
      distance_ = distance;
    }
  }

  double energy_tolerance_, residual_tolerance_, eps_;
  Index most_;
  bool warm_, energy_met_ = false, residual_met_ = false;
  Index looks_ = 0, pass_of_look_ = 0;
  double deficit_ = 1, energy_ = 0, gain_ = 0,
         steps_ = 1;  ///< the last look's, and what had grown since the one before
  double worst_ = 0, rate_ = 0, distance_ = 0;
};

}  // namespace lowrank::detail

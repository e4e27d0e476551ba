// SPDX-License-Identifier: Apache-2.0
// Learning rates over time: linear warm-up, then constant, linear or cosine decay.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "lowrank/core/errors.hpp"

namespace lowrank {

/// What happens after the warm-up.
enum class Decay { constant, linear, cosine };

/// A learning-rate schedule as plain data.
struct ScheduleOptions {
  double peak = 1e-4;             ///< learning rate at the end of the warm-up
  std::int64_t warmup_steps = 0;  ///< steps of linear growth from peak/warmup_steps to peak
  std::int64_t total_steps = 1;   ///< steps of the run; later steps keep the last value
  Decay decay = Decay::cosine;
  double floor = 0;  ///< learning rate at the end, at most peak
};

/// lr(t) for t = 0, 1, …: peak·(t + 1)/warmup in the warm-up; then with x = (t − warmup)/(total − warmup) in [0, 1]
/// constant: peak; linear: peak + (floor − peak)·x; cosine: floor + (peak − floor)·(1 + cos πx)/2.
///
/// **Throws** ArgumentError for a negative or not finite rate, floor above peak, or a warm-up longer than the run.
class Schedule {
 public:
  explicit Schedule(const ScheduleOptions& options) : o_(options) {
    if (!(o_.peak >= 0) || !std::isfinite(o_.peak) || !(o_.floor >= 0) || o_.floor > o_.peak)
      throw ArgumentError(
          detail::text("Schedule: needs 0 <= floor <= peak, finite, got floor ", o_.floor, " and peak ", o_.peak));
    if (o_.total_steps < 1 || o_.warmup_steps < 0 || o_.warmup_steps > o_.total_steps)
      throw ArgumentError(detail::text("Schedule: needs 0 <= warmup_steps <= total_steps and total_steps >= 1, got ",
                                       o_.warmup_steps, " and ", o_.total_steps));
  }

  /// The learning rate of step t = 0, 1, …; the last value after total_steps. **Throws** ArgumentError for t < 0.
  [[nodiscard]] double operator()(std::int64_t step) const {
    if (step < 0) throw ArgumentError(detail::text("Schedule: the step must not be negative, got ", step));
    if (step < o_.warmup_steps) return o_.peak * double(step + 1) / double(o_.warmup_steps);
    if (o_.decay == Decay::constant || o_.total_steps == o_.warmup_steps) return o_.peak;
    const double x = std::min(1.0, double(step - o_.warmup_steps) / double(o_.total_steps - o_.warmup_steps));
    if (o_.decay == Decay::linear) return o_.peak + (o_.floor - o_.peak) * x;
    return o_.floor + (o_.peak - o_.floor) * 0.5 * (1 + std::cos(std::numbers::pi * x));
  }

 private:
  ScheduleOptions o_;
};

}  // namespace lowrank

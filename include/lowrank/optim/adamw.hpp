// SPDX-License-Identifier: Apache-2.0
// AdamW on flat blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "lowrank/core/threads.hpp"
#include "lowrank/optim/groups.hpp"

namespace lowrank {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double weight_decay = 0;  ///< for parameters in no group; an error where the groups hold all
};

/// AdamW: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²; θ ← θ − lr·λ·θ − lr·m̂/(√v̂ + ε) with m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ).
///
/// Works on any pointer and length, ours or not. **Cost** one pass over values, gradients and two moments; no
/// allocation after construction. **Numerics** moments in T; the bias corrections and rates in double. Same order of
/// operations as PyTorch's.
/// **Source** Loshchilov & Hutter, arXiv 1711.05101, algorithm 2; Kingma & Ba, arXiv 1412.6980.
template <Real T>
class AdamW {
 public:
  /// For a block of n parameters. Groups must lie inside the block and not overlap; what no group covers gets factor 1
  /// and options.weight_decay. **Throws** ArgumentError otherwise, and for n < 0, betas outside [0, 1), ε not positive,
  /// a decay or lr_factor that is negative, or any of these not finite.
  explicit AdamW(Index n, const AdamWOptions& options = {}, std::vector<ParameterGroup> groups = {})
      : o_(options), groups_(std::move(groups)), m_(checked_size(n)), v_(n) {
    if (!(o_.beta1 >= 0 && o_.beta1 < 1 && o_.beta2 >= 0 && o_.beta2 < 1))
      throw ArgumentError(detail::text("AdamW: betas must lie in [0, 1), got ", o_.beta1, " and ", o_.beta2));
    if (!(o_.epsilon > 0) || !std::isfinite(o_.epsilon))
      throw ArgumentError(detail::text("AdamW: epsilon must be positive and finite, got ", o_.epsilon));
    if (!(o_.weight_decay >= 0) || !std::isfinite(o_.weight_decay))
      throw ArgumentError(detail::text("AdamW: weight_decay must be finite and not negative, got ", o_.weight_decay));
    std::fill(m_.begin(), m_.end(), T(0));
    std::fill(v_.begin(), v_.end(), T(0));
    complete_groups(n);
  }

  [[nodiscard]] Index size() const noexcept { return m_.size(); }
  [[nodiscard]] std::int64_t steps() const noexcept { return t_; }
  /// The state a resumed run must restore: first and second moments, and the step count.
  [[nodiscard]] std::span<T> first_moments() noexcept { return {m_.data(), std::size_t(m_.size())}; }
  [[nodiscard]] std::span<T> second_moments() noexcept { return {v_.data(), std::size_t(v_.size())}; }
  void set_steps(std::int64_t t) noexcept { t_ = t; }

  /// One step with the given learning rate. **Throws** ShapeError when the blocks are not size() long, ArgumentError
  /// for a rate that is negative or not finite.
  void step(std::span<T> values, std::span<const std::type_identity_t<T>> gradients, double learning_rate) {
    if (Index(values.size()) != size() || Index(gradients.size()) != size())
      throw ShapeError(detail::text("AdamW::step: values and gradients must have ", size(), " elements, got ",
                                    values.size(), " and ", gradients.size()));
    if (!(learning_rate >= 0) || !std::isfinite(learning_rate))
      throw ArgumentError(
          detail::text("AdamW::step: learning rate must be finite and not negative, got ", learning_rate));
    ++t_;
    const double correct1 = 1 - std::pow(o_.beta1, double(t_)), correct2 = 1 - std::pow(o_.beta2, double(t_));
    for (const ParameterGroup& group : groups_) {
      const double lr = learning_rate * group.lr_factor;
      const T keep = T(1 - lr * group.weight_decay), rate = T(lr / correct1), root = T(1 / std::sqrt(correct2));
      const T b1 = T(o_.beta1), b2 = T(o_.beta2), c1 = T(1 - o_.beta1), c2 = T(1 - o_.beta2), eps = T(o_.epsilon);
      T *const p = values.data() + group.offset, *const m = m_.data() + group.offset,
               *const v = v_.data() + group.offset;
      const T* const g = gradients.data() + group.offset;
      parallel_ranges(group.size, 65536, [=](Index begin, Index end) {
        for (Index i = begin; i < end; ++i) {
          m[i] = b1 * m[i] + c1 * g[i];
          v[i] = b2 * v[i] + c2 * g[i] * g[i];
          p[i] = keep * p[i] - rate * m[i] / (std::sqrt(v[i]) * root + eps);
        }
      });
    }
  }

 private:
  static Index checked_size(Index n) {
    if (n < 0) throw ArgumentError(detail::text("AdamW: the number of parameters must not be negative, got ", n));
    return n;
  }
  /// Sorts the groups and adds default ones for what they leave out, so that step() is one loop.
  void complete_groups(Index n) {
    std::sort(groups_.begin(), groups_.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
    std::vector<ParameterGroup> all;
    Index next = 0;
    for (const ParameterGroup& g : groups_) {
      if (g.offset < next || g.offset > n || g.size < 0 || g.size > n - g.offset)
        throw ArgumentError(detail::text("AdamW: groups must not overlap and lie in [0, ", n, "), got ", g.size,
                                         " parameters from ", g.offset));
      if (!(g.lr_factor >= 0) || !std::isfinite(g.lr_factor) || !(g.weight_decay >= 0) ||
          !std::isfinite(g.weight_decay))
        throw ArgumentError(
            detail::text("AdamW: a group's lr_factor and weight_decay must be finite and not negative, got ",
                         g.lr_factor, " and ", g.weight_decay));
      if (g.offset > next) all.push_back({next, g.offset - next, 1.0, o_.weight_decay});
      all.push_back(g);
      next = g.offset + g.size;
    }
    if (next < n) all.push_back({next, n - next, 1.0, o_.weight_decay});
    if (o_.weight_decay > 0 && n > 0 && all.size() == groups_.size())
      throw ArgumentError(detail::text("AdamW: weight_decay ", o_.weight_decay,
                                       " is for parameters in no group, and the ", groups_.size(), " groups hold all ",
                                       n, "; give the groups their decay"));
    groups_ = std::move(all);
  }

  AdamWOptions o_;
  std::vector<ParameterGroup> groups_;
  Buffer<T> m_, v_;
  std::int64_t t_ = 0;
};

}  // namespace lowrank

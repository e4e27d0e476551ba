// SPDX-License-Identifier: Apache-2.0
// Gradient clipping by global norm.
#pragma once

#include <cmath>
#include <span>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/core/scalar.hpp"

namespace lowrank {

/// The 2-norm of a block, accumulated in double.
template <Real T>
double norm(std::span<const T> values) {
  double sum = 0;
  for (const T v : values) sum += double(v) * double(v);
  return std::sqrt(sum);
}

/// Scales a gradient block by max_norm/‖g‖ when ‖g‖ exceeds max_norm; returns the norm before.
///
/// **Throws** ArgumentError unless max_norm is positive; NonFiniteError, naming the first index, when a gradient is NaN
/// or infinite (a step with it would destroy the parameters). **Cost** two passes. **Source** Pascanu et al., arXiv
/// 1211.5063.
template <Real T>
double clip_gradients(std::span<T> gradients, double max_norm) {
  if (!(max_norm > 0)) throw ArgumentError(detail::text("clip_gradients: max_norm must be positive, got ", max_norm));
  const double before = norm(std::span<const T>(gradients));
  if (!std::isfinite(before)) {
    for (std::size_t i = 0; i < gradients.size(); ++i)
      if (!std::isfinite(gradients[i]))
        throw NonFiniteError(
            detail::text("clip_gradients: gradient ", i, " of ", gradients.size(), " is ", double(gradients[i])));
    throw NonFiniteError("clip_gradients: the norm of the gradient overflows");
  }
  if (before > max_norm) {
    const T factor = T(max_norm / before);
    for (T& g : gradients) g *= factor;
  }
  return before;
}

}  // namespace lowrank

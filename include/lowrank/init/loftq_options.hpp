// SPDX-License-Identifier: Apache-2.0
// What LoftQ and QPiSSA are asked for, and what they report of every iteration.
#pragma once

#include <limits>
#include <string>
#include <vector>

#include "lowrank/init/initialised.hpp"
#include "lowrank/quant/quantise.hpp"

namespace lowrank {

struct LoftqOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// How the base is stored: codebook, blocks, double quantisation, scale search.
  QuantiseOptions quantise = {};
  /// With a covariance: the base is quantised by gptq against it, not to the nearest codes. Scales are found beforehand
  /// where double quantisation or blocks across row ends need it.
  bool gptq = false;
  /// T ≥ 1.
  int iterations = 5;
  /// End when an iteration does not lower the error; the best one is returned either way.
  bool stop_when_worse = true;
  /// Type the factors will be stored in; errors are those of the rounded factors.
  FactorStorage factor_storage = FactorStorage::native;
  /// How much larger than with exact SVDs an iteration's error may be, relatively, through inexact ones.
  double svd_slack = 2e-4;
  /// Report the nuclear norm of every error too: all singular values of a dense out×in matrix each time.
  bool nuclear = false;
  /// Data-aware methods: the covariance becomes C + damping·mean(diag C)·I.
  double damping = 0.01;
  /// Of the start vectors of the first SVD, which the result depends on within svd_slack.
  std::uint64_t seed = 0;
};

/// The error E = W − (Q + s·B·A) after one iteration.
struct LoftqStep {
  double frobenius = 0;  ///< ‖E‖_F
  double spectral = 0;   ///< ‖E‖₂ from below: a Rayleigh–Ritz value, within some percent
  double nuclear = std::numeric_limits<double>::quiet_NaN();  ///< ‖E‖_*, when asked for
  double weighted = std::numeric_limits<double>::quiet_NaN();  ///< √tr(E·C·Eᵀ) for the data-aware methods, C damped
  Index passes = 0;                                            ///< readings of the residual by the truncated SVD
  double seconds = 0;
};

struct LoftqReport {
  std::string method;
  /// ‖W‖_F, and the error of quantising W itself, without factors: what the method improves on.
  double weight_norm = 0;
  LoftqStep plain;
  /// One entry an iteration that was run; `best` is the one returned.
  std::vector<LoftqStep> steps;
  Index best = 0;
  double seconds = 0;

  [[nodiscard]] const LoftqStep& result() const { return steps[std::size_t(best)]; }
  /// 1 − ‖W − (Q + s·B·A)‖_F / ‖W − quant(W)‖_F.
  [[nodiscard]] double error_reduction() const {
    return plain.frobenius > 0 ? 1 - result().frobenius / plain.frobenius : 0.0;
  }
  /// The same in the nuclear norm, as the QPiSSA paper counts; NaN unless `nuclear` was set.
  [[nodiscard]] double nuclear_error_reduction() const { return 1 - result().nuclear / plain.nuclear; }
};

/// A quantised base and the factors that correct it: W ≈ base + s·B·A.
template <Real T>
struct QuantisedInit {
  QuantisedMatrix<T> base;
  LoraFactors<T> factors;
  LoftqReport report;
};

}  // namespace lowrank

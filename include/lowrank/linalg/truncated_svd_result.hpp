// SPDX-License-Identifier: Apache-2.0
// What a truncated SVD is asked for, and what it returns.
#pragma once

#include <cstdint>

#include "lowrank/core/half.hpp"
#include "lowrank/linalg/svd_result.hpp"

namespace lowrank {

/// How accurate, and by what means. The defaults suit initialisers: the energy captured is within 1e-5 of the best
/// possible.
///
/// At least one of the tolerances must be positive; when both are, both must be met.
struct TruncatedSvdOptions {
  /// Stop when the captured-energy deficit, (Σ_{i≤k} σᵢ² − Σ_{i≤k} σ̂ᵢ²) / Σ_{i≤k} σᵢ² with the true σ and our σ̂, is
  /// estimated to be below this. The estimate extrapolates the growth of Σσ̂² from step to step. 0: do not look at it.
  double energy_tolerance = 1e-5;
  /// Stop when every triplet has ‖Aᵀu − σ̂v‖ ≤ residual_tolerance·σ̂₁ (‖Av − σ̂u‖ is zero to rounding). 0: do not look at
  /// it.
  double residual_tolerance = 0;
  /// Vectors multiplied at once; 0: chosen for the rank.
  Index block = 0;
  /// Vectors kept beyond `rank` when the basis is restarted, and random ones added to a warm start; 0: automatic.
  Index oversampling = 0;
  /// Vectors in the basis before a restart; 0: automatic. At least rank + 2·block.
  Index max_basis = 0;
  /// Passes after which the best result so far is returned with converged = false; 0: 1000.
  Index max_passes = 0;
  /// Seed of the random start.
  std::uint64_t seed = 0;
  /// Test first, on random vectors, that apply and apply_adjoint belong to one matrix (check_adjoint). Costs two
  /// readings, which are not counted in passes. On by default in debug builds.
#if defined(NDEBUG)
  bool check_adjoint = false;
#else
  bool check_adjoint = true;
#endif
};

/// The leading triplets of A with what is known about their error.
///
/// **Numerics** each σ̂ᵢ lies within residuals[i] of a true singular value, and σ̂ᵢ ≤ σᵢ to rounding.
/// ‖A − U·diag(S)·Vᵀ‖_F² = total_energy − captured_energy.
template <Real T>
struct TruncatedSvd : Svd<T> {
  /// ‖Aᵀuᵢ − σ̂ᵢvᵢ‖₂ and ‖Avᵢ − σ̂ᵢuᵢ‖₂, the larger; measured with A, not estimated.
  std::vector<double> residuals;
  double captured_energy = 0;  ///< Σ σ̂ᵢ²
  double total_energy = 0;     ///< ‖A‖_F²; NaN when the operator does not know it
  double energy_deficit = 0;   ///< estimated captured-energy deficit
  Index passes = 0;            ///< products with A, Aᵀ, or both at once, the two that measure the residuals included
  Index block = 0;             ///< vectors multiplied at once
  Index basis = 0;             ///< dimension of the space the triplets were taken from
  bool converged = false;      ///< whether the tolerances asked for were met
};

namespace detail {

inline void check_options(const char* where, const TruncatedSvdOptions& o) {
  const auto bad = [&](const char* what, double got) { throw ArgumentError(text(where, ": ", what, ", got ", got)); };
  if (!(o.energy_tolerance >= 0) || !std::isfinite(o.energy_tolerance))
    bad("energy_tolerance must be finite and not negative", o.energy_tolerance);
  if (!(o.residual_tolerance >= 0) || !std::isfinite(o.residual_tolerance))
    bad("residual_tolerance must be finite and not negative", o.residual_tolerance);
  if (o.energy_tolerance == 0 && o.residual_tolerance == 0)
    bad("one of energy_tolerance and residual_tolerance must be positive", 0);
  if (o.block < 0) bad("block must not be negative", double(o.block));
  if (o.oversampling < 0) bad("oversampling must not be negative", double(o.oversampling));
  if (o.max_basis < 0) bad("max_basis must not be negative", double(o.max_basis));
  if (o.max_passes < 0) bad("max_passes must not be negative", double(o.max_passes));
}

}  // namespace detail
}  // namespace lowrank

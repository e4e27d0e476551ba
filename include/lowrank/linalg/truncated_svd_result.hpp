// SPDX-License-Identifier: Apache-2.0
// What a truncated SVD is asked for, and what it returns.
#pragma once

#include <cstdint>

#include "lowrank/core/scalar.hpp"
#include "lowrank/linalg/svd_result.hpp"

namespace lowrank {

/// How accurate, and by what means. The defaults suit initialisers: the energy captured is within 1e-5 of the best
/// possible.
///
/// At least one of the tolerances must be positive; when both are, both must be met.
struct TruncatedSvdOptions {
  /// Stop when the captured-energy deficit, (Σ_{i≤k} σᵢ² − Σ_{i≤k} σ̂ᵢ²) / Σ_{i≤k} σᵢ² with the true σ and our σ̂, is
  /// estimated to be below this. The estimate extrapolates the growth of Σσ̂² from step to step. 0: do not look at it.
  /// Below 4·eps of the scalar it cannot be told: the iteration goes as far as 4·eps and returns that, not converged.
  double energy_tolerance = 1e-5;
  /// Stop when every triplet has a measured residual of at most residual_tolerance·σ̂₁. 0: do not look at it.
  double residual_tolerance = 0;
  /// Vectors multiplied at once; 0: chosen for the rank.
  Index block = 0;
  /// Vectors kept beyond `rank` when the basis is restarted, and random ones added to a warm start; 0: automatic.
  Index oversampling = 0;
  /// Vectors in the basis before a restart; 0: automatic. At least rank + 2·block.
  Index max_basis = 0;
  /// Passes after which the best result so far is returned with converged = false; 0: 1000.
  Index max_passes = 0;
  /// Where values lie so close together that a block may have met only some of them (repeated ones most of all), search
  /// what has been found for the others, with fresh random vectors; without it they may be missing.
  bool seek_copies = true;
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

/// Why an iteration ended.
enum class StopReason {
  met,           ///< the tolerances asked for were met
  scalar_limit,  ///< the scalar does not resolve a tolerance; this is the best it can do
  passes,        ///< max_passes were spent; more would bring more
};

/// The leading triplets of A with what is known about their error.
///
/// **Scale** `residuals`, `rounding` and `error` in units of A. **Numerics** a true singular value lies within error(i)
/// of S[i], and S[i] ≤ σᵢ + rounding. ‖A − U·diag(S)·Vᵀ‖_F² = total_energy − captured_energy, to the same.
///
/// Where the error bound comes from: the residuals are measured with products in T. With rounding errors as independent
/// random ones an element of a product of length n errs by √n·u of the norm of what is summed (u = eps/2), so that all
/// of A·v err by √n·u·(largest row norm) ≤ √n·u·σ₁; eps for u leaves two such standard deviations, which add over
/// hundreds of elements. Storing σ̂, u and v, and the rotation of k vectors, add a few eps·σ₁.
/// **Source** residual bound of the Hermitian [0 A; Aᵀ 0]: Parlett, The Symmetric Eigenvalue Problem, §4.5; Higham &
/// Mary, SIAM J. Sci. Comput. 41 (2019) for rounding errors as random ones.
template <Real T>
struct TruncatedSvd : Svd<T> {
  /// ‖Aᵀuᵢ − σ̂ᵢvᵢ‖₂ and ‖Avᵢ − σ̂ᵢuᵢ‖₂, the larger, as measured with products of A in T: true to within `rounding`.
  std::vector<double> residuals;
  /// (√max(m, n) + 8)·eps·S[0] and one denormal: what rounding can hide from the residuals and the values.
  double rounding = 0;
  double captured_energy = 0;  ///< Σ σ̂ᵢ²
  double total_energy = 0;     ///< ‖A‖_F²; NaN when the operator does not know it
  double energy_deficit = 0;   ///< estimated captured-energy deficit
  Index passes = 0;            ///< products with A, Aᵀ, or both at once, the two that measure the residuals included
  Index block = 0;             ///< vectors multiplied at once
  Index basis = 0;             ///< dimension of the space the triplets were taken from
  bool converged = false;      ///< whether the tolerances asked for were met
  StopReason stopped = StopReason::passes;  ///< met when converged, else why not

  /// The error bound of S[i]: residuals[i] + rounding.
  [[nodiscard]] double error(Index i) const { return residuals[std::size_t(i)] + rounding; }
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

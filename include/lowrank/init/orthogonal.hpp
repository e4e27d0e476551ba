// SPDX-License-Identifier: Apache-2.0
// The orthogonal start: A and B both random, their product zero.
#pragma once

#include "lowrank/core/rng.hpp"
#include "lowrank/init/initialised.hpp"
#include "lowrank/linalg/qr.hpp"

namespace lowrank {

struct OrthogonalOptions {
  /// r, 2 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Standard deviation of the entries of A and B before they are spread over the r directions.
  double std = 0.1;
  /// Of the random numbers; none: the next of the process-wide sequence that seed_everything starts.
  std::optional<std::uint64_t> seed = std::nullopt;
};

/// Factors that are both random and yet B·A = 0: A = Q₀ᵀ·G₀, B = G₁ᵀ·Q₁, where Q₀ and Q₁ are the even and the odd rows
/// of one random orthogonal r×r matrix and G₀, G₁ are Gaussian.
///
/// Q₁·Q₀ᵀ = 0, hence the product vanishes while neither factor does: both get a gradient at the first step.
/// **Shapes** A r×in, B out×r. **Scale** s = α/r or α/√r. **Throws** ArgumentError: rank outside [2, min(out, in)], α
/// not positive and finite, std negative or not finite. **Cost** (out + in)·r² flops.
/// **Numerics** ‖B·A‖ is rounding, some eps·‖B‖·‖A‖, not an exact zero. Same seed, same bits, whatever
/// the threads; without a seed every call draws other numbers, the same in every run (seed_everything). `report.seed`
/// is the one taken.
/// **Source** no paper: the scheme is that of PEFT's `init_lora_weights="orthogonal"`, which admits even ranks only;
/// the random orthogonal matrix from a QR of a Gaussian one: Stewart, SIAM J. Numer. Anal. 17 (1980), §3.
template <Real T>
Initialised<T> orthogonal(Index out, Index in, const OrthogonalOptions& options = {}) {
  const detail::Stopwatch watch;
  const Index r = options.rank;
  detail::check_rank("orthogonal", r, out, in);
  if (r < 2) throw ArgumentError("orthogonal: rank must be at least 2, got 1: one direction has no orthogonal partner");
  if (!(options.std >= 0) || !std::isfinite(options.std))
    throw ArgumentError(detail::text("orthogonal: std must be finite and not negative, got ", options.std));
  Initialised<T> result;
  result.factors.scale = T(detail::scale_of<T>(options));

  Matrix<T> Q(r, r);
  const std::uint64_t seed = result.report.seed = detail::seed_or_fresh(options.seed);
  CounterRng(seed, 0).fill_normal(Q.view());
  orthonormalise(Q.view());
  const Index r0 = (r + 1) / 2, r1 = r / 2;
  Matrix<T> Q0(r0, r), Q1(r1, r), G0(r0, in), G1(r1, out);
  for (Index i = 0; i < r; ++i)
    for (Index j = 0; j < r; ++j) (i % 2 == 0 ? Q0 : Q1)(i / 2, j) = Q(i, j);
  CounterRng(seed, 1).fill_normal(G0.view(), 0, options.std);
  CounterRng(seed, 2).fill_normal(G1.view(), 0, options.std);
  result.factors.A = multiply<T>(Q0.view().transposed(), G0.view());
  result.factors.B = multiply<T>(G1.view().transposed(), Q1.view());
  result.report.method = "orthogonal";
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

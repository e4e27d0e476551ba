// SPDX-License-Identifier: Apache-2.0
// Gaussian starts: A normal and B zero for linear layers; A zero and B normal for embeddings.
#pragma once

#include "lowrank/core/rng.hpp"
#include "lowrank/init/initialised.hpp"

namespace lowrank {

struct GaussianOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Of the random numbers; none: the next of the process-wide sequence that seed_everything starts.
  std::optional<std::uint64_t> seed = std::nullopt;
};

/// Factors with A normal and B zero: A_ij ~ N(0, 1/r²), B = 0.
///
/// **Shapes** A r×in, B out×r. **Scale** s = α/r or α/√r; the standard deviation 1/r is PEFT's (`"gaussian"`).
/// **Throws** ArgumentError: rank outside [1, min(out, in)], α not positive and finite.
/// **Cost** r·in random numbers. **Numerics** same seed, same bits, whatever the threads; without a seed
/// every call draws other numbers, the same in every run (seed_everything). `report.seed` is the one taken.
/// **Source** Hu et al., arXiv 2106.09685, §4.1 ("a random Gaussian initialization for A and zero for B").
template <Real T>
Initialised<T> gaussian(Index out, Index in, const GaussianOptions& options = {}) {
  const detail::Stopwatch watch;
  detail::check_rank("gaussian", options.rank, out, in);
  Initialised<T> result;
  result.factors.scale = T(detail::scale_of<T>(options));
  result.factors.A.resize(options.rank, in);
  result.factors.B = Matrix<T>(out, options.rank);
  result.report.seed = detail::seed_or_fresh(options.seed);
  CounterRng(result.report.seed).fill_normal(result.factors.A.view(), 0, 1 / double(options.rank));
  result.report.method = "gaussian";
  result.report.seconds = watch.seconds();
  return result;
}

/// Factors for an embedding table of vocab rows: A = 0, B_ij ~ N(0, 1).
///
/// The update of row t of the table is s·(B·A)(:, t)ᵀ: a lookup of column t of A, then B. A is the zero factor here
/// since a step touches only the looked-up columns of it.
/// **Shapes** A r×vocab, B dim×r. **Scale**, **Throws**, **Numerics** as gaussian (with out = dim, in = vocab).
/// **Source** the reference implementation of LoRA, loralib, `Embedding.reset_parameters`.
template <Real T>
Initialised<T> gaussian_embedding(Index dim, Index vocab, const GaussianOptions& options = {}) {
  const detail::Stopwatch watch;
  detail::check_rank("gaussian_embedding", options.rank, dim, vocab);
  Initialised<T> result;
  result.factors.scale = T(detail::scale_of<T>(options));
  result.factors.A = Matrix<T>(options.rank, vocab);
  result.factors.B.resize(dim, options.rank);
  result.report.seed = detail::seed_or_fresh(options.seed);
  CounterRng(result.report.seed).fill_normal(result.factors.B.view());
  result.report.method = "gaussian_embedding";
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// LoRA-XS: A and B frozen from the SVD of W, only an r×r core between them trains.
#pragma once

#include "lowrank/core/rng.hpp"
#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank {

struct LoraXsOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Standard deviation of the core at the start.
  double core_std = 1e-5;
  /// Of the core's random numbers; none: the next of the process-wide sequence that seed_everything starts.
  std::optional<std::uint64_t> seed = std::nullopt;
  /// Accuracy of the truncated SVD, and the seed of its start vectors.
  TruncatedSvdOptions svd = {};
};

/// ΔW = s·B·core·A with B and A frozen.
template <Real T>
struct LoraXs {
  Matrix<T> B;     ///< out×r, U·S
  Matrix<T> core;  ///< r×r, trained
  Matrix<T> A;     ///< r×in, Vᵀ
  T scale = T(1);
  InitReport report;

  /// The plain adapter (B·core, A) that does the same. **Cost** 2·out·r² flops.
  [[nodiscard]] LoraFactors<T> folded() const { return {A, multiply<T>(B.view(), core.view()), scale}; }
};

/// LoRA-XS: with W ≈ U·S·Vᵀ of rank r, B = U·S and A = Vᵀ frozen, core ~ N(0, core_std²).
///
/// **Shapes** W out×in in any order and storage; B out×r, core r×r, A r×in. The base is W, unchanged but for the tiny
/// core.
/// **Scale** s = α/r or α/√r. **Throws** ArgumentError: rank, α, core_std, svd options; NonFiniteError.
/// **Cost** one truncated SVD. **Numerics** A orthonormal to a few eps. Same seeds, same bits; without a seed
/// every call draws another core, the same in every run (seed_everything). `report.seed` is the one taken.
/// **Source** Bałazy et al., "LoRA-XS", arXiv 2405.17604, §3 (their A and B are our B and A).
template <class Factor = void, MatrixLike X>
requires FactorScalarOf<Factor, X> LoraXs<factor_scalar<X>> lora_xs(X&& weight, const LoraXsOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  detail::check_rank("lora_xs", options.rank, W.rows(), W.cols());
  if (!(options.core_std >= 0) || !std::isfinite(options.core_std))
    throw ArgumentError(detail::text("lora_xs: core_std must be finite and not negative, got ", options.core_std));
  LoraXs<T> result;
  result.scale = T(detail::scale_of<T>(options));
  TruncatedSvd<T> d = truncated_svd(W, options.rank, options.svd);
  result.B = std::move(d.U);
  for (Index i = 0; i < result.B.rows(); ++i)
    for (Index j = 0; j < result.B.cols(); ++j) result.B(i, j) *= d.S[std::size_t(j)];
  result.A = Matrix<T>(d.V.view().transposed());
  result.core = Matrix<T>(options.rank, options.rank);
  result.report.seed = detail::seed_or_fresh(options.seed);
  CounterRng(result.report.seed, 1).fill_normal(result.core.view(), 0, options.core_std);
  result.report.method = "lora_xs";
  result.report.captured_energy = d.captured_energy;
  result.report.total_energy = d.total_energy;
  result.report.passes = d.passes;
  result.report.converged = d.converged;
  result.report.notes = "freeze A and B";
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// MiLoRA and MiCA: adapters in the minor singular subspace, which pretraining used least.
#pragma once

#include "lowrank/init/pissa.hpp"
#include "lowrank/linalg/minor_svd.hpp"

namespace lowrank {

struct MiloraOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Type the factors will be stored in; the base is formed from the rounded ones.
  FactorStorage factor_storage = FactorStorage::native;
  /// How the smallest triplets are found, and the seed of the start vectors.
  MinorSvdOptions svd = {};
};

/// MiLoRA: with U, S, V the r smallest singular triplets of W, B = U·√(S/s), A = √(S/s)·Vᵀ and base = W − s·B·A.
///
/// **Shapes**, **Scale** as pissa. **Throws** ArgumentError: rank, α, factors outside the range
/// of their storage type; NonFiniteError. **Cost** see minor_svd;
/// `report.notes` says when a full SVD was needed. **Numerics** base + s·B·A = W to rounding of the base's type. Where
/// W is singular the factors start at zero and `notes` says so.
/// **Source** Wang et al., "MiLoRA", arXiv 2406.09044, §3.
template <class Factor = void, class Base = void, MatrixLike X>
requires FactorScalarOf<Factor, X> && BaseStorageOf<Base, X> InitialisedFrom<X, Base> milora(
    X&& weight, const MiloraOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  detail::check_rank("milora", options.rank, W.rows(), W.cols());
  const double scale = detail::scale_of<T>(options);
  InitialisedFrom<X, Base> result;
  const MinorSvd<T> d = minor_svd(W, options.rank, options.svd);
  detail::balanced_factors<T>(d.U.view(), d.S, d.V.view(), scale, result.factors);
  for (const T s : d.S) result.report.captured_energy += double(s) * double(s);
  result.report.total_energy = detail::squared_norm(W);
  const double rms_sigma = std::sqrt(result.report.total_energy / double(std::min(W.rows(), W.cols())));
  result.report.notes =
      detail::dead_pairs_note(d.S, rms_sigma, W.rows(), W.cols(), double(std::numeric_limits<T>::epsilon()));
  result.report.notes += detail::way_found(d);
  detail::split_weight("milora", W, options.factor_storage, result);
  result.report.seconds = watch.seconds();
  return result;
}

struct MicaOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// How the smallest triplets are found, and the seed of the start vectors.
  MinorSvdOptions svd = {};
};

/// MiCA: B = the left singular vectors of the r smallest singular values of W, to be frozen; A = 0, to be trained.
///
/// **Shapes** A r×in, B out×r orthonormal; the base is W, unchanged. For out > in the vectors are the last of the thin
/// SVD's `in`, not of the out − in directions that W does not reach. **Scale** s = α/r or α/√r. **Throws**, **Cost** as
/// milora.
/// **Source** Rüdiger and Raschka, "MiCA", arXiv 2604.01694.
template <class Factor = void, MatrixLike X>
requires FactorScalarOf<Factor, X> InitialisedFrom<X> mica(X&& weight, const MicaOptions& options = {}) {
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const scalar_of<X>> W = view_of(weight);
  detail::check_rank("mica", options.rank, W.rows(), W.cols());
  InitialisedFrom<X> result;
  result.factors.scale = T(detail::scale_of<T>(options));
  MinorSvd<T> d = minor_svd(W, options.rank, options.svd);
  result.factors.B = std::move(d.U);
  result.factors.A = Matrix<T>(options.rank, W.cols());
  for (const T s : d.S) result.report.captured_energy += double(s) * double(s);
  result.report.total_energy = detail::squared_norm(W);
  result.report.method = "mica";
  result.report.notes = std::string("freeze B; ") + detail::way_found(d);
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

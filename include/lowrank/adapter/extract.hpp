// SPDX-License-Identifier: Apache-2.0
// An adapter out of a full fine-tune: the leading part of W_tuned − W_base, which is never formed.
#pragma once

#include <limits>

#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank {

struct ExtractOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// s of the result: α/r as the file or the layer will have it.
  double scale = 1;
  /// Accuracy of the truncated SVD and its seed.
  TruncatedSvdOptions svd = {};
};

template <Real T>
struct Extracted {
  LoraFactors<T> factors;
  /// The r leading singular values of ΔW = W_tuned − W_base, and their residuals.
  std::vector<T> sigma;
  std::vector<double> residuals;
  /// ‖ΔW‖_F and ‖ΔW − s·B·A‖_F.
  double norm = 0, error = 0;
  Index passes = 0;
  bool converged = false;
};

/// The scalar of an adapter extracted from two weights: double when either is, else float.
template <MatrixLike X, MatrixLike Y>
using extracted_scalar =
    std::conditional_t<std::is_same_v<scalar_of<X>, double> || std::is_same_v<scalar_of<Y>, double>, double, float>;

/// The rank-r adapter closest to ΔW = W_tuned − W_base: with ΔW ≈ U·S·Vᵀ, B = U·√(S/s) and A = √(S/s)·Vᵀ.
///
/// **Shapes** both out×in; storages (f32, f64, bf16, f16) and orders may differ. **Scale** see options.
/// **Throws** ShapeError: shapes differ; ArgumentError: rank, scale, svd options; NonFiniteError.
/// **Cost** `passes` readings of both weights; no memory of their size. **Numerics** differences are taken in float
/// (double for doubles), where those of two bf16 numbers are nearly always exact; but bf16 weights carry their own
/// rounding, see spectrum/rounding.hpp for the rank at which ΔW is no more than that. `error` is √(‖ΔW‖_F² − Σσ̂²): it
/// cannot be told from 0 below 1e-7·norm.
/// **Source** Eckart and Young (1936); the extraction of LoRA from checkpoints as in LoRD and mergekit.
template <MatrixLike X, MatrixLike Y>
Extracted<extracted_scalar<X, Y>> extract_adapter(X&& tuned, Y&& base, const ExtractOptions& options = {}) {
  using S1 = scalar_of<X>;
  using S0 = scalar_of<Y>;
  using T = extracted_scalar<X, Y>;
  static_assert(StorageOf<S1, T> && StorageOf<S0, T>,
                "extract_adapter: a double weight can only be compared with a double one; convert first");
  const MatrixView<const S1> W1 = view_of(tuned);
  const MatrixView<const S0> W0 = view_of(base);
  detail::expect_shape("extract_adapter", "base", W0.rows(), W0.cols(), W1.rows(), W1.cols());
  detail::check_rank("extract_adapter", options.rank, W1.rows(), W1.cols());
  if (!(options.scale > 0) || !std::isfinite(options.scale))
    throw ArgumentError(detail::text("extract_adapter: the scale must be positive and finite, got ", options.scale));
  TruncatedSvd<T> d = truncated_svd<T>(difference_operator<T, S1, S0>(W1, W0), options.rank, options.svd);
  Extracted<T> out;
  detail::balanced_factors<T>(d.U.view(), d.S, d.V.view(), options.scale, out.factors);
  out.norm = std::sqrt(d.total_energy);
  out.error = std::sqrt(std::max(0.0, d.total_energy - d.captured_energy));
  out.passes = d.passes;
  out.converged = d.converged;
  out.sigma = std::move(d.S);
  out.residuals = std::move(d.residuals);
  return out;
}

}  // namespace lowrank

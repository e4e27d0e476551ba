// SPDX-License-Identifier: Apache-2.0
// PiSSA: the principal singular triplets of W become the factors, the rest stays as base.
#pragma once

#include <limits>
#include <span>

#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank {

struct PissaOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Type the factors will be stored in; the base is formed from the rounded ones.
  FactorStorage factor_storage = FactorStorage::native;
  /// Accuracy of the truncated SVD: by default the energy captured is within 1e-5 of the most any rank r can. svd.seed
  /// is that of the start vectors, which the factors depend on to that accuracy.
  TruncatedSvdOptions svd = {};
};

namespace detail {

/// Rounds the factors, forms the base from them, and completes the report of a method that splits W itself.
template <class S, class T, class Base>
void split_weight(const char* method, MatrixView<const S> W, FactorStorage storage, Initialised<T, Base>& result) {
  round_to_storage(method, result.factors.A.view(), storage);
  round_to_storage(method, result.factors.B.view(), storage);
  form_base(W, result);
  result.report.method = method;
}

/// A pair (column of B, row of A) that is zero gets no gradient, ever; a reader must be told.
template <class Values>
std::string dead_pairs_note(const Values& S, double largest, Index m, Index n, double eps) {
  Index dead = 0;
  for (const auto s : S) dead += double(s) <= largest * double(std::max(m, n)) * eps;
  if (dead == 0) return {};
  return text(dead, " of ", S.size(),
              " singular values are zero to rounding: their columns of B and rows of A are zero and "
              "will not train; ");
}

}  // namespace detail

/// PiSSA: with W ≈ U·S·Vᵀ of rank r, B = U·√(S/s), A = √(S/s)·Vᵀ and base = W − s·B·A.
///
/// **Shapes** W out×in in f32, f64, bf16 or f16, any order, never widened whole; B out×r, A r×in of the type of
/// arithmetic (`Factor`: float, or double for a W of doubles); base out×in stored as `Base`, by default as the factors:
/// `pissa<float, bf16>(W)`. **Scale** s = α/r or α/√r is divided out of the factors, so that base +
/// s·B·A = W at the start whatever α.
/// **Throws** ArgumentError: rank, α, svd options, a value beyond the range of a storage type; NonFiniteError: NaN or
/// infinity in W. **Cost** the truncated SVD, and 2·out·in·r flops for the base.
/// **Numerics** base + s·B·A = W to rounding of the base's type (`storage_error`) at any accuracy of the SVD: a looser
/// one only captures less. `captured_energy` is Σσ̂², within `svd.energy_tolerance` of optimal when `converged`.
/// **Source** Meng et al., "PiSSA", arXiv 2404.02948, eqs. 2–4.
template <class Factor = void, class Base = void, MatrixLike X>
requires FactorScalarOf<Factor, X> && BaseStorageOf<Base, X> InitialisedFrom<X, Base> pissa(
    X&& weight, const PissaOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  detail::check_rank("pissa", options.rank, W.rows(), W.cols());
  InitialisedFrom<X, Base> result;
  const double scale = detail::scale_of<T>(options);
  const TruncatedSvd<T> d = truncated_svd(W, options.rank, options.svd);
  result.report.notes =
      detail::dead_pairs_note(d.S, double(d.S[0]), W.rows(), W.cols(), double(std::numeric_limits<T>::epsilon()));
  detail::balanced_factors<T>(d.U.view(), d.S, d.V.view(), scale, result.factors);
  result.report.captured_energy = d.captured_energy;
  result.report.total_energy = d.total_energy;
  result.report.passes = d.passes;
  result.report.converged = d.converged;
  detail::split_weight("pissa", W, options.factor_storage, result);
  result.report.seconds = watch.seconds();
  return result;
}

/// PiSSA from triplets that are known already: a full SVD, or one truncated SVD cut to several ranks.
///
/// **Shapes** d holds at least `options.rank` triplets of W, sorted descending. `options.svd` is not looked at.
/// **Throws**, **Numerics** as pissa; ShapeError when d is not of W's shape. **Cost** 2·out·in·r flops.
template <class Factor = void, class Base = void, MatrixLike X>
requires FactorScalarOf<Factor, X> && BaseStorageOf<Base, X> InitialisedFrom<X, Base> pissa_from_svd(
    X&& weight, const Svd<factor_scalar<X>>& d, const PissaOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  const Index r = options.rank, known = Index(d.S.size());
  detail::check_rank("pissa_from_svd", r, W.rows(), W.cols());
  detail::expect_shape("pissa_from_svd", "U", d.U.rows(), d.U.cols(), W.rows(), known);
  detail::expect_shape("pissa_from_svd", "V", d.V.rows(), d.V.cols(), W.cols(), known);
  if (r > known) throw ArgumentError(detail::text("pissa_from_svd: needs ", r, " triplets, got ", known));
  InitialisedFrom<X, Base> result;
  const std::span<const T> S1 = std::span(d.S).first(std::size_t(r));
  result.report.notes =
      detail::dead_pairs_note(S1, double(S1[0]), W.rows(), W.cols(), double(std::numeric_limits<T>::epsilon()));
  detail::balanced_factors<T>(d.U.view().middle_cols(0, r), S1, d.V.view().middle_cols(0, r),
                              detail::scale_of<T>(options), result.factors);
  for (const T s : S1) result.report.captured_energy += double(s) * double(s);
  result.report.total_energy = detail::squared_norm(W);
  detail::split_weight("pissa", W, options.factor_storage, result);
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// OLoRA: the first columns of a QR decomposition of W as factors, the rest as base.
#pragma once

#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/qr.hpp"

namespace lowrank {

struct OloraOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Type the factors will be stored in.
  FactorStorage factor_storage = FactorStorage::native;
};

/// OLoRA: with W = Q·R, B = Q(:, 1…r), A = R(1…r, :) and base = W − s·B·A.
///
/// The first r columns of Q depend on the first r columns of W alone, and R(1…r, :) = Bᵀ·W: no full QR is taken.
/// **Shapes** W out×in, f32, f64, bf16 or f16 in any order; base out×in stored as `Base`, by default as
/// the factors: `olora<float, bf16>(W)`.
/// **Scale** s = α/r or α/√r. As in the paper's code the factors carry no 1/s: the base gives up s·B·A, which is more
/// or less than the projection B·A of W unless s = 1.
/// **Throws** ArgumentError: rank, α, factors outside the range of their storage type; NonFiniteError: NaN or infinity
/// in W. **Cost** 4·out·in·r flops, two passes over W.
/// **Numerics** signs of the columns of Q are those of Householder's method; B·A does not depend on them. When the
/// first r columns of W are dependent, the columns of B that W does not determine are some orthonormal completion.
/// **Source** Büyükakyüz, "OLoRA", arXiv 2406.01775, Algorithm 1.
template <class Factor = void, class Base = void, MatrixLike X>
requires FactorScalarOf<Factor, X> && BaseStorageOf<Base, X> InitialisedFrom<X, Base> olora(
    X&& weight, const OloraOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  const Index r = options.rank, m = W.rows(), n = W.cols();
  detail::check_rank("olora", r, m, n);
  InitialisedFrom<X, Base> result;
  result.factors.scale = T(detail::scale_of<T>(options));
  // Powers of two, taken in double: columns of 1e30 must not overflow in the products of the QR, nor denormals lose
  // their bits.
  const MatrixView<const S> leading = W.middle_cols(0, r);
  result.factors.B = Matrix<T>(m, r);
  detail::copy_scaled(leading, detail::unit_scale(detail::checked_max_abs("olora", "W", leading)),
                      result.factors.B.view());
  orthonormalise(result.factors.B.view());
  result.factors.A.resize(r, n);
  detail::product<T, T, S>(T(1), result.factors.B.view().transposed(), W.transposed(), false, result.factors.A.view());
  for (Index i = 1; i < r; ++i)  // zero but for rounding: R is triangular there
    for (Index j = 0; j < i; ++j) result.factors.A(i, j) = T(0);

  const double s = double(result.factors.scale);
  result.report.captured_energy = s * s * detail::squared_norm(result.factors.A.view());
  detail::round_to_storage("olora", result.factors.A.view(), options.factor_storage);
  detail::round_to_storage("olora", result.factors.B.view(), options.factor_storage);
  detail::form_base(W, result);
  result.report.method = "olora";
  result.report.total_energy = detail::squared_norm(W);
  result.report.passes = 2;
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

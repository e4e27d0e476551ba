// SPDX-License-Identifier: Apache-2.0
// Where an update points, seen from the weight: amplification, and its energy along the weight's own singular
// directions.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "lowrank/spectrum/subspace.hpp"

namespace lowrank {

namespace detail {

/// Throws unless the values are finite and not negative.
template <class T>
void check_update_values(const char* where, const char* name, const std::vector<T>& S) {
  for (std::size_t i = 0; i < S.size(); ++i) {
    if (!std::isfinite(S[i])) throw NonFiniteError(text(where, ": singular value ", i, " of ", name, " is not finite"));
    if (S[i] < T(0))
      throw ArgumentError(
          text(where, ": singular value ", i, " of ", name, " must not be negative, got ", double(S[i])));
  }
}

}  // namespace detail

/// What an update did with directions the weight already had: ‖ΔW‖_F / ‖UᵀWV‖_F, with U and V the leading singular
/// vectors of ΔW.
///
/// Large values say that the update amplifies directions W does not emphasise.
/// **Shapes** W out×in in any order; delta: the (truncated) SVD of ΔW, whose own norm is taken from its singular
/// values.
/// **Scale** free when W and ΔW have one unit; infinity when W has nothing there, 0 for a zero update.
/// **Throws** ShapeError when the shapes do not fit; ArgumentError when U or V is not orthonormal or a value negative;
/// NonFiniteError when any of them or W is not finite. **Cost** 2·out·in·r flops, one reading of W.
/// **Source** Hu et al., "LoRA", arXiv 2106.09685, §7.3, table 7.
template <Real T>
double amplification_factor(MatrixView<const T> W, const Svd<T>& delta) {
  const Index k = Index(delta.S.size());
  detail::expect_shape("amplification_factor", "U of the update", delta.U.rows(), delta.U.cols(), W.rows(), k);
  detail::expect_shape("amplification_factor", "V of the update", delta.V.rows(), delta.V.cols(), W.cols(), k);
  detail::check_update_values("amplification_factor", "the update", delta.S);
  detail::check_orthonormal<T>("amplification_factor", "U of the update", delta.U.view());
  detail::check_orthonormal<T>("amplification_factor", "V of the update", delta.V.view());
  double norm = 0, seen = 0;
  for (const T s : delta.S) norm += double(s) * double(s);
  if (norm == 0) return 0;
  const Matrix<T> WV = multiply<T>(W, delta.V.view());
  const Matrix<T> core = multiply<T>(delta.U.view().transposed(), WV.view());
  for (Index i = 0; i < core.size(); ++i) seen += double(core.data()[i]) * double(core.data()[i]);
  if (!std::isfinite(seen)) throw NonFiniteError("amplification_factor: W must be finite, and so must be its products");
  return seen > 0 ? std::sqrt(norm / seen) : std::numeric_limits<double>::infinity();
}
/// As above for a matrix-like W.
template <class X, Real T>
requires MatrixOf<const X&, const T>
double amplification_factor(const X& W, const Svd<T>& delta) {
  return amplification_factor<T>(detail::const_view_of(W), delta);
}

/// Shares of an update's energy along the first k singular directions of the weight, k = 1…K, each in [0, 1].
struct Alignment {
  std::vector<double> left;   ///< ‖U_kᵀΔW‖²/‖ΔW‖²; a random update has k/out
  std::vector<double> right;  ///< ‖ΔW·V_k‖²/‖ΔW‖²; a random update has k/in
  std::vector<double> both;   ///< ‖U_kᵀΔW·V_k‖²/‖ΔW‖²; a random update has k²/(out·in)
};

/// How much of ΔW lies along W's own leading singular directions.
///
/// **Shapes** weight: the leading K triplets of W (out×K, K, in×K); delta: the SVD of ΔW, of a LoRA update for
/// instance.
/// **Throws** ShapeError when the shapes do not fit; ArgumentError when one of the four bases is not orthonormal or a
/// value of ΔW negative; NonFiniteError when they are not finite. W's own values are not looked at.
/// **Cost** 2·(out + in)·K·r + 2·K²·r flops; W itself is not read. **Numerics** sums in double; a zero update gives
/// zeros. The energy of ΔW is that of the values given: with a truncated SVD of ΔW, shares are of that part.
/// **Source** the projections of the LoRA paper's §7.3, arXiv 2106.09685, for every k and side.
template <Real T>
Alignment alignment(const Svd<T>& weight, const Svd<T>& delta) {
  const Index K = weight.U.cols(), r = Index(delta.S.size());
  detail::expect_shape("alignment", "U of the update", delta.U.rows(), delta.U.cols(), weight.U.rows(), r);
  detail::expect_shape("alignment", "V of the update", delta.V.rows(), delta.V.cols(), weight.V.rows(), r);
  detail::expect_shape("alignment", "V of the weight", weight.V.rows(), weight.V.cols(), weight.V.rows(), K);
  detail::check_orthonormal<T>("alignment", "U of the weight", weight.U.view());
  detail::check_orthonormal<T>("alignment", "V of the weight", weight.V.view());
  detail::check_orthonormal<T>("alignment", "U of the update", delta.U.view());
  detail::check_orthonormal<T>("alignment", "V of the update", delta.V.view());
  detail::check_update_values("alignment", "the update", delta.S);
  const Matrix<double> L(multiply<T>(weight.U.view().transposed(), delta.U.view()).view());
  const Matrix<double> R(multiply<T>(weight.V.view().transposed(), delta.V.view()).view());
  double energy = 0;
  for (const T s : delta.S) energy += double(s) * double(s);
  Alignment a;
  Matrix<double> scaled = L;  // U_Wᵀ·U_Δ·S, so that scaled·Rᵀ = U_WᵀΔW·V_W
  for (Index i = 0; i < K; ++i)
    for (Index j = 0; j < r; ++j) scaled(i, j) *= double(delta.S[std::size_t(j)]);
  const Matrix<double> core = multiply<double>(scaled.view(), R.view().transposed());
  double left = 0, right = 0, both = 0;
  for (Index k = 0; k < K; ++k) {
    for (Index j = 0; j < r; ++j) {
      const double s = double(delta.S[std::size_t(j)]);
      left += scaled(k, j) * scaled(k, j);
      right += R(k, j) * R(k, j) * s * s;
    }
    for (Index i = 0; i <= k; ++i) both += core(i, k) * core(i, k) + (i < k ? core(k, i) * core(k, i) : 0);
    const auto share = [energy](double x) { return energy > 0 ? std::min(1.0, x / energy) : 0.0; };
    a.left.push_back(share(left));
    a.right.push_back(share(right));
    a.both.push_back(share(both));
  }
  return a;
}

}  // namespace lowrank

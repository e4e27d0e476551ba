// SPDX-License-Identifier: Apache-2.0
// Merging an adapter into its weight, and taking it out again exactly.
#pragma once

#include <cmath>
#include <utility>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/gemm.hpp"

namespace lowrank {

/// ΔW = s·B·A as a dense out×in matrix. **Cost** 2·out·in·r flops. **Throws** ShapeError when the factors do not
/// multiply.
template <Real T>
Matrix<T> delta_weight(const LoraFactors<T>& f) {
  detail::check_factors("delta_weight", f);
  Matrix<T> delta;
  delta.resize(f.out_features(), f.in_features());
  gemm(f.scale, f.B.view(), f.A.view(), delta.view());
  return delta;
}

/// W + s·B·A as a new matrix; W may be stored in two bytes, the sum is formed and returned in T.
///
/// **Shapes** W out×in in any order. **Throws** ShapeError when the factors are not of W's shape.
/// **Cost** 2·out·in·r flops. **Numerics** what the layer computes unmerged, up to rounding in T.
template <Real T, MatrixLike W>
Matrix<T> merged_weight(W&& weight, const LoraFactors<T>& f) {
  const auto w = view_of(weight);
  detail::check_factors("merged_weight", f);
  detail::expect_shape("merged_weight", "B*A", f.out_features(), f.in_features(), w.rows(), w.cols());
  Matrix<T> merged(w);
  gemm(f.scale, f.B.view(), f.A.view(), merged.view(), Update::accumulate);
  return merged;
}

/// A weight merged in place, with the original kept: restore() puts back the very bits, whatever the storage rounded
/// away.
///
///     MergedWeight<bf16> m = merge_into(W, layer.factors());   // W now holds round(W + s·B·A)
///     …
///     m.restore();                                             // W is what it was, bit for bit
///
/// Subtracting s·B·A again would not: (w + d) − d ≠ w in floating point. W must outlive this object and not move.
/// Destroying it without restore() keeps the merge. **Cost** a copy of W.
template <class S>
class MergedWeight {
 public:
  MergedWeight(MatrixView<S> weight, Matrix<S>&& original) : weight_(weight), original_(std::move(original)) {}
  MergedWeight(MergedWeight&& other) noexcept
      : weight_(other.weight_), original_(std::move(other.original_)), merged_(std::exchange(other.merged_, false)) {}
  MergedWeight& operator=(MergedWeight&&) = delete;

  /// The weight before the merge.
  [[nodiscard]] MatrixView<const S> original() const noexcept { return original_.view(); }
  [[nodiscard]] bool merged() const noexcept { return merged_; }
  /// Puts the original bits back. Nothing happens the second time.
  void restore() {
    if (!merged_) return;
    for (Index i = 0; i < weight_.rows(); ++i)
      for (Index j = 0; j < weight_.cols(); ++j) weight_(i, j) = original_(i, j);
    merged_ = false;
  }

 private:
  MatrixView<S> weight_;
  Matrix<S> original_;
  bool merged_ = true;
};

namespace detail {

/// Puts a merged weight, `formula` of it, into W's own storage. **Throws** before it writes, where W cannot hold it.
template <class S, class T>
MergedWeight<S> put_merged(MatrixView<S> w, const Matrix<T>& merged, const char* formula) {
  for (Index i = 0; i < w.rows(); ++i)
    for (Index j = 0; j < w.cols(); ++j) {
      const double sum = double(merged(i, j));
      if (std::isfinite(double(S(merged(i, j))))) continue;
      if (!std::isfinite(sum))
        throw NonFiniteError(text("merge_into: element (", i, ", ", j, ") of ", formula, " is ", sum));
      throw ArgumentError(text("merge_into: element (", i, ", ", j, ") of ", formula, " is ", sum,
                               ", beyond the range of W's storage of ", 8 * sizeof(S), " bits"));
    }
  Matrix<S> original{MatrixView<const S>(w)};
  for (Index i = 0; i < w.rows(); ++i)
    for (Index j = 0; j < w.cols(); ++j) w(i, j) = S(merged(i, j));
  return MergedWeight<S>(w, std::move(original));
}

}  // namespace detail

/// Replaces W by W + s·B·A in its own storage (rounded to nearest even for bf16 and f16) and keeps the original.
///
/// **Throws** ShapeError when the factors are not of W's shape; ArgumentError when a sum leaves the range of W's
/// storage (65504 for f16); NonFiniteError when W, a factor or a sum is not finite. W is then unchanged.
/// **Cost** 2·out·in·r flops and two copies.
template <Real T, MatrixLike W>
MergedWeight<scalar_of<W>> merge_into(W&& weight, const LoraFactors<T>& f) {
  const MatrixView<scalar_of<W>> w = view_of(weight);
  return detail::put_merged(w, merged_weight<T>(w, f), "W + s*B*A");
}

}  // namespace lowrank

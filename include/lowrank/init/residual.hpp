// SPDX-License-Identifier: Apache-2.0
// The residual base W − s·B·A, formed panel by panel so that a narrow W is never widened whole.
#pragma once

#include <vector>

#include "lowrank/init/initialised.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/gemm.hpp"

namespace lowrank {

/// What residual_base measured on the way.
struct ResidualNorms {
  /// ‖W − s·B·A‖_F.
  double residual = 0;
  /// ‖W − s·B·A − base‖_F: what rounding the base to its storage lost; 0 when it is stored as computed.
  double storage_error = 0;
};

namespace detail {

/// Rows [i0, i1) of W − s·B·A in `panel` (i1 − i0 rows of n). W row-major.
template <class T, class S>
void residual_panel(const MatrixView<const S>& W, const MatrixView<const T>& B, const MatrixView<const T>& A, T scale,
                    Index i0, Index i1, MatrixView<T> panel) {
  parallel_ranges(i1 - i0, 16, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const S* w = &W(i0 + i, 0);
      T* p = &panel(i, 0);
      for (Index j = 0; j < W.cols(); ++j) p[j] = T(w[j]);
    }
  });
  if (A.rows() > 0) product<T, T, T>(-scale, B.middle_rows(i0, i1 - i0), A.transposed(), true, panel);
}

}  // namespace detail

/// base = W − s·B·A, rounded to the base's type, with the norms of what remains and of what rounding lost.
///
/// **Shapes** W and base out×in in any order and any of f32, f64, bf16, f16; `base` may be W itself (same memory, same
/// order), so a weight can be turned into its residual in place. A r×in, B out×r.
/// **Scale** s is the factors' own. **Throws** ShapeError when sizes disagree or a base overlaps W otherwise;
/// NonFiniteError when the result is not finite (NaN or infinity in W or the factors); ArgumentError when a value
/// leaves the range of the base's type. On a throw `base` is unspecified.
/// **Cost** 2·out·in·r flops, one pass over W, a panel of some 4 MiB. **Numerics** the difference is taken in T and
/// rounded once; norms accumulate in double and do not depend on the number of threads.
template <class S, Real T, class Out>
ResidualNorms residual_base(MatrixView<const S> W, const LoraFactors<T>& f, MatrixView<Out> base) {
  static_assert(StorageOf<S, T> && (StorageOf<Out, T>), "W and base must be stored as the factors' type, bf16 or f16");
  detail::check_factors("residual_base", f);
  detail::expect_shape("residual_base", "W", W.rows(), W.cols(), f.out_features(), f.in_features());
  detail::expect_shape("residual_base", "base", base.rows(), base.cols(), W.rows(), W.cols());
  const bool in_place = static_cast<const void*>(W.data()) == static_cast<const void*>(base.data()) &&
                        sizeof(S) == sizeof(Out) && W.row_stride() == base.row_stride() &&
                        W.col_stride() == base.col_stride();
  if (!in_place && detail::overlap(W, base)) throw ShapeError("residual_base: base must be W itself or not overlap it");
  ResidualNorms norms;
  if (W.empty()) return norms;

  MatrixView<const T> left = f.B.view(), right = f.A.view();
  if (!W.is_row_major()) {  // work along the contiguous direction: Wᵀ − s·Aᵀ·Bᵀ
    W = W.transposed();
    base = base.transposed();
    left = f.A.view().transposed();
    right = f.B.view().transposed();
  }
  const Index n = W.cols(), height = std::clamp<Index>((Index(4) << 20) / (n * Index(sizeof(T))), 16, W.rows() + 15);
  Matrix<T> panel;
  // One a row, so that the sums have one order.
  std::vector<double> residual(static_cast<std::size_t>(W.rows())), lost(residual);
  for (Index i0 = 0; i0 < W.rows(); i0 += height) {
    const Index i1 = std::min(W.rows(), i0 + height);
    panel.resize(i1 - i0, n);
    detail::residual_panel<T, S>(W, left, right, f.scale, i0, i1, panel.view());
    parallel_ranges(i1 - i0, 16, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const T* p = &panel(i, 0);
        residual[std::size_t(i0 + i)] = detail::norm2(n, p);
        if (base.col_stride() == 1) {
          Out* b = &base(i0 + i, 0);
          for (Index j = 0; j < n; ++j) b[j] = Out(p[j]);
        } else {
          for (Index j = 0; j < n; ++j) base(i0 + i, j) = Out(p[j]);
        }
        if constexpr (!std::same_as<Out, T>)
          lost[std::size_t(i0 + i)] = detail::lane_sum(n, [&](Index j) {
            const double d = double(p[j]) - double(T(base(i0 + i, j)));
            return d * d;
          });
      }
    });
  }
  norms.residual = detail::norm2(W.rows(), residual.data());
  norms.storage_error = std::sqrt(detail::lane_sum(W.rows(), [&](Index i) { return lost[std::size_t(i)]; }));
  if (!std::isfinite(norms.residual))
    throw NonFiniteError("residual_base: W - s*B*A must be finite, got NaN or infinity (in W, A or B, or by overflow)");
  if (!std::isfinite(norms.storage_error))
    throw ArgumentError("residual_base: a value of the base leaves the range of its storage type; store it wider");
  return norms;
}

namespace detail {

/// Fills result.base from W and the result's factors, and the norms of the report.
template <class S, class T, class Base>
void form_base(MatrixView<const S> W, Initialised<T, Base>& result) {
  result.base.resize(W.rows(), W.cols());
  const ResidualNorms norms = residual_base(W, result.factors, result.base.view());
  result.base_changed = true;
  result.report.residual_norm = norms.residual;
  result.report.storage_error = norms.storage_error;
}

/// A = √(S/s)·Vᵀ and B = U·√(S/s) for k triplets U (m×k), S, V (n×k), so that s·B·A = U·S·Vᵀ with balanced factors.
template <Real T, class Values>
void balanced_factors(MatrixView<const T> U, const Values& S, MatrixView<const T> V, double scale, LoraFactors<T>& f) {
  const Index k = U.cols();
  f.scale = T(scale);
  f.A.resize(k, V.rows());
  f.B.resize(U.rows(), k);
  std::vector<T> root(static_cast<std::size_t>(k));
  for (Index i = 0; i < k; ++i) root[std::size_t(i)] = T(std::sqrt(double(S[std::size_t(i)]) / scale));
  for (Index i = 0; i < U.rows(); ++i)
    for (Index j = 0; j < k; ++j) f.B(i, j) = U(i, j) * root[std::size_t(j)];
  for (Index j = 0; j < V.rows(); ++j)
    for (Index i = 0; i < k; ++i) f.A(i, j) = V(j, i) * root[std::size_t(i)];
}

}  // namespace detail
}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank {
extern template ResidualNorms residual_base(MatrixView<const float>, const LoraFactors<float>&, MatrixView<float>);
extern template ResidualNorms residual_base(MatrixView<const double>, const LoraFactors<double>&, MatrixView<double>);
extern template ResidualNorms residual_base(MatrixView<const bf16>, const LoraFactors<float>&, MatrixView<float>);
extern template ResidualNorms residual_base(MatrixView<const f16>, const LoraFactors<float>&, MatrixView<float>);
extern template ResidualNorms residual_base(MatrixView<const bf16>, const LoraFactors<float>&, MatrixView<bf16>);
extern template ResidualNorms residual_base(MatrixView<const f16>, const LoraFactors<float>&, MatrixView<f16>);
extern template ResidualNorms residual_base(MatrixView<const float>, const LoraFactors<float>&, MatrixView<bf16>);
}  // namespace lowrank
#endif

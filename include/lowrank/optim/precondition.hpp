// SPDX-License-Identifier: Apache-2.0
// Gradients of the factors corrected for the geometry of B·A: Riemannian preconditioning and LoRA-FA.
#pragma once

#include <cmath>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/detail/cholesky.hpp"
#include "lowrank/linalg/detail/gram.hpp"

namespace lowrank {

namespace detail {

/// P·Pᵀ + δ·I for the rows of P (r×n), in double.
template <class T>
Matrix<double> damped_gram(MatrixView<const T> P, double delta) {
  Matrix<double> M = gram(P.transposed());
  for (Index i = 0; i < M.rows(); ++i) M(i, i) += delta;
  return M;
}

/// X ← M⁻¹·X for a symmetric positive definite M (r×r, overwritten by its Cholesky factor) and X r×n.
template <class T>
void solve_positive(const char* where, Matrix<double>& M, MatrixView<T> X) {
  const Index r = M.rows();
  if (!cholesky(M.view(), 0))
    throw ArgumentError(text(where, ": the Gram matrix of a factor is singular; a positive delta is needed"));
  Buffer<double> x(r);
  for (Index c = 0; c < X.cols(); ++c) {
    for (Index i = 0; i < r; ++i) {
      x[i] = double(X(i, c));
      for (Index k = 0; k < i; ++k) x[i] -= M(i, k) * x[k];
      x[i] /= M(i, i);
    }
    for (Index i = r; i-- > 0;) {
      for (Index k = i + 1; k < r; ++k) x[i] -= M(k, i) * x[k];
      x[i] /= M(i, i);
      X(i, c) = T(x[i]);
    }
  }
}

inline void check_delta(const char* where, double delta) {
  if (!(delta >= 0) || !std::isfinite(delta))
    throw ArgumentError(text(where, ": delta must be finite and not negative, got ", delta));
}

}  // namespace detail

/// Riemannian preconditioning of both gradients: g_A ← (BᵀB + δI)⁻¹·g_A, g_B ← g_B·(A·Aᵀ + δI)⁻¹, in place.
///
///     riemannian_precondition(layer.A(), layer.B(), layer.parameters().gradient(0), layer.parameters().gradient(1));
///
/// The step of s·B·A then no longer depends on how the product is split between the factors. Call between backward and
/// the optimizer's step. **Shapes** A, g_A r×in; B, g_B out×r. **Throws** ShapeError; ArgumentError for a negative δ,
/// or δ = 0 with dependent rows of A or columns of B (B = 0 at the start of LoRA among them).
/// **Cost** O(r²·(in + out)). **Source** Zhang & Pilanci, "Riemannian preconditioned LoRA", arXiv 2402.02347, eq. 2.
template <Real T>
void riemannian_precondition(std::type_identity_t<MatrixView<const T>> A, std::type_identity_t<MatrixView<const T>> B,
                             MatrixView<T> gA, std::type_identity_t<MatrixView<T>> gB, double delta = 1e-6) {
  constexpr const char* where = "riemannian_precondition";
  detail::check_delta(where, delta);
  detail::expect_shape(where, "B", B.rows(), B.cols(), B.rows(), A.rows());
  detail::expect_shape(where, "gA", gA.rows(), gA.cols(), A.rows(), A.cols());
  detail::expect_shape(where, "gB", gB.rows(), gB.cols(), B.rows(), B.cols());
  Matrix<double> of_B = detail::damped_gram<T>(B.transposed(), delta), of_A = detail::damped_gram<T>(A, delta);
  detail::solve_positive(where, of_B, gA);
  detail::solve_positive(where, of_A, gB.transposed());
}

/// LoRA-FA's gradient of B with A frozen: g_B ← g_B·(A·Aᵀ + δI)⁻¹/s², in place; g_A is to be ignored.
///
///     lora_fa_gradient(layer.A(), layer.scale(), layer.parameters().gradient(1));
///
/// With it a step along g_B is the least-squares best approximation of a step along the full gradient by s·B·A.
/// **Shapes** A r×in, g_B out×r. **Throws** as riemannian_precondition, and ArgumentError for s = 0. **Cost** O(r²·(in
/// + out)).
/// **Source** Zhang et al., "LoRA-FA", arXiv 2308.03303; the corrected gradient as in PEFT's LoraFAOptimizer.
template <Real T>
void lora_fa_gradient(std::type_identity_t<MatrixView<const T>> A, std::type_identity_t<T> scale, MatrixView<T> gB,
                      double delta = 1e-6) {
  constexpr const char* where = "lora_fa_gradient";
  detail::check_delta(where, delta);
  detail::expect_shape(where, "gB", gB.rows(), gB.cols(), gB.rows(), A.rows());
  if (!std::isfinite(scale) || scale == T(0))
    throw ArgumentError(detail::text(where, ": the scale must be finite and not zero, got ", double(scale)));
  Matrix<double> of_A = detail::damped_gram<T>(A, delta);
  detail::solve_positive(where, of_A, gB.transposed());
  const T inverse = T(1 / (double(scale) * double(scale)));
  detail::for_each_run(gB, [inverse](T* x, Index n) {
    for (Index i = 0; i < n; ++i) x[i] *= inverse;
  });
}

}  // namespace lowrank

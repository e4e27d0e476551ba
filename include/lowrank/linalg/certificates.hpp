// SPDX-License-Identifier: Apache-2.0
// What can be proved about an approximation after the fact, whoever made it: its error in the Frobenius norm, bounds of
// its error in the spectral norm with a stated probability, and the error of a random sketch from the sketch alone.
#pragma once

#include <cmath>
#include <span>

#include "lowrank/linalg/adjoint_check.hpp"
#include "lowrank/linalg/operators.hpp"
#include "lowrank/linalg/qr.hpp"
#include "lowrank/linalg/svd_result.hpp"

namespace lowrank {

/// A norm between two bounds.
struct NormBounds {
  double lower = 0, upper = 0;
  /// That the norm exceeds `upper` has at most this probability over the seed; 0: it cannot.
  double failure_probability = 0;
};

namespace detail {
template <class T>
void check_svd_shapes(const char* where, const Svd<T>& a, Index m, Index n) {
  const Index k = Index(a.S.size());
  expect_shape(where, "U", a.U.rows(), a.U.cols(), m, k);
  expect_shape(where, "V", a.V.rows(), a.V.cols(), n, k);
}

/// What U·diag(S)·Vᵀ weighs.
struct ProductNorm {
  double squared = 0;  ///< ‖U·diag(S)·Vᵀ‖_F²
  double error = 0;    ///< of `squared`, at most, by rounding
  double terms = 0;    ///< Σ |sᵢ|·‖uᵢ‖·‖vᵢ‖
  double root = 0;     ///< √Σ (sᵢ·‖uᵢ‖·‖vᵢ‖)²: what products with it round relative to
};

/// The relative error, at most, of a sum of m·n squares in double. A sum here has one accumulator a lane and is cut
/// into rows, so that (m + n)·2⁻⁵³ would be a proof of what is a few units for random errors; this is a proof up to m +
/// n = 64 and twice eight standard deviations of it beyond.
inline double double_rounding(Index m, Index n) { return 0x1p-50 * std::sqrt(double(m + n)); }

/// Σ_ij s_i s_j (UᵀU)_ij (VᵀV)_ij in double.
template <class T>
ProductNorm product_norm(const Svd<T>& a) {
  const Index k = Index(a.S.size());
  Matrix<double> u(a.U.view().transposed()), v(a.V.view().transposed());
  const Matrix<double> G = multiply<double>(u.view(), u.view().transposed());
  const Matrix<double> H = multiply<double>(v.view(), v.view().transposed());
  ProductNorm out;
  for (Index i = 0; i < k; ++i) {
    const double own = std::abs(double(a.S[std::size_t(i)])) * std::sqrt(G(i, i) * H(i, i));
    out.terms += own;
    out.root += own * own;
    for (Index j = 0; j < k; ++j) {
      const double s = double(a.S[std::size_t(i)]) * double(a.S[std::size_t(j)]);
      out.squared += s * G(i, j) * H(i, j);
      // An element of G errs relative to ‖u_i‖·‖u_j‖, whatever is left of it, and so does one of H.
      out.error += std::abs(s) * (std::sqrt(G(i, i) * G(j, j)) * std::abs(H(i, j)) +
                                  std::abs(G(i, j)) * std::sqrt(H(i, i) * H(j, j)));
    }
  }
  out.error *= double_rounding(a.U.rows() + k, a.V.rows() + k);
  out.root = std::sqrt(out.root);
  return out;
}

/// E = A − U·diag(S)·Vᵀ on blocks of vectors in rows.
template <class T, class Op>
struct ResidualOperator {
  const Op& A;
  const Svd<T>& approximation;

  void forward(MatrixView<const T> X, MatrixView<T> Y) const {
    A.apply(X.transposed(), Y.transposed());
    subtract(approximation.V.view(), approximation.U.view(), X, Y);
  }
  void adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    A.apply_adjoint(X.transposed(), Y.transposed());
    subtract(approximation.U.view(), approximation.V.view(), X, Y);
  }

 private:
  void subtract(MatrixView<const T> from, MatrixView<const T> to, MatrixView<const T> X, MatrixView<T> Y) const {
    const Index k = Index(approximation.S.size());
    if (k == 0) return;
    Matrix<T> t(X.rows(), k);
    gemm(T(1), X, from, t.view());
    for (Index i = 0; i < t.rows(); ++i)
      for (Index j = 0; j < k; ++j) t(i, j) *= approximation.S[std::size_t(j)];
    gemm(T(-1), t.view(), to.transposed(), Y, Update::accumulate);
  }
};
}  // namespace detail

/// ‖A − U·diag(S)·Vᵀ‖_F for any factors, orthonormal or not:
/// ‖A‖_F² − 2·Σ sᵢ·uᵢᵀ·A·vᵢ + ‖U·diag(S)·Vᵀ‖_F², sums in double.
///
/// For an exact triplet set this is √(‖A‖_F² − Σsᵢ²), the Frobenius identity; it stays true when they are not exact.
/// **Shapes** A m×n, U m×k, V n×k. **Throws** ShapeError. **Cost** one product of A with k vectors, one reading for
/// ‖A‖_F².
/// **Numerics** the bounds allow for rounding in A·V of 2·√n·eps·N·‖vᵢ‖ a vector, N = ‖A‖_F or A's rounding_norm(), for
/// that of ‖A‖_F² (2⁻⁵⁰·√(m + n) of it, or what HasRoundingNorm says) and of the sums here. They are wide apart only
/// when the error is below about √eps·N. Rounding errors are taken as independent, each sum at four times its standard
/// deviation or more, and as a proof for n ≤ 16. **Source** 0909.4061 §4 for the identity; Higham & Mary, SIAM J. Sci.
/// Comput. 41 (2019) for rounding errors as random ones.
template <Real T, class Op>
requires LinearOperator<Op, T> && HasFrobeniusNorm<Op> NormBounds frobenius_error(const Op& A,
                                                                                  const Svd<T>& approximation) {
  const Index m = A.rows(), n = A.cols(), k = Index(approximation.S.size());
  detail::check_svd_shapes("frobenius_error", approximation, m, n);
  const double total = A.frobenius_norm_squared();
  Matrix<T> AV(k, m);
  if (k > 0) A.apply(approximation.V.view(), AV.view().transposed());
  double inner = 0;
  for (Index i = 0; i < k; ++i) {
    double uav = 0;
    for (Index j = 0; j < m; ++j) uav += double(approximation.U(j, i)) * double(AV(i, j));
    inner += double(approximation.S[std::size_t(i)]) * uav;
  }
  const detail::ProductNorm own = detail::product_norm(approximation);
  const double eps = double(std::numeric_limits<T>::epsilon());
  double scale = std::sqrt(total), product_error = 2 * std::sqrt(double(n)) * eps;
  double norm_error = detail::double_rounding(m, n) * total;
  if constexpr (HasRoundingNorm<Op>) {
    scale = A.rounding_norm();
    product_error = 2 * std::sqrt(double(std::max(m, n))) * eps;
    norm_error = (product_error + detail::double_rounding(m, n)) * scale * scale;
  }
  const double slack = norm_error + 2 * (product_error + detail::double_rounding(m, n)) * scale * own.terms + own.error;
  const double square = total - 2 * inner + own.squared;
  return {std::sqrt(std::max(0.0, square - slack)), std::sqrt(std::max(0.0, square + slack)), 0};
}
/// As above for a matrix-like A.
template <class X, Real T>
requires MatrixLike<const X&> && StorageOf<scalar_of<const X&>, T> NormBounds
frobenius_error(const X& A, const Svd<T>& approximation) {
  return frobenius_error<T>(dense_operator<T>(A), approximation);
}

/// How spectral_error looks.
struct SpectralErrorOptions {
  double failure_probability = 1e-9;  ///< in (0, 1)
  Index probes = 8;                   ///< Gaussian vectors, at least 1
  Index powers = 3;  ///< products with EᵀE before the last with E, at least 0; more bring the bounds closer
  std::uint64_t seed = 0;
};

/// Bounds of ‖A − U·diag(S)·Vᵀ‖₂ by a randomised power method on the error E.
///
/// lower = max ‖E·x‖/‖x‖ over the iterates: always valid. upper = (α·√(2/π)·max_i ‖(EEᵀ)^q·E·ωᵢ‖)^{1/(2q+1)} over r
/// Gaussian ωᵢ, valid with probability at least 1 − α^{−r}; α is chosen for the probability asked for.
/// **Shapes** A m×n, U m×k, V n×k, k ≥ 0. **Throws** ShapeError, ArgumentError. **Cost** 2q + 1 products with r
/// vectors.
/// **Numerics** both bounds allow for rounding of 8·√max(m, n)·eps·(√Σ(sᵢ‖uᵢ‖‖vᵢ‖)² + error + N), N A's rounding_norm()
/// if it has one, nothing else.
/// **Source** Halko, Martinsson & Tropp, arXiv 0909.4061, Lemma 4.1 and §4.4 (the lemma applied to powers of E).
template <Real T, class Op>
requires LinearOperator<Op, T> NormBounds spectral_error(const Op& A, const Svd<T>& approximation,
                                                         const SpectralErrorOptions& options = {}) {
  const Index m = A.rows(), n = A.cols(), r = options.probes;
  detail::check_svd_shapes("spectral_error", approximation, m, n);
  if (!(options.failure_probability > 0 && options.failure_probability < 1))
    throw ArgumentError(
        detail::text("spectral_error: failure_probability must lie in (0, 1), got ", options.failure_probability));
  if (r < 1) throw ArgumentError(detail::text("spectral_error: probes must be at least 1, got ", r));
  if (options.powers < 0)
    throw ArgumentError(detail::text("spectral_error: powers must not be negative, got ", options.powers));
  if (m == 0 || n == 0) return {0, 0, 0};
  const detail::ResidualOperator<T, Op> E{A, approximation};
  Matrix<T> X(r, n), Y(r, m);
  CounterRng(options.seed, 0x5bec).fill_normal(X.view());
  // Every vector keeps its own size as a logarithm, so that high powers neither overflow nor underflow.
  std::vector<double> log_size(std::size_t(r), 0.0);
  double lower = 0;
  bool zero = true;
  const auto normalise = [&](Matrix<T>& M, bool measured_on_unit) {
    for (Index i = 0; i < r; ++i) {
      double square = 0;
      for (Index j = 0; j < M.cols(); ++j) square += double(M(i, j)) * double(M(i, j));
      const double norm = std::sqrt(square);
      if (!std::isfinite(norm)) throw NonFiniteError("spectral_error: a product is not finite");
      if (measured_on_unit) lower = std::max(lower, norm);
      log_size[std::size_t(i)] += std::log(norm);
      if (norm == 0) continue;
      zero = false;
      for (Index j = 0; j < M.cols(); ++j) M(i, j) = T(double(M(i, j)) / norm);
    }
  };
  normalise(X, false);
  zero = true;
  E.forward(X.view(), Y.view());
  normalise(Y, true);
  for (Index q = 0; q < options.powers && !zero; ++q) {
    E.adjoint(Y.view(), X.view());
    normalise(X, true);
    E.forward(X.view(), Y.view());
    normalise(Y, true);
  }
  double scale = detail::product_norm(approximation).root + lower;
  if constexpr (HasRoundingNorm<Op>) scale += A.rounding_norm();
  const double eps = double(std::numeric_limits<T>::epsilon());
  const double rounding = 8 * std::sqrt(double(std::max(m, n))) * eps * scale;
  if (zero) return {0, rounding, options.failure_probability};
  const double alpha = std::pow(options.failure_probability, -1.0 / double(r));
  const double largest = *std::max_element(log_size.begin(), log_size.end());
  const double log_factor = std::log(alpha * std::sqrt(2 / 3.14159265358979323846));
  const double upper = std::exp((largest + log_factor) / double(2 * options.powers + 1));
  return {std::max(0.0, lower - rounding), std::max(upper, lower) + rounding, options.failure_probability};
}
/// As above for a matrix-like A.
template <class X, Real T>
requires MatrixLike<const X&> && StorageOf<scalar_of<const X&>, T> NormBounds
spectral_error(const X& A, const Svd<T>& approximation, const SpectralErrorOptions& options = {}) {
  return spectral_error<T>(dense_operator<T>(A), approximation, options);
}

/// The root mean square error ‖A − Q·QᵀA‖_F of a randomised range finder with one column less, from the sketch alone.
///
/// Y = A·Ω with s Gaussian columns, Y = Q·R. Leaving column j out of the sketch changes the approximation by a rank-one
/// term, so that its error on ω_j, which it has not seen, is 1/‖R^{−ᵀ}e_j‖: estimate² = (1/s)·Σ_j 1/‖R^{−ᵀ}e_j‖².
/// **Shapes** Y m×s, 2 ≤ s ≤ m. **Throws** ArgumentError on another s. **Cost** 2·m·s² + s³ flops; A is not read again.
/// **Numerics** the square is an unbiased estimate of E‖A − Q_{s−1}Q_{s−1}ᵀA‖_F², not a bound. 0 when Y is rank
/// deficient.
/// **Source** Epperly & Tropp, "Efficient error and variance estimation for randomized matrix computations", arXiv
/// 2207.06342, eq. (3.3) and §3.2.
template <Real T>
double leave_one_out_error(MatrixView<const T> Y) {
  const Index m = Y.rows(), s = Y.cols();
  if (s < 2 || s > m)
    throw ArgumentError(detail::text("leave_one_out_error: expected between 2 and ", m, " columns, got ", s));
  Matrix<double> Q(Y), R(s, s);
  thin_qr_in_place(Q.view(), R.view());
  double sum = 0;
  // Column j of R^{−ᵀ} solves Rᵀ·x = e_j: zero above j, then forward substitution.
  std::vector<double> x(std::size_t(s), 0.0);
  for (Index j = 0; j < s; ++j) {
    double square = 0;
    for (Index i = j; i < s; ++i) {
      double b = i == j ? 1 : 0;
      for (Index l = j; l < i; ++l) b -= R(l, i) * x[std::size_t(l)];
      x[std::size_t(i)] = b / R(i, i);
      square += x[std::size_t(i)] * x[std::size_t(i)];
    }
    sum += std::isfinite(square) ? 1 / square : 0;
  }
  return std::sqrt(sum / double(s));
}
/// As above for a matrix-like Y.
template <class X>
requires RealMatrix<const X&>
double leave_one_out_error(const X& Y) { return leave_one_out_error<scalar_of<const X&>>(detail::const_view_of(Y)); }

}  // namespace lowrank

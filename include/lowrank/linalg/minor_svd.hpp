// SPDX-License-Identifier: Apache-2.0
// The smallest singular triplets of a matrix: dominant ones of its triangular inverse, verified, or a full SVD.
#pragma once

#include "lowrank/linalg/detail/triangular_inverse.hpp"
#include "lowrank/linalg/qr.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/small_svd.hpp"
#include "lowrank/linalg/svd.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank {

struct MinorSvdOptions {
  /// Triplets are accepted when ‖Av − σu‖ and ‖Aᵀu − σv‖ stay below this times ‖A‖₂; 0: 100·eps of the scalar.
  double tolerance = 0;
  /// Take the full SVD without trying.
  bool full = false;
  /// Compare with all singular values of A (values only, with their error bounds), so that no smaller triplet can have
  /// been missed; without it that rests on the random start.
  bool certify = true;
  std::uint64_t seed = 0;
};

/// The r smallest of the min(m, n) singular triplets, still sorted descending.
template <Real T>
struct MinorSvd : Svd<T> {
  /// The larger of ‖Avᵢ − σᵢuᵢ‖ and ‖Aᵀuᵢ − σᵢvᵢ‖.
  std::vector<double> residuals;
  /// Whether a full SVD was needed.
  bool full = false;
  /// Whether none smaller was missed: by a full SVD, or because each S is the value of its rank to the tolerance.
  bool complete = false;
};

namespace detail {

/// ‖A·V − U·diag(S)‖ and ‖Aᵀ·U − V·diag(S)‖ column by column, the larger.
template <class T, class S>
std::vector<double> triplet_residuals(MatrixView<const S> A, const Svd<T>& d) {
  const Index k = Index(d.S.size());
  Matrix<T> left(k, A.rows()), right(k, A.cols());  // (A·V)ᵀ and (Aᵀ·U)ᵀ
  product<T, T, S>(T(1), d.V.view().transposed(), A, false, left.view());
  product<T, T, S>(T(1), d.U.view().transposed(), A.transposed(), false, right.view());
  std::vector<double> out;
  for (Index i = 0; i < k; ++i) {
    const double s = double(d.S[std::size_t(i)]);
    const double l =
        lane_sum(A.rows(), [&](Index j) { return std::pow(double(left(i, j)) - s * double(d.U(j, i)), 2); });
    const double r =
        lane_sum(A.cols(), [&](Index j) { return std::pow(double(right(i, j)) - s * double(d.V(j, i)), 2); });
    out.push_back(std::sqrt(std::max(l, r)));
  }
  return out;
}

template <class T, class S>
MinorSvd<T> minor_by_full_svd(MatrixView<const S> A, Index rank) {
  const Matrix<T> copy(A);
  Svd<T> d = svd(copy);
  const Index skip = Index(d.S.size()) - rank;
  MinorSvd<T> out;
  out.U = Matrix<T>(d.U.view().middle_cols(skip, rank));
  out.V = Matrix<T>(d.V.view().middle_cols(skip, rank));
  out.S.assign(d.S.begin() + skip, d.S.end());
  out.residuals = triplet_residuals<T, S>(A, out);
  out.full = out.complete = true;
  return out;
}

/// The triplets of a tall A through A = Q·R, or nothing when they are not as good as `tolerance`·‖A‖.
template <class T, class S>
bool minor_by_inverse(MatrixView<const S> A, Index rank, double tolerance, std::uint64_t seed, MinorSvd<T>& out) {
  const Index n = A.cols();
  Matrix<T> Q(A), R(n, n);
  thin_qr_in_place(Q.view(), R.view());
  // A zero on the diagonal becomes eps·max|R|: a change of the size that rounding has made already.
  double largest = 0;
  for (Index i = 0; i < n; ++i) largest = std::max(largest, std::abs(double(R(i, i))));
  const T least = T(largest * double(std::numeric_limits<T>::epsilon()));
  if (!(least > 0)) return false;
  for (Index i = 0; i < n; ++i)
    if (std::abs(R(i, i)) < least) R(i, i) = least;

  // R⁻¹ = X·diag(1/σ)·Yᵀ, so R = Y·diag(σ)·Xᵀ. The Krylov method leaves errors relative to 1/σ_min, the largest value
  // it sees. One more solve from either side damps what sticks out of the subspaces by σ/σ₁, down to rounding.
  const TriangularInverse<T> solver(R.view());
  const auto inverse = truncated_svd<T>(
      solver, rank, {.energy_tolerance = 0, .residual_tolerance = tolerance, .max_passes = 200, .seed = seed});
  Matrix<T> left(n, rank), right(n, rank);
  solver.apply_adjoint(inverse.U.view(), left.view());
  orthonormalise(left.view());
  solver.apply(left.view(), right.view());
  orthonormalise(right.view());
  Svd<T> trial;
  trial.U = multiply<T>(Q.view(), left.view());
  trial.V = std::move(right);
  // One Rayleigh–Ritz step on A itself puts the values and the pairing right to rounding of A.
  Matrix<T> AV(A.rows(), rank);
  product<T, S, T>(T(1), A, trial.V.view().transposed(), false, AV.view());
  const Matrix<T> core = multiply<T>(trial.U.view().transposed(), AV.view());
  const Svd<T> inner = small_svd<T>(core.view());
  out.U = multiply<T>(trial.U.view(), inner.U.view());
  out.V = multiply<T>(trial.V.view(), inner.V.view());
  out.S = inner.S;
  out.residuals = triplet_residuals<T, S>(A, out);
  const double norm = double(truncated_svd(A, 1, {.energy_tolerance = 1e-2, .seed = seed}).S[0]);
  return std::all_of(out.residuals.begin(), out.residuals.end(), [&](double r) { return r <= tolerance * norm; });
}

/// Whether each S is, to the tolerance, the singular value of A with its rank. By the minimax principle S can only be
/// too large, as when a smaller triplet was missed.
template <class T, class S>
bool none_missed(MatrixView<const S> A, double tolerance, const MinorSvd<T>& d) {
  const SingularValues all = singular_values(A, {.accuracy = std::max(tolerance, 1e-12)});
  const Index n = Index(all.values.size()), r = Index(d.S.size());
  for (Index i = 0; i < r; ++i) {
    const double exact = all.values[std::size_t(n - r + i)];
    if (double(d.S[std::size_t(i)]) - exact > tolerance * all.values.front() + all.error(n - r + i)) return false;
  }
  return true;
}

/// For a report: how the triplets were found.
template <class T>
const char* way_found(const MinorSvd<T>& d) {
  return d.full ? "full SVD" : d.complete ? "triangular inverse, certified" : "triangular inverse, triplets verified";
}

}  // namespace detail

/// The `rank` smallest singular triplets of A: A·v = σ·u, Aᵀ·u = σ·v.
///
/// Krylov methods find large values; the small ones of a weight lie too close together for them. Those of R⁻¹, A = Q·R,
/// are the largest and far apart: a few solves with R bring them out. Each triplet is then checked against A itself,
/// and all of them against A's singular values, which can be had with certified errors for a fraction of a full SVD.
/// When one does not hold (A close to singular) the full SVD is taken, as it is below 256 columns, where it is as fast.
/// **Shapes** A m×n in f32, f64, bf16 or f16, any order; U m×rank, S rank descending, V n×rank: the last `rank` of the
/// min(m, n) triplets of the thin SVD. **Throws** ArgumentError: rank or tolerance out of range; NonFiniteError.
/// **Cost** a QR of the longer side, 7·m·n² flops, and 2·n²·(block) a solve; memory a copy of A in T and n². Certifying
/// costs `singular_values(A)`: m·n² and 4/3·n³ flops in double.
/// **Numerics** `residuals` are measured, so each (u, σ, v) is a triplet of A to within its residual; `complete` says
/// that each σ exceeds the singular value of its rank by no more than tolerance·‖A‖₂ and that value's stated error.
/// Where σ is below eps·σ₁ the direction is that of rounding.
/// **Source** inverse iteration in the form of Golub and Van Loan, Matrix Computations, §8.2; Rayleigh–Ritz on A.
template <MatrixLike X>
MinorSvd<arithmetic_of<scalar_of<X>>> minor_svd(X&& matrix, Index rank, const MinorSvdOptions& options = {}) {
  using S = scalar_of<X>;
  using T = arithmetic_of<S>;
  const MatrixView<const S> A = view_of(matrix);
  detail::check_rank("minor_svd", rank, A.rows(), A.cols());
  const double largest = detail::checked_max_abs("minor_svd", "A", A);
  const double tolerance = options.tolerance == 0 ? 100 * double(std::numeric_limits<T>::epsilon()) : options.tolerance;
  if (!(tolerance > 0) || !std::isfinite(tolerance))
    throw ArgumentError(
        detail::text("minor_svd: the tolerance must be finite and not negative, got ", options.tolerance));
  if (largest > 1e12 || (largest > 0 && largest < 1e-12)) {  // squares would leave the range of float
    const double scale = detail::unit_scale(largest);
    Matrix<T> scaled(A);
    detail::for_each_run(scaled.view(), [&](T* x, Index n) {
      for (Index i = 0; i < n; ++i) x[i] = T(double(x[i]) * scale);
    });
    MinorSvd<T> out = minor_svd(scaled, rank, options);
    for (T& s : out.S) s = T(double(s) / scale);
    for (double& r : out.residuals) r /= scale;
    return out;
  }
  if (options.full || std::min(A.rows(), A.cols()) < 256 || 4 * rank > std::min(A.rows(), A.cols()))
    return detail::minor_by_full_svd<T, S>(A, rank);
  MinorSvd<T> out;
  const bool tall = A.rows() >= A.cols();
  bool holds = detail::minor_by_inverse<T, S>(tall ? A : A.transposed(), rank, tolerance, options.seed, out);
  if (!tall) std::swap(out.U, out.V);
  if (holds && options.certify) holds = out.complete = detail::none_missed<T, S>(A, tolerance, out);
  return holds ? out : detail::minor_by_full_svd<T, S>(A, rank);
}

}  // namespace lowrank

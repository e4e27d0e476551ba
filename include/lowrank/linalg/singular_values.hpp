// SPDX-License-Identifier: Apache-2.0
// All singular values of a dense matrix without vectors: Gram matrix in double, band, tridiagonal, QL; or bidiagonal
// QR.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "lowrank/linalg/detail/band_reduction.hpp"
#include "lowrank/linalg/detail/band_to_tridiagonal.hpp"
#include "lowrank/linalg/detail/bidiagonal.hpp"
#include "lowrank/linalg/detail/bidiagonal_qr.hpp"
#include "lowrank/linalg/detail/gram.hpp"
#include "lowrank/linalg/detail/scaling.hpp"
#include "lowrank/linalg/svd_result.hpp"
#include "lowrank/linalg/symmetric_eigen.hpp"

#if defined(LOWRANK_USE_LAPACK)
#include "lowrank/linalg/detail/lapack.hpp"
#endif

namespace lowrank {

struct SingularValueOptions {
  /// Every value within accuracy·σ₁ of the true one. The Gram matrix reaches about 4e-7 at worst (and 1e-10 for values
  /// above 1e-3·σ₁); what it cannot promise goes to bidiagonalisation, some four times slower, which reaches 1e-13.
  double accuracy = 1e-6;
  /// Also every value above numerical zero within this share of itself; 0: not asked for. Small values then decide: the
  /// Gram matrix keeps 1e-3 down to σ_i ≈ 1e-5·σ₁, bidiagonalisation to about 1e-10·σ₁; below σ₁·max(m, n)·eps there
  /// are no digits.
  double relative_accuracy = 0;
};

namespace detail {

/// Below this many columns one-stage reductions win, and bidiagonalisation costs little more than the Gram matrix.
inline constexpr Index small_spectrum = 128;

/// Eigenvalues of a symmetric matrix, in no order; its upper triangle is destroyed.
[[gnu::cold]] inline std::vector<double> symmetric_eigenvalues(MatrixView<double> A, const char* where) {
  const Index n = A.rows();
  std::vector<double> d(std::size_t(n), 0.0), e(std::size_t(n), 0.0);
  if (n < 256) {
    std::vector<double> tau(std::size_t(n), 0.0);
    tridiagonalise(A, d.data(), e.data(), tau.data());
  } else if (n < 3072) {
    reduce_to_band(A, 32);
    BulgeChaser<32>(A).run(d.data(), e.data());
  } else {
    // Out of cache the matrix should be passed over less often; the bulges cost twice as much, which is little.
    reduce_to_band(A, 64);
    BulgeChaser<64>(A).run(d.data(), e.data());
  }
  NoRotations none;
  if (!tridiagonal_ql(n, d.data(), e.data(), none, [] {}))
    throw Error(text(where, ": the QL iteration did not converge"));
  return d;
}

/// Values through the Gram matrix of the columns of W (m ≥ n); scaled by `scale` on the way in and back.
template <class S>
[[gnu::cold]] SingularValues gram_singular_values(MatrixView<const S> W, double scale, const char* where) {
  const Index m = W.rows(), n = W.cols();
  Matrix<double> G;
  G.resize(n, n);
  gram_upper(W, scale, G.view());
  SingularValues out;
  out.method = SpectrumMethod::gram;
  out.values = symmetric_eigenvalues(G.view(), where);
  std::sort(out.values.begin(), out.values.end(), std::greater<>());
  // Rounding errors of the sums and of the transforms behave like random ones; the factors leave room of ten and more.
  const double largest = std::max(out.values.front(), 0.0);
  const double squared = 0x1p-52 * (8 + std::sqrt(double(m)) + 8 * std::sqrt(double(n))) * largest;
  for (double& x : out.values) x = std::sqrt(std::max(x, 0.0)) / scale;
  out.squared_error = squared / scale / scale;
  out.absolute_error = std::sqrt(squared) / scale;
  out.absolute_error = out.error(n - 1);
  return out;
}

/// Values by bidiagonalisation in double of W (m ≥ n).
template <class S>
[[gnu::cold]] SingularValues bidiagonal_singular_values(MatrixView<const S> W, double scale, const char* where) {
  const Index m = W.rows(), n = W.cols();
  Matrix<double> A;
  A.resize(m, n);
  copy_scaled(W, scale, A.view());
  SingularValues out;
#if defined(LOWRANK_USE_LAPACK)
  if (n > small_spectrum) {
    out.method = SpectrumMethod::lapack;
    out.values = lapack_singular_values(A.view(), where);
  } else
#endif
  {
    out.method = SpectrumMethod::bidiagonal;
    out.values.assign(std::size_t(n), 0.0);
    std::vector<double> e(std::size_t(n), 0.0);
    NoRotations none;
    if (m > n + n / 2) {
      Matrix<double> R(n, n), F(n, n);
      QrScratch<double> scratch;
      qr_recursive(A.view(), R.view(), F.view(), scratch);
      A = std::move(R);
    }
    bidiagonalise<double>(A.view(), out.values.data(), e.data(), nullptr);
    if (!bidiagonal_qr(n, out.values.data(), e.data(), true, none, none, [] {}))
      throw Error(text(where, ": the QR iteration did not converge"));
    for (double& x : out.values) x = std::abs(x);
    std::sort(out.values.begin(), out.values.end(), std::greater<>());
  }
  out.absolute_error = 0x1p-52 * (16 + std::sqrt(double(m)) + 8 * std::sqrt(double(n))) * out.values.front() / scale;
  for (double& x : out.values) x /= scale;
  return out;
}

template <class S>
[[gnu::cold]] SingularValues singular_values_of(MatrixView<const S> W, const SingularValueOptions& options) {
  constexpr const char* where = "singular_values";
  if (!(options.accuracy > 0) || !(options.relative_accuracy >= 0))
    throw ArgumentError(text(where, ": accuracy must be positive and relative_accuracy not negative, got ",
                             options.accuracy, " and ", options.relative_accuracy));
  const double scale = unit_scale(checked_max_abs(where, "W", W));  // while (i, j) are the caller's
  if (W.rows() < W.cols()) W = W.transposed();
  if (W.cols() == 0) return {};
  if (W.cols() >= small_spectrum) {
    SingularValues out = gram_singular_values(W, scale, where);
    const double top = out.values.front(), zero = top * double(W.rows()) * 0x1p-52;
    bool good = out.absolute_error <= options.accuracy * top;
    if (options.relative_accuracy > 0)
      // Where values sink into the error of the Gram matrix it cannot even tell them from zero.
      for (Index i = 0; i < W.cols() && good; ++i)
        good = out.error(i) <= options.relative_accuracy * std::max(out.values[std::size_t(i)], zero);
    if (good) return out;
  }
  return bidiagonal_singular_values(W, scale, where);
}

}  // namespace detail

/// All singular values of W, descending, in double; no vectors.
///
/// **Shapes** W m×n in any order, stored as float, double, bf16 or f16; min(m, n) values. **Scale** W is scaled by a
/// power of two, so any finite entries do. **Throws** NonFiniteError naming the first NaN or infinity, ArgumentError on
/// options that are not positive. **Cost** with n the short side: m·n² flops for the Gram matrix at the speed of
/// products, 4/3·n³ for the reduction to a band, in products, 6·n²·32 (64 from 3072 columns on) to a tridiagonal in
/// cache, and O(n²); memory 8·n² bytes, W itself is streamed.
/// **Numerics** see SingularValueOptions; the result carries its error, and tells values below √(squared_error) apart
/// from zero only when relative_accuracy asked for it. The bounds treat rounding errors as random, with tenfold room; a
/// worst case proof would be √n larger. Through the Gram matrix the same bits for any number of threads; the fallback
/// gives the same bits for the same number.
/// **Source** Bischof, Lang & Sun (2000) for the two stages, Demmel & Kahan (1990) for the fallback.
template <MatrixLike X>
SingularValues singular_values(X&& W, const SingularValueOptions& options = {}) {
  return detail::singular_values_of<scalar_of<X>>(view_of(W), options);
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template SingularValues singular_values_of(MatrixView<const float>, const SingularValueOptions&);
extern template SingularValues singular_values_of(MatrixView<const double>, const SingularValueOptions&);
extern template SingularValues singular_values_of(MatrixView<const bf16>, const SingularValueOptions&);
extern template SingularValues singular_values_of(MatrixView<const f16>, const SingularValueOptions&);
}  // namespace lowrank::detail
#endif

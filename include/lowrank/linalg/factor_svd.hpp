// SPDX-License-Identifier: Apache-2.0
// Exact SVD, singular values and norm of s·B·A, and of sums of such products, from the factors alone.
#pragma once

#include <cmath>
#include <span>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/small_svd.hpp"

namespace lowrank {
namespace detail {

/// Σ_t s_t·B_t·A_t as one product L·Rᵀ: L = [s₁B₁ … ], R = [A₁ᵀ …], in double, each brought to entries around 1.
struct StackedFactors {
  Matrix<double> left, right;  // m×R, n×R
  double scale = 1;            // the product is scale·left·rightᵀ

  template <class T>
  StackedFactors(const char* where, std::span<const LoraFactors<T>* const> terms) {
    if (terms.empty()) throw ArgumentError(text(where, ": a sum needs at least one term"));
    const Index m = terms[0]->out_features(), n = terms[0]->in_features();
    Index r = 0;
    double left_max = 0, right_max = 0;
    for (const auto* f : terms) {
      check_factors(where, *f);
      expect_shape(where, "the update", f->out_features(), f->in_features(), m, n);
      r += f->rank();
      left_max = std::max(left_max, std::abs(double(f->scale)) * checked_max_abs(where, "B", f->B.view()));
      right_max = std::max(right_max, checked_max_abs(where, "A", f->A.view()));
    }
    const double left_scale = unit_scale(left_max), right_scale = unit_scale(right_max);
    scale = 1 / left_scale / right_scale;
    left.resize(m, r);
    right.resize(n, r);
    Index first = 0;
    for (const auto* f : terms) {
      const double s = double(f->scale) * left_scale;
      const Index k = f->rank();
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < k; ++j) left(i, first + j) = s * double(f->B(i, j));
      for (Index j = 0; j < k; ++j)
        for (Index i = 0; i < n; ++i) right(i, first + j) = right_scale * double(f->A(j, i));
      first += k;
    }
  }

  /// left = Q_L·R_L, right = Q_R·R_R; returns the core R_L·R_Rᵀ. The Qs replace the factors on request.
  Matrix<double> reduce(bool keep_q) {
    const auto triangle = [&](Matrix<double>& X) {
      if (X.rows() >= X.cols()) {
        Matrix<double> R(X.cols(), X.cols());
        triangularise(X, R, keep_q);
        return R;
      }
      Qr<double> f = thin_qr<double>(X.view());
      X = std::move(f.Q);
      return std::move(f.R);
    };
    const Matrix<double> RL = triangle(left), RR = triangle(right);
    return multiply<double>(RL.view(), RR.view().transposed());
  }

 private:
  static void triangularise(Matrix<double>& X, Matrix<double>& R, bool keep_q) {
    if (keep_q) return thin_qr_in_place(X.view(), R.view());
    Matrix<double> F(X.cols(), X.cols());
    QrScratch<double> scratch;
    if (X.cols() > 0) qr_recursive(X.view(), R.view(), F.view(), scratch);
  }
};

template <class T>
Svd<T> svd_of_stacked(StackedFactors f) {
  const Matrix<double> core = f.reduce(true);
  const Svd<double> inner = small_svd<double>(core.view());
  const Matrix<double> U = multiply<double>(f.left.view(), inner.U.view());
  const Matrix<double> V = multiply<double>(f.right.view(), inner.V.view());
  Svd<T> out{Matrix<T>(U), {}, Matrix<T>(V)};
  for (const double s : inner.S) out.S.push_back(T(s * f.scale));
  return out;
}

/// Entries of the core are sums of R products around 1 and carry the errors of two QRs of about this many eps.
inline double factor_error(const StackedFactors& f, double left_norm, double right_norm) {
  const double r = double(f.left.cols());
  return 16 * (r + 4) * 0x1p-52 * left_norm * right_norm * f.scale;
}

inline SingularValues values_of_stacked(StackedFactors f) {
  const double left_norm = norm2(f.left.size(), f.left.data()), right_norm = norm2(f.right.size(), f.right.data());
  const Matrix<double> core = f.reduce(false);
  SingularValues out;
  out.values = small_svd<double>(core.view()).S;
  out.absolute_error = factor_error(f, left_norm, right_norm);
  out.method = SpectrumMethod::factors;
  for (double& s : out.values) s *= f.scale;
  return out;
}

inline double norm_of_stacked(StackedFactors f) {
  const Matrix<double> core = f.reduce(false);
  return norm2(core.size(), core.data()) * f.scale;
}

template <class T>
std::vector<const LoraFactors<T>*> pointers(std::span<const LoraFactors<T>> terms) {
  std::vector<const LoraFactors<T>*> out;
  for (const auto& f : terms) out.push_back(&f);
  return out;
}

}  // namespace detail

/// Exact SVD of an update s·B·A, without forming it.
///
/// B = Q_B·R_B and Aᵀ = Q_A·R_A, R_B·R_Aᵀ = X·Σ·Yᵀ; then U = Q_B·X, S = s·Σ, V = Q_A·Y.
/// **Shapes** B out×r, A r×in; U out×k, S k, V in×k, k = min(r, out, in); trailing zeros of S when B or A is rank
/// deficient.
/// **Throws** ShapeError when B and A do not fit, NonFiniteError when a factor holds NaN or infinity, ArgumentError on
/// a scale that is not finite. **Cost** O((out + in)·r² + r³), in double. **Numerics** everything runs in double, so
/// that for T = float the result is correct to eps of float even when B·A nearly cancels; for T = double the error is
/// about r·eps·|s|·‖B‖·‖A‖. Values beyond the range of T become infinity.
/// **Source** the product SVD by QR, Golub & Van Loan, Matrix Computations, §8.6.
template <Real T>
Svd<T> svd(const LoraFactors<T>& update) {
  const LoraFactors<T>* term[] = {&update};
  return detail::svd_of_stacked<T>(detail::StackedFactors("svd", std::span<const LoraFactors<T>* const>(term)));
}

/// Exact SVD of a sum Σ_t s_t·B_t·A_t of updates of one shape; a difference is a term with −s. Rank at most Σr_t.
/// **Throws** as svd of one update, and ArgumentError for an empty sum. **Cost** O((out + in)·R² + R³), R = Σr_t.
template <Real T>
Svd<T> svd(std::span<const LoraFactors<T>> terms) {
  const auto list = detail::pointers(terms);
  return detail::svd_of_stacked<T>(detail::StackedFactors("svd", std::span<const LoraFactors<T>* const>(list)));
}

/// The singular values of s·B·A in double, without vectors. **Shapes**, **Throws**, **Cost**: see svd of an update.
/// **Numerics** `absolute_error` is 16·(r + 4)·eps·|s|·‖B‖_F·‖A‖_F with eps of double, whatever T.
template <Real T>
SingularValues singular_values(const LoraFactors<T>& update) {
  const LoraFactors<T>* term[] = {&update};
  return detail::values_of_stacked(
      detail::StackedFactors("singular_values", std::span<const LoraFactors<T>* const>(term)));
}
/// The singular values of a sum Σ_t s_t·B_t·A_t. **Throws**, **Cost**: see svd of a sum. **Numerics** `absolute_error`
/// is the same with R = Σr_t in place of r, and √Σ‖s_t·B_t‖_F²·√Σ‖A_t‖_F² in place of the norms.
template <Real T>
SingularValues singular_values(std::span<const LoraFactors<T>> terms) {
  const auto list = detail::pointers(terms);
  return detail::values_of_stacked(
      detail::StackedFactors("singular_values", std::span<const LoraFactors<T>* const>(list)));
}

/// ‖s·B·A‖_F in double, from the factors: ‖R_B·R_Aᵀ‖_F·|s|, which unlike the trace of the Grams keeps its digits when
/// the product is much smaller than its factors. **Shapes**, **Throws**, **Cost**: see svd of an update.
template <Real T>
double frobenius_norm(const LoraFactors<T>& update) {
  const LoraFactors<T>* term[] = {&update};
  return detail::norm_of_stacked(
      detail::StackedFactors("frobenius_norm", std::span<const LoraFactors<T>* const>(term)));
}
/// ‖Σ_t s_t·B_t·A_t‖_F, cross terms and cancellation included.
template <Real T>
double frobenius_norm(std::span<const LoraFactors<T>> terms) {
  const auto list = detail::pointers(terms);
  return detail::norm_of_stacked(
      detail::StackedFactors("frobenius_norm", std::span<const LoraFactors<T>* const>(list)));
}

}  // namespace lowrank

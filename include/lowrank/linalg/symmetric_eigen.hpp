// SPDX-License-Identifier: Apache-2.0
// Eigenvalues and eigenvectors of a symmetric matrix in double: Householder tridiagonalisation and implicit QL.
#pragma once

#include <algorithm>
#include <vector>

#include "lowrank/linalg/detail/householder.hpp"
#include "lowrank/linalg/detail/tridiagonal_ql.hpp"

namespace lowrank {

/// A = Q·diag(values)·Qᵀ.
struct SymmetricEigen {
  std::vector<double> values;  ///< descending
  Matrix<double> vectors;      ///< n×n, column i belongs to values[i]
};

namespace detail {

/// row −= a·w + b·v, then y += c·row, all of length n; returns row·x. One pass over a row of the matrix does the update
/// the previous reflector left behind and both halves of the product with the next one.
inline double update_and_multiply(Index n, double* row, double a, const double* w, double b, const double* v, double c,
                                  double* y, const double* x) {
  constexpr int L = lanes<double>;
  Vec<double> sum{}, sum2{};
  Index j = 0;
  for (; j + 2 * L <= n; j += 2 * L) {
    const Vec<double> r = load<Vec<double>>(row + j) - a * load<Vec<double>>(w + j) - b * load<Vec<double>>(v + j);
    const Vec<double> q =
        load<Vec<double>>(row + j + L) - a * load<Vec<double>>(w + j + L) - b * load<Vec<double>>(v + j + L);
    store(row + j, r);
    store(row + j + L, q);
    store(y + j, load<Vec<double>>(y + j) + c * r);
    store(y + j + L, load<Vec<double>>(y + j + L) + c * q);
    sum += r * load<Vec<double>>(x + j);
    sum2 += q * load<Vec<double>>(x + j + L);
  }
  double total = sum_lanes<double>(sum + sum2);
  for (; j < n; ++j) {
    row[j] -= a * w[j] + b * v[j];
    y[j] += c * row[j];
    total += row[j] * x[j];
  }
  return total;
}

/// A = Q·T·Qᵀ from A's upper triangle (row-major). T's diagonals go to d (n) and e (n − 1), and A's rows become the
/// reflectors Q = H₀···H_{n−2} in form_orthogonal's layout with offset 1, for tau (n − 1).
/// **Cost** 4/3·n³ flops in one pass over the shrinking triangle a step.
inline void tridiagonalise(MatrixView<double> A, double* d, double* e, double* tau) {
  const Index n = A.rows(), ld = A.row_stride();
  std::vector<double> work(std::size_t(4 * n), 0.0);
  double *v = work.data(), *w = v + n, *x = w + n,
         *y = x + n;  // pending update v·wᵀ + w·vᵀ; next reflector and product
  for (Index k = 0; k < n; ++k) {
    double* const row = A.data() + k * ld;
    for (Index j = k; j < n; ++j) row[j] -= v[k] * w[j] + w[k] * v[j];
    d[k] = row[k];
    std::fill_n(row, k + 1, 0.0);
    if (k + 1 == n) break;
    tau[k] = make_reflector(n - k - 1, row + k + 1);
    e[k] = row[k + 1];
    row[k + 1] = 1;
    std::copy(row + k + 1, row + n, x + k + 1);
    std::fill(y + k + 1, y + n, 0.0);
    for (Index i = k + 1; i < n; ++i) {
      double* const r = A.data() + i * ld + i;
      r[0] -= 2 * v[i] * w[i];
      const double off =
          update_and_multiply(n - i - 1, r + 1, v[i], w + i + 1, w[i], v + i + 1, x[i], y + i + 1, x + i + 1);
      y[i] += r[0] * x[i] + off;
    }
    // With y = A·x: H·A·H = A − x·wᵀ − w·xᵀ, w = τ·y − (τ²/2·yᵀx)·x.
    const double half = 0.5 * tau[k] * tau[k] * dot(n - k - 1, y + k + 1, x + k + 1);
    for (Index j = k + 1; j < n; ++j) {
      w[j] = tau[k] * y[j] - half * x[j];
      v[j] = x[j];
    }
  }
}

/// Rotations kept before they are applied: 512 KiB of them, which stay in L2 beside a strip of vectors.
inline constexpr Index rotation_batch = 32768;

/// A = Q·T·Qᵀ kept: the cubic part both functions below begin with, from which values and tails can be had first and
/// the whole vectors later.
class TridiagonalForm {
 public:
  /// Only the upper triangle of A is read.
  [[gnu::cold]] TridiagonalForm(MatrixView<const double> A, const char* who) : who_(who) {
    const Index n = A.rows();
    expect_shape(who, "A", A.rows(), A.cols(), n, n);
    reflectors_.resize(n, n);
    for (Index i = 0; i < n; ++i) {
      std::fill_n(reflectors_.data() + i * n, i, 0.0);
      for (Index j = i; j < n; ++j) {
        if (!std::isfinite(A(i, j))) throw NonFiniteError(text(who, ": element (", i, ", ", j, ") is ", A(i, j)));
        reflectors_(i, j) = A(i, j);
      }
    }
    d_.resize(std::size_t(n));
    e_.resize(std::size_t(n));
    tau_.resize(std::size_t(n));
    if (n > 0) tridiagonalise(reflectors_.view(), d_.data(), e_.data(), tau_.data());
  }

  [[nodiscard]] Index size() const noexcept { return reflectors_.rows(); }

  /// All values and vectors.
  [[nodiscard, gnu::cold]] SymmetricEigen whole() const {
    const Index n = size();
    if (n == 0) return {};
    Matrix<double> Zt(n, n);
    form_orthogonal<double>(reflectors_.view().middle_rows(0, n - 1), tau_.data(), 1, Zt.view());
    return diagonalise(Zt);
  }

  /// All values, and the last `count` elements of every vector.
  [[nodiscard, gnu::cold]] SymmetricEigen tail(Index count) const {
    const Index n = size();
    if (count < 0 || count > n) throw ArgumentError(text(who_, ": tail must be in [0, ", n, "], got ", count));
    if (n == 0) return {};
    // Row j of Q = H₀·H₁··· is eⱼᵀ·H₀·H₁···.
    Matrix<double> rows(count, n), Zt(n, count);
    for (Index c = 0; c < count; ++c) {
      double* const row = rows.data() + c * n;
      row[n - count + c] = 1;
      for (Index k = 0; k + 1 < n; ++k) {
        const double* const v = reflectors_.data() + k * n + k + 1;
        axpy(n - k - 1, -tau_[std::size_t(k)] * dot(n - k - 1, row + k + 1, v), v, row + k + 1);
      }
      for (Index i = 0; i < n; ++i) Zt(i, c) = row[i];
    }
    return diagonalise(Zt);
  }

 private:
  /// T = Z·Λ·Zᵀ; the rows of Zt, on entry columns of (a part of) Q, take the rotations and become those of the vectors.
  [[nodiscard, gnu::cold]] SymmetricEigen diagonalise(Matrix<double>& Zt) const {
    const Index n = size();
    std::vector<double> d = d_, e = e_;
    RotationQueue<double> queue;
    const bool converged = tridiagonal_ql(n, d.data(), e.data(), queue, [&] {
      if (queue.size() >= rotation_batch) queue.apply(Zt.data(), Zt.cols(), Zt.cols());
    });
    if (!converged) throw Error(text(who_, ": the QL iteration did not converge"));
    queue.apply(Zt.data(), Zt.cols(), Zt.cols());
    const auto order = descending_order(d);
    SymmetricEigen out{std::vector<double>(std::size_t(n)), Matrix<double>(Zt.cols(), n)};
    for (Index j = 0; j < n; ++j) out.values[std::size_t(j)] = d[std::size_t(order[std::size_t(j)])];
    for (Index i = 0; i < Zt.cols(); ++i)
      for (Index j = 0; j < n; ++j) out.vectors(i, j) = Zt(order[std::size_t(j)], i);
    return out;
  }

  const char* who_;
  Matrix<double> reflectors_;
  std::vector<double> d_, e_, tau_;
};

}  // namespace detail

/// All eigenvalues, descending, and eigenvectors of a symmetric matrix.
///
/// **Shapes** A n×n; only its upper triangle A(i, j), i ≤ j, is read. **Throws** ShapeError unless square,
/// NonFiniteError when the triangle holds NaN or infinity. **Cost** 4/3·n³ flops bound by L2 for the reduction, 4/3·n³
/// in products, about 5·n³ in rotations at near peak. **Numerics** ‖A − QΛQᵀ‖ and ‖QᵀQ − I‖·‖A‖ within a small multiple
/// of n·eps·‖A‖; entries whose squares leave the range of double must be scaled by the caller.
/// **Source** Golub & Van Loan, Matrix Computations, §8.3; Dubrulle, Martin & Wilkinson (1968).
inline SymmetricEigen symmetric_eigen(MatrixView<const double> A) {
  return detail::TridiagonalForm(A, "symmetric_eigen").whole();
}

/// The eigenvalues, and of every eigenvector only the last `tail` elements: all that the residuals of Ritz vectors in a
/// Krylov space depend on.
///
/// **Shapes** A n×n, upper triangle read, 0 ≤ tail ≤ n; `vectors` is tail×n. **Throws** as symmetric_eigen, and
/// ArgumentError when tail is out of range. **Cost** 4/3·n³ flops for the reduction, O(tail·n²) for the rest.
/// **Numerics** the same reduction and rotations as symmetric_eigen: the values are the same to the bit, the vectors
/// to rounding.
inline SymmetricEigen symmetric_eigen_tail(MatrixView<const double> A, Index tail) {
  return detail::TridiagonalForm(A, "symmetric_eigen_tail").tail(tail);
}

}  // namespace lowrank

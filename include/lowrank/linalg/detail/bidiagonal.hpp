// SPDX-License-Identifier: Apache-2.0
// Householder bidiagonalisation, two passes over the shrinking matrix a step.
#pragma once

#include <vector>

#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/householder.hpp"

namespace lowrank::detail {

/// row −= a·x + b·y, then z += c·row, all of length n.
template <class T>
void update_and_accumulate(Index n, T* row, T a, const T* x, T b, const T* y, T c, T* z) {
  constexpr int L = lanes<T>;
  Index j = 0;
  for (; j + L <= n; j += L) {
    const Vec<T> r = load<Vec<T>>(row + j) - a * load<Vec<T>>(x + j) - b * load<Vec<T>>(y + j);
    store(row + j, r);
    store(z + j, load<Vec<T>>(z + j) + c * r);
  }
  for (; j < n; ++j) {
    row[j] -= a * x[j] + b * y[j];
    z[j] += c * row[j];
  }
}

/// What A = Q·B·Pᵀ leaves behind: the reflectors of Q (left, n×m, offset 0) and P (right, n×n, offset 1) as rows, in
/// form_orthogonal's layout, when the vectors are wanted.
template <class T>
struct BidiagonalReflectors {
  Matrix<T> left, right;
  std::vector<T> left_tau, right_tau;
};

/// A (m×n, m ≥ n, row-major, destroyed) = Q·B·Pᵀ with B upper bidiagonal: d (n), e (n − 1).
///
/// **Cost** 8/3·n³ flops (m = n). The update by the reflectors of the last step, and both products the next ones need,
/// take one read-write and one read pass over A; rows are split over threads.
/// **Source** the merged passes follow Howell, Demmel, Fulton, Hammarling & Marmol, ACM TOMS 34 (2008).
template <class T>
void bidiagonalise(MatrixView<T> A, double* d, double* e, BidiagonalReflectors<T>* keep) {
  const Index m = A.rows(), n = A.cols(), ld = A.row_stride();
  const int parts_max = std::max(1, max_threads());
  // Pending update A −= u·zᵀ + w·vᵀ of the last step.
  Buffer<T> work(2 * m + 2 * n + 2 * m + Index(parts_max) * n);
  std::fill(work.begin(), work.end(), T(0));
  T *u = work.data(), *w = u + m, *z = w + m, *v = z + n, *next_u = v + n, *next_w = next_u + m, *sums = next_w + m;
  Buffer<T> next_z(n), next_v(n);
  if (keep != nullptr) {
    keep->left = Matrix<T>(n, m);
    keep->right = Matrix<T>(n, n);
    keep->left_tau.assign(std::size_t(n), T(0));
    keep->right_tau.assign(std::size_t(n), T(0));
  }
  for (Index k = 0; k < n; ++k) {
    const Index rest = n - k - 1;
    const int parts = int(std::clamp<Index>((m - k) * (n - k) / 65536, 1, parts_max));
    for (Index i = k; i < m; ++i) next_u[i] = A(i, k) - u[i] * z[k] - w[i] * v[k];
    const T left_tau = make_reflector(m - k, next_u + k);
    d[k] = double(next_u[k]);
    next_u[k] = T(1);
    // The pass that brings A up to date and gathers z = τ·Aᵀ·u.
    parallel_parts(parts, [&](int p, int of) {
      T* const sum = sums + Index(p) * n;
      std::fill(sum + k, sum + n, T(0));
      const Index i0 = k + (m - k) * p / of, i1 = k + (m - k) * (p + 1) / of;
      for (Index i = i0; i < i1; ++i)
        update_and_accumulate(rest, A.data() + i * ld + k + 1, u[i], z + k + 1, w[i], v + k + 1, next_u[i],
                              sum + k + 1);
    });
    for (Index j = k + 1; j < n; ++j) {
      T sum = sums[j];
      for (int p = 1; p < parts; ++p) sum += sums[Index(p) * n + j];
      next_z[j] = left_tau * sum;
    }
    T right_tau = T(0);
    if (rest > 0) {
      for (Index j = k + 1; j < n; ++j) next_v[j] = A(k, j) - next_z[j];
      right_tau = make_reflector(rest, next_v.data() + k + 1);
      e[k] = double(next_v[k + 1]);
      next_v[k + 1] = T(1);
      // w = τ·(A − u·zᵀ)·v.
      const T zv = dot(rest, next_z.data() + k + 1, next_v.data() + k + 1);
      parallel_parts(parts, [&](int p, int of) {
        const Index i0 = k + 1 + (m - k - 1) * p / of, i1 = k + 1 + (m - k - 1) * (p + 1) / of;
        for (Index i = i0; i < i1; ++i)
          next_w[i] = right_tau * (dot(rest, A.data() + i * ld + k + 1, next_v.data() + k + 1) - next_u[i] * zv);
      });
    }
    if (keep != nullptr) {
      keep->left_tau[std::size_t(k)] = left_tau;
      std::copy(next_u + k, next_u + m, &keep->left(k, k));
      if (rest > 0) {
        keep->right_tau[std::size_t(k)] = right_tau;
        std::copy(next_v.data() + k + 1, next_v.data() + n, &keep->right(k, k + 1));
      }
    }
    std::swap(u, next_u);
    std::swap(w, next_w);
    std::copy(next_z.data() + k + 1, next_z.data() + n, z + k + 1);
    std::copy(next_v.data() + k + 1, next_v.data() + n, v + k + 1);
  }
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// The two LAPACK routines used when a build links one (CMake option LOWRANK_WITH_LAPACK).
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "lowrank/core/matrix.hpp"

// Fortran symbols, hidden string length included, as gfortran and its users pass it.
extern "C" {
void sgesdd_(const char* jobz, const int* m, const int* n, float* a, const int* lda, float* s, float* u, const int* ldu,
             float* vt, const int* ldvt, float* work, const int* lwork, int* iwork, int* info, std::size_t);
void dgesdd_(const char* jobz, const int* m, const int* n, double* a, const int* lda, double* s, double* u,
             const int* ldu, double* vt, const int* ldvt, double* work, const int* lwork, int* iwork, int* info,
             std::size_t);
}

namespace lowrank::detail {

inline void gesdd(char job, int m, int n, float* a, int lda, float* s, float* u, int ldu, float* vt, int ldvt,
                  float* work, int lwork, int* iwork, int* info) {
  sgesdd_(&job, &m, &n, a, &lda, s, u, &ldu, vt, &ldvt, work, &lwork, iwork, info, 1);
}
inline void gesdd(char job, int m, int n, double* a, int lda, double* s, double* u, int ldu, double* vt, int ldvt,
                  double* work, int lwork, int* iwork, int* info) {
  dgesdd_(&job, &m, &n, a, &lda, s, u, &ldu, vt, &ldvt, work, &lwork, iwork, info, 1);
}

/// Runs gesdd on a column-major A (destroyed); u and vt may be null for job 'N'. **Throws** Error when LAPACK fails,
/// ShapeError when a size exceeds its int.
template <class T>
void lapack_svd(char job, MatrixView<T> A, T* s, T* u, T* vt, const char* where) {
  constexpr Index most = std::numeric_limits<int>::max();
  const Index k = std::min(A.rows(), A.cols());
  if (std::max({A.rows(), A.cols(), A.leading_dimension()}) > most)
    throw ShapeError(text(where, ": ", shape_text(A.rows(), A.cols()), " exceeds LAPACK's 32 bit sizes"));
  const int m = int(A.rows()), n = int(A.cols()), lda = int(std::max<Index>(A.col_stride(), m));
  const int ldvt = u == nullptr ? 1 : int(k);
  int info = 0;
  std::vector<int> iwork(std::size_t(8 * k));
  T best = 0;
  gesdd(job, m, n, A.data(), lda, s, u, m, vt, ldvt, &best, -1, iwork.data(), &info);
  // The optimal size comes back rounded to T: leave room for the rounding.
  const Index lwork = std::min<Index>(most, Index(double(best) * (1 + 1e-6)) + 1);
  Buffer<T> work(lwork);
  gesdd(job, m, n, A.data(), lda, s, u, m, vt, ldvt, work.data(), int(lwork), iwork.data(), &info);
  if (info != 0) throw Error(text(where, ": LAPACK's gesdd failed with info = ", info));
}

/// The singular values of a row-major A (destroyed), descending.
inline std::vector<double> lapack_singular_values(MatrixView<double> A, const char* where) {
  std::vector<double> s(std::size_t(std::min(A.rows(), A.cols())));
  lapack_svd<double>('N', A.transposed(), s.data(), nullptr, nullptr, where);
  return s;
}

}  // namespace lowrank::detail

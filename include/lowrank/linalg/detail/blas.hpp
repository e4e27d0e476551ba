// SPDX-License-Identifier: Apache-2.0
// The products handed to an installed CBLAS (CMake option LOWRANK_WITH_BLAS); empty in every other build.
#pragma once

#include "lowrank/core/matrix_view.hpp"

#if defined(LOWRANK_USE_BLAS)
#include <cblas.h>

namespace lowrank::detail {

/// Below this many multiply-adds our kernel wins: BLAS pays for its own packing and thread hand-over.
inline constexpr double blas_threshold = 1 << 24;

/// C (row-major) = accumulate·C + α·P·Qᵀ by cblas.
inline void blas_gemm(float alpha, MatrixView<const float> p, MatrixView<const float> q, bool accumulate,
                      MatrixView<float> c) {
  cblas_sgemm(CblasRowMajor, p.is_row_major() ? CblasNoTrans : CblasTrans, q.is_row_major() ? CblasTrans : CblasNoTrans,
              int(c.rows()), int(c.cols()), int(p.cols()), alpha, p.data(), int(p.leading_dimension()), q.data(),
              int(q.leading_dimension()), accumulate ? 1.0F : 0.0F, c.data(), int(c.row_stride()));
}
inline void blas_gemm(double alpha, MatrixView<const double> p, MatrixView<const double> q, bool accumulate,
                      MatrixView<double> c) {
  cblas_dgemm(CblasRowMajor, p.is_row_major() ? CblasNoTrans : CblasTrans, q.is_row_major() ? CblasTrans : CblasNoTrans,
              int(c.rows()), int(c.cols()), int(p.cols()), alpha, p.data(), int(p.leading_dimension()), q.data(),
              int(q.leading_dimension()), accumulate ? 1.0 : 0.0, c.data(), int(c.row_stride()));
}

}  // namespace lowrank::detail
#endif

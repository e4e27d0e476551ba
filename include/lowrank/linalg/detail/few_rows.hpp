// SPDX-License-Identifier: Apache-2.0
// Products of a few vectors with a big matrix: W passes through the registers once, as stored, and is never packed.
#pragma once

#include <algorithm>

#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

/// Up to this many rows of P the matrix Q is read once, in place; above, packing it pays.
inline constexpr Index few_rows_limit = 4;
/// Scalars of work below which a second thread costs more than it brings.
inline constexpr Index few_rows_grain = 32768;

// The odd ends of the two kernels below, for any number of rows: unrolled with their kernels they would be most of the
// code, and none of the time.

/// c(i, r) = accumulate·c(i, r) + α·(sums(i, r) + Σ_{l ≥ k} P(i, l)·q(r, l)).
template <class T, class S>
[[gnu::noinline]] void finish_dots(int rows, int cols, T* sums, const MatrixView<const T>& p, const S* q, Index ldq,
                                   Index k, T alpha, bool accumulate, T* c, Index ldc) {
  for (int i = 0; i < rows; ++i)
    for (int r = 0; r < cols; ++r) {
      T sum = sums[i * cols + r];
      for (Index l = k; l < p.cols(); ++l) sum += p(i, l) * T(q[r * ldq + l]);
      T& out = c[i * ldc + r];
      out = accumulate ? out + alpha * sum : alpha * sum;
    }
}
/// c(i, j) += Σ_r x(i, r)·q(r, j) for `count` columns.
template <class T, class S>
[[gnu::noinline]] void finish_axpys(int rows, int depth, const T* x, const S* q, Index ldq, T* c, Index ldc,
                                    Index count) {
  for (Index j = 0; j < count; ++j)
    for (int i = 0; i < rows; ++i)
      for (int r = 0; r < depth; ++r) c[i * ldc + j] += x[i * depth + r] * T(q[r * ldq + j]);
}

/// C(i, j) = accumulate·C(i, j) + α·Σ_k P(i, k)·Q(j, k) for MR rows, Q's rows contiguous (`ldq` apart), P's rows
/// contiguous. Four rows of Q at a time share the loads of P.
template <int MR, class T, class S>
[[gnu::noinline]] void few_rows_dot(T alpha, MatrixView<const T> p, const S* q, Index ldq, bool accumulate,
                                    MatrixView<T> c, Index j0, Index j1) {
  constexpr int L = lanes<T>, J = 4;
  const Index depth = p.cols();
  const auto block = [&]<int JR>(Index j) {
    Vec<T> acc[MR][JR] = {};
    Index k = 0;
    for (; k + L <= depth; k += L) {
      Vec<T> w[JR];
      LOWRANK_UNROLL
      for (int r = 0; r < JR; ++r) w[r] = load_as<T, L>(q + (j + r) * ldq + k);
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) {
        const Vec<T> x = load<Vec<T>>(p.data() + i * p.row_stride() + k);
        LOWRANK_UNROLL
        for (int r = 0; r < JR; ++r) acc[i][r] += x * w[r];
      }
    }
    T sums[MR * JR];
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      LOWRANK_UNROLL
      for (int r = 0; r < JR; ++r) sums[i * JR + r] = sum_lanes<T>(acc[i][r]);
    }
    finish_dots<T>(MR, JR, sums, p, q + j * ldq, ldq, k, alpha, accumulate, &c(0, j), c.row_stride());
  };
  Index j = j0;
  for (; j + J <= j1; j += J) block.template operator()<J>(j);
  for (; j < j1; ++j) block.template operator()<1>(j);
}

/// C(i, j) += α·Σ_k P(i, k)·Q(k, j) for MR rows, Q's rows contiguous (`ldq` apart), for columns [j0, j1) of C, whose
/// rows are contiguous. Eight rows of Q at a time share the loads and stores of C.
template <int MR, class T, class S>
[[gnu::noinline]] void few_rows_axpy(T alpha, MatrixView<const T> p, const S* q, Index ldq, MatrixView<T> c, Index j0,
                                     Index j1) {
  constexpr int L = lanes<T>, K = 8;
  const Index depth = p.cols();
  const auto block = [&]<int KR>(Index k) {
    T x[MR][KR];
    for (int i = 0; i < MR; ++i)
      for (int r = 0; r < KR; ++r) x[i][r] = alpha * p(i, k + r);
    Index j = j0;
    for (; j + L <= j1; j += L) {
      Vec<T> acc[MR];
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) acc[i] = load<Vec<T>>(&c(i, j));
      LOWRANK_UNROLL
      for (int r = 0; r < KR; ++r) {
        const Vec<T> w = load_as<T, L>(q + (k + r) * ldq + j);
        LOWRANK_UNROLL
        for (int i = 0; i < MR; ++i) acc[i] += x[i][r] * w;
      }
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) store(&c(i, j), acc[i]);
    }
    if (j < j1) finish_axpys<T>(MR, KR, x[0], q + k * ldq + j, ldq, &c(0, j), c.row_stride(), j1 - j);
  };
  Index k = 0;
  for (; k + K <= depth; k += K) block.template operator()<K>(k);
  for (; k < depth; ++k) block.template operator()<1>(k);
}

/// Runs f.operator()<MR>(first row) over groups of 4, 2, 1 rows.
template <class F>
void in_row_groups(Index rows, F&& f) {
  Index i = 0;
  for (; i + 4 <= rows; i += 4) f.template operator()<4>(i);
  for (; i + 2 <= rows; i += 2) f.template operator()<2>(i);
  for (; i < rows; ++i) f.template operator()<1>(i);
}

/// C = accumulate·C + α·P·Qᵀ for few rows of P, Q in either order. P and C have contiguous rows (col_stride 1).
///
/// **Shapes** P m×k, Q n×k, C m×n; the caller has checked them. **Throws** nothing. **Cost** 2·m·n·k flops and one
/// reading of Q for each four rows of P. **Numerics** sums in T, one a lane; bits do not depend on the number of
/// threads.
template <class T, class S>
void few_rows_product(T alpha, MatrixView<const T> p, MatrixView<const S> q, bool accumulate, MatrixView<T> c) {
  // Threads share whole groups of columns: which columns are done four (or a vector) at a time, and so their rounding,
  // must not depend on the number of threads.
  constexpr Index group = std::max(4, lanes<T>);
  const Index grain = std::max<Index>(64, few_rows_grain / std::max<Index>(1, p.cols()));
  parallel_ranges((c.cols() + group - 1) / group, (grain + group - 1) / group, [&](Index g0, Index g1) {
    const Index j0 = g0 * group, j1 = std::min(g1 * group, c.cols());
    in_row_groups(c.rows(), [&]<int MR>(Index i) {
      const auto pi = p.middle_rows(i, MR);
      const auto ci = c.middle_rows(i, MR);
      if (q.col_stride() == 1) {
        few_rows_dot<MR>(alpha, pi, q.data(), q.row_stride(), accumulate, ci, j0, j1);
      } else {
        if (!accumulate)
          for (int r = 0; r < MR; ++r)
            for (Index j = j0; j < j1; ++j) ci(r, j) = T(0);
        few_rows_axpy<MR>(alpha, pi, q.data(), q.col_stride(), ci, j0, j1);
      }
    });
  });
}

}  // namespace lowrank::detail

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template void few_rows_product(float, MatrixView<const float>, MatrixView<const float>, bool, MatrixView<float>);
extern template void few_rows_product(double, MatrixView<const double>, MatrixView<const double>, bool,
                                      MatrixView<double>);
extern template void few_rows_product(float, MatrixView<const float>, MatrixView<const bf16>, bool, MatrixView<float>);
extern template void few_rows_product(float, MatrixView<const float>, MatrixView<const f16>, bool, MatrixView<float>);
}  // namespace lowrank::detail
#endif

// SPDX-License-Identifier: Apache-2.0
// Y = W·X and Z = Wᵀ·Y in one pass over W: the panel of rows that has just made its part of Y makes its part of Z from
// cache.
#pragma once

#include <algorithm>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/row_source.hpp"

namespace lowrank::detail {

/// y(i, c) += Σ_j w(i, j)·x(c, j) over columns [0, n): MR rows of W (`ldw` apart) against MC vectors (`ldx` apart).
template <int MR, int MC, class T, class S>
[[gnu::noinline]] void panel_dot(const S* w, Index ldw, const T* x, Index ldx, Index n, T* y, Index ldy) {
  constexpr int L = lanes<T>;
  Vec<T> acc[MR][MC] = {};
  Index j = 0;
  for (; j + L <= n; j += L) {
    Vec<T> xv[MC];
    LOWRANK_UNROLL
    for (int c = 0; c < MC; ++c) xv[c] = load<Vec<T>>(x + c * ldx + j);
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<T> wv = load_as<T, L>(w + i * ldw + j);
      LOWRANK_UNROLL
      for (int c = 0; c < MC; ++c) acc[i][c] += wv * xv[c];
    }
  }
  LOWRANK_UNROLL
  for (int i = 0; i < MR; ++i) LOWRANK_UNROLL
  for (int c = 0; c < MC; ++c) {
    T sum = sum_lanes<T>(acc[i][c]);
    for (Index l = j; l < n; ++l) sum += T(w[i * ldw + l]) * x[c * ldx + l];
    y[i * ldy + c] += sum;
  }
}

/// z(c, j) += Σ_i y(i, c)·w(i, j) over columns [0, n): MR rows of W into MC vectors.
template <int MR, int MC, class T, class S>
[[gnu::noinline]] void panel_axpy(const S* w, Index ldw, const T* y, Index ldy, Index n, T* z, Index ldz) {
  constexpr int L = lanes<T>;
  Vec<T> yv[MR][MC];
  LOWRANK_UNROLL
  for (int i = 0; i < MR; ++i) LOWRANK_UNROLL
  for (int c = 0; c < MC; ++c) yv[i][c] = y[i * ldy + c] - Vec<T>{};
  Index j = 0;
  for (; j + L <= n; j += L) {
    Vec<T> acc[MC];
    LOWRANK_UNROLL
    for (int c = 0; c < MC; ++c) acc[c] = load<Vec<T>>(z + c * ldz + j);
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      const Vec<T> wv = load_as<T, L>(w + i * ldw + j);
      LOWRANK_UNROLL
      for (int c = 0; c < MC; ++c) acc[c] += wv * yv[i][c];
    }
    LOWRANK_UNROLL
    for (int c = 0; c < MC; ++c) store(z + c * ldz + j, acc[c]);
  }
  for (; j < n; ++j)
    for (int c = 0; c < MC; ++c)
      for (int i = 0; i < MR; ++i) z[c * ldz + j] += y[i * ldy + c] * T(w[i * ldw + j]);
}

/// Calls f.operator()<MR, MC>(row, vector) over rows × vectors in groups of 4 × 4 and less at the ends.
template <class F>
void in_groups(Index rows, Index vectors, F&& f) {
  const auto over_vectors = [&]<int MR>(Index i) {
    Index c = 0;
    for (; c + 4 <= vectors; c += 4) f.template operator()<MR, 4>(i, c);
    for (; c + 2 <= vectors; c += 2) f.template operator()<MR, 2>(i, c);
    for (; c < vectors; ++c) f.template operator()<MR, 1>(i, c);
  };
  Index i = 0;
  for (; i + 4 <= rows; i += 4) over_vectors.template operator()<4>(i);
  for (; i < rows; ++i) over_vectors.template operator()<1>(i);
}

/// What a pass computes: Y = W·X, Z = Wᵀ·Y of a given Y, or both.
enum class Pass { forward, adjoint, gram };

/// Columns a pass works on at a time, so that the pieces of X and Z in use stay in L1.
inline constexpr Index pass_columns = 1024;
/// Bytes of W held in L2 between its two uses.
inline constexpr Index pass_panel_bytes = 256 * 1024;

struct NoAdjustment {
  template <class T>
  void operator()(Index, Index, T*) const {}
};

/// One pass over the rows of W. forward: Y = W·X; adjoint: Z = Wᵀ·Y; gram: both, Z from the Y just made. After a panel
/// of Y is made, `adjust(i0, count, y)` may change it (count × b, row-major): that is where a low-rank term is added.
///
/// **Shapes** X b×n, Y b×m, Z b×n, rows contiguous: they are blocks of vectors, one a row. W is read once.
/// **Numerics** the rows are cut into parts by the shape alone and the parts of Z added in order, so that the bits do
/// not depend on the number of threads.
template <Pass What, class T, RowSource Rows, class Adjust = NoAdjustment>
void streamed_pass(const Rows& W, MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z, Adjust&& adjust = {}) {
  using S = typename Rows::storage;
  const Index m = W.rows(), n = W.cols(), b = Y.rows();
  const int parts = int(std::clamp<Index>(m / 128, 1, 16));
  const Index panel = std::clamp<Index>(pass_panel_bytes / std::max<Index>(1, n * Index(sizeof(S))) / 4 * 4, 4, 32);
  const Index scratch_size = panel * b + (Rows::decodes ? panel * n : 0);
  Buffer<T> partial(What == Pass::forward ? 0 : Index(parts - 1) * b * n), scratch(scratch_size * parts);
  const auto run = [&](int p) {
    const MatrixView<T> z =
        p == 0 || What == Pass::forward ? Z : MatrixView<T>(partial.data() + Index(p - 1) * b * n, b, n, n, 1);
    if constexpr (What != Pass::forward)
      for (Index c = 0; c < b; ++c) std::fill_n(&z(c, 0), n, T(0));
    T* const y = scratch.data() + p * scratch_size;
    S* const decoded = [&]() -> S* {
      if constexpr (Rows::decodes) return y + panel * b;
      return nullptr;
    }();
    const Index end = m * (p + 1) / parts;
    for (Index i0 = m * p / parts; i0 < end; i0 += panel) {
      const Index rows = std::min(panel, end - i0);
      const S* const w = W.read(i0, rows, decoded);
      const Index ldw = W.ld();
      if constexpr (What == Pass::adjoint) {
        for (Index i = 0; i < rows; ++i)
          for (Index c = 0; c < b; ++c) y[i * b + c] = Y(c, i0 + i);
      } else {
        std::fill_n(y, rows * b, T(0));
        for (Index j = 0; j < n; j += pass_columns) {
          const Index cols = std::min(pass_columns, n - j);
          in_groups(rows, b, [&]<int MR, int MC>(Index i, Index c) {
            panel_dot<MR, MC>(w + i * ldw + j, ldw, &X(c, j), X.row_stride(), cols, y + i * b + c, b);
          });
        }
        adjust(i0, rows, y);
        for (Index i = 0; i < rows; ++i)
          for (Index c = 0; c < b; ++c) Y(c, i0 + i) = y[i * b + c];
      }
      if constexpr (What != Pass::forward)
        for (Index j = 0; j < n; j += pass_columns) {
          const Index cols = std::min(pass_columns, n - j);
          in_groups(rows, b, [&]<int MR, int MC>(Index i, Index c) {
            panel_axpy<MR, MC>(w + i * ldw + j, ldw, y + i * b + c, b, cols, &z(c, j), z.row_stride());
          });
        }
    }
  };
  parallel_parts(std::min(parts, max_threads()), [&](int t, int of) {
    for (int p = parts * t / of; p < parts * (t + 1) / of; ++p) run(p);
  });
  if constexpr (What != Pass::forward)
    parallel_ranges(n, 1024, [&](Index j0, Index j1) {
      for (int p = 1; p < parts; ++p)
        for (Index c = 0; c < b; ++c) {
          const T* from = partial.data() + (Index(p - 1) * b + c) * n;
          T* to = &Z(c, 0);
          for (Index j = j0; j < j1; ++j) to[j] += from[j];
        }
    });
}

/// Σ of squares of the elements in double. Not finite when an element is not; for T = float only then.
template <class T, RowSource Rows>
double sum_of_squared_rows(const Rows& W) {
  using S = typename Rows::storage;
  constexpr int L = lanes<double>;
  const Index m = W.rows(), n = W.cols();
  const int parts = int(std::clamp<Index>(m / 32, 1, 64));
  Buffer<double> sums(parts);
  Buffer<S> scratch(Rows::decodes ? parts * n : 0);
  const auto run = [&](int p) {
    double total = 0;
    for (Index i = m * p / parts; i < m * (p + 1) / parts; ++i) {
      const S* x = W.read(i, 1, scratch.data() + (Rows::decodes ? p * n : 0));
      Vec<double> a{}, b{};
      Index j = 0;
      for (; j + 2 * L <= n; j += 2 * L) {
        const auto u = __builtin_convertvector(load_as<T, L>(x + j), Vec<double>);
        const auto v = __builtin_convertvector(load_as<T, L>(x + j + L), Vec<double>);
        a += u * u;
        b += v * v;
      }
      total += sum_lanes<double>(a + b);
      for (; j < n; ++j) total += double(T(x[j])) * double(T(x[j]));
    }
    sums[p] = total;
  };
  parallel_parts(std::min(parts, max_threads()), [&](int t, int of) {
    for (int p = parts * t / of; p < parts * (t + 1) / of; ++p) run(p);
  });
  double total = 0;
  for (const double s : sums) total += s;
  return total;
}

}  // namespace lowrank::detail

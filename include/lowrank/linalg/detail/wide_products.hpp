// SPDX-License-Identifier: Apache-2.0
// Products of a few double vectors with a matrix kept in float or less: double arithmetic, without a double copy of W.
#pragma once

#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

// A tile of W is widened into a buffer that stays in L1/L2 and then serves all vectors; W passes through the caches
// once a product. Vectors are rows: X is count×length, row-major.

inline constexpr int tile_rows = 8;
inline constexpr Index tile_cols = 512;

/// Whatever W is stored in, as doubles: tile[r·tile_cols + j] = W(i0 + r, j0 + j), zero rows below the last.
template <class S>
void widen_tile(MatrixView<const S> W, Index i0, Index rows, Index j0, Index cols, double* tile) {
  constexpr int L = lanes<double>;
  for (Index r = 0; r < rows; ++r) {
    const S* src = W.data() + (i0 + r) * W.row_stride() + j0;
    double* out = tile + r * tile_cols;
    Index j = 0;
    for (; j + L <= cols; j += L) {
      if constexpr (std::same_as<S, double>)
        store(out + j, load<Vec<double>>(src + j));
      else
        store(out + j, __builtin_convertvector(load_as<float, L>(src + j), Vec<double>));
    }
    for (; j < cols; ++j) out[j] = double(src[j]);
  }
  for (Index r = rows; r < tile_rows; ++r) std::fill_n(tile + r * tile_cols, cols, 0.0);
}

/// Y(v, i0 + r) += Σ_j tile(r, j)·X(v, j0 + j) for V vectors.
template <int V>
void tile_dot(const double* tile, Index rows, Index cols, const double* x, Index ldx, double* y, Index ldy) {
  constexpr int L = lanes<double>;
  Vec<double> acc[V][tile_rows] = {};
  Index j = 0;
  for (; j + L <= cols; j += L) {
    Vec<double> xv[V];
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) xv[v] = load<Vec<double>>(x + v * ldx + j);
    LOWRANK_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      const Vec<double> w = load<Vec<double>>(tile + r * tile_cols + j);
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) acc[v][r] += w * xv[v];
    }
  }
  for (int v = 0; v < V; ++v)
    for (Index r = 0; r < rows; ++r) {
      double sum = sum_lanes<double>(acc[v][r]);
      for (Index l = j; l < cols; ++l) sum += tile[r * tile_cols + l] * x[v * ldx + l];
      y[v * ldy + r] += sum;
    }
}

/// Y(v, j0 + j) += Σ_r tile(r, j)·X(v, i0 + r) for V vectors; x holds tile_rows scalars a vector, zeros included.
template <int V>
void tile_axpy(const double* tile, Index cols, const double (*x)[tile_rows], double* y, Index ldy) {
  constexpr int L = lanes<double>;
  Index j = 0;
  for (; j + L <= cols; j += L) {
    Vec<double> acc[V];
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) acc[v] = load<Vec<double>>(y + v * ldy + j);
    LOWRANK_UNROLL
    for (int r = 0; r < tile_rows; ++r) {
      const Vec<double> w = load<Vec<double>>(tile + r * tile_cols + j);
      LOWRANK_UNROLL
      for (int v = 0; v < V; ++v) acc[v] += x[v][r] * w;
    }
    LOWRANK_UNROLL
    for (int v = 0; v < V; ++v) store(y + v * ldy + j, acc[v]);
  }
  for (; j < cols; ++j)
    for (int v = 0; v < V; ++v)
      for (int r = 0; r < tile_rows; ++r) y[v * ldy + j] += x[v][r] * tile[r * tile_cols + j];
}

/// Y(v, :) = W·X(v, :) for row-major W; every thread takes rows of W.
template <class S>
void wide_rows(MatrixView<const S> W, Index count, const double* x, Index ldx, double* y, Index ldy) {
  const Index blocks = (W.rows() + tile_rows - 1) / tile_rows;
  parallel_ranges(blocks, std::max<Index>(1, 65536 / (tile_rows * std::max<Index>(1, W.cols()))),
                  [&](Index b0, Index b1) {
                    alignas(64) double tile[tile_rows * tile_cols];
                    for (Index b = b0; b < b1; ++b) {
                      const Index i0 = b * tile_rows, rows = std::min<Index>(tile_rows, W.rows() - i0);
                      for (Index v = 0; v < count; ++v) std::fill_n(y + v * ldy + i0, rows, 0.0);
                      for (Index j0 = 0; j0 < W.cols(); j0 += tile_cols) {
                        const Index cols = std::min(tile_cols, W.cols() - j0);
                        widen_tile(W, i0, rows, j0, cols, tile);
                        Index v = 0;
                        for (; v + 2 <= count; v += 2)
                          tile_dot<2>(tile, rows, cols, x + v * ldx + j0, ldx, y + v * ldy + i0, ldy);
                        if (v < count) tile_dot<1>(tile, rows, cols, x + v * ldx + j0, ldx, y + v * ldy + i0, ldy);
                      }
                    }
                  });
}

/// Y(v, :) = Wᵀ·X(v, :) for row-major W; every thread takes columns of W, so the sums have one order whatever their
/// number.
template <class S>
void wide_cols(MatrixView<const S> W, Index count, const double* x, Index ldx, double* y, Index ldy) {
  const Index blocks = (W.cols() + tile_cols - 1) / tile_cols;
  parallel_ranges(blocks, 1, [&](Index b0, Index b1) {
    alignas(64) double tile[tile_rows * tile_cols];
    double scalars[2][tile_rows];
    for (Index b = b0; b < b1; ++b) {
      const Index j0 = b * tile_cols, cols = std::min(tile_cols, W.cols() - j0);
      for (Index v = 0; v < count; ++v) std::fill_n(y + v * ldy + j0, cols, 0.0);
      for (Index i0 = 0; i0 < W.rows(); i0 += tile_rows) {
        const Index rows = std::min<Index>(tile_rows, W.rows() - i0);
        widen_tile(W, i0, rows, j0, cols, tile);
        const auto gather = [&](Index v, int slot) {
          for (Index r = 0; r < tile_rows; ++r) scalars[slot][r] = r < rows ? x[v * ldx + i0 + r] : 0.0;
        };
        Index v = 0;
        for (; v + 2 <= count; v += 2) {
          gather(v, 0);
          gather(v + 1, 1);
          tile_axpy<2>(tile, cols, scalars, y + v * ldy + j0, ldy);
        }
        if (v < count) {
          gather(v, 0);
          tile_axpy<1>(tile, cols, scalars, y + v * ldy + j0, ldy);
        }
      }
    }
  });
}

/// Y(v, :) = W·X(v, :) in double for any order of W and any storage. X count×cols, Y count×rows, both row-major.
template <class S>
void wide_product(MatrixView<const S> W, MatrixView<const double> X, MatrixView<double> Y) {
  if (W.is_row_major())
    wide_rows(W, X.rows(), X.data(), X.row_stride(), Y.data(), Y.row_stride());
  else
    wide_cols(W.transposed(), X.rows(), X.data(), X.row_stride(), Y.data(), Y.row_stride());
}

}  // namespace lowrank::detail

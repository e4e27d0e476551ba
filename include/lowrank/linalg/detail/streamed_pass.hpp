// SPDX-License-Identifier: Apache-2.0
// Y = W·X and Z = Wᵀ·Y in one pass over W: the panel of rows that has just made its part of Y makes its part of Z from
// cache.
#pragma once

#include <algorithm>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/row_source.hpp"

namespace lowrank::detail {

/// Keeps the compiler from folding a load into each of its uses: a vector that serves four multiply-adds must be loaded
/// once, or the load ports, not the arithmetic, set the pace (measured: 160 against 220 GF/s on one core).
template <class V>
[[gnu::always_inline]] inline void pin(V& v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  static_cast<void>(v);
#endif
}

/// Lane l of the result is the sum over the lanes of a[l], for as many vectors as one has lanes: log2 rounds of
/// pairwise shuffles instead of one reduction a vector.
template <class T>
[[gnu::always_inline]] inline Vec<T> sums_of_lanes(Vec<T> (&a)[lanes<T>]) {
  constexpr int L = lanes<T>;
  const auto fold = [&]<int Step, int... I>(std::integer_sequence<int, I...>) {
    LOWRANK_UNROLL
    for (int i = 0; i < Step; ++i)
      a[i] = __builtin_shufflevector(a[i], a[i + Step], ((I & Step) ? L + I - Step : I)...) +
             __builtin_shufflevector(a[i], a[i + Step], ((I & Step) ? L + I : I + Step)...);
  };
  using All = std::make_integer_sequence<int, L>;
  if constexpr (L >= 16) fold.template operator()<8>(All{});
  if constexpr (L >= 8) fold.template operator()<4>(All{});
  if constexpr (L >= 4) fold.template operator()<2>(All{});
  if constexpr (L >= 2) fold.template operator()<1>(All{});
  return a[0];
}

// The odd ends of the two kernels below, for any number of rows and vectors.

/// y(i, c) += sums(i, c) + Σ_j w(i, j)·x(c, j).
template <class T, class S>
[[gnu::noinline]] void finish_panel_dot(int rows, int vectors, const S* w, Index ldw, const T* x, Index ldx, Index n,
                                        T* sums, T* y, Index ldy) {
  for (int i = 0; i < rows; ++i)
    for (int c = 0; c < vectors; ++c) {
      T& sum = sums[i * vectors + c];
      for (Index j = 0; j < n; ++j) sum += T(w[i * ldw + j]) * x[c * ldx + j];
      y[i * ldy + c] += sum;
    }
}
/// z(c, j) += Σ_i y(i, c)·w(i, j).
template <class T, class S>
[[gnu::noinline]] void finish_panel_axpy(int rows, int vectors, const S* w, Index ldw, const T* y, Index ldy, Index n,
                                         T* z, Index ldz) {
  for (Index j = 0; j < n; ++j)
    for (int c = 0; c < vectors; ++c)
      for (int i = 0; i < rows; ++i) z[c * ldz + j] += y[i * ldy + c] * T(w[i * ldw + j]);
}

/// y(i, c) += Σ_j w(i, j)·x(c, j) over columns [0, n): MR rows of W (`ldw` apart) against MC vectors (`ldx` apart).
template <int MR, int MC, class T, class S>
[[gnu::noinline]] void panel_dot(const S* w, Index ldw, const T* x, Index ldx, Index n, T* y, Index ldy) {
  constexpr int L = lanes<T>, tiles = MR * MC, groups = (tiles + L - 1) / L;
  Vec<T> acc[groups * L] = {};
  Index j = 0;
  for (; j + L <= n; j += L) {
    Vec<T> xv[MC];
    LOWRANK_UNROLL
    for (int c = 0; c < MC; ++c) {
      xv[c] = load<Vec<T>>(x + c * ldx + j);
      pin(xv[c]);
    }
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      Vec<T> wv = load_as<T, L>(w + i * ldw + j);
      pin(wv);
      LOWRANK_UNROLL
      for (int c = 0; c < MC; ++c) acc[i * MC + c] += wv * xv[c];
    }
  }
  T sums[groups * L];
  LOWRANK_UNROLL
  for (int g = 0; g < groups; ++g) {
    Vec<T> part[L];
    LOWRANK_UNROLL
    for (int l = 0; l < L; ++l) part[l] = acc[g * L + l];
    store(sums + g * L, sums_of_lanes<T>(part));
  }
  finish_panel_dot<T>(MR, MC, w + j, ldw, x + j, ldx, n - j, sums, y, ldy);
}

/// z(c, j) += Σ_i y(i, c)·w(i, j) over columns [0, n): MR rows of W into MC vectors. `ahead`: rows that will be read
/// next, fetched into L2 meanwhile; null: none.
template <int MR, int MC, class T, class S>
[[gnu::noinline]] void panel_axpy(const S* w, Index ldw, const T* y, Index ldy, Index n, T* z, Index ldz,
                                  const S* ahead) {
  constexpr int L = lanes<T>;
  Vec<T> yv[MR][MC];
  LOWRANK_UNROLL
  for (int i = 0; i < MR; ++i) LOWRANK_UNROLL
  for (int c = 0; c < MC; ++c) yv[i][c] = y[i * ldy + c] - Vec<T>{};
  const auto columns = [&](Index j) {
    Vec<T> acc[MC];
    LOWRANK_UNROLL
    for (int c = 0; c < MC; ++c) {
      acc[c] = load<Vec<T>>(z + c * ldz + j);
      pin(acc[c]);
    }
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      Vec<T> wv = load_as<T, L>(w + i * ldw + j);
      pin(wv);
      LOWRANK_UNROLL
      for (int c = 0; c < MC; ++c) acc[c] += wv * yv[i][c];
    }
    LOWRANK_UNROLL
    for (int c = 0; c < MC; ++c) store(z + c * ldz + j, acc[c]);
  };
  Index j = 0;
  if (ahead != nullptr) {
    for (; j + L <= n; j += L) {
      LOWRANK_UNROLL
      for (int i = 0; i < MR; ++i) __builtin_prefetch(ahead + i * ldw + j, 0, 2);
      columns(j);
    }
  } else {
    for (; j + L <= n; j += L) columns(j);
  }
  if (j < n) finish_panel_axpy<T>(MR, MC, w + j, ldw, y, ldy, n - j, z + j, ldz);
}

/// Rows of W a kernel takes at a time: with 4 vectors their 24 products fill the registers, and a vector loaded serves
/// six rows (measured against 4: a tenth faster).
inline constexpr int pass_rows = 6;

/// Calls f.operator()<MR, MC>(row, vector) over rows × vectors in groups of pass_rows × 4 and less at the ends; the
/// vectors of a group stay in L1 while the rows go by.
template <class F>
void in_groups(Index rows, Index vectors, F&& f) {
  const auto over_rows = [&]<int MC>(Index c) {
    Index i = 0;
    for (; i + pass_rows <= rows; i += pass_rows) f.template operator()<pass_rows, MC>(i, c);
    for (; i + 2 <= rows; i += 2) f.template operator()<2, MC>(i, c);
    for (; i < rows; ++i) f.template operator()<1, MC>(i, c);
  };
  Index c = 0;
  for (; c + 4 <= vectors; c += 4) over_rows.template operator()<4>(c);
  for (; c + 2 <= vectors; c += 2) over_rows.template operator()<2>(c);
  for (; c < vectors; ++c) over_rows.template operator()<1>(c);
}

/// What a pass computes: Y = W·X, Z = Wᵀ·Y of a given Y, or both.
enum class Pass { forward, adjoint, gram };

/// Columns a pass works on at a time, so that the pieces of X and Z in use stay in L1.
inline constexpr Index pass_columns = 1024;
/// Bytes of W between its two uses: a part of L2.
inline constexpr Index pass_panel_bytes = 384 * 1024;
/// Vectors multiplied while W is read once; more are done in several readings, or X and Z would crowd W out of L2.
inline constexpr Index pass_vectors = 16;

/// What may change a panel of Y after it is made; see streamed_pass. Empty: nothing does.
template <class T>
struct PanelAdjustment {
  const void* closure = nullptr;
  void (*call)(const void* closure, Index i0, Index count, Index c0, T* y) = nullptr;
};

/// Scratch of the thread that starts a pass; grows to the largest pass it has seen and stays.
template <class T>
struct PassScratch {
  Buffer<T> partial, panels;
  static PassScratch& local() {
    thread_local PassScratch scratch;
    return scratch;
  }
};

/// One pass over the rows of W. forward: Y = W·X; adjoint: Z = Wᵀ·Y; gram: both, Z from the Y just made. After a panel
/// of Y is made, `adjust(i0, count, c0, y)` may change it (rows i0… of vectors c0…, `count` × pass_vectors, row-major):
/// that is where a low-rank term is added.
///
/// **Shapes** X b×n, Y b×m, Z b×n, rows contiguous: they are blocks of vectors, one a row. W is read once for every
/// pass_vectors of them.
/// **Numerics** the rows are cut into parts by the shape alone and the parts of Z added in order, so that the bits do
/// not depend on the number of threads.
template <class T, class S>
void streamed_pass_of(Pass what, const AnyRows<S>& W, MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z,
                      PanelAdjustment<T> adjust) {
  const bool forward = what != Pass::adjoint, adjoint = what != Pass::forward, decodes = W.decodes();
  const Index m = W.rows(), n = W.cols(), b_all = Y.rows(), ldy = pass_vectors;
  const Index panel =
      std::clamp<Index>(pass_panel_bytes / std::max<Index>(1, n * Index(sizeof(S))) / pass_rows, 1, 5) * pass_rows;
  // An even number, so that two threads have the same work.
  const int parts = m < 256 ? 1 : int(std::min<Index>((m + 128) / 256 * 2, 16));
  const Index decoded_size = decodes ? (panel * n + 15) / 16 * 16 : 0;
  const Index panel_size = panel * ldy + decoded_size, z_size = pass_vectors * n;
  PassScratch<T>& scratch = PassScratch<T>::local();
  scratch.panels.resize(panel_size * parts);
  if (adjoint) scratch.partial.resize(Index(parts - 1) * z_size);

  for (Index c0 = 0; c0 < b_all; c0 += pass_vectors) {
    const Index b = std::min(pass_vectors, b_all - c0);
    const auto z_of = [&](int p, Index c) {
      return p == 0 ? &Z(c0 + c, 0) : scratch.partial.data() + (p - 1) * z_size + c * n;
    };
    const Index ldz_first = adjoint ? Z.row_stride() : 0;
    const auto run = [&](int p) {
      if (adjoint)
        for (Index c = 0; c < b; ++c) std::fill_n(z_of(p, c), n, T(0));
      const Index ldz = p == 0 ? ldz_first : n;
      T* const y = scratch.panels.data() + p * panel_size;
      S* decoded = nullptr;
      if constexpr (std::same_as<S, T>)  // what is decoded is decoded to T
        if (decodes) decoded = y + panel * ldy;
      const Index end = m * (p + 1) / parts;
      for (Index i0 = m * p / parts; i0 < end; i0 += panel) {
        const Index rows = std::min(panel, end - i0);
        const S* const w = W.read(i0, rows, decoded);
        const Index ldw = W.ld();
        if (forward) {
          std::fill_n(y, rows * ldy, T(0));
          for (Index j = 0; j < n; j += pass_columns) {
            const Index cols = std::min(pass_columns, n - j);
            in_groups(rows, b, [&]<int MR, int MC>(Index i, Index c) {
              panel_dot<MR, MC>(w + i * ldw + j, ldw, &X(c0 + c, j), X.row_stride(), cols, y + i * ldy + c, ldy);
            });
          }
          if (adjust.call != nullptr) adjust.call(adjust.closure, i0, rows, c0, y);
          for (Index c = 0; c < b; ++c)
            for (Index i = 0; i < rows; ++i) Y(c0 + c, i0 + i) = y[i * ldy + c];
        } else {
          for (Index c = 0; c < b; ++c)
            for (Index i = 0; i < rows; ++i) y[i * ldy + c] = Y(c0 + c, i0 + i);
        }
        if (adjoint) {
          // What is fetched ahead may lie beyond this part, never beyond W.
          const bool more = !decodes && i0 + 2 * panel <= m;
          for (Index j = 0; j < n; j += pass_columns) {
            const Index cols = std::min(pass_columns, n - j);
            in_groups(rows, b, [&]<int MR, int MC>(Index i, Index c) {
              const S* const from = w + i * ldw + j;
              panel_axpy<MR, MC>(from, ldw, y + i * ldy + c, ldy, cols, z_of(p, c) + j, ldz,
                                 more && c == 0 ? from + panel * ldw : nullptr);
            });
          }
        }
      }
    };
    parallel_parts(std::min(parts, max_threads()), [&](int t, int of) {
      for (int p = parts * t / of; p < parts * (t + 1) / of; ++p) run(p);
    });
    if (adjoint)
      parallel_ranges(n, 1024, [&](Index j0, Index j1) {
        for (Index c = 0; c < b; ++c)
          for (int p = 1; p < parts; ++p) {
            const T* from = z_of(p, c);
            T* to = z_of(0, c);
            for (Index j = j0; j < j1; ++j) to[j] += from[j];
          }
      });
  }
}

/// As above for any row source, with `adjust` anything to call.
template <Pass What, class T, RowSource Rows>
void streamed_pass(const Rows& W, MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z) {
  streamed_pass_of<T>(What, AnyRows<typename Rows::storage>(W), X, Y, Z, {});
}
template <Pass What, class T, RowSource Rows, class Adjust>
void streamed_pass(const Rows& W, MatrixView<const T> X, MatrixView<T> Y, MatrixView<T> Z, const Adjust& adjust) {
  streamed_pass_of<T>(What, AnyRows<typename Rows::storage>(W), X, Y, Z,
                      {&adjust, [](const void* closure, Index i0, Index count, Index c0, T* y) {
                         (*static_cast<const Adjust*>(closure))(i0, count, c0, y);
                       }});
}

/// Σ of squares of the elements in double. Not finite when an element is not; for T = float only then.
template <class T, class S>
double sum_of_squares_of(const AnyRows<S>& W) {
  constexpr int L = lanes<double>;
  const Index m = W.rows(), n = W.cols();
  const int parts = int(std::clamp<Index>(m / 32, 1, 64));
  Buffer<double> sums(parts);
  Buffer<S> scratch(W.decodes() ? parts * n : 0);
  const auto run = [&](int p) {
    double total = 0;
    for (Index i = m * p / parts; i < m * (p + 1) / parts; ++i) {
      const S* x = W.read(i, 1, scratch.data() + (W.decodes() ? p * n : 0));
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

template <class T, RowSource Rows>
double sum_of_squared_rows(const Rows& W) {
  return sum_of_squares_of<T>(AnyRows<typename Rows::storage>(W));
}

}  // namespace lowrank::detail

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template void streamed_pass_of(Pass, const AnyRows<float>&, MatrixView<const float>, MatrixView<float>,
                                      MatrixView<float>, PanelAdjustment<float>);
extern template void streamed_pass_of(Pass, const AnyRows<double>&, MatrixView<const double>, MatrixView<double>,
                                      MatrixView<double>, PanelAdjustment<double>);
extern template void streamed_pass_of(Pass, const AnyRows<bf16>&, MatrixView<const float>, MatrixView<float>,
                                      MatrixView<float>, PanelAdjustment<float>);
extern template void streamed_pass_of(Pass, const AnyRows<f16>&, MatrixView<const float>, MatrixView<float>,
                                      MatrixView<float>, PanelAdjustment<float>);
extern template double sum_of_squares_of<float>(const AnyRows<float>&);
extern template double sum_of_squares_of<double>(const AnyRows<double>&);
extern template double sum_of_squares_of<float>(const AnyRows<bf16>&);
extern template double sum_of_squares_of<float>(const AnyRows<f16>&);
}  // namespace lowrank::detail
#endif

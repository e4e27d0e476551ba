// SPDX-License-Identifier: Apache-2.0
// The packed product C = β·C + α·P·Qᵀ over panel sources: cache blocking, the register kernel, the split over threads.
//
// Why not Eigen's or BLAS' product: neither can be fed from anything but a dense matrix. Here W may be bf16, 4-bit
// codes, or [W | B] at once, and only the packing step knows. It also allocates nothing in steady state, gives the same
// bits for any number of threads (the depth is never split), and compiles in a fraction of Eigen's time.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/panel.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

/// Depth of a packed block: a panel of kernel_cols × depth stays in a 32 KiB L1.
template <class T>
inline constexpr Index block_depth = Index(32768 / (sizeof(T) * std::size_t(kernel_cols<T>)));
/// Rows of a packed block of P: rows × depth fill about 256 KiB of L2.
template <class T>
inline constexpr Index block_rows =
    Index(262144 / (sizeof(T) * std::size_t(block_depth<T>))) / kernel_rows* kernel_rows;
/// Columns of a packed block of Q: cols × depth in about 2 MiB of L3 a thread.
template <class T>
inline constexpr Index block_cols =
    Index(2097152 / (sizeof(T) * std::size_t(block_depth<T>))) / kernel_cols<T>* kernel_cols<T>;

/// acc = Σ_k P(·, k)·q(k, ·) on an MR × NV-vector register tile, then C = β·C + α·acc, β ∈ {0, 1}.
/// `p` and `q` are packed panels: MR and kernel_cols scalars a k. Only the first `cols` columns of C are touched.
/// Not inlined: one big function of all heights would spill the tile.
template <class T, int MR, int NV>
[[gnu::noinline]] void kernel(Index kc, const T* p, const T* q, T alpha, bool accumulate, T* c, Index ldc, Index cols) {
  using V = Vec<T>;
  constexpr int L = lanes<T>;
  V acc[MR][NV] = {};
  for (Index k = 0; k < kc; ++k) {
    V b[NV];
    LOWRANK_UNROLL
    for (int v = 0; v < NV; ++v) b[v] = load<V>(q + v * L);
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      const V ai = p[i] - V{};
      LOWRANK_UNROLL
      for (int v = 0; v < NV; ++v) acc[i][v] += ai * b[v];
    }
    p += MR;
    q += kernel_cols<T>;
  }
  if (cols == NV * L) [[likely]] {
    LOWRANK_UNROLL
    for (int i = 0; i < MR; ++i) {
      LOWRANK_UNROLL
      for (int v = 0; v < NV; ++v) {
        T* out = c + i * ldc + v * L;
        const V x = alpha * acc[i][v];
        store(out, accumulate ? load<V>(out) + x : x);
      }
    }
  } else {
    for (int i = 0; i < MR; ++i) {
      T row[NV * L];
      for (int v = 0; v < NV; ++v) store(row + v * L, V(alpha * acc[i][v]));
      for (Index j = 0; j < cols; ++j) c[i * ldc + j] = accumulate ? c[i * ldc + j] + row[j] : row[j];
    }
  }
}

/// The largest kernel height that fits `rows`: kernel_rows, then 8, 4, 2, 1.
inline constexpr int kernel_height(Index rows) {
  if (rows >= kernel_rows) return kernel_rows;
  for (int h = 8; h > 1; h /= 2)
    if (h < kernel_rows && rows >= h) return h;
  return 1;
}

/// Calls the kernel of height `mr`, one of those kernel_height returns.
template <class T, int NV, class... Args>
inline void kernel_of_height(int mr, Args... args) {
  if (mr == kernel_rows) return kernel<T, kernel_rows, NV>(args...);
  if constexpr (kernel_rows > 8)
    if (mr == 8) return kernel<T, 8, NV>(args...);
  if constexpr (kernel_rows > 4)
    if (mr == 4) return kernel<T, 4, NV>(args...);
  if (mr == 2) return kernel<T, 2, NV>(args...);
  return kernel<T, 1, NV>(args...);
}

/// Packs rows [i0, i0 + m) of P as consecutive panels of kernel_height rows.
template <class T>
void pack_rows(const AnySource<T>& source, Index i0, Index m, Index k0, Index kc, T* out) {
  for (Index i = 0; i < m;) {
    const int h = kernel_height(m - i);
    source.pack(h, i0 + i, h, k0, kc, out);
    out += h * kc;
    i += h;
  }
}

/// Scratch of one thread; grows to the largest product it has seen and stays.
template <class T>
struct GemmScratch {
  Buffer<T> p, q;
  static GemmScratch& local() {
    thread_local GemmScratch scratch;
    return scratch;
  }
};

/// C = accumulate·C + α·P·Qᵀ for rows [i0, i1) and columns [j0, j1) of a row-major C, on the calling thread.
/// `upper`: register tiles that lie wholly below C's diagonal are left out.
template <class T>
[[gnu::noinline]] void gemm_block(T alpha, const AnySource<T>& p, const AnySource<T>& q, bool accumulate,
                                  MatrixView<T> c, Index i0, Index i1, Index j0, Index j1, bool upper = false) {
  constexpr int NR = kernel_cols<T>, NV = kernel_vectors<T>;
  const Index depth = p.depth(), ldc = c.row_stride();
  const Index blocks = std::max<Index>(1, (depth + block_depth<T> - 1) / block_depth<T>);
  const Index kc_max = (depth + blocks - 1) / blocks;
  // Blocks of equal height, so that the last one is not a sliver.
  const Index row_blocks = std::max<Index>(1, (i1 - i0 + block_rows<T> - 1) / block_rows<T>);
  const Index mc_max = ((i1 - i0 + row_blocks - 1) / row_blocks + kernel_rows - 1) / kernel_rows * kernel_rows;
  GemmScratch<T>& scratch = GemmScratch<T>::local();

  for (Index jc = j0; jc < j1; jc += block_cols<T>) {
    const Index nc = std::min(block_cols<T>, j1 - jc);
    const Index panels = (nc + NR - 1) / NR;
    for (Index k0 = 0; k0 < depth; k0 += kc_max) {
      const Index kc = std::min(kc_max, depth - k0);
      const bool add = accumulate || k0 > 0;
      scratch.q.resize(panels * NR * kc);
      for (Index jp = 0; jp < panels; ++jp)
        q.pack(NR, jc + jp * NR, std::min<Index>(NR, nc - jp * NR), k0, kc, scratch.q.data() + jp * NR * kc);
      for (Index ic = i0; ic < i1; ic += mc_max) {
        if (upper && ic >= jc + nc) break;
        const Index mc = std::min(mc_max, i1 - ic);
        scratch.p.resize(mc * kc);
        pack_rows(p, ic, mc, k0, kc, scratch.p.data());
        for (Index jp = 0; jp < panels; ++jp) {
          const T* qp = scratch.q.data() + jp * NR * kc;
          const Index cols = std::min<Index>(NR, nc - jp * NR);
          for (Index i = 0; i < mc;) {
            if (upper && ic + i >= jc + jp * NR + cols) break;
            const int h = kernel_height(mc - i);
            const T* pp = scratch.p.data() + i * kc;
            T* out = c.data() + (ic + i) * ldc + jc + jp * NR;
            if (cols <= lanes<T>)
              kernel_of_height<T, 1>(h, kc, pp, qp, alpha, add, out, ldc, cols);
            else
              kernel_of_height<T, NV>(h, kc, pp, qp, alpha, add, out, ldc, cols);
            i += h;
          }
        }
      }
    }
  }
}

/// C = accumulate·C + α·P·Qᵀ; C row-major with p.rows() rows and q.rows() columns; depths equal and at least 1.
///
/// Threads split the columns of C (so each packs its own part of Q, the expensive operand when it is a quantised
/// weight) unless there are too few of them.
template <class T>
void gemm_packed(T alpha, const std::type_identity_t<AnySource<T>>& p, const std::type_identity_t<AnySource<T>>& q,
                 bool accumulate, MatrixView<T> c) {
  constexpr Index NR = kernel_cols<T>;
  const Index m = c.rows(), n = c.cols();
  const double flops = 2.0 * double(m) * double(n) * double(p.depth());
  const int threads = int(std::clamp(flops / 200e3, 1.0, double(max_threads())));
  const Index column_panels = (n + NR - 1) / NR, row_panels = (m + kernel_rows - 1) / kernel_rows;
  if (column_panels >= 4 * threads || column_panels >= row_panels) {
    parallel_parts(int(std::min<Index>(threads, column_panels)), [&](int t, int of) {
      gemm_block(alpha, p, q, accumulate, c, 0, m, column_panels * t / of * NR,
                 std::min(n, column_panels * (t + 1) / of * NR));
    });
  } else {
    parallel_parts(int(std::min<Index>(threads, row_panels)), [&](int t, int of) {
      gemm_block(alpha, p, q, accumulate, c, row_panels * t / of * kernel_rows,
                 std::min(m, row_panels * (t + 1) / of * kernel_rows), 0, n);
    });
  }
}

/// The upper triangle (i ≤ j) of C = accumulate·C + α·P·Qᵀ, C square; what lies below it becomes unspecified.
///
/// Half the work of gemm_packed: for Gram matrices and symmetric updates. Threads take columns of equal area.
template <class T>
void gemm_packed_upper(T alpha, const std::type_identity_t<AnySource<T>>& p,
                       const std::type_identity_t<AnySource<T>>& q, bool accumulate, MatrixView<T> c) {
  constexpr Index NR = kernel_cols<T>;
  const Index n = c.cols(), panels = (n + NR - 1) / NR;
  const double flops = double(n) * double(n) * double(p.depth());
  const int threads = int(std::clamp(flops / 200e3, 1.0, double(std::min<Index>(max_threads(), panels))));
  parallel_parts(threads, [&](int t, int of) {
    const auto bound = [&](int k) {
      return k == of ? n : Index(double(panels) * std::sqrt(double(k) / double(of))) * NR;
    };
    gemm_block(alpha, p, q, accumulate, c, 0, bound(t + 1), bound(t), bound(t + 1), true);
  });
}

}  // namespace lowrank::detail

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template void gemm_packed(float, const AnySource<float>&, const AnySource<float>&, bool, MatrixView<float>);
extern template void gemm_packed(double, const AnySource<double>&, const AnySource<double>&, bool, MatrixView<double>);
extern template void gemm_packed_upper(float, const AnySource<float>&, const AnySource<float>&, bool,
                                       MatrixView<float>);
extern template void gemm_packed_upper(double, const AnySource<double>&, const AnySource<double>&, bool,
                                       MatrixView<double>);
}  // namespace lowrank::detail
#endif

// SPDX-License-Identifier: Apache-2.0
// A symmetric band to tridiagonal form by chasing bulges: the second stage, whose data never leaves the cache.
#pragma once

#include <algorithm>

#include "lowrank/linalg/detail/householder.hpp"

namespace lowrank::detail {

/// Chases bulges through a symmetric band of half-bandwidth B, values only.
///
/// Row i of the band lives in 3·B doubles: columns i − B … i + 2B, both triangles of the diagonal blocks and room for
/// one bulge, so that every step works on dense B×B blocks with rows of whole vectors. Rows beyond n are zeros:
/// reflectors end in zeros there and change nothing, so no step is ever partial.
/// **Cost** 6·n²·B flops, some double counted. **Source** Murata & Horikoshi (1975); Lang, SIAM J. Sci. Comput. 14
/// (1993); Haidar, Ltaief & Dongarra, SC 2011, for steps small enough to stay in cache.
template <int B>
class BulgeChaser {
  static_assert(B % lanes<double> == 0);

 public:
  /// Takes the band from the upper triangle of a row-major matrix.
  explicit BulgeChaser(MatrixView<const double> A) : n_(A.rows()), band_((n_ + 2 * B) * ld) {
    std::fill(band_.begin(), band_.end(), 0.0);
    for (Index i = 0; i < n_; ++i)
      for (Index j = i; j < std::min(n_, i + B + 1); ++j) {
        at(i, j)[0] = A(i, j);
        if (j < i + B) at(j, i)[0] = A(i, j);
      }
  }

  /// Leaves the tridiagonal matrix in d (n) and e (n − 1).
  [[gnu::noinline]] void run(double* d, double* e) {
    // Sweeps of a group run as a wave front, each three blocks behind the one before it, on data still in L1 and L2.
    constexpr Index group = 6, lag = 3;
    for (Index s0 = 0; s0 + 2 < n_; s0 += group) {
      const Index count = std::min(group, n_ - 2 - s0), steps = (n_ - s0 - 2) / B + 1;
      Reflector reflectors[group];
      for (Index time = 0; time < steps + lag * (count - 1); ++time)
        for (Index g = 0; g < count; ++g) {
          const Index s = s0 + g, t = time - lag * g, i = s + 1 + t * B;
          if (t < 0 || i >= n_) continue;
          if (t == 0) start(s, reflectors[g]);
          step(i, reflectors[g]);
        }
    }
    for (Index i = 0; i < n_; ++i) d[i] = at(i, i)[0];
    for (Index i = 0; i + 1 < n_; ++i) e[i] = at(i, i + 1)[0];
  }

 private:
  static constexpr Index ld = 3 * B;
  static constexpr int L = lanes<double>, NV = B / L;
  struct Reflector {
    alignas(64) double v[B];
    double tau;
  };

  double* at(Index i, Index j) { return band_.data() + i * ld + (j - i + B); }

  /// The reflector that annihilates row s beyond its first superdiagonal.
  void start(Index s, Reflector& h) { take(at(s, s + 1), h); }

  static void take(double* row, Reflector& h) {
    std::copy_n(row, B, h.v);
    h.tau = make_reflector(Index(B), h.v);
    std::fill_n(row, B, 0.0);
    row[0] = h.v[0];
    h.v[0] = 1;
  }

  /// Rows and columns [i, i+B) ← H·A·H, the block to their right ← H·C, whose first row then gives the next reflector,
  /// which multiplies C from the right and stays in `h` for the next step.
  [[gnu::noinline]] void step(Index i, Reflector& h) {
    using V = Vec<double>;
    double* const D = at(i, i);
    double* const C = at(i, i + B);
    constexpr Index next = ld - 1;  // from an element to the one below it
    if (h.tau != 0) {
      V y[NV] = {};
      for (int r = 0; r < B; ++r) {
        const double x = h.v[r];
        LOWRANK_UNROLL
        for (int k = 0; k < NV; ++k) y[k] += x * load<V>(D + r * next + k * L);
      }
      alignas(64) double w[B];
      V v[NV], sum{};
      LOWRANK_UNROLL
      for (int k = 0; k < NV; ++k) {
        v[k] = load<V>(h.v + k * L);
        sum += y[k] * v[k];
      }
      const double half = 0.5 * h.tau * h.tau * sum_pairwise(sum);
      LOWRANK_UNROLL
      for (int k = 0; k < NV; ++k) {
        y[k] = h.tau * y[k] - half * v[k];
        store(w + k * L, y[k]);
      }
      for (int r = 0; r < B; ++r) {
        const double a = h.v[r], b = w[r];
        LOWRANK_UNROLL
        for (int k = 0; k < NV; ++k) {
          double* const p = D + r * next + k * L;
          store(p, load<V>(p) - a * y[k] - b * v[k]);
        }
      }
    }
    if (i + B >= n_) return;

    V z[NV] = {};
    if (h.tau != 0)
      for (int r = 0; r < B; ++r) {
        const double x = h.tau * h.v[r];
        LOWRANK_UNROLL
        for (int k = 0; k < NV; ++k) z[k] += x * load<V>(C + r * next + k * L);
      }
    LOWRANK_UNROLL
    for (int k = 0; k < NV; ++k) store(C + k * L, load<V>(C + k * L) - h.v[0] * z[k]);
    Reflector g;
    take(C, g);
    V v[NV];
    LOWRANK_UNROLL
    for (int k = 0; k < NV; ++k) v[k] = load<V>(g.v + k * L);
    // C's first column lies in the next sweep's diagonal block, which is stored in full: keep its mirror image too.
    double* const mirror = at(i + B, i);
    for (int r = 1; r < B; ++r) {
      double* const p = C + r * next;
      const double x = h.v[r];
      V row[NV], sum{};
      LOWRANK_UNROLL
      for (int k = 0; k < NV; ++k) {
        row[k] = load<V>(p + k * L) - x * z[k];
        sum += row[k] * v[k];
      }
      const double y = g.tau * sum_pairwise(sum);
      LOWRANK_UNROLL
      for (int k = 0; k < NV; ++k) store(p + k * L, row[k] - y * v[k]);
      mirror[r] = p[0];
    }
    h = g;
  }

  Index n_;
  Buffer<double> band_;
};

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of a symmetric tridiagonal matrix by implicitly shifted QL and QR sweeps, rotations recorded on request.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "lowrank/linalg/detail/rotations.hpp"

namespace lowrank::detail {

struct NoRotations {
  static void begin_sweep(Index, Index) {}
  static void push(double, double) {}
};

/// c, s and r with c·a + s·b = r, c·b − s·a = 0.
struct PlaneRotation {
  double c, s, r;
  PlaneRotation(double a, double b) {
    // Callers scale, so that squares neither overflow nor underflow where it matters.
    const double sum = a * a + b * b;
    if (sum > 1e-280) [[likely]] {
      r = std::sqrt(sum);
      c = a / r;
      s = b / r;
    } else if ((r = std::hypot(a, b)) > 0) {
      c = a / r;
      s = b / r;
    } else {
      c = 1;
      s = 0;
    }
  }
};

/// One implicitly shifted sweep over the block [lo, hi] of a tridiagonal matrix, that ends at hi (Step 1, QR) or at lo
/// (Step −1, QL): the same text, read from the other end.
template <Index Step, class Rotations>
[[gnu::noinline]] void tridiagonal_sweep(double* diagonal, double* off_diagonal, Index lo, Index hi,
                                         Rotations& rotations) {
  double *const d = diagonal + (Step > 0 ? lo : hi), *const e = off_diagonal + (Step > 0 ? lo : hi - 1);
  const Index last = hi - lo;
  const auto D = [&](Index i) -> double& { return d[i * Step]; };
  const auto E = [&](Index i) -> double& { return e[i * Step]; };
  // Wilkinson's shift, from the end at which the sweep deflates.
  double g = (D(last - 1) - D(last)) / (2 * E(last - 1));
  double r = std::hypot(g, 1.0);
  g = D(0) - D(last) + E(last - 1) / (g + std::copysign(r, g));
  double s = 1, c = 1, p = 0;
  rotations.begin_sweep(Step > 0 ? lo : hi - 1, Step);
  for (Index i = 0; i < last; ++i) {
    const double f = s * E(i), b = c * E(i);
    const PlaneRotation rot(g, f);
    if (i > 0) E(i - 1) = rot.r;
    c = rot.c;
    s = rot.s;
    g = D(i) - p;
    r = (D(i + 1) - g) * s + 2 * c * b;
    p = s * r;
    D(i) = g + p;
    g = c * r - b;
    rotations.push(c, Step > 0 ? s : -s);
  }
  D(last) -= p;
  E(last - 1) = g;
}

/// d (n) becomes the eigenvalues in no order, e (n − 1 used) is destroyed. `rotations` takes the transforms of the rows
/// of the transposed eigenvector matrix; `flush` is called between sweeps, so that it can apply and empty a full queue.
///
/// Returns false when some eigenvalue took more than 50 sweeps, which finite numbers do not.
/// **Throws** nothing. **Cost** about 1.7·n sweeps of some 20·n flops, rotations of vectors not counted.
/// **Numerics** error of a value about eps·‖T‖ times a small factor. Off-diagonals below eps/8·‖T‖ count as zero:
/// neglecting any number of them moves eigenvalues by at most twice the largest.
/// **Source** Dubrulle, Martin & Wilkinson, Numer. Math. 12 (1968); direction by the larger end, as in EISPACK's
/// successors.
template <class Rotations, class Flush>
bool tridiagonal_ql(Index n, double* d, double* e, Rotations& rotations, Flush&& flush) {
  constexpr double eps = std::numeric_limits<double>::epsilon();
  double largest = 0;
  for (Index i = 0; i < n; ++i) largest = std::max(largest, std::abs(d[i]));
  for (Index i = 0; i + 1 < n; ++i) largest = std::max(largest, std::abs(e[i]));
  if (largest == 0) return true;
  if (!std::isfinite(largest)) return false;
  // A power of two, so that scaling costs no bits.
  const double scale = std::ldexp(1.0, std::min(1000, -std::ilogb(largest))), floor = eps / 8;
  for (Index i = 0; i < n; ++i) d[i] *= scale;
  for (Index i = 0; i + 1 < n; ++i) e[i] *= scale;
  const auto negligible = [&](Index i) {
    const double x = std::abs(e[i]);
    return x <= floor || x * x <= eps * eps / 4 * std::abs(d[i]) * std::abs(d[i + 1]);
  };

  Index budget = 50 * n;
  Index end = n - 1;  // rows above `end` are done, from the bottom
  while (end > 0) {
    if (negligible(end - 1)) {
      --end;
      continue;
    }
    Index begin = end - 1;
    while (begin > 0 && !negligible(begin - 1)) --begin;
    // The unreduced block [begin, end]. QL deflates at the top, QR at the bottom: work where the diagonal is smaller.
    Index lo = begin, hi = end;
    const bool ql = std::abs(d[hi]) > std::abs(d[lo]);
    while (lo < hi) {
      if (ql ? negligible(lo) : negligible(hi - 1)) {
        ql ? ++lo : --hi;
        continue;
      }
      // A split in the middle: leave this block and look again.
      Index split = lo;
      while (split < hi && !negligible(split)) ++split;
      if (split < hi) break;
      if (budget-- == 0) return false;
      ql ? tridiagonal_sweep<-1>(d, e, lo, hi, rotations) : tridiagonal_sweep<1>(d, e, lo, hi, rotations);
      flush();
    }
  }
  for (Index i = 0; i < n; ++i) d[i] /= scale;
  return true;
}

}  // namespace lowrank::detail

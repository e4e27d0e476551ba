// SPDX-License-Identifier: Apache-2.0
// Eigenvalues of a symmetric tridiagonal matrix by implicitly shifted QL and QR sweeps, rotations recorded on request.
#pragma once

#include <cmath>
#include <limits>
#include <utility>

#include "lowrank/linalg/rotations.hpp"

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

/// d (n) becomes the eigenvalues in no order, e (n − 1 used) is destroyed. `rotations` takes the transforms of the rows
/// of the transposed eigenvector matrix; `flush` is called between sweeps, so that it can apply and empty a full queue.
///
/// Returns false when some eigenvalue took more than 50 sweeps, which finite numbers do not.
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
      if (ql) {
        double g = (d[lo + 1] - d[lo]) / (2 * e[lo]);
        double r = std::hypot(g, 1.0);
        g = d[hi] - d[lo] + e[lo] / (g + std::copysign(r, g));
        double s = 1, c = 1, p = 0;
        rotations.begin_sweep(hi - 1, -1);
        for (Index i = hi - 1; i >= lo; --i) {
          const double f = s * e[i], b = c * e[i];
          const PlaneRotation rot(g, f);
          if (i + 1 < hi) e[i + 1] = rot.r;
          c = rot.c;
          s = rot.s;
          g = d[i + 1] - p;
          r = (d[i] - g) * s + 2 * c * b;
          p = s * r;
          d[i + 1] = g + p;
          g = c * r - b;
          rotations.push(c, -s);
        }
        d[lo] -= p;
        e[lo] = g;
      } else {
        double g = (d[hi - 1] - d[hi]) / (2 * e[hi - 1]);
        double r = std::hypot(g, 1.0);
        g = d[lo] - d[hi] + e[hi - 1] / (g + std::copysign(r, g));
        double s = 1, c = 1, p = 0;
        rotations.begin_sweep(lo, 1);
        for (Index i = lo; i < hi; ++i) {
          const double f = s * e[i], b = c * e[i];
          const PlaneRotation rot(g, f);
          if (i > lo) e[i - 1] = rot.r;
          c = rot.c;
          s = rot.s;
          g = d[i] - p;
          r = (d[i + 1] - g) * s + 2 * c * b;
          p = s * r;
          d[i] = g + p;
          g = c * r - b;
          rotations.push(c, s);
        }
        d[hi] -= p;
        e[hi - 1] = g;
      }
      flush();
    }
  }
  for (Index i = 0; i < n; ++i) d[i] /= scale;
  return true;
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Singular values of a bidiagonal matrix to high relative accuracy: implicit QR with and without a shift.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "lowrank/linalg/tridiagonal_ql.hpp"

namespace lowrank::detail {

/// The smaller singular value of [f g; 0 h], to a few ulps. **Source** LAPACK's DLAS2.
inline double smaller_singular_value(double f, double g, double h) {
  const double fa = std::abs(f), ga = std::abs(g), ha = std::abs(h), low = std::min(fa, ha), high = std::max(fa, ha);
  if (low == 0) return 0;
  if (ga < high) {
    const double as = 1 + low / high, at = (high - low) / high, au = (ga / high) * (ga / high);
    return low * (2 / (std::sqrt(as * as + au) + std::sqrt(at * at + au)));
  }
  const double au = high / ga;
  if (au == 0) return (low * high) / ga;
  const double as = 1 + low / high, at = (high - low) / high;
  const double c = 1 / (std::sqrt(1 + (as * au) * (as * au)) + std::sqrt(1 + (at * au) * (at * au)));
  return 2 * (low * c) * au;
}

/// B upper bidiagonal with diagonal d (n) and superdiagonal e (n − 1): d becomes the singular values in no order, some
/// negative (flip the right vector). `left` and `right` take rotations of the rows of Uᵀ and Vᵀ; `flush` runs between
/// sweeps.
///
/// Returns false when 50 sweeps a value did not suffice. Entries must be scaled to around 1 by the caller.
/// **Numerics** every value, the smallest too, to relative error about 50·n·eps when `relative`; otherwise
/// off-diagonals below eps/8 of the largest entry count as zero and the error is of order eps·σ₁.
/// **Source** Demmel & Kahan, "Accurate singular values of bidiagonal matrices", SIAM J. Sci. Stat. Comput. 11 (1990).
template <class Left, class Right, class Flush>
bool bidiagonal_qr(Index n, double* d, double* e, bool relative, Left& left, Right& right, Flush&& flush) {
  constexpr double eps = std::numeric_limits<double>::epsilon(), tol = 16 * eps;
  double largest = 0;
  for (Index i = 0; i < n; ++i) largest = std::max(largest, std::abs(d[i]));
  for (Index i = 0; i + 1 < n; ++i) largest = std::max(largest, std::abs(e[i]));
  if (!std::isfinite(largest)) return false;
  if (largest == 0) return true;
  double floor = eps / 8 * largest;
  if (relative && n > 0) {
    // A lower bound of σ_n, Demmel & Kahan (2.4); off-diagonals far below it do not matter even to σ_n.
    double mu = std::abs(d[0]), smallest = mu;
    for (Index i = 1; i < n && smallest > 0; ++i) {
      mu = std::abs(d[i]) * (mu / (mu + std::abs(e[i - 1])));
      smallest = std::min(smallest, mu);
    }
    floor = std::max(tol * smallest / std::sqrt(double(n)), 1e-290);
  }

  Index budget = 50 * n, hi = n - 1, previous_lo = -1, previous_hi = -1;
  bool down = true;
  while (hi > 0) {
    if (std::abs(e[hi - 1]) <= floor) {
      e[hi - 1] = 0;
      --hi;
      continue;
    }
    Index lo = hi - 1;
    double top = std::max({std::abs(d[hi]), std::abs(d[lo]), std::abs(e[lo])});
    while (lo > 0 && std::abs(e[lo - 1]) > floor) {
      --lo;
      top = std::max({top, std::abs(d[lo]), std::abs(e[lo])});
    }
    if (lo > 0) e[lo - 1] = 0;
    // A fresh block is chased from its larger end to its smaller one; a known block keeps its direction.
    if (lo > previous_hi || hi < previous_lo) down = std::abs(d[lo]) >= std::abs(d[hi]);
    previous_lo = lo;
    previous_hi = hi;

    // Demmel & Kahan's convergence criteria, which preserve relative accuracy, and their estimate of the smallest
    // value.
    double smallest = 0;
    if (down) {
      if (std::abs(e[hi - 1]) <= tol * std::abs(d[hi])) {
        e[hi - 1] = 0;
        continue;
      }
      double mu = std::abs(d[lo]);
      smallest = mu;
      bool split = false;
      for (Index i = lo; i < hi && !split; ++i) {
        if (std::abs(e[i]) <= tol * mu) {
          e[i] = 0;
          split = true;
        } else {
          mu = std::abs(d[i + 1]) * (mu / (mu + std::abs(e[i])));
          smallest = std::min(smallest, mu);
        }
      }
      if (split) continue;
    } else {
      if (std::abs(e[lo]) <= tol * std::abs(d[lo])) {
        e[lo] = 0;
        continue;
      }
      double mu = std::abs(d[hi]);
      smallest = mu;
      bool split = false;
      for (Index i = hi - 1; i >= lo && !split; --i) {
        if (std::abs(e[i]) <= tol * mu) {
          e[i] = 0;
          split = true;
        } else {
          mu = std::abs(d[i]) * (mu / (mu + std::abs(e[i])));
          smallest = std::min(smallest, mu);
        }
      }
      if (split) continue;
    }
    if (budget-- == 0) return false;

    double shift = 0;
    if (!relative || double(n) * tol * (smallest / top) > eps) {
      const double end = std::abs(down ? d[lo] : d[hi]);
      shift =
          down ? smaller_singular_value(d[hi - 1], e[hi - 1], d[hi]) : smaller_singular_value(d[lo], e[lo], d[lo + 1]);
      if (end == 0 || (shift / end) * (shift / end) < eps) shift = 0;
    }

    if (shift == 0 && down) {
      double c = 1, s = 0, oc = 1, os = 0;
      left.begin_sweep(lo, 1);
      right.begin_sweep(lo, 1);
      for (Index i = lo; i < hi; ++i) {
        const PlaneRotation r(d[i] * c, e[i]);
        c = r.c;
        s = r.s;
        if (i > lo) e[i - 1] = os * r.r;
        const PlaneRotation l(oc * r.r, d[i + 1] * s);
        oc = l.c;
        os = l.s;
        d[i] = l.r;
        right.push(c, s);
        left.push(oc, os);
      }
      const double h = d[hi] * c;
      d[hi] = h * oc;
      e[hi - 1] = h * os;
    } else if (shift == 0) {
      double c = 1, s = 0, oc = 1, os = 0;
      left.begin_sweep(hi - 1, -1);
      right.begin_sweep(hi - 1, -1);
      for (Index i = hi; i > lo; --i) {
        const PlaneRotation r(d[i] * c, e[i - 1]);
        c = r.c;
        s = r.s;
        if (i < hi) e[i] = os * r.r;
        const PlaneRotation l(oc * r.r, d[i - 1] * s);
        oc = l.c;
        os = l.s;
        d[i] = l.r;
        left.push(c, -s);
        right.push(oc, -os);
      }
      const double h = d[lo] * c;
      d[lo] = h * oc;
      e[lo] = h * os;
    } else if (down) {
      double f = (std::abs(d[lo]) - shift) * (std::copysign(1.0, d[lo]) + shift / d[lo]), g = e[lo];
      left.begin_sweep(lo, 1);
      right.begin_sweep(lo, 1);
      for (Index i = lo; i < hi; ++i) {
        const PlaneRotation r(f, g);
        if (i > lo) e[i - 1] = r.r;
        f = r.c * d[i] + r.s * e[i];
        e[i] = r.c * e[i] - r.s * d[i];
        g = r.s * d[i + 1];
        d[i + 1] *= r.c;
        const PlaneRotation l(f, g);
        d[i] = l.r;
        f = l.c * e[i] + l.s * d[i + 1];
        d[i + 1] = l.c * d[i + 1] - l.s * e[i];
        if (i + 1 < hi) {
          g = l.s * e[i + 1];
          e[i + 1] *= l.c;
        }
        right.push(r.c, r.s);
        left.push(l.c, l.s);
      }
      e[hi - 1] = f;
    } else {
      double f = (std::abs(d[hi]) - shift) * (std::copysign(1.0, d[hi]) + shift / d[hi]), g = e[hi - 1];
      left.begin_sweep(hi - 1, -1);
      right.begin_sweep(hi - 1, -1);
      for (Index i = hi; i > lo; --i) {
        const PlaneRotation r(f, g);
        if (i < hi) e[i] = r.r;
        f = r.c * d[i] + r.s * e[i - 1];
        e[i - 1] = r.c * e[i - 1] - r.s * d[i];
        g = r.s * d[i - 1];
        d[i - 1] *= r.c;
        const PlaneRotation l(f, g);
        d[i] = l.r;
        f = l.c * e[i - 1] + l.s * d[i - 1];
        d[i - 1] = l.c * d[i - 1] - l.s * e[i - 1];
        if (i > lo + 1) {
          g = l.s * e[i - 2];
          e[i - 2] *= l.c;
        }
        left.push(r.c, -r.s);
        right.push(l.c, -l.s);
      }
      e[lo] = f;
    }
    flush();
  }
  return true;
}

}  // namespace lowrank::detail

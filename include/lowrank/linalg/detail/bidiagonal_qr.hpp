// SPDX-License-Identifier: Apache-2.0
// Singular values of a bidiagonal matrix to high relative accuracy: implicit QR with and without a shift.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "lowrank/linalg/detail/tridiagonal_ql.hpp"

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

/// An unreduced block of a bidiagonal matrix, read from the end a chase starts at: the upper end downward (Step 1), or
/// the lower end upward (Step −1). Reversed and transposed, an upper bidiagonal matrix is one again, so that one text
/// serves both directions; they differ in which side a rotation belongs to, and in its sign.
template <Index Step>
struct BidiagonalBlock {
  double *d, *e;
  Index last;       ///< elements 0 … last of the diagonal, 0 … last − 1 of the superdiagonal
  Index first_row;  ///< where the sweep's first rotation acts

  BidiagonalBlock(double* diagonal, double* superdiagonal, Index lo, Index hi)
      : d(diagonal + (Step > 0 ? lo : hi)),
        e(superdiagonal + (Step > 0 ? lo : hi - 1)),
        last(hi - lo),
        first_row(Step > 0 ? lo : hi - 1) {}

  [[nodiscard]] double& D(Index i) const { return d[i * Step]; }
  [[nodiscard]] double& E(Index i) const { return e[i * Step]; }

  /// Demmel & Kahan's convergence criteria, which preserve relative accuracy: true when an off-diagonal was set to
  /// zero. Else `smallest` is their estimate of the block's smallest singular value.
  [[gnu::noinline]] bool deflate(double tol, double& smallest) const {
    if (std::abs(E(last - 1)) <= tol * std::abs(D(last))) {
      E(last - 1) = 0;
      return true;
    }
    double mu = smallest = std::abs(D(0));
    for (Index i = 0; i < last; ++i) {
      if (std::abs(E(i)) <= tol * mu) {
        E(i) = 0;
        return true;
      }
      mu = std::abs(D(i + 1)) * (mu / (mu + std::abs(E(i))));
      smallest = std::min(smallest, mu);
    }
    return false;
  }

  /// The smaller singular value of the last 2×2, or 0 when subtracting its square would change nothing.
  [[nodiscard]] double shift() const {
    const double shift = smaller_singular_value(D(last - 1), E(last - 1), D(last)), start = std::abs(D(0));
    return start == 0 || (shift / start) * (shift / start) < std::numeric_limits<double>::epsilon() ? 0 : shift;
  }

  /// One implicit QR sweep without a shift, which loses no relative accuracy.
  template <class Left, class Right>
  [[gnu::noinline]] void chase_without_shift(Left& left, Right& right) const {
    double c = 1, oc = 1, os = 0;
    begin(left, right);
    for (Index i = 0; i < last; ++i) {
      const PlaneRotation r(D(i) * c, E(i));
      c = r.c;
      if (i > 0) E(i - 1) = os * r.r;
      const PlaneRotation l(oc * r.r, D(i + 1) * r.s);
      oc = l.c;
      os = l.s;
      D(i) = l.r;
      push(left, right, r, l);
    }
    const double h = D(last) * c;
    D(last) = h * oc;
    E(last - 1) = h * os;
  }

  /// One implicit QR sweep with a shift.
  template <class Left, class Right>
  [[gnu::noinline]] void chase(double shift, Left& left, Right& right) const {
    double f = (std::abs(D(0)) - shift) * (std::copysign(1.0, D(0)) + shift / D(0)), g = E(0);
    begin(left, right);
    for (Index i = 0; i < last; ++i) {
      const PlaneRotation r(f, g);
      if (i > 0) E(i - 1) = r.r;
      f = r.c * D(i) + r.s * E(i);
      E(i) = r.c * E(i) - r.s * D(i);
      g = r.s * D(i + 1);
      D(i + 1) *= r.c;
      const PlaneRotation l(f, g);
      D(i) = l.r;
      f = l.c * E(i) + l.s * D(i + 1);
      D(i + 1) = l.c * D(i + 1) - l.s * E(i);
      if (i + 1 < last) {
        g = l.s * E(i + 1);
        E(i + 1) *= l.c;
      }
      push(left, right, r, l);
    }
    E(last - 1) = f;
  }

 private:
  template <class Left, class Right>
  void begin(Left& left, Right& right) const {
    left.begin_sweep(first_row, Step);
    right.begin_sweep(first_row, Step);
  }
  template <class Left, class Right>
  static void push(Left& left, Right& right, const PlaneRotation& r, const PlaneRotation& l) {
    if constexpr (Step > 0) {
      right.push(r.c, r.s);
      left.push(l.c, l.s);
    } else {
      left.push(r.c, -r.s);
      right.push(l.c, -l.s);
    }
  }
};

/// The off-diagonal below which nothing matters: eps/8 of the largest entry, or with `relative` what does not even
/// change σ_n.
inline double bidiagonal_floor(Index n, const double* d, const double* e, double largest, bool relative, double tol) {
  if (!relative) return std::numeric_limits<double>::epsilon() / 8 * largest;
  // A lower bound of σ_n, Demmel & Kahan (2.4); off-diagonals far below it do not matter even to σ_n.
  double mu = std::abs(d[0]), smallest = mu;
  for (Index i = 1; i < n && smallest > 0; ++i) {
    mu = std::abs(d[i]) * (mu / (mu + std::abs(e[i - 1])));
    smallest = std::min(smallest, mu);
  }
  return std::max(tol * smallest / std::sqrt(double(n)), 1e-290);
}

/// B upper bidiagonal with diagonal d (n) and superdiagonal e (n − 1): d becomes the singular values in no order, some
/// negative (flip the right vector). `left` and `right` take rotations of the rows of Uᵀ and Vᵀ; `flush` runs between
/// sweeps.
///
/// Returns false when 50 sweeps a value did not suffice. Entries must be scaled to around 1 by the caller.
/// **Throws** nothing. **Cost** about 2·n sweeps of some 30·n flops, rotations of vectors not counted.
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
  const double floor = bidiagonal_floor(n, d, e, largest, relative, tol);

  Index budget = 50 * n, hi = n - 1, previous_lo = -1, previous_hi = -1;
  bool down = true;
  // False when the budget is spent; a sweep, or an off-diagonal less, otherwise.
  const auto advance = [&](const auto& block, double top) {
    double smallest = 0;
    if (block.deflate(tol, smallest)) return true;
    if (budget-- == 0) return false;
    // Where the shift would cost the smallest values their digits there is none.
    const bool may_shift = !relative || double(n) * tol * (smallest / top) > eps;
    const double shift = may_shift ? block.shift() : 0;
    shift == 0 ? block.chase_without_shift(left, right) : block.chase(shift, left, right);
    flush();
    return true;
  };
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
    if (!(down ? advance(BidiagonalBlock<1>(d, e, lo, hi), top) : advance(BidiagonalBlock<-1>(d, e, lo, hi), top)))
      return false;
  }
  return true;
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Long sequences of plane rotations, recorded by an iteration on a few diagonals and applied to vectors later, all at
// once.
#pragma once

#include <cmath>
#include <vector>

#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/simd.hpp"

namespace lowrank::detail {

/// Rotations of neighbouring rows in the order they were made. Rotation (i, c, s) replaces
/// (row i, row i+1) by (c·row i + s·row i+1, c·row i+1 − s·row i).
template <class T>
class RotationQueue {
 public:
  void begin_sweep(Index first_row, Index step) { sweeps_.push_back({Index(cs_.size()), 0, first_row, step}); }
  /// The next rotation of the sweep begun last acts on the row `step` further than the previous one did.
  void push(double c, double s) {
    cs_.push_back({T(c), T(s)});
    ++sweeps_.back().count;
  }
  [[nodiscard]] Index size() const noexcept { return Index(cs_.size()); }
  void clear() noexcept {
    sweeps_.clear();
    cs_.clear();
  }

  /// Applies everything recorded to the rows of Z (row-major, `cols` wide, `ld` apart), then forgets it.
  ///
  /// Columns do not see each other, so strips of them go to different threads, and within a strip every row stays in
  /// cache while a row is carried in registers from one rotation to the next: one load and one store for six flops a
  /// scalar.
  void apply(T* Z, Index cols, Index ld) {
    constexpr Index strip = 4 * lanes<T>;
    parallel_ranges((cols + strip - 1) / strip, 1, [&](Index begin, Index end) {
      for (Index b = begin; b < end; ++b) {
        const Index j = b * strip;
        if (cols - j >= strip)
          strip_of<4>(Z + j, ld);
        else
          tail(Z + j, cols - j, ld);
      }
    });
    clear();
  }

 private:
  struct Rotation {
    T c, s;
  };
  struct Sweep {
    Index begin, count, first_row, step;
  };

  template <int NV>
  void strip_of(T* z, Index ld) const {
    constexpr int L = lanes<T>;
    for (const Sweep& sweep : sweeps_) {
      const Rotation* r = cs_.data() + sweep.begin;
      if (sweep.count == 0) continue;
      Vec<T> carry[NV];
      if (sweep.step > 0) {
        T* row = z + sweep.first_row * ld;
        for (int v = 0; v < NV; ++v) carry[v] = load<Vec<T>>(row + v * L);
        for (Index k = 0; k < sweep.count; ++k, row += ld) {
          const T c = r[k].c, s = r[k].s;
          LOWRANK_UNROLL
          for (int v = 0; v < NV; ++v) {
            const Vec<T> next = load<Vec<T>>(row + ld + v * L);
            store(row + v * L, c * carry[v] + s * next);
            carry[v] = c * next - s * carry[v];
          }
        }
        for (int v = 0; v < NV; ++v) store(row + v * L, carry[v]);
      } else {
        T* row = z + (sweep.first_row + 1) * ld;
        for (int v = 0; v < NV; ++v) carry[v] = load<Vec<T>>(row + v * L);
        for (Index k = 0; k < sweep.count; ++k, row -= ld) {
          const T c = r[k].c, s = r[k].s;
          LOWRANK_UNROLL
          for (int v = 0; v < NV; ++v) {
            const Vec<T> previous = load<Vec<T>>(row - ld + v * L);
            store(row + v * L, c * carry[v] - s * previous);
            carry[v] = c * previous + s * carry[v];
          }
        }
        for (int v = 0; v < NV; ++v) store(row + v * L, carry[v]);
      }
    }
  }
  void tail(T* z, Index cols, Index ld) const {
    for (const Sweep& sweep : sweeps_) {
      Index i = sweep.first_row;
      for (Index k = 0; k < sweep.count; ++k, i += sweep.step) {
        const Rotation r = cs_[std::size_t(sweep.begin + k)];
        T *x = z + i * ld, *y = x + ld;
        for (Index j = 0; j < cols; ++j) {
          const T a = x[j], b = y[j];
          x[j] = r.c * a + r.s * b;
          y[j] = r.c * b - r.s * a;
        }
      }
    }
  }

  std::vector<Rotation> cs_;
  std::vector<Sweep> sweeps_;
};

}  // namespace lowrank::detail

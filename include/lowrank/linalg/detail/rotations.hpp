// SPDX-License-Identifier: Apache-2.0
// Long sequences of plane rotations, recorded by an iteration on a few diagonals and applied to vectors later, all at
// once.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

/// Rotations of neighbouring rows in the order they were made. Rotation (i, c, s) replaces
/// (row i, row i+1) by (c·row i + s·row i+1, c·row i+1 − s·row i).
///
/// **Throws** std::bad_alloc only. **Cost** apply: 6 flops a rotation and column, a load and a store of every row for
/// each sweep, in cache. **Numerics** rotations are rounded to T once; their bits do not depend on the number of
/// threads.
/// **Source** the wavefront idea, by whole sweeps in place of pairs: Van Zee, van de Geijn & Quintana-Ortí,
/// "Restructuring the tridiagonal and bidiagonal QR algorithms for performance", ACM TOMS 40 (2014).
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
  /// Columns do not see each other, so strips of them go to different threads. A strip is copied out and back: rows a
  /// power of two apart would fall into the same few cache sets. Within it a row is carried in registers from one
  /// rotation to the next: one load and one store for six flops a scalar.
  void apply(T* Z, Index cols, Index ld) {
    Index low = std::numeric_limits<Index>::max(), high = 0;
    for (const Sweep& sweep : sweeps_) {
      if (sweep.count == 0) continue;
      const Index last = sweep.first_row + (sweep.count - 1) * sweep.step;
      low = std::min({low, sweep.first_row, last});
      high = std::max({high, sweep.first_row + 1, last + 1});
    }
    if (low < high)
      parallel_ranges((cols + strip - 1) / strip, 1, [&](Index begin, Index end) {
        Buffer<T> copy((high - low + 1) * strip);
        for (Index b = begin; b < end; ++b) {
          const Index j = b * strip, width = std::min(strip, cols - j);
          for (Index i = low; i <= high; ++i) {
            T* const row = copy.data() + (i - low) * strip;
            std::copy_n(Z + i * ld + j, width, row);
            std::fill(row + width, row + strip, T(0));
          }
          apply_to_strip(copy.data(), low);
          for (Index i = low; i <= high; ++i) std::copy_n(copy.data() + (i - low) * strip, width, Z + i * ld + j);
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

  static constexpr int L = lanes<T>, NV = 4;
  static constexpr Index strip = NV * L;

  /// Row i of the strip is at z + (i − low)·strip.
  void apply_to_strip(T* z, Index low) const {
    for (const Sweep& sweep : sweeps_) {
      if (sweep.count == 0) continue;
      const Rotation* r = cs_.data() + sweep.begin;
      const bool forward = sweep.step > 0;
      const Index next = forward ? strip : -strip;
      // Backwards the carried row is the lower one of each pair, and the rotation turns the other way.
      const T sign = forward ? T(1) : T(-1);
      T* row = z + (sweep.first_row - low + (forward ? 0 : 1)) * strip;
      Vec<T> carry[NV];
      LOWRANK_UNROLL
      for (int v = 0; v < NV; ++v) carry[v] = load<Vec<T>>(row + v * L);
      for (Index k = 0; k < sweep.count; ++k, row += next) {
        const T c = r[k].c, s = sign * r[k].s;
        LOWRANK_UNROLL
        for (int v = 0; v < NV; ++v) {
          const Vec<T> other = load<Vec<T>>(row + next + v * L);
          store(row + v * L, c * carry[v] + s * other);
          carry[v] = c * other - s * carry[v];
        }
      }
      LOWRANK_UNROLL
      for (int v = 0; v < NV; ++v) store(row + v * L, carry[v]);
    }
  }

  std::vector<Rotation> cs_;
  std::vector<Sweep> sweeps_;
};

}  // namespace lowrank::detail

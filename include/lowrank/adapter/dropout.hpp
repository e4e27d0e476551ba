// SPDX-License-Identifier: Apache-2.0
// Dropout whose mask is a function of (seed, call, element): the backward pass makes it again instead of keeping it.
#pragma once

#include <cmath>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/core/threads.hpp"

namespace lowrank::detail {

/// Inverted dropout of probability p, resolved to 2^-16: element kept with probability 1 − p, then scaled by 1/(1 − p).
class DropoutMask {
 public:
  DropoutMask(double p, std::uint64_t seed, std::uint64_t call)
      : rng_(seed, call),
        dropped_(std::uint32_t(std::lround(p * 65536.0))),
        scale_(1.0 / (1.0 - double(dropped_) / 65536.0)) {}

  /// f(i, j, factor) for every element, factor 0 or 1/(1 − p). One random number of 64 bits serves four elements.
  template <class F>
  void for_each(Index rows, Index cols, F&& f) const {
    const Index quads = (cols + 3) / 4;
    parallel_ranges(rows, std::max<Index>(1, 16384 / std::max<Index>(cols, 1)), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i)
        for (Index q = 0; q < quads; ++q) {
          std::uint64_t bits = rng_.bits(std::uint64_t(i * quads + q));
          for (Index j = 4 * q; j < std::min(4 * q + 4, cols); ++j, bits >>= 16)
            f(i, j, (bits & 0xffffU) < dropped_ ? 0.0 : scale_);
        }
    });
  }

 private:
  CounterRng rng_;
  std::uint32_t dropped_;
  double scale_;
};

}  // namespace lowrank::detail

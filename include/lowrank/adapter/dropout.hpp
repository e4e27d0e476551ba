// SPDX-License-Identifier: Apache-2.0
// Dropout whose mask is a function of (seed, layer, workspace, call, element): the backward pass makes it again instead
// of keeping it.
#pragma once

#include <atomic>
#include <cmath>
#include <string_view>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/core/threads.hpp"

namespace lowrank {
namespace detail {

/// The probability in units of 2⁻¹⁶, the resolution of the masks.
inline std::uint32_t dropout_units(double p) { return std::uint32_t(std::lround(p * 65536.0)); }

/// p, once it is known to be a probability that the masks can express. **Throws** ArgumentError outside [0, 1), and for
/// a positive p that rounds to dropping nothing or everything.
inline double checked_dropout(const char* where, double p) {
  if (!(p >= 0 && p < 1)) throw ArgumentError(text(where, ": dropout must lie in [0, 1), got ", p));
  if (p > 0 && (dropout_units(p) == 0 || dropout_units(p) == 65536))
    throw ArgumentError(
        text(where, ": dropout is resolved to 2^-16; it must be 0 or lie in [2^-17, 1 - 2^-17), got ", p));
  return p;
}

/// The seed of the masks of one workspace of one layer. Mixed rather than added up: seeds and names that a caller has
/// combined already must not cancel, nor meet the streams of the initialisers.
inline std::uint64_t dropout_seed(std::uint64_t seed, std::string_view layer, std::int64_t workspace) {
  const auto mix = [](std::uint64_t x) {  // the finaliser of SplitMix64, a bijection
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
  };
  std::uint64_t name = 0xcbf29ce484222325U;  // FNV-1a
  for (const char c : layer) name = (name ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  constexpr std::uint64_t step = 0x9e3779b97f4a7c15U;
  return mix(mix(mix(seed + step) + name + step) + std::uint64_t(workspace) + step);
}

/// Numbers handed out 0, 1, …, also to several threads at once; moves with its owner.
class Numbering {
 public:
  Numbering() = default;
  Numbering(Numbering&& other) noexcept : next_(other.next_.load()) {}
  Numbering& operator=(Numbering&& other) noexcept {
    next_ = other.next_.load();
    return *this;
  }
  [[nodiscard]] std::int64_t next() noexcept { return next_++; }

 private:
  std::atomic<std::int64_t> next_{0};
};

}  // namespace detail

/// Inverted dropout of probability p, resolved to 2⁻¹⁶: element kept with probability 1 − p, then scaled by 1/(1 − p).
/// A function of (seed, call, element), so that the same three give the same mask, and nothing is kept.
class DropoutMask {
 public:
  /// **Throws** ArgumentError for p outside [0, 1), and for a positive p that rounds to dropping nothing or everything.
  DropoutMask(double p, std::uint64_t seed, std::uint64_t call)
      : rng_(seed, call),
        dropped_(detail::dropout_units(detail::checked_dropout("DropoutMask", p))),
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

}  // namespace lowrank

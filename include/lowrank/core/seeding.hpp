// SPDX-License-Identifier: Apache-2.0
// The seeds of those who name none: one sequence for the process, the same in every run.
#pragma once

#include <atomic>
#include <cstdint>

namespace lowrank {

namespace detail {

/// The mixing step of SplitMix64: a bijection of 64 bits in which every bit of the result depends on every bit of x.
constexpr std::uint64_t mix_bits(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}
inline constexpr std::uint64_t golden_step = 0x9e3779b97f4a7c15U;  ///< 2^64/φ, odd: all 2^64 states are visited
constexpr std::uint64_t first_seed_state(std::uint64_t seed) { return mix_bits(seed + golden_step); }

inline std::atomic<std::uint64_t> seed_state{first_seed_state(0)};

}  // namespace detail

/// Starts the sequence of default seeds again, at a place that `seed` decides; a program starts as after
/// `seed_everything(0)`.
///
/// What draws random numbers and is given no seed takes the next of this sequence (`fresh_seed`): two layers made one
/// after the other start differently, and the same program gives the same bits in every run. A seed that is given
/// neither moves the sequence nor depends on it.
/// **Numerics** thread-safe. Threads that initialise layers at the same time get different seeds in an order that is
/// not theirs to know: give each layer its seed then, say `CounterRng(run_seed).bits(layer)`.
inline void seed_everything(std::uint64_t seed) noexcept {
  detail::seed_state.store(detail::first_seed_state(seed), std::memory_order_relaxed);
}

/// The next seed of the sequence that `seed_everything` starts.
///
/// **Numerics** no seed comes twice in 2^64 draws; thread-safe, without a lock.
/// **Source** SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
inline std::uint64_t fresh_seed() noexcept {
  return detail::mix_bits(detail::seed_state.fetch_add(detail::golden_step, std::memory_order_relaxed) +
                          detail::golden_step);
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// A fast checksum of bytes: XXH64, to tell whether a weight is the one it was. It guards against mistakes, not against
// somebody who wants a collision.
#pragma once

#include <algorithm>
#include <bit>

#include "lowrank/io/file.hpp"

namespace lowrank::io {

/// XXH64 of bytes that come piece by piece: the same as of all of them at once, however they are cut.
///
/// **Cost** one pass; faster than memory is read. **Numerics** the same on every machine this library supports (little
/// endian).
/// **Source** the XXH64 specification, github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
class Xxh64 {
 public:
  explicit Xxh64(std::uint64_t seed = 0) noexcept : v_{seed + P1 + P2, seed + P2, seed, seed - P1}, seed_(seed) {}

  void add(Bytes bytes) noexcept {
    total_ += bytes.size();
    if (kept_ > 0) {  // fill up the stripe that was begun
      const std::size_t n = std::min(sizeof rest_ - kept_, bytes.size());
      if (n > 0) std::memcpy(rest_ + kept_, bytes.data(), n);
      kept_ += n;
      bytes = bytes.subspan(n);
      if (kept_ < sizeof rest_) return;
      stripe(rest_);
      kept_ = 0;
    }
    for (; bytes.size() >= sizeof rest_; bytes = bytes.subspan(sizeof rest_)) stripe(bytes.data());
    kept_ = bytes.size();
    if (kept_ > 0) std::memcpy(rest_, bytes.data(), kept_);
  }
  [[nodiscard]] std::uint64_t value() const noexcept {
    std::uint64_t h = seed_ + P5;
    if (total_ >= sizeof rest_) {
      h = std::rotl(v_[0], 1) + std::rotl(v_[1], 7) + std::rotl(v_[2], 12) + std::rotl(v_[3], 18);
      for (const std::uint64_t lane : v_) h = (h ^ round(0, lane)) * P1 + P4;
    }
    h += total_;
    const std::byte* p = rest_;
    std::size_t left = kept_;
    const auto take = [&]<class U>(U word) {
      std::memcpy(&word, p, sizeof word);
      p += sizeof word;
      left -= sizeof word;
      return std::uint64_t(word);
    };
    while (left >= 8) h = std::rotl(h ^ round(0, take(std::uint64_t{})), 27) * P1 + P4;
    if (left >= 4) h = std::rotl(h ^ take(std::uint32_t{}) * P1, 23) * P2 + P3;
    while (left > 0) h = std::rotl(h ^ take(std::uint8_t{}) * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
  }

 private:
  static constexpr std::uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9,
                                 P4 = 0x85EBCA77C2B2AE63, P5 = 0x27D4EB2F165667C5;
  static std::uint64_t round(std::uint64_t lane, std::uint64_t word) noexcept {
    return std::rotl(lane + word * P2, 31) * P1;
  }
  void stripe(const std::byte* p) noexcept {
    for (std::uint64_t& lane : v_) {
      std::uint64_t word = 0;
      std::memcpy(&word, p, sizeof word);
      lane = round(lane, word);
      p += sizeof word;
    }
  }
  std::uint64_t v_[4], seed_, total_ = 0;
  std::byte rest_[32] = {};
  std::size_t kept_ = 0;
};

/// XXH64 of the bytes. **Cost**, **Numerics** as Xxh64.
inline std::uint64_t xxh64(Bytes bytes, std::uint64_t seed = 0) noexcept {
  Xxh64 h(seed);
  h.add(bytes);
  return h.value();
}

inline std::uint64_t xxh64(std::string_view text, std::uint64_t seed = 0) noexcept {
  return xxh64(std::as_bytes(std::span(text.data(), text.size())), seed);
}

}  // namespace lowrank::io

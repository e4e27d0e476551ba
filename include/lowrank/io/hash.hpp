// SPDX-License-Identifier: Apache-2.0
// A fast checksum of bytes: XXH64, to tell whether a weight is the one it was. It guards against mistakes, not against
// somebody who wants a collision.
#pragma once

#include <bit>

#include "lowrank/io/file.hpp"

namespace lowrank::io {

/// XXH64 of the bytes.
///
/// **Cost** one pass; faster than memory is read. **Numerics** the same on every machine this library supports (little
/// endian).
/// **Source** the XXH64 specification, github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
inline std::uint64_t xxh64(Bytes bytes, std::uint64_t seed = 0) noexcept {
  constexpr std::uint64_t P1 = 0x9E3779B185EBCA87, P2 = 0xC2B2AE3D27D4EB4F, P3 = 0x165667B19E3779F9,
                          P4 = 0x85EBCA77C2B2AE63, P5 = 0x27D4EB2F165667C5;
  const auto round = [](std::uint64_t lane, std::uint64_t word) { return std::rotl(lane + word * P2, 31) * P1; };
  const std::byte* p = bytes.data();
  std::size_t left = bytes.size();
  const auto take = [&]<class U>(U word) {
    std::memcpy(&word, p, sizeof word);
    p += sizeof word;
    left -= sizeof word;
    return std::uint64_t(word);
  };
  std::uint64_t h = seed + P5;
  if (left >= 32) {
    std::uint64_t v[4] = {seed + P1 + P2, seed + P2, seed, seed - P1};
    while (left >= 32)
      for (std::uint64_t& lane : v) lane = round(lane, take(std::uint64_t{}));
    h = std::rotl(v[0], 1) + std::rotl(v[1], 7) + std::rotl(v[2], 12) + std::rotl(v[3], 18);
    for (const std::uint64_t lane : v) h = (h ^ round(0, lane)) * P1 + P4;
  }
  h += bytes.size();
  while (left >= 8) h = std::rotl(h ^ round(0, take(std::uint64_t{})), 27) * P1 + P4;
  if (left >= 4) h = std::rotl(h ^ take(std::uint32_t{}) * P1, 23) * P2 + P3;
  while (left > 0) h = std::rotl(h ^ take(std::uint8_t{}) * P5, 11) * P1;
  h = (h ^ h >> 33) * P2;
  h = (h ^ h >> 29) * P3;
  return h ^ h >> 32;
}

inline std::uint64_t xxh64(std::string_view text, std::uint64_t seed = 0) noexcept {
  return xxh64(std::as_bytes(std::span(text.data(), text.size())), seed);
}

}  // namespace lowrank::io

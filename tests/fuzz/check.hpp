// SPDX-License-Identifier: Apache-2.0
// What the fuzz targets assert: a parser either throws IoError or returns something that holds its promises.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>

#include "lowrank/io/file.hpp"

#define LOWRANK_PROMISE(condition)                                                 \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: broken: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

namespace lowrank::fuzz {

inline io::Bytes bytes(const std::uint8_t* data, std::size_t size) { return std::as_bytes(std::span(data, size)); }
inline io::Bytes bytes(const std::string& s) { return std::as_bytes(std::span(s.data(), s.size())); }
inline std::string text(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

/// Runs the parser; false when it refused with an IoError. Any other exception escapes and is a finding.
template <class F>
bool accepted(F&& parse) {
  try {
    parse();
    return true;
  } catch (const IoError& e) {
    LOWRANK_PROMISE(e.what()[0] != '\0');
    return false;
  }
}

}  // namespace lowrank::fuzz

// SPDX-License-Identifier: Apache-2.0
// Files made of strings, and the check that an IoError says what it should.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <span>
#include <sstream>
#include <string>

#include "lowrank/io/file.hpp"
#include "support/compare.hpp"
#include "support/temp_dir.hpp"

namespace test {

inline void put(const std::string& path, const std::string& bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary) << bytes;
}
inline std::string get(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream s;
  s << in.rdbuf();
  return s.str();
}
inline std::size_t files_in(const std::string& directory) {
  std::size_t n = 0;
  for ([[maybe_unused]] const auto& e : std::filesystem::directory_iterator(directory)) ++n;
  return n;
}

inline lowrank::io::Bytes bytes_of(const std::string& s) { return std::as_bytes(std::span(s.data(), s.size())); }

/// `size` as eight little-endian bytes, then the text: the front of a safetensors file.
inline std::string with_length(const std::string& header, std::uint64_t size) {
  return std::string(reinterpret_cast<const char*>(&size), 8) + header;
}
inline std::string safetensors_bytes(const std::string& header, const std::string& data = {}) {
  return with_length(header, header.size()) + data;
}

/// f() must throw an E whose message holds every one of the given parts.
template <class E = lowrank::IoError, class F>
void check_error(F&& f, std::initializer_list<const char*> parts) {
  try {
    f();
  } catch (const E& e) {
    for (const char* part : parts) {
      const std::string said = e.what(), expected = part;
      INFO("message: ", said, "; expected in it: ", expected);
      CHECK(said.find(expected) != std::string::npos);
    }
    return;
  }
  FAIL("nothing was thrown");
}

}  // namespace test

// SPDX-License-Identifier: Apache-2.0
// Words for the messages of the two programs.
#pragma once

#include <cstdio>
#include <string>
#include <string_view>
#include <type_traits>

namespace common {

inline std::string to_text(std::string_view s) { return std::string(s); }
inline std::string to_text(const std::string& s) { return s; }
inline std::string to_text(const char* s) { return s; }
inline std::string to_text(char c) { return std::string(1, c); }
inline std::string to_text(bool b) { return b ? "true" : "false"; }
template <class N>
requires std::is_integral_v<N> std::string to_text(N n) { return std::to_string(n); }
/// Nine digits, which name every float: 0.001, 1e-12, nan.
inline std::string to_text(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", x);
  return buffer;
}

/// Strings and numbers joined into one message.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (out.append(to_text(parts)), ...);
  return out;
}

/// "3x5", as the messages of the library write a shape.
template <class I>
std::string shape_text(I rows, I cols) {
  return text(rows, "x", cols);
}

/// Whether `value` is one of `list`, which is any range of strings.
template <class List>
bool is_one_of(std::string_view value, const List& list) {
  for (const auto& entry : list)
    if (value == entry) return true;
  return false;
}

/// What follows the last dot: "model.layers.0.q_proj" gives "q_proj".
inline std::string_view last_component(std::string_view name) {
  const auto dot = name.rfind('.');
  return dot == std::string_view::npos ? name : name.substr(dot + 1);
}

}  // namespace common

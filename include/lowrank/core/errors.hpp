// SPDX-License-Identifier: Apache-2.0
// The exceptions lowrank throws, and the one way their messages are put together.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace lowrank {

/// Base of everything this library throws: catch this one to catch them all.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Sizes that do not fit together, or a stride the library does not support.
class ShapeError : public Error {
 public:
  using Error::Error;
};

/// An argument outside its domain: rank 0, dropout 1, a negative learning rate, ...
class ArgumentError : public Error {
 public:
  using Error::Error;
};

/// NaN or infinity where only finite numbers make sense.
class NonFiniteError : public ArgumentError {
 public:
  using ArgumentError::ArgumentError;
};

/// A file that cannot be read, written, or believed. Names the path and, where there is one, the offending key.
class IoError : public Error {
 public:
  IoError(std::string path, std::string key, const std::string& what)
      : Error(path + (key.empty() ? "" : ": '" + key + "'") + ": " + what),
        path_(std::move(path)),
        key_(std::move(key)) {}
  IoError(std::string path, const std::string& what) : IoError(std::move(path), {}, what) {}

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] const std::string& key() const noexcept { return key_; }

 private:
  std::string path_, key_;
};

namespace detail {

inline std::string to_text(std::string_view s) { return std::string(s); }
inline std::string to_text(const char* s) { return s; }
inline std::string to_text(bool b) { return b ? "true" : "false"; }
template <class N>
requires std::is_integral_v<N> std::string to_text(N n) { return std::to_string(n); }
inline std::string to_text(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.9g", x);
  return buffer;
}

/// Strings and numbers joined into one message; `<sstream>` would cost every user's compile time.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (out.append(to_text(parts)), ...);
  return out;
}

/// "3×5", the way every message of the library writes a shape.
template <class I>
std::string shape_text(I rows, I cols) {
  return text(rows, "x", cols);
}

/// Throws ShapeError unless the shape that came is the one expected.
/// `where` names the public function, `what` the argument: "LoraLinear::forward", "Y".
template <class I>
void expect_shape(const char* where, const char* what, I rows, I cols, I want_rows, I want_cols) {
  if (rows != want_rows || cols != want_cols) [[unlikely]]
    throw ShapeError(
        text(where, ": ", what, " must be ", shape_text(want_rows, want_cols), ", got ", shape_text(rows, cols)));
}

}  // namespace detail
}  // namespace lowrank

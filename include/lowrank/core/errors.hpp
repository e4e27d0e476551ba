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

/// One part of a message: a string or a number, by value or by view, so that one function puts all messages together.
class TextPart {
 public:
  template <class P>
  TextPart(const P& part) {  // NOLINT(google-explicit-constructor): made by text() from whatever it is given
    if constexpr (std::is_convertible_v<const P&, std::string_view>)
      string_ = part;
    else if constexpr (std::is_same_v<P, bool>)
      string_ = part ? "true" : "false";
    else if constexpr (std::is_integral_v<P> && std::is_signed_v<P>)
      set(Kind::integer).integer_ = part;
    else if constexpr (std::is_integral_v<P>)
      set(Kind::natural).natural_ = part;
    else
      set(Kind::real).real_ = double(part);
  }
  void append_to(std::string& out) const {
    char buffer[32];
    int n = 0;
    switch (kind_) {
      case Kind::string:
        out.append(string_);
        return;
      case Kind::integer:
        n = std::snprintf(buffer, sizeof buffer, "%lld", integer_);
        break;
      case Kind::natural:
        n = std::snprintf(buffer, sizeof buffer, "%llu", natural_);
        break;
      case Kind::real:
        n = std::snprintf(buffer, sizeof buffer, "%.9g", real_);
        break;
    }
    out.append(buffer, std::size_t(n));
  }

 private:
  enum class Kind { string, integer, natural, real };
  TextPart& set(Kind kind) {
    kind_ = kind;
    return *this;
  }
  Kind kind_ = Kind::string;
  std::string_view string_;
  union {
    long long integer_;
    unsigned long long natural_;
    double real_ = 0;
  };
};

[[gnu::cold, gnu::noinline]] inline std::string join(const TextPart* parts, std::size_t count) {
  std::string out;
  for (std::size_t i = 0; i < count; ++i) parts[i].append_to(out);
  return out;
}

/// Strings and numbers joined into one message; `<sstream>` would cost every user's compile time. Cold and out of line,
/// like everything on the way to an exception: what a message costs must not be paid where nothing is wrong.
template <class... Parts>
[[gnu::cold, gnu::noinline]] std::string text(const Parts&... parts) {
  const TextPart list[] = {TextPart(parts)...};
  return join(list, sizeof...(parts));
}

/// "3×5", the way every message of the library writes a shape.
template <class I>
[[gnu::cold]] std::string shape_text(I rows, I cols) {
  return text(rows, "x", cols);
}

[[noreturn, gnu::cold, gnu::noinline]] inline void throw_shape(const char* where, const char* what, long long rows,
                                                               long long cols, long long want_rows,
                                                               long long want_cols) {
  throw ShapeError(
      text(where, ": ", what, " must be ", shape_text(want_rows, want_cols), ", got ", shape_text(rows, cols)));
}

/// Throws ShapeError unless the shape that came is the one expected.
/// `where` names the public function, `what` the argument: "LoraLinear::forward", "Y".
template <class I>
void expect_shape(const char* where, const char* what, I rows, I cols, I want_rows, I want_cols) {
  if (rows != want_rows || cols != want_cols) [[unlikely]]
    throw_shape(where, what, rows, cols, want_rows, want_cols);
}

}  // namespace detail
}  // namespace lowrank

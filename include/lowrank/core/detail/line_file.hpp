// SPDX-License-Identifier: Apache-2.0
// LineFile: whole lines appended to a file of our own, and to no other.
#pragma once

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include "lowrank/core/errors.hpp"

namespace lowrank::detail {

/// How the first line of the files one kind of writer makes reads.
struct FirstLine {
  std::string text;
  bool whole = true;  ///< the line is `text`; else it begins with it

  /// Whether a file whose first line is this one is of that kind. A line without its newline is one that was being
  /// written: then a beginning of `text` will do, and cutting it off loses nothing that is not written again.
  [[nodiscard]] bool fits(std::string_view line, bool ended) const {
    if (!ended && text.starts_with(line)) return true;
    return whole ? line == text : line.starts_with(text);
  }
};

/// Lines appended to a file so that a crash leaves whole lines: each block is one write, and a torn last line of an
/// earlier run is cut off when the file is opened again.
///
/// **Throws** IoError: the file cannot be opened or written, is not regular, or is not empty and begins with another
/// line than `first`; it is then left as it was.
class LineFile {
 public:
  LineFile(std::string path, const FirstLine& first) : path_(std::move(path)) {
    namespace fs = std::filesystem;
    std::error_code error;
    const fs::file_status status = fs::status(path_, error);
    if (fs::exists(status)) {
      if (!fs::is_regular_file(status)) throw IoError(path_, "is not a regular file");
      const std::uintmax_t size = fs::file_size(path_, error);
      if (error) fail("cannot stat", error.message());
      const std::uintmax_t kept = size > 0 ? whole_lines(first, size) : 0;
      if (kept < size) fs::resize_file(path_, kept, error);
      if (error) fail("cannot cut off the torn last line", error.message());
      empty_ = kept == 0;
    }
    file_.reset(std::fopen(path_.c_str(), "ab"));
    if (!file_) fail("cannot open for appending", std::strerror(errno));
    std::setvbuf(file_.get(), nullptr, _IONBF, 0);  // a block is one write, and nothing waits for a later one
  }

  [[nodiscard]] bool empty() const noexcept { return empty_; }
  void append(std::string_view block) {
    if (std::fwrite(block.data(), 1, block.size(), file_.get()) != block.size())
      fail("cannot append", std::strerror(errno));
    empty_ = empty_ && block.empty();
  }

 private:
  struct Close {
    void operator()(std::FILE* f) const noexcept { std::fclose(f); }
  };
  using File = std::unique_ptr<std::FILE, Close>;

  /// The length of the file up to its last newline, if its first line is ours.
  [[nodiscard]] std::uintmax_t whole_lines(const FirstLine& first, std::uintmax_t size) const {
    const File in(std::fopen(path_.c_str(), "rb"));
    if (!in) fail("cannot open", std::strerror(errno));
    char buffer[4096];
    std::string line(buffer, std::fread(buffer, 1, sizeof buffer, in.get()));
    const std::size_t end = line.find('\n');
    const bool ended = end != std::string::npos;
    if (ended) line.resize(end);
    if (!first.fits(line, ended)) {
      constexpr std::size_t most = 80;
      std::string got(line, 0, most);
      for (char& c : got)
        if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) c = '?';
      throw IoError(path_, text("is not a file to append to: its first line must ", first.whole ? "be" : "begin with",
                                " '", first.text, "', got '", got, line.size() > most ? "…'" : "'"));
    }
    for (std::uintmax_t at = size; at > 0;) {
      const std::uintmax_t from = at > sizeof buffer ? at - sizeof buffer : 0;
      const auto n = std::size_t(at - from);
      if (std::fseek(in.get(), long(from), SEEK_SET) != 0 || std::fread(buffer, 1, n, in.get()) != n)
        fail("cannot read", std::strerror(errno));
      const std::size_t newline = std::string_view(buffer, n).rfind('\n');
      if (newline != std::string_view::npos) return from + newline + 1;
      at = from;
    }
    return 0;
  }
  [[noreturn]] void fail(const char* what, const std::string& why) const {
    throw IoError(path_, text(what, ": ", why));
  }

  std::string path_;
  File file_;
  bool empty_ = true;
};

}  // namespace lowrank::detail

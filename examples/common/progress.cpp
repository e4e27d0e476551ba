// SPDX-License-Identifier: Apache-2.0
#include "common/progress.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>

#include "common/text.hpp"

namespace common {
namespace {

std::atomic<bool> bar_is_open{false};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

template <class... Args>
std::string format(const char* pattern, Args... args) {
  char buffer[128];
  std::snprintf(buffer, sizeof buffer, pattern, args...);
  return buffer;
}

/// A redrawn line must not wrap: "\r" goes back to the start of the last row only.
std::size_t columns() {
  winsize size{};
  if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 80;
  return size.ws_col;
}

bool begins_character(char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }  // of UTF-8

/// The first `width` characters.
std::string cut(const std::string& s, std::size_t width) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < s.size(); ++i)
    if (begins_character(s[i]) && ++count > width) return s.substr(0, i);
  return s;
}

}  // namespace

std::string size_text(std::uint64_t bytes) {
  static constexpr const char* units[] = {"B", "KB", "MB", "GB", "TB"};
  auto x = double(bytes);
  int u = 0;
  while (x >= 999.95 && u < 4) {
    x /= 1000;
    ++u;
  }
  return format(u == 0 ? "%.0f %s" : "%.1f %s", x, units[u]);
}

std::string time_text(double seconds) {
  if (seconds < 59.95) return format("%.1f s", seconds);
  const auto whole = static_cast<long long>(seconds + 0.5);
  if (whole < 3600) return format("%lld:%02lld", whole / 60, whole % 60);
  return format("%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60, whole % 60);
}

void clear_progress() {
  if (bar_is_open.exchange(false)) std::fputs("\r\033[K", stderr);
}

Progress::Progress(ProgressOptions options)
    : o_(std::move(options)),
      terminal_(!o_.quiet && ::isatty(STDERR_FILENO) != 0),
      items_(o_.items_before),
      work_(o_.work_before),
      start_(now()) {}

Progress::~Progress() { clear_progress(); }

double Progress::seconds() const { return now() - start_; }

void Progress::update(std::uint64_t items, std::uint64_t work, std::string_view detail) {
  items_ = items;
  work_ = work;
  if (o_.quiet) return;
  if (terminal_) {
    const double t = now();
    if (t - drawn_ < 0.1) return;  // ten redraws a second are smooth
    drawn_ = t;
    const std::string text = "\r" + cut(line(true, false, detail), columns() - 1) + "\033[K";
    bar_is_open = true;
    std::fwrite(text.data(), 1, text.size(), stderr);
    std::fflush(stderr);
    return;
  }
  if (o_.plain_lines == 0) return;
  const std::uint64_t all = o_.work > 0 ? o_.work : o_.items, done = o_.work > 0 ? work_ : items_;
  const int due = all == 0 ? 0 : int(double(done) / double(all) * o_.plain_lines);
  if (due <= lines_ || due >= o_.plain_lines) return;  // the last line is finish()'s
  lines_ = due;
  std::fprintf(stderr, "%s\n", line(false, false, detail).c_str());
}

void Progress::finish(std::string_view detail) {
  clear_progress();
  if (terminal_ || (!o_.quiet && o_.plain_lines > 0)) std::fprintf(stderr, "%s\n", line(false, true, detail).c_str());
}

std::string Progress::line(bool bar, bool last, std::string_view detail) const {
  const bool by_items = o_.work == 0;
  const double all = double(by_items ? o_.items : o_.work), done = double(by_items ? items_ : work_);
  const double here = done - double(by_items ? o_.items_before : o_.work_before), elapsed = std::max(seconds(), 1e-9);
  const double share = all > 0 ? std::min(1.0, done / all) : 1;
  std::string s = o_.label;
  if (bar) {
    constexpr std::size_t width = 20;
    const auto full = std::size_t(share * width);
    s += text(" [", std::string(full, '#'), std::string(width - full, '.'), "]");
  } else {
    s += ':';
  }
  s += o_.items > 0 ? text(" ", items_, " of ", o_.items, o_.item_name.empty() ? "" : " ", o_.item_name)
                    : format(" %.0f %%", 100 * share);
  if (here > 0) {
    s += o_.work > 0 && o_.work_name == "bytes"
             ? text(", ", size_text(std::uint64_t(here / elapsed)), "/s")
             : format(here / elapsed < 9.95 ? ", %.2g " : ", %.0f ", here / elapsed) +
                   (o_.work > 0            ? o_.work_name
                    : o_.item_name.empty() ? ""
                                           : o_.item_name) +
                   "/s";
    s += last ? ", took " + time_text(elapsed) : ", " + time_text((all - done) / here * elapsed) + " left";
  } else if (last) {
    s += ", took " + time_text(elapsed);
  }
  if (!detail.empty()) s += text("  ", detail);
  return s;
}

}  // namespace common

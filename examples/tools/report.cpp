// SPDX-License-Identifier: Apache-2.0
// Reports and progress of the `lowrank` program.
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "tool.hpp"

namespace lowrank::tool {
namespace {
template <class... Args>
std::string format(const char* pattern, Args... args) {
  char buffer[128];
  std::snprintf(buffer, sizeof buffer, pattern, args...);
  return buffer;
}
}  // namespace

CLI::App* add_command(CLI::App& app, const std::string& name, const std::string& description, Common& common) {
  CLI::App* sub = app.add_subcommand(name, description);
  sub->add_flag("--json", common.json, "Print the report as JSON");
  sub->add_flag("-q,--quiet", common.quiet, "No progress, no notes");
  return sub;
}

void print(const Common& common, const Json& report, const std::string& text) {
  const std::string out = common.json ? report.dump(2, ' ', false, Json::error_handler_t::replace) + "\n" : text;
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

void note(const Common& common, const std::string& line) {
  if (!common.quiet) std::fprintf(stderr, "lowrank: %s\n", line.c_str());
}

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
  if (seconds < 60) return format("%.1f s", seconds);
  const int whole = int(seconds + 0.5);
  return format("%d:%02d", whole / 60, whole % 60);
}

Progress::Progress(const Common& common, std::string what, std::uint64_t total_bytes)
    : what_(std::move(what)),
      total_(total_bytes),
      visible_(!common.quiet && ::isatty(STDERR_FILENO) != 0),
      start_(std::chrono::steady_clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (visible_) std::fprintf(stderr, "\r\033[K");
}

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void Progress::advance(std::uint64_t bytes, const std::string& current) {
  done_ += bytes;
  const auto now = std::chrono::steady_clock::now();
  if (!visible_ || (done_ < total_ && now - last_ < std::chrono::milliseconds(100))) return;
  last_ = now;
  const double share = total_ > 0 ? std::min(1.0, double(done_) / double(total_)) : 1.0, elapsed = seconds();
  std::string bar(24, '.');
  std::fill_n(bar.begin(), std::size_t(share * 24), '#');
  std::string name = current.size() > 40 ? "…" + current.substr(current.size() - 39) : current;
  std::fprintf(stderr, "\r\033[K%s [%s] %3.0f%% %s left, %s/s %s", what_.c_str(), bar.c_str(), 100 * share,
               share > 0 ? time_text(elapsed / share - elapsed).c_str() : "?",
               size_text(std::uint64_t(double(done_) / std::max(elapsed, 1e-9))).c_str(), name.c_str());
  std::fflush(stderr);
}

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// The handlers of SIGINT and SIGTERM. What runs in them calls nothing but async-signal-safe functions.
#include "interrupt.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <string_view>

namespace lowrank::tool {
namespace {

constexpr unsigned patience = 1;  // seconds between a signal and the end, whatever the work is

std::atomic<int> caught_signal{0}, sets_in_motion{0};  // the latter counts what Finishing guards
static_assert(std::atomic<int>::is_always_lock_free, "handlers may use lock-free atomics only");
bool on_terminal = false;

// Two texts, so that a handler never reads one that is being changed.
std::array<std::array<char, 1024>, 2> texts{};
std::atomic<int> current_text{0};

// Directories to remove if they are empty, deepest first; read by a handler, so in fixed places.
std::array<std::array<char, 4096>, 16> new_directories{};
std::atomic<int> new_directory_count{0};

void remove_empty_directories() noexcept {
  const int count = new_directory_count;
  for (int i = 0; i < count; ++i) ::rmdir(new_directories[std::size_t(i)].data());
}

void write_all(std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return;
    text.remove_prefix(std::size_t(n));
  }
}

/// Removes what this process is writing under the name of an io::OutputFile that was not committed. Its own table of
/// files knows them: no list to keep, and none to lock in a handler.
void remove_unfinished() noexcept {
  constexpr std::string_view mark = ".partial-", unique = "XXXXXX";
  for (int fd = 0; fd < 4096; ++fd) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY) continue;  // an input may bear such a name
    char link[32] = "/proc/self/fd/";
    char digits[8];
    int n = 0;
    for (int rest = fd; n == 0 || rest > 0; rest /= 10) digits[n++] = char('0' + rest % 10);
    std::reverse_copy(digits, digits + n, link + std::strlen(link));
    char path[4096];
    const ssize_t length = ::readlink(link, path, sizeof path - 1);
    if (length < ssize_t(mark.size() + unique.size())) continue;
    path[length] = '\0';
    const std::string_view name(path, std::size_t(length));
    if (name.substr(name.size() - mark.size() - unique.size(), mark.size()) == mark) ::unlink(path);
  }
}

extern "C" void note_signal(int signal) {
  const int saved = errno;
  caught_signal = signal;
  struct sigaction usual {};
  usual.sa_handler = SIG_DFL;
  for (const int s : {SIGINT, SIGTERM}) ::sigaction(s, &usual, nullptr);
  if (sets_in_motion != 0)
    write_all("lowrank: the work is done and its files are being put in place; once more ends that at once\n");
  ::alarm(patience);
  errno = saved;
}

extern "C" void out_of_patience(int) {
  const int saved = errno;
  if (sets_in_motion != 0) {
    ::alarm(patience);
    errno = saved;
    return;
  }
  remove_unfinished();
  remove_empty_directories();
  say_interrupted();
  ::_exit(Interrupted{caught_signal}.exit_code());
}

}  // namespace

void watch_for_interrupts() {
  on_terminal = ::isatty(STDERR_FILENO) != 0;
  struct sigaction action {};
  action.sa_flags = SA_RESTART;  // reads and writes under way go on
  action.sa_handler = out_of_patience;
  ::sigaction(SIGALRM, &action, nullptr);
  action.sa_handler = note_signal;
  for (const int s : {SIGINT, SIGTERM}) {
    struct sigaction before {};
    ::sigaction(s, nullptr, &before);
    if (before.sa_handler != SIG_IGN) ::sigaction(s, &action, nullptr);
  }
}

int interrupted() noexcept { return caught_signal; }

void throw_if_interrupted() {
  if (const int signal = caught_signal; signal != 0) throw Interrupted{signal};
}

void describe_interruption(const std::string& command, const std::string& files) {
  const int other = 1 - current_text;
  auto& text = texts[std::size_t(other)];
  const std::string line = " in " + command + ": " + files;
  text.fill('\0');
  std::copy_n(line.begin(), std::min(line.size(), text.size() - 1), text.begin());
  current_text = other;
}

void say_interrupted() noexcept {
  // One write: the ranks of an MPI run say theirs at the same time.
  std::array<char, 1200> line{};
  std::size_t length = 0;
  const auto add = [&](std::string_view part) {
    length += part.copy(line.data() + length, std::min(part.size(), line.size() - length));
  };
  if (on_terminal) add("\r\033[K");  // over the progress bar
  add(caught_signal == SIGTERM ? "lowrank: interrupted (SIGTERM)" : "lowrank: interrupted (SIGINT)");
  add(texts[std::size_t(int(current_text))].data());
  add("\n");
  write_all({line.data(), length});
}

Finishing::Finishing() noexcept { ++sets_in_motion; }
Finishing::~Finishing() { --sets_in_motion; }

NewDirectories::NewDirectories(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code failed;
  fs::path p = fs::absolute(path, failed).lexically_normal();
  if (!p.has_filename()) p = p.parent_path();  // it was written with a slash at its end
  for (int i = 0; i < int(new_directories.size()) && !fs::exists(p, failed) && p != p.parent_path();
       p = p.parent_path()) {
    const std::string name = p.string();
    auto& place = new_directories[std::size_t(i)];
    if (name.size() >= place.size()) continue;
    place.fill('\0');
    std::copy(name.begin(), name.end(), place.begin());
    new_directory_count = ++i;
  }
}
NewDirectories::~NewDirectories() {
  remove_empty_directories();
  new_directory_count = 0;
}

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
#include "common/outputs.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "common/text.hpp"
#include "lowrank/core/errors.hpp"

namespace common {
namespace {

namespace fs = std::filesystem;
constexpr std::string_view mark = ".partial-";
constexpr std::size_t unique = 6;  // of mkdtemp and mkostemp

[[noreturn]] void fail(const std::string& path, std::string_view what) {
  throw lowrank::IoError(path, text(what, ": ", std::strerror(errno)));
}

/// "model" of "model.partial-a1b2c3"; "" of other names.
std::string name_before_mark(const std::string& name) {
  if (name.size() <= mark.size() + unique) return "";
  const std::size_t at = name.size() - mark.size() - unique;
  return std::string_view(name).substr(at, mark.size()) == mark ? name.substr(0, at) : "";
}

/// Where a file system has neither locks nor leases, time has to tell: an hour without a change.
bool is_old(const fs::path& path) {
  std::error_code error;
  const auto changed = fs::last_write_time(path, error);
  return !error && fs::file_time_type::clock::now() - changed > std::chrono::hours(1);
}

/// Whether no process is writing it. A folder's writer holds a lock on it; a file's has it open, and then no lease on
/// it is to be had.
bool is_abandoned(const fs::path& path, bool folder) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return false;
  const bool had = folder ? ::flock(fd, LOCK_EX | LOCK_NB) == 0 : ::fcntl(fd, F_SETLEASE, F_WRLCK) == 0;
  const bool held = !had && (errno == EAGAIN || errno == EWOULDBLOCK);
  if (had && !folder) ::fcntl(fd, F_SETLEASE, F_UNLCK);
  ::close(fd);
  return had || (!held && is_old(path));
}

/// Swaps two paths in one step; false where the file system cannot.
bool swap_paths(const std::string& a, const std::string& b) {
#if defined(RENAME_EXCHANGE)
  return ::renameat2(AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE) == 0;
#else
  return (void)a, (void)b, false;
#endif
}

}  // namespace

StagedFolder::StagedFolder(std::string path) : path_(std::move(path)) {
  while (path_.size() > 1 && path_.back() == '/') path_.pop_back();
  const fs::path parent = fs::path(path_).parent_path();
  std::error_code error;
  if (!parent.empty()) fs::create_directories(parent, error);
  if (error) throw lowrank::IoError(parent.string(), "cannot be created: " + error.message());
  if (fs::is_symlink(fs::symlink_status(path_, error)))
    throw lowrank::IoError(path_, "is a symbolic link; name the folder itself as the output");
  temporary_ = text(path_, mark, "XXXXXX");
  if (::mkdtemp(temporary_.data()) == nullptr) {
    temporary_.clear();
    fail(path_, "cannot create");
  }
  const mode_t mask = ::umask(0);  // mkdtemp made it private; it gets the mode any new folder gets
  ::umask(mask);
  ::chmod(temporary_.c_str(), 0777 & ~mask);
  lock_ = ::open(temporary_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (lock_ >= 0) ::flock(lock_, LOCK_EX | LOCK_NB);
}

StagedFolder::~StagedFolder() {
  std::error_code ignored;
  if (!temporary_.empty()) fs::remove_all(temporary_, ignored);
  if (lock_ >= 0) ::close(lock_);
}

void StagedFolder::commit() {
  if (::fsync(lock_) != 0 && errno == EIO) fail(temporary_, "cannot be written");
  struct stat info {};
  if (::lstat(path_.c_str(), &info) != 0) {
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "cannot be put in place");
    temporary_.clear();
    return;
  }
  if (!S_ISDIR(info.st_mode)) throw lowrank::IoError(path_, "is not a folder, cannot be replaced by one");
  if (swap_paths(temporary_, path_)) return;  // the old one now bears the name that the destructor removes
  const std::string old = temporary_ + ".old";
  if (::rename(path_.c_str(), old.c_str()) != 0) fail(path_, "cannot be moved out of the way");
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int why = errno;
    ::rename(old.c_str(), path_.c_str());
    errno = why;
    fail(path_, "cannot be put in place");
  }
  temporary_ = old;
}

std::vector<std::string> remove_leftovers(const std::string& directory,
                                          const std::function<bool(const std::string&)>& is_ours) {
  std::vector<std::string> removed;
  std::error_code error;
  std::vector<fs::directory_entry> found;
  for (const auto& entry : fs::directory_iterator(directory, error)) found.push_back(entry);
  for (const auto& entry : found) {
    const std::string name = name_before_mark(entry.path().filename().string());
    if (name.empty() || !is_ours(name)) continue;
    const fs::file_status status = entry.symlink_status(error);
    if (error || (!fs::is_directory(status) && !fs::is_regular_file(status))) continue;
    if (!is_abandoned(entry.path(), fs::is_directory(status))) continue;
    fs::remove_all(entry.path(), error);
    if (!error) removed.push_back(entry.path().string());
  }
  std::sort(removed.begin(), removed.end());
  return removed;
}

void refuse_existing(const std::string& path, const std::string& option) {
  std::error_code ignored;
  if (fs::exists(fs::symlink_status(path, ignored)))
    throw lowrank::IoError(path, "exists already; " + option + " replaces it");
}

std::string absolute(const std::string& path) {
  std::error_code error;
  const fs::path whole = fs::absolute(path, error).lexically_normal();
  if (error) return path;
  return whole.has_filename() || !whole.has_parent_path() ? whole.string() : whole.parent_path().string();
}

}  // namespace common

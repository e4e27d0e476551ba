// SPDX-License-Identifier: Apache-2.0
// Outputs before they are written.
#include "outputs.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string_view>
#include <vector>

#include "lowrank/io/changed_base.hpp"
#include "lowrank/io/file.hpp"

namespace lowrank::tool {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view partial_mark = ".partial-";
constexpr std::size_t unique = 6;  // letters that io::OutputFile puts behind the partial_mark

bool is_partial(const std::string& name) {
  return name.size() > partial_mark.size() + unique &&
         std::string_view(name).substr(name.size() - partial_mark.size() - unique, partial_mark.size()) == partial_mark;
}

/// Whether nobody holds the lock that an io::OutputFile has on its file while it lives.
bool is_abandoned(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return false;
  struct stat info {};
  const bool free = ::fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && ::flock(fd, LOCK_EX | LOCK_NB) == 0;
  ::close(fd);
  return free;
}

}  // namespace

void expect_writable(const std::string& file) {
  if (!file.empty() && file != "-") io::OutputFile probe(file);  // made beside it, and gone again
}

void expect_writable_directory(const std::string& directory, const char* option) {
  std::error_code ignored;
  if (!fs::is_directory(directory, ignored))
    throw IoError(directory, std::string("is no directory; ") + option + " wants one that is there");
  expect_writable((fs::path(directory) / "writable").string());
}

void remove_leftovers(const Common& common, std::initializer_list<std::string> outputs) {
  for (const std::string& output : outputs) {
    if (output.empty() || output == "-") continue;
    std::error_code failed;
    const fs::path path(output);
    const bool whole = fs::is_directory(path, failed);
    const fs::path parent = path.has_parent_path() ? path.parent_path() : fs::path("."), where = whole ? path : parent;
    const std::string start = whole ? std::string() : path.filename().string() + std::string(partial_mark);
    std::vector<std::string> found;
    for (const fs::directory_entry& e : fs::directory_iterator(where, failed)) {
      const std::string name = e.path().filename().string();
      if (is_partial(name) && name.starts_with(start) && is_abandoned(e.path().string()))
        found.push_back(e.path().string());
    }
    for (const std::string& name : found)
      if (fs::remove(name, failed)) note(common, "removed " + name + ", which a killed run had left half-written");
  }
}

void expect_no_changed_base(const std::string& directory) {
  const std::string base = (fs::path(directory) / "base").string();
  if (const auto changed = io::read_changed_base(base))
    throw IoError(base, "is the base that an earlier " + (changed->method.empty() ? "run" : "init " + changed->method) +
                            " changed, and would pass for the base of this adapter: remove it, or name another output");
}

std::string base_name(const std::string& name) {
  std::error_code ignored;
  if (name.empty() || !fs::exists(name, ignored)) return name;
  std::string text = fs::absolute(name).lexically_normal().string();
  while (text.size() > 1 && text.back() == '/') text.pop_back();
  return text;
}

}  // namespace lowrank::tool

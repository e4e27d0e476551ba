// SPDX-License-Identifier: Apache-2.0
// Outputs before they are written.
#include "outputs.hpp"

#include <filesystem>

#include "common/outputs.hpp"
#include "lowrank/io/changed_base.hpp"
#include "lowrank/io/file.hpp"

namespace lowrank::tool {
namespace fs = std::filesystem;
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
    std::error_code ignored;
    const fs::path path(output);
    const bool directory = fs::is_directory(path, ignored);
    const std::string name = path.filename().string(), where = directory                ? output
                                                               : path.has_parent_path() ? path.parent_path().string()
                                                                                        : ".";
    for (const std::string& removed :
         common::remove_leftovers(where, [&](const std::string& of) { return directory || of == name; }))
      note(common, "removed " + removed + ", which a killed run had left half-written");
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
  return common::absolute(name);
}

}  // namespace lowrank::tool

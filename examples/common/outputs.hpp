// SPDX-License-Identifier: Apache-2.0
// Folders that appear whole or not at all, and what killed runs left half-written.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace common {

/// A folder written beside its destination, as PATH.partial-XXXXXX, and moved there by commit().
///
/// Until then, and whatever goes wrong, what stood at PATH stays as it is; commit() swaps the two in one step where the
/// file system can, and removes the old one after. A lock tells it from the leftover of a run that was killed. Throws
/// lowrank::IoError from the constructor and commit().
class StagedFolder {
 public:
  explicit StagedFolder(std::string path);
  StagedFolder(const StagedFolder&) = delete;
  StagedFolder& operator=(const StagedFolder&) = delete;
  /// Removes what was not committed.
  ~StagedFolder();
  /// Where to write.
  [[nodiscard]] const std::string& folder() const { return temporary_; }
  void commit();

 private:
  std::string path_, temporary_;
  int lock_ = -1;
};

/// Removes NAME.partial-XXXXXX, files and folders, from a directory where `is_ours(NAME)`, unless a process is writing
/// them; gives the removed paths in order. Nothing where there is no such directory.
std::vector<std::string> remove_leftovers(const std::string& directory,
                                          const std::function<bool(const std::string&)>& is_ours);

/// Throws lowrank::IoError when there is anything at `path`, a dangling link too: it says that `option` allows to
/// replace it.
void refuse_existing(const std::string& path, const std::string& option);

/// The path from the root of the file system, with links kept: it means the same from anywhere.
std::string absolute(const std::string& path);

}  // namespace common

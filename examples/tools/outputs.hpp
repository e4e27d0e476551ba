// SPDX-License-Identifier: Apache-2.0
// What is looked at before the work: whether its outputs can be written, and what earlier runs left in their place.
#pragma once

#include <initializer_list>
#include <string>

#include "tool.hpp"

namespace lowrank::tool {

/// Throws IoError now for what would fail after the work: a file that cannot be written. A text that is empty or "-" is
/// no file.
void expect_writable(const std::string& file);
/// The same for a directory that has to be there.
void expect_writable_directory(const std::string& directory, const char* option);

/// Removes what a killed run left half-written in these directories, or beside these files, and names it on stderr.
/// What another process is writing at the moment stays.
void remove_leftovers(const Common& common, std::initializer_list<std::string> outputs);

/// Throws IoError where `directory` is to get an adapter of the original base and holds the changed base of an earlier
/// `init` in base/: who finds the two together would take them for one.
void expect_no_changed_base(const std::string& directory);

/// A name for adapter_config.json: a path that leads somewhere becomes absolute, any other text stays as it is, for it
/// is the name of a model.
std::string base_name(const std::string& name);

}  // namespace lowrank::tool

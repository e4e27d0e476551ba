// SPDX-License-Identifier: Apache-2.0
// What a subcommand registers, prints and notes.
#include <cstdio>

#include "common/errors.hpp"
#include "tool.hpp"

namespace lowrank::tool {

CLI::App* add_command(CLI::App& app, const std::string& name, const std::string& description, Common& common) {
  CLI::App* sub = app.add_subcommand(name, description);
  sub->add_flag("--json", common.json, "Print the report as JSON");
  sub->add_flag("-q,--quiet", common.quiet, "No progress, no notes");
  return sub;
}

void print(const Common& common, const Json& report, const std::string& text) {
  const std::string out = common.json ? report.dump(2, ' ', false, Json::error_handler_t::replace) + "\n" : text;
  common::clear_progress();
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

void note(const Common& common, const std::string& line) {
  if (!common.quiet) common::note("lowrank", line);
}

}  // namespace lowrank::tool

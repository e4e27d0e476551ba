// SPDX-License-Identifier: Apache-2.0
// What CLI11 says about a command line, in the words both programs use.
#pragma once

#include <CLI/CLI.hpp>
#include <charconv>
#include <limits>
#include <string>
#include <system_error>
#include <vector>

#include "common/errors.hpp"
#include "common/text.hpp"

namespace common {

/// Check of an option's whole number, also of one that no 64 bits hold, for which CLI11 takes the nearest.
inline CLI::Validator whole_number(long long low = std::numeric_limits<long long>::min(),
                                   long long high = std::numeric_limits<long long>::max()) {
  return {[=](std::string& given) -> std::string {
            long long value = 0;
            const auto [end, error] = std::from_chars(given.data(), given.data() + given.size(), value);
            if (error == std::errc() && end == given.data() + given.size() && value >= low && value <= high) return {};
            std::string range;
            if (low > std::numeric_limits<long long>::min()) range += text(" from ", low);
            if (high < std::numeric_limits<long long>::max()) range += text(" to ", high);
            return text("expected a whole number", range, ", got ", given);
          },
          ""};
}

/// The line for a command line that CLI11 refused: the option or subcommand that was most likely meant when one is
/// unknown, whatever else is missing because of it; else CLI11's own words.
inline std::string explain(const CLI::App& app, const CLI::ParseError& error) {
  const std::string see = " (see " + app.get_name() + " --help)";
  const auto parsed = app.get_subcommands();
  const CLI::App& command = parsed.empty() ? app : *parsed.front();
  // A misspelt option often leaves another one missing, so CLI11 complains about that one first.
  const bool complete = error.get_exit_code() == int(CLI::ExitCodes::ExtrasError) ||
                        error.get_exit_code() == int(CLI::ExitCodes::RequiredError);
  for (const std::string& left : complete ? app.remaining(true) : std::vector<std::string>{}) {
    const bool is_option = left.size() > 1 && left[0] == '-';
    std::vector<std::string> known;
    if (is_option) {
      for (const CLI::App* a : {&command, &app})
        for (const CLI::Option* o : a->get_options())
          for (const std::string& name : o->get_lnames()) known.push_back("--" + name);
      const std::string name = left.substr(0, left.find('='));
      const std::string near = nearest(name, known);
      return text("unknown option '", name, "'", near.empty() ? "" : "; did you mean '" + near + "'?", see);
    }
    if (parsed.empty()) {
      for (const CLI::App* sub : app.get_subcommands(nullptr)) known.push_back(sub->get_name());
      if (!known.empty()) return unknown("subcommand", left, known) + see;
    }
    return text("'", left, "' was not expected here", see);
  }
  return error.what() + see;
}

}  // namespace common

// SPDX-License-Identifier: Apache-2.0
// What the subcommands of the `lowrank` program share: how one registers, prints its report, and shows progress.
//
// A subcommand is one file with one function `void add_name(CLI::App&)` and a Registration beside it:
//
//     void add_spectrum(CLI::App& app) {
//       auto o = std::make_shared<Options>();
//       CLI::App* sub = add_command(app, "spectrum", "Ranks and singular values of the weights", o->common);
//       sub->add_option("checkpoint", o->path, "…")->required();
//       sub->callback([o] { run(*o); });              // throws lowrank::Error → exit 1, UsageError → exit 2
//     }
//     const Registration registration{60, "spectrum", add_spectrum};
#pragma once

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/progress.hpp"
#include "common/text.hpp"

namespace lowrank::tool {

using common::shape_text;
using common::size_text;
using common::text;
using common::time_text;
using Json = nlohmann::ordered_json;

/// Options that do not go together, found only after parsing: exit code 2, like a misspelt option.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Options every subcommand has.
struct Common {
  bool json = false, quiet = false;
};

/// Adds a subcommand with --json and --quiet.
CLI::App* add_command(CLI::App& app, const std::string& name, const std::string& description, Common& common);

/// Checks of an option's number, NaN and what no integer holds refused: above 0; 0 or more; from `low` to `high`; any
/// but infinity.
CLI::Validator positive();
CLI::Validator not_negative();
CLI::Validator between(double low, double high);
CLI::Validator finite_number();
/// Of a whole number: from `low` to `high`; of a seed, whatever 64 bits hold; of a rank or a count, from 1.
CLI::Validator whole(std::uint64_t low, std::uint64_t high);
CLI::Validator seed();
CLI::Validator count();

/// An option that counts in some modes only: whether it does in this one; what the mode is, "with --method cat"; and a
/// sentence on what it is for.
struct Use {
  const char* option;
  bool used;
  std::string mode, users;
};
/// **Throws** UsageError for an option that was given and has no use: nothing a user said is ignored.
void expect_used(const CLI::App* sub, std::initializer_list<Use> uses);

/// Makes a subcommand known to main(). `order` is its place in the help.
class Registration {
 public:
  Registration(int order, const char* name, void (*add)(CLI::App&));
};

/// Prints the report as JSON, or else the text. Nothing else ever goes to stdout.
void print(const Common& common, const Json& report, const std::string& text);

/// A line on stderr that a person may want to see; dropped with --quiet.
void note(const Common& common, const std::string& line);

/// A bar on stderr, when that is a terminal: count, rate, time left, and what is being worked on.
class Progress {
 public:
  /// `items` of `item_name` ("tensors") will be done, which hold so many bytes.
  Progress(const Common& common, std::string what, std::uint64_t items, std::string item_name,
           std::uint64_t total_bytes)
      : bar_({.label = std::move(what),
              .items = items,
              .item_name = std::move(item_name),
              .work = std::max<std::uint64_t>(total_bytes, 1),
              .quiet = common.quiet}) {}
  /// One more is done, of so many bytes; `current` names it.
  void advance(std::uint64_t bytes, const std::string& current) { bar_.update(++items_, bytes_ += bytes, current); }
  [[nodiscard]] double seconds() const { return bar_.seconds(); }

 private:
  common::Progress bar_;
  std::uint64_t items_ = 0, bytes_ = 0;
};

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// What finetune's command line says, and what of it is wrong.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "config.hpp"

namespace CLI {
class App;
}

namespace llama {

struct Options {
  std::vector<std::string> source, target, methods{"full", "lora", "pissa"}, rates, train_fully;
  std::string targets = "all-linear", output, base, save, track, checkpoint, dtype = "auto", base_name;
  int token_bits = 16;
  std::vector<double> sweep;
  Index rank = 16, steps = 400, base_steps = 2000, batch = 8, window = 128, sample = 0, eval_windows = 256;
  Index checkpoint_every = 100;
  double alpha = 32, base_rate = 3e-3, dropout = 0, lora_plus = 1, weight_decay = 0;
  bool rank_stabilised = false, resume = false, overwrite = false;
  std::uint64_t seed = 1;
  ModelConfig model;
  std::set<std::string> given;  ///< names of the options on the command line: "--rank"
};

void add_options(CLI::App& app, Options& o);
/// After parsing: fills `given`.
void note_given(const CLI::App& app, Options& o);

/// The rate the user asked for, or what default_rate() says for a base of that many parameters.
double rate_of(const std::string& method, const Options& o, Index parameters);

/// Throws common::UsageError for names that are not known, numbers out of range, and options that do not go together or
/// have no use; lowrank::ArgumentError for states that are missing or in the way.
void check_options(const Options& o);

/// Makes the folders that will be written to. Throws lowrank::ArgumentError when one cannot be.
void make_folders(const Options& o);

/// Names and removes what a killed run left half-written where this one writes.
void clean_up(const Options& o);

/// The file that keeps the state of the run with this label, "" when none is kept.
std::string state_file(const Options& o, const std::string& label);
/// One that exists, "" when none does.
std::string found_state(const Options& o);

}  // namespace llama

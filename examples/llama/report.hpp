// SPDX-License-Identifier: Apache-2.0
// The tables a run ends with, on the terminal and as CSV files.
#pragma once

#include <string>
#include <vector>

#include "methods.hpp"
#include "trainer.hpp"

namespace llama {

/// One line of the main table: a method, or the base before any.
struct Result {
  std::string method;
  double learning_rate = 0;
  Index trainable = 0;
  double target_loss = 0, source_loss = 0;  ///< nats a token on held-out text; source NaN when there is no source
  double init_seconds = 0;
  double first_loss = 0;  ///< on target test text before the first step
  TrainResult training;
  std::vector<Adaptation::Change> changes;
};

/// Losses, forgetting, parameters and speed, a line for each result; the first is the base.
void print_losses(const std::vector<Result>& results, bool with_source);

/// r₉₀ of ΔW by kind of module (median over the layers), beside the adapter's rank and what noise of that shape shows.
void print_ranks(const std::vector<Result>& results, Index rank);

/// results.csv, ranks.csv and losses.csv in `directory`, each whole or not at all. Throws lowrank::IoError.
void write_files(const std::string& directory, const std::vector<Result>& results, Index rank);

}  // namespace llama

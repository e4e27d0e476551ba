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
  Index diverged_at = 0;  ///< the step, 1 the first; 0: it did not. Else nothing was measured after
};

/// One cell of a sweep: a method at a rate.
struct Trial {
  std::string method;
  double learning_rate = 0, loss = 0;  ///< loss in nats a token on validation text; NaN when it diverged
  Index diverged_at = 0;               ///< the step; 0: it did not
};

/// Losses, forgetting, parameters and speed, a line for each result; the first is the base.
void print_losses(const std::vector<Result>& results, bool with_source);

/// r₉₀ of ΔW by kind of module (median over the layers), beside the adapter's rank and what noise of that shape shows.
void print_ranks(const std::vector<Result>& results, Index rank);

/// results.csv, ranks.csv and losses.csv in `directory`, each whole or not at all; gives their paths. Throws
/// lowrank::IoError.
std::vector<std::string> write_files(const std::string& directory, const std::vector<Result>& results, Index rank);

/// The table of a sweep, a row for each method, and the best rate of each; trials not made are blank.
void print_sweep(const std::vector<Trial>& trials, const std::vector<std::string>& methods,
                 const std::vector<double>& rates, Index steps);

/// sweep.csv in `directory`, whole or not at all; gives its path. Throws lowrank::IoError.
std::string write_sweep(const std::string& directory, const std::vector<Trial>& trials, Index steps);

}  // namespace llama

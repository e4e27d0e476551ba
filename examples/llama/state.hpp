// SPDX-License-Identifier: Apache-2.0
// The state of a training run on disk, so that it can stop and go on.
//
// A step depends on the parameters, AdamW's moments and the step's number, and on nothing else: batches, dropout masks
// and rates are functions of (seed, step). Those are kept, with the settings they belong to.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "lowrank/optim/adamw.hpp"
#include "projection.hpp"

namespace llama {

using Settings = std::map<std::string, std::string>;

struct StateOptions {
  std::string file = {};   ///< a safetensors file; "": no state is kept
  Index every = 100;       ///< steps between two times it is written
  bool resume = false;     ///< go on from the file; without the file the run begins
  Settings settings = {};  ///< what must agree with the saved run, beside train()'s own options
};

/// Where a run stands.
struct Progressed {
  Index step = 0;               ///< steps made
  std::vector<double> losses;   ///< of each
  std::vector<double> seconds;  ///< each took
};

/// Replaces the file by the state, whole or not at all; its folder is made. Throws lowrank::IoError.
void save_state(const std::string& file, lowrank::FlatParameters<float>& parameters, lowrank::AdamW<float>& adam,
                const Progressed& progressed, const Settings& settings);

/// Puts parameters and optimizer where the saved run's were. Throws lowrank::IoError for a file that is no state or
/// fits no such model; lowrank::ArgumentError that lists every setting that differs, as expected and as it is. Says on
/// stderr when the number of threads differs, with which sums round differently.
Progressed load_state(const std::string& file, lowrank::FlatParameters<float>& parameters, lowrank::AdamW<float>& adam,
                      const Settings& settings);

/// Count and a 64-bit hash of the values: enough to tell other data from the same.
std::string fingerprint(const std::vector<Token>& tokens);
std::string fingerprint(const Weights<float>& weights);

/// A number as its shortest text that reads back the same.
std::string exact(double x);

}  // namespace llama

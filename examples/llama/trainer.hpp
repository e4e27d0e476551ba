// SPDX-License-Identifier: Apache-2.0
// The training loop: batches in, AdamW on the model's one flat block, loss and speed out; Ctrl-C ends it between steps.
#pragma once

#include <functional>
#include <optional>
#include <stdexcept>
#include <string>

#include "lowrank/optim/adamw.hpp"
#include "lowrank/optim/clip.hpp"
#include "lowrank/optim/schedule.hpp"
#include "model.hpp"
#include "state.hpp"

namespace llama {

/// Thrown between two steps after Ctrl-C; says where. Nothing is being written then.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Installs the SIGINT and SIGTERM handlers; they only set a flag.
void watch_for_interrupts();
bool interrupt_requested();
/// Throws Interrupted if a signal came.
void throw_if_interrupted();

/// A training whose loss or gradients are no numbers any more; says which, at which step, at which rate. Nothing else
/// is wrong: what was trained before it stands.
struct Diverged : lowrank::NonFiniteError {
  Diverged(const std::string& label, double rate, Index steps, std::vector<double> losses_so_far);
  Index step;                  ///< 1 the first
  std::vector<double> losses;  ///< of the steps before, or of all
};

struct TrainOptions {
  std::string label = "training";
  Index steps = 100;
  Index batch = 8, window = 128;  ///< a step sees batch·window tokens
  double learning_rate = 1e-3;    ///< peak of a cosine that ends at a tenth of it
  double warmup = 0.05;           ///< share of the steps
  double weight_decay = 0;
  double clip = 1;
  double lora_plus = 1;  ///< lr_B / lr_A
  std::uint64_t seed = 0;
  std::function<void()> after_step = {};  ///< called after every step, when there is one
  StateOptions state = {};
};

struct TrainResult {
  double seconds = 0;
  double step_ms = 0;            ///< median
  double tokens_per_second = 0;  ///< of the median step
  std::vector<double> losses;    ///< of each step's batch, before the step
};

/// Trains what is trainable in the model.
///
/// With a state file the run is kept there at the start, every so many steps, at the end, and when it is interrupted;
/// resumed from it, it ends at the bits it would have reached without the stop. Throws Diverged when the loss or a
/// gradient is not finite, Interrupted after Ctrl-C; lowrank::ArgumentError for a state of other settings,
/// lowrank::IoError for one that cannot be read or written.
TrainResult train(Model<float>& model, const std::vector<Token>& tokens, const TrainOptions& options);

/// Mean loss in nats a token over at most `windows` windows spread evenly over the tokens.
double evaluate(Model<float>& model, const std::vector<Token>& tokens, Index window, Index windows = 256);

/// `count` more tokens, drawn at the given temperature, the same for the same seed.
std::vector<Token> generate(Model<float>& model, std::vector<Token> prompt, Index count, Index window,
                            double temperature, std::uint64_t seed);

}  // namespace llama

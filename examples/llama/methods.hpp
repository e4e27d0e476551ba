// SPDX-License-Identifier: Apache-2.0
// Ways to adapt a trained base, as recipes: full fine-tuning, LoRA, PiSSA, QLoRA, …; and what each did to the weights.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "model.hpp"
#include "trainer.hpp"

namespace lowrank {
template <Real T>
class Tracker;  // lowrank/spectrum/tracker.hpp, which only changes.cpp compiles
}

namespace llama {

struct MethodOptions {
  Index rank = 8;
  double alpha = 16;
  bool rank_stabilised = false;  ///< s = α/√r instead of α/r
  double dropout = 0;
  std::string targets = "all-linear";  ///< lowrank::TargetOptions: a preset, names, or a regular expression
  std::vector<std::string> train_fully =
      {};  ///< kinds trained in full beside the adapters: "norm", "embed_tokens", "lm_head", …
  std::uint64_t seed = 0;
};

/// What --method takes, with a line about each.
struct MethodInfo {
  std::string name, what;
  double learning_rate;  ///< peak for the demo's model; docs/demo.md says how it was chosen
  [[nodiscard]] bool adapts() const { return name != "full"; }            ///< has adapters
  [[nodiscard]] bool quantises() const { return stored_bits(name) > 0; }  ///< its base is stored in few bits
  static int stored_bits(const std::string& name);                        ///< 4 of "qlora4"; 0 of "lora"
};
const std::vector<MethodInfo>& known_methods();
/// Null when there is none of that name.
const MethodInfo* find_method(const std::string& name);

/// The method's peak rate for a model of that many parameters: the demo's where the model is no larger, falling from
/// there by a power of the size to what is usual at 7 billion: 2e-5 for full fine-tuning, a fiftieth of the demo's
/// (LoRA 2e-4) for adapters. A start, not the best rate of any model: that is what a sweep is for.
double default_rate(const MethodInfo& method, Index parameters);

/// One adaptation of one base. The base's weights must outlive it and the models made from it.
class Adaptation {
 public:
  /// Throws lowrank::ArgumentError for an unknown method (naming the known ones), targets that match nothing, a rank
  /// above what a target allows.
  Adaptation(const ModelConfig& config, const Weights<float>& base, const std::string& method,
             const MethodOptions& options);

  /// Says which layer each weight becomes; hand it to a Model.
  [[nodiscard]] Recipe<float> recipe();
  [[nodiscard]] const std::string& method() const { return method_; }
  /// "adapting 28 of 30 modules (…)".
  [[nodiscard]] const std::string& summary() const { return summary_; }

  /// The singular values of ΔW = W' − W₀ of every module that was trained, W₀ what it stood for at the start: the
  /// base's own weight, or for a quantised base with its adapter what those two add up to.
  struct Change {
    std::string module, kind;
    Index rows = 0, cols = 0;
    std::vector<double> sigma;
    double relative_norm = 0;  ///< ‖ΔW‖_F / ‖W‖_F
  };
  [[nodiscard]] std::vector<Change> changes(Model<float>& model) const;

  /// That ΔW of every adapter, as factors. A and B as trained, where B started at zero; else the difference to the
  /// start, of twice the rank, so that the adapter of a residual base (PiSSA) becomes one of the base's own weight.
  [[nodiscard]] std::map<std::string, lowrank::LoraFactors<float>> factors(Model<float>& model) const;

  /// Lets the tracker follow ΔW of every projection that is trained, as "METHOD/module". The model must outlive it.
  void watch(lowrank::Tracker<float>& tracker, Model<float>& model) const;

  [[nodiscard]] const MethodOptions& options() const { return options_; }
  /// Whether the method stores its base in few bits: its adapter belongs to that base and no other.
  [[nodiscard]] bool quantises() const { return bits_ > 0; }
  /// Mean bytes a weight of the adapted modules' base takes.
  [[nodiscard]] double bytes_per_weight() const { return weights_ > 0 ? bytes_ / weights_ : 4; }

 private:
  LinearLayer<float> adapt(const std::string& module, const lowrank::Matrix<float>& W);
  LinearLayer<float> adapt_quantised(const std::string& module, const lowrank::Matrix<float>& W);
  [[nodiscard]] bool trains_fully(const std::string& module) const;

  ModelConfig config_;
  const Weights<float>* base_;
  std::string method_, summary_;
  int bits_ = 0;
  double bytes_ = 0, weights_ = 0;
  MethodOptions options_;
  std::set<std::string> targets_;
  std::map<std::string, lowrank::LoraFactors<float>> start_;  // where they did not start at zero
};

/// train(), while a Tracker follows the updates into `file` at its default of 2 % of the time, and once more at the
/// end; what it took is said on stderr.
TrainResult train_tracked(const Adaptation& adaptation, Model<float>& model, const std::vector<Token>& tokens,
                          TrainOptions options, const std::string& file);

/// A number that depends on the module's name alone: its stream of random numbers, whatever order modules come in.
std::uint64_t stream_of(const std::string& module);

/// Every weight trained: how the base itself is made.
Recipe<float> train_everything();

}  // namespace llama

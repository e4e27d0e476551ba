// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <filesystem>
#include <set>

#include "methods.hpp"

namespace llama {
namespace {

void add_text_options(CLI::App& app, Options& o) {
  const char* group = "Text";
  app.add_option("--source", o.source, "Files or folders the base is trained on (the old domain)")->group(group);
  app.add_option("--target", o.target, "Files or folders it is adapted to (the new domain)")->required()->group(group);
  app.add_option("--token-bits", o.token_bits, "Width of the ids in .bin files: 16 or 32")
      ->capture_default_str()
      ->group(group);
  app.add_option("--window", o.window, "Tokens (bytes) a training example reads")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group(group);
}

void add_adaptation_options(CLI::App& app, Options& o) {
  const char* group = "Adaptation";
  std::string names;
  for (const MethodInfo& m : known_methods()) names += (names.empty() ? "" : ", ") + m.name;
  app.add_option("--method", o.methods, "Which of " + names)->delimiter(',')->capture_default_str()->group(group);
  app.add_option("--rank", o.rank, "Rank of the adapters")->capture_default_str()->group(group);
  app.add_option("--alpha", o.alpha, "Adapters are scaled by alpha/rank")->capture_default_str()->group(group);
  app.add_flag("--rank-stabilised", o.rank_stabilised, "Scale by alpha/sqrt(rank) instead")->group(group);
  app.add_option("--targets", o.targets, "attention, mlp, all-linear, all, names, or a regular expression")
      ->capture_default_str()
      ->group(group);
  app.add_option("--train-fully", o.train_fully, "Modules trained in full beside the adapters, e.g. norm,lm_head")
      ->delimiter(',')
      ->group(group);
  app.add_option("--lr", o.rates, "Peak learning rate: RATE for all methods or METHOD=RATE")
      ->delimiter(',')
      ->group(group);
  app.add_option("--steps", o.steps, "Steps of each adaptation")->capture_default_str()->group(group);
  app.add_option("--batch", o.batch, "Windows a step")->capture_default_str()->group(group);
  app.add_option("--dropout", o.dropout, "Dropout on the adapters' input")->capture_default_str()->group(group);
  app.add_option("--lora-plus", o.lora_plus, "Learning rate of B over that of A")->capture_default_str()->group(group);
  app.add_option("--weight-decay", o.weight_decay, "Decoupled weight decay")->capture_default_str()->group(group);
  app.add_option("--sweep", o.sweep, "Try these rates with every method, print validation losses, and stop")
      ->delimiter(',')
      ->group(group);
}

void add_base_options(CLI::App& app, Options& o) {
  const char* group = "Base model";
  app.add_option("--base", o.base, "A Hugging Face checkpoint (Llama architecture) to adapt, instead of training one")
      ->group(group);
  app.add_option("--base-steps", o.base_steps, "Steps of the base's training")->capture_default_str()->group(group);
  app.add_option("--base-lr", o.base_rate, "Peak learning rate of the base's training")
      ->capture_default_str()
      ->group(group);
  app.add_option("--hidden", o.model.hidden_size, "Width of the residual stream")->capture_default_str()->group(group);
  app.add_option("--intermediate", o.model.intermediate_size, "Width of the MLP")->capture_default_str()->group(group);
  app.add_option("--layers", o.model.num_hidden_layers, "Layers")->capture_default_str()->group(group);
  app.add_option("--heads", o.model.num_attention_heads, "Query heads")->capture_default_str()->group(group);
  app.add_option("--kv-heads", o.model.num_key_value_heads, "Key and value heads")->capture_default_str()->group(group);
  app.add_option("--head-dim", o.model.head_dim, "Width of a head")->capture_default_str()->group(group);
  app.add_flag("--tied", o.model.tie_word_embeddings, "Share the embedding with the head")->group(group);
}

void add_output_options(CLI::App& app, Options& o) {
  const char* group = "Output";
  app.add_option("--output", o.output, "Folder for results.csv, ranks.csv and losses.csv")->group(group);
  app.add_option("--track", o.track,
                 "File (.csv or .jsonl) that the ranks of every update are appended to while it is trained")
      ->group(group);
  app.add_option("--save", o.save,
                 "Folder for the base and what was made of it: base/, METHOD/ (PEFT adapters; a checkpoint for full)")
      ->group(group);
  app.add_option("--dtype", o.dtype, "Of the checkpoints saved: f32, bf16, f16; auto is the base's own")
      ->check(CLI::IsMember({"auto", "f32", "bf16", "f16"}))
      ->capture_default_str()
      ->group(group);
  app.add_option("--sample", o.sample, "Bytes of text each model writes at the end")
      ->capture_default_str()
      ->group(group);
  app.add_option("--eval-windows", o.eval_windows, "Windows of held-out text a loss is measured on")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group(group);
  app.add_option("--seed", o.seed, "Same seed, same figures")->capture_default_str()->group(group);

  group = "Stopping and going on";
  CLI::Option* checkpoint =
      app.add_option("--checkpoint", o.checkpoint,
                     "Folder (or, for a single training, .safetensors file) that keeps the state of every training")
          ->group(group);
  app.add_option("--checkpoint-every", o.checkpoint_every, "Steps between two states; Ctrl-C writes one too")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->needs(checkpoint)
      ->group(group);
  app.add_flag("--resume", o.resume, "Go on from the states in --checkpoint: the same options, the same bits")
      ->needs(checkpoint)
      ->group(group);
}

std::vector<std::string> trainings(const Options& o) {
  std::vector<std::string> labels = o.methods;
  if (o.base.empty()) labels.insert(labels.begin(), "base");
  return labels;
}

/// "--rank: expected ..., got ...", for the numbers that the library would refuse after the base has been trained.
void check_numbers(const Options& o) {
  const auto expect = [](bool good, const char* option, const char* what, auto got) {
    if (!good) throw lowrank::ArgumentError(message(option, ": expected ", what, ", got ", got));
  };
  const auto positive = [](double x) { return x > 0 && std::isfinite(x); };
  expect(o.rank >= 1, "--rank", "at least 1", o.rank);
  expect(positive(o.alpha), "--alpha", "a positive number", o.alpha);
  expect(o.dropout >= 0 && o.dropout < 1, "--dropout", "a number in [0, 1)", o.dropout);
  expect(positive(o.lora_plus), "--lora-plus", "a positive number", o.lora_plus);
  expect(o.weight_decay >= 0 && std::isfinite(o.weight_decay), "--weight-decay", "a number not below 0",
         o.weight_decay);
  expect(o.steps >= 1, "--steps", "at least 1", o.steps);
  expect(o.batch >= 1, "--batch", "at least 1", o.batch);
  if (o.base.empty()) {
    expect(o.base_steps >= 1, "--base-steps", "at least 1", o.base_steps);
    expect(positive(o.base_rate), "--base-lr", "a positive number", o.base_rate);
  }
  for (const double rate : o.sweep) expect(positive(rate), "--sweep", "positive rates", rate);
}

void check_states(const Options& o) {
  if (o.checkpoint.empty()) return;
  if (!o.sweep.empty()) throw lowrank::ArgumentError("--checkpoint: a --sweep keeps no states, got both");
  if (o.resume && !o.track.empty())
    throw lowrank::ArgumentError("--track: follows a training from its first step, cannot join one that is resumed");
  const std::vector<std::string> labels = trainings(o);
  if (o.checkpoint.ends_with(".safetensors") && labels.size() > 1)
    throw lowrank::ArgumentError(message("--checkpoint: expected a folder for the states of ", labels.size(),
                                         " trainings, got the file ", o.checkpoint));
  const std::string found = found_state(o);
  if (o.resume && found.empty())
    throw lowrank::ArgumentError("--resume: expected the state of a run, found no " + state_file(o, labels.front()));
  if (!o.resume && !found.empty())
    throw lowrank::ArgumentError("--checkpoint: " + found +
                                 " exists already: --resume goes on with it, another place begins anew");
}

}  // namespace

void add_options(CLI::App& app, Options& o) {
  add_text_options(app, o);
  add_adaptation_options(app, o);
  add_base_options(app, o);
  add_output_options(app, o);
}

double rate_of(const std::string& method, const Options& o) {
  double rate = 0;
  for (const MethodInfo& m : known_methods())
    if (m.name == method) rate = m.learning_rate;
  for (const std::string& text : o.rates) {
    const std::size_t equals = text.find('=');
    if (equals != std::string::npos && text.substr(0, equals) != method) continue;
    const std::string number = equals == std::string::npos ? text : text.substr(equals + 1);
    char* end = nullptr;
    rate = std::strtod(number.c_str(), &end);
    if (number.empty() || *end != '\0' || !(rate > 0))
      throw lowrank::ArgumentError("--lr: expected a positive number or METHOD=NUMBER, got '" + text + "'");
  }
  return rate;
}

void check_options(const Options& o) {
  for (const std::string& method : o.methods) rate_of(method, o);
  if (std::set<std::string>(o.methods.begin(), o.methods.end()).size() != o.methods.size())
    throw lowrank::ArgumentError("--method: expected every method once, got one of them twice");
  if (o.source.empty() && o.base.empty())
    throw lowrank::ArgumentError("--source: expected text to train the base on (or a --base), got none");
  check_numbers(o);
  check_states(o);
}

void make_folders(const Options& o) {
  const auto folder = [](const char* option, const std::string& path) {
    if (path.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error || ::access(path.c_str(), W_OK) != 0)
      throw lowrank::ArgumentError(message(option, ": expected a folder that can be written, got ", path));
  };
  folder("--output", o.output);
  folder("--save", o.save);
  if (!o.checkpoint.empty() && !o.checkpoint.ends_with(".safetensors")) folder("--checkpoint", o.checkpoint);
  const std::filesystem::path track = o.track;
  if (!o.track.empty()) folder("--track", track.has_parent_path() ? track.parent_path().string() : ".");
}

std::string state_file(const Options& o, const std::string& label) {
  if (o.checkpoint.empty() || o.checkpoint.ends_with(".safetensors")) return o.checkpoint;
  return o.checkpoint + "/" + label + ".state.safetensors";
}

std::string found_state(const Options& o) {
  std::error_code ignored;
  for (const std::string& label : trainings(o))
    if (const std::string file = state_file(o, label); !file.empty() && std::filesystem::exists(file, ignored))
      return file;
  return "";
}

}  // namespace llama

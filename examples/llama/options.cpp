// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <set>

#include "common/cli.hpp"
#include "common/errors.hpp"
#include "common/outputs.hpp"
#include "common/text.hpp"
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
  app.add_option(
         "--lr", o.rates,
         "Peak learning rate: RATE for all methods or METHOD=RATE; else one by the number of parameters, from the "
         "demo's for 0.8 M to 2e-5 (full) and 2e-4 (lora) for 7 G; --sweep finds better ones")
      ->delimiter(',')
      ->group(group);
  app.add_option("--steps", o.steps, "Steps of each adaptation")->capture_default_str()->group(group);
  app.add_option("--batch", o.batch, "Windows a step")->capture_default_str()->group(group);
  app.add_option("--dropout", o.dropout, "Dropout on the adapters' input")->capture_default_str()->group(group);
  app.add_option("--lora-plus", o.lora_plus, "Learning rate of B over that of A")->capture_default_str()->group(group);
  app.add_option("--weight-decay", o.weight_decay, "Decoupled weight decay")->capture_default_str()->group(group);
  app.add_option("--sweep", o.sweep,
                 "Try these rates with every method, print validation losses (--output: sweep.csv too), and stop")
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
  app.add_option("--output", o.output, "Folder for results.csv, ranks.csv and losses.csv, replaced after every method")
      ->group(group);
  app.add_option("--track", o.track,
                 "File (.csv or .jsonl) that the ranks of every update are appended to while it is trained")
      ->group(group);
  app.add_option("--save", o.save,
                 "Folder for the base and what was made of it: base/, METHOD/ (PEFT adapters; a checkpoint for full)")
      ->group(group);
  app.add_flag("--overwrite", o.overwrite, "Replace the models in --save, each when its successor is complete")
      ->group(group);
  app.add_option("--base-name", o.base_name,
                 "What saved adapters call their base, a hub name for example; else its absolute path")
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
  app.add_option("--seed", o.seed, "Same seed, same figures: a whole number from 0")
      ->check(common::whole_number(0))
      ->capture_default_str()
      ->group(group);

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
    if (!good) throw common::UsageError(common::text(option, ": expected ", what, ", got ", got));
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

/// One word of --lr.
struct Rate {
  std::string method;  // "" for all
  double value;
};

Rate parse_rate(const std::string& text) {
  const std::size_t equals = text.find('=');
  const std::string number = equals == std::string::npos ? text : text.substr(equals + 1);
  char* end = nullptr;
  const double value = std::strtod(number.c_str(), &end);
  if (number.empty() || *end != '\0' || !(value > 0) || !std::isfinite(value))
    throw common::UsageError("--lr: expected a positive number or METHOD=NUMBER, got '" + text + "'");
  return {equals == std::string::npos ? "" : text.substr(0, equals), value};
}

std::string joined(const std::vector<std::string>& words) {
  std::string list;
  for (const std::string& w : words) list += (list.empty() ? "" : ", ") + w;
  return list;
}

void check_methods(const Options& o) {
  std::vector<std::string> known;
  for (const MethodInfo& m : known_methods()) known.push_back(m.name);
  for (const std::string& method : o.methods)
    if (find_method(method) == nullptr)
      throw common::UsageError("--method: " + common::unknown("method", method, known));
  if (std::set<std::string>(o.methods.begin(), o.methods.end()).size() != o.methods.size())
    throw common::UsageError("--method: expected every method once, got one of them twice");
  for (const std::string& text : o.rates) {
    const std::string method = parse_rate(text).method;
    if (method.empty()) continue;
    if (find_method(method) == nullptr)
      throw common::UsageError("--lr: " + common::unknown("method", method, known) + " in '" + text + "'");
    if (!common::is_one_of(method, o.methods))
      throw common::UsageError("--lr: '" + text + "' has no use: the methods are " + joined(o.methods));
  }
}

/// What would be ignored is refused.
void check_uses(const Options& o) {
  const auto useless = [&](bool when, std::initializer_list<const char*> options, const char* why) {
    for (const char* option : options)
      if (when && o.given.count(option) > 0) throw common::UsageError(common::text(option, ": has no use ", why));
  };
  const auto any = [&](auto&& is) {
    return std::any_of(o.methods.begin(), o.methods.end(), [&](const auto& m) { return is(*find_method(m)); });
  };
  const auto any_text = [&](auto&& matches) {
    return std::any_of(o.source.begin(), o.source.end(), matches) ||
           std::any_of(o.target.begin(), o.target.end(), matches);
  };
  useless(!any([](const MethodInfo& m) { return m.adapts(); }),
          {"--rank", "--alpha", "--rank-stabilised", "--targets", "--train-fully", "--dropout", "--lora-plus"},
          "with --method full, which has no adapters");
  useless(!o.base.empty(), {"--base-steps", "--base-lr"}, "with --base, which is trained already");
  useless(!o.base.empty(), {"--hidden", "--intermediate", "--layers", "--heads", "--kv-heads", "--head-dim", "--tied"},
          "with --base, whose config.json says it");
  useless(!any_text([](const std::string& path) { return path.ends_with(".bin"); }), {"--token-bits"},
          "without .bin files");
  useless(!o.sweep.empty(), {"--lr"}, "with --sweep, which names the rates");
  useless(!o.sweep.empty(), {"--track", "--sample", "--base-name"}, "with --sweep, which keeps no adapted model");
  useless(!o.sweep.empty() && !o.base.empty(), {"--save"}, "with --sweep and --base: no model is made");
  useless(!o.sweep.empty() && !o.base.empty(), {"--source"}, "with --sweep and --base: rates are chosen on --target");
  useless(o.save.empty(), {"--overwrite", "--base-name", "--dtype"}, "without --save");
  useless(!o.base.empty() && !any([](const MethodInfo& m) { return !m.adapts() || m.quantises(); }), {"--dtype"},
          "where only adapters are saved, which are f32");
  useless(!any([](const MethodInfo& m) { return m.adapts() && !m.quantises(); }), {"--base-name"},
          "with methods that save whole checkpoints");
  const bool known = o.track.ends_with(".csv") || o.track.ends_with(".jsonl");
  if (!o.track.empty() && !known)
    throw common::UsageError("--track: expected a file that ends in .csv or .jsonl, got " + o.track);
}

void check_states(const Options& o) {
  if (o.checkpoint.empty()) return;
  if (!o.sweep.empty()) throw common::UsageError("--checkpoint: a --sweep keeps no states, got both");
  if (o.resume && !o.track.empty())
    throw common::UsageError("--track: follows a training from its first step, cannot join one that is resumed");
  const std::vector<std::string> labels = trainings(o);
  if (o.checkpoint.ends_with(".safetensors") && labels.size() > 1)
    throw common::UsageError(message("--checkpoint: expected a folder for the states of ", labels.size(),
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
  for (const char* name :
       {"--token-bits", "--window", "--rank", "--steps", "--batch", "--base-steps", "--hidden", "--intermediate",
        "--layers", "--heads", "--kv-heads", "--head-dim", "--sample", "--eval-windows", "--checkpoint-every"})
    app.get_option(name)->check(common::whole_number());
}

void note_given(const CLI::App& app, Options& o) {
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames())
      if (option->count() > 0) o.given.insert("--" + name);
}

double rate_of(const std::string& method, const Options& o, Index parameters) {
  double rate = default_rate(*find_method(method), parameters);
  for (const std::string& text : o.rates)
    if (const Rate r = parse_rate(text); r.method.empty() || r.method == method) rate = r.value;
  return rate;
}

void check_options(const Options& o) {
  check_methods(o);
  if (o.source.empty() && o.base.empty())
    throw common::UsageError("--source: expected text to train the base on (or a --base), got none");
  check_numbers(o);
  check_uses(o);
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

void clean_up(const Options& o) {
  const auto clean = [](const std::string& folder, auto&& is_ours) {
    if (folder.empty()) return;
    for (const std::string& path : common::remove_leftovers(folder, is_ours))
      common::note("finetune", "removed " + path + ", which a run that was killed left unfinished");
  };
  clean(o.save, [](const std::string& name) { return name == "base" || find_method(name) != nullptr; });
  clean(o.output, [](const std::string& name) {
    return common::is_one_of(name, std::array{"results.csv", "ranks.csv", "losses.csv", "sweep.csv"});
  });
  if (o.checkpoint.empty()) return;
  const bool file = o.checkpoint.ends_with(".safetensors");
  const std::filesystem::path path = o.checkpoint;
  const std::string parent = path.has_parent_path() ? path.parent_path().string() : ".";
  clean(file ? parent : o.checkpoint,
        [&](const std::string& name) { return file ? name == path.filename() : name.ends_with(".state.safetensors"); });
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

// SPDX-License-Identifier: Apache-2.0
// finetune: trains a small language model on one kind of text, adapts it to another in several ways, and compares them.
//
// Read in this order: projection.hpp (how the library is embedded), model.hpp (the transformer around it), methods.cpp
// (what tells LoRA from PiSSA), trainer.cpp (the loop), then this file.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <limits>

#include "checkpoint.hpp"
#include "corpus.hpp"
#include "report.hpp"

namespace {

using namespace llama;

struct Options {
  std::vector<std::string> source, target, methods{"full", "lora", "pissa"}, rates, train_fully;
  std::string targets = "all-linear", output, base, save, track;
  int token_bits = 16;
  std::vector<double> sweep;
  Index rank = 16, steps = 400, base_steps = 2000, batch = 8, window = 128, sample = 0, eval_windows = 256;
  double alpha = 32, base_rate = 3e-3, dropout = 0, lora_plus = 1, weight_decay = 0;
  bool rank_stabilised = false;
  std::uint64_t seed = 1;
  ModelConfig model;
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void add_options(CLI::App& app, Options& o) {
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

  group = "Adaptation";
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

  group = "Base model";
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

  group = "Output";
  app.add_option("--output", o.output, "Folder for results.csv, ranks.csv and losses.csv")->group(group);
  app.add_option("--track", o.track,
                 "File (.csv or .jsonl) that the ranks of every update are appended to while it is trained")
      ->group(group);
  app.add_option("--save", o.save,
                 "Folder for the base and what was made of it: base/, METHOD/ (PEFT adapters; a checkpoint for full)")
      ->group(group);
  app.add_option("--sample", o.sample, "Bytes of text each model writes at the end")
      ->capture_default_str()
      ->group(group);
  app.add_option("--eval-windows", o.eval_windows, "Windows of held-out text a loss is measured on")
      ->check(CLI::PositiveNumber)
      ->capture_default_str()
      ->group(group);
  app.add_option("--seed", o.seed, "Same seed, same figures")->capture_default_str()->group(group);
}

/// The rate the user asked for, or the method's own.
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

void describe(const char* name, const Corpus& c) {
  const auto& r = c.report;
  std::fprintf(stderr,
               "%s: %zu files, %.2f MB (%.2f MB of repeated paragraphs left out; %zu binary, %zu empty, %zu unreadable "
               "skipped); "
               "train %.2f, validation %.2f, test %.2f MB, held out by %s\n",
               name, r.files, double(r.bytes) * 1e-6, double(r.duplicates) * 1e-6, r.binary, r.empty, r.unreadable,
               double(c.train.size()) * 1e-6, double(c.validation.size()) * 1e-6, double(c.test.size()) * 1e-6,
               r.whole_files ? "whole files" : "the end of each file");
}

void print_sample(const std::string& who, Model<float>& model, const Corpus& corpus, const Options& o) {
  const std::vector<Token> prompt(corpus.test.begin(),
                                  corpus.test.begin() + std::min<Index>(o.window, Index(corpus.test.size())));
  std::string text;
  for (const Token t : generate(model, prompt, o.sample, o.window, 0.7, o.seed))
    text += t == 9 || t == 10 || (t >= 32 && t < 127) ? char(t) : '?';
  std::printf("\n--- %s writes, after held-out text of the new domain:\n%s\n", who.c_str(), text.c_str());
}

MethodOptions method_options(const Options& o) {
  return {.rank = o.rank,
          .alpha = o.alpha,
          .rank_stabilised = o.rank_stabilised,
          .dropout = o.dropout,
          .targets = o.targets,
          .train_fully = o.train_fully,
          .seed = o.seed};
}

TrainOptions train_options(const Options& o, const std::string& label, double rate) {
  return {.label = label,
          .steps = o.steps,
          .batch = o.batch,
          .window = o.window,
          .learning_rate = rate,
          .weight_decay = o.weight_decay,
          .lora_plus = o.lora_plus,
          .seed = o.seed + 1};
}

/// Validation loss of every method at every rate: how a rate is chosen without looking at the test text.
void sweep(const Options& o, const Weights<float>& base, const Corpus& target) {
  std::printf("Validation loss on the new domain after %td steps\n\n  %-12s", o.steps, "method");
  for (const double rate : o.sweep) std::printf(" %9.2g", rate);
  std::printf("\n");
  for (const std::string& method : o.methods) {
    std::printf("  %-12s", method.c_str());
    for (const double rate : o.sweep) {
      Adaptation adaptation(o.model, base, method, method_options(o));
      Model<float> model(o.model, base, adaptation.recipe());
      double loss = std::numeric_limits<double>::quiet_NaN();
      try {
        train(model, target.train, train_options(o, method, rate));
        loss = evaluate(model, target.validation, o.window, o.eval_windows);
      } catch (const lowrank::NonFiniteError&) {  // diverged: that is what the table then says
      }
      std::printf(" %9.4f", loss);
      std::fflush(stdout);
    }
    std::printf("\n");
  }
}

/// Text as bytes; .npy and .bin files as token ids.
Corpus load(const std::vector<std::string>& paths, const Options& o) {
  const CorpusOptions options{.window = o.window, .seed = o.seed};
  const auto is_ids = [](const std::string& p) { return p.ends_with(".npy") || p.ends_with(".bin"); };
  if (!paths.empty() && std::all_of(paths.begin(), paths.end(), is_ids))
    return load_tokens(paths, options, o.token_bits, o.model.vocab_size);
  if (o.model.vocab_size != 256)
    throw lowrank::ArgumentError(message("the base has a vocabulary of ", o.model.vocab_size,
                                         ", text is read as 256 bytes: give token ids in .npy or .bin files"));
  return load_text(paths, options);
}

void run(Options& o) {
  // Everything a user can get wrong is found before the first minute of training.
  for (const std::string& method : o.methods) rate_of(method, o);
  if (o.source.empty() && o.base.empty())
    throw lowrank::ArgumentError("--source: expected text to train the base on (or a --base), got none");
  Weights<float> base;
  if (!o.base.empty()) {
    Base loaded = load_checkpoint(o.base);
    o.model = loaded.config;
    base = std::move(loaded.weights);
  } else {
    base = random_weights<float>(o.model, o.seed);
  }
  for (const std::string& method : o.methods) Adaptation(o.model, base, method, method_options(o));
  const Corpus target = load(o.target, o), source = o.source.empty() ? Corpus{} : load(o.source, o);
  const bool with_source = !o.source.empty();
  if (with_source) describe("old domain", source);
  describe("new domain", target);
  const auto source_loss = [&](Model<float>& model) {
    return with_source ? evaluate(model, source.test, o.window, o.eval_windows)
                       : std::numeric_limits<double>::quiet_NaN();
  };

  std::vector<Result> results;
  {
    Model<float> model(o.model, base, train_everything());
    std::fprintf(stderr, "base: %td parameters, %td layers of width %td, %td query and %td key-value heads\n",
                 model.parameters().size(), o.model.num_hidden_layers, o.model.hidden_size, o.model.num_attention_heads,
                 o.model.num_key_value_heads);
    if (o.base.empty())
      train(model, source.train,
            {.label = "base",
             .steps = o.base_steps,
             .batch = o.batch,
             .window = o.window,
             .learning_rate = o.base_rate,
             .weight_decay = 0.1,
             .seed = o.seed});
    Result r;
    r.method = "base";
    r.target_loss = evaluate(model, target.test, o.window, o.eval_windows);
    r.source_loss = source_loss(model);
    if (o.sample > 0) print_sample("the base", model, target, o);
    results.push_back(std::move(r));
    if (o.base.empty()) base = model.weights();
  }
  if (!o.save.empty() && o.base.empty()) save_checkpoint(o.save + "/base", o.model, base);
  if (!o.sweep.empty()) return sweep(o, base, target);

  for (const std::string& method : o.methods) {
    Result r;
    r.method = method;
    r.learning_rate = rate_of(method, o);
    const double begin = seconds();
    Adaptation adaptation(o.model, base, method, method_options(o));
    Model<float> model(o.model, base, adaptation.recipe());
    r.init_seconds = seconds() - begin;
    r.trainable = model.parameters().size();
    r.first_loss = evaluate(model, target.test, o.window, o.eval_windows);
    std::fprintf(stderr, "%s: %s, %td parameters\n", method.c_str(), adaptation.summary().c_str(), r.trainable);
    const TrainOptions training = train_options(o, method, r.learning_rate);
    r.training = o.track.empty() ? train(model, target.train, training)
                                 : train_tracked(adaptation, model, target.train, training, o.track);
    r.target_loss = evaluate(model, target.test, o.window, o.eval_windows);
    r.source_loss = source_loss(model);
    r.changes = adaptation.changes(model);
    if (o.sample > 0) print_sample(method, model, target, o);
    if (!o.save.empty()) {
      const std::string folder = o.save + "/" + method;
      if (method == "full" || adaptation.quantises())
        save_checkpoint(folder, o.model, model.weights());
      else
        save_adapter(folder, adaptation, model, o.base.empty() ? o.save + "/base" : o.base);
    }
    results.push_back(std::move(r));
  }
  print_losses(results, with_source);
  print_ranks(results, o.rank);
  if (!o.output.empty()) write_files(o.output, results, o.rank);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Trains a small Llama-architecture model on bytes of --source, adapts it to --target in several ways, compares "
      "them.",
      "finetune"};
  app.get_formatter()->column_width(34);
  add_options(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  llama::watch_for_interrupts();
  try {
    run(options);
  } catch (const llama::Interrupted&) {
    std::fprintf(stderr, "\ninterrupted; no file was written\n");
    return 130;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "finetune: %s\n", e.what());
    return 1;
  }
  return 0;
}

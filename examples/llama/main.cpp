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
#include "options.hpp"
#include "report.hpp"

namespace {

using namespace llama;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

/// Text as bytes; .npy and .bin files as token ids.
Corpus load(const std::vector<std::string>& paths, const Options& o) {
  if (paths.empty()) return {};
  const CorpusOptions options{.window = o.window, .seed = o.seed};
  const auto is_ids = [](const std::string& p) { return p.ends_with(".npy") || p.ends_with(".bin"); };
  if (std::all_of(paths.begin(), paths.end(), is_ids))
    return load_tokens(paths, options, o.token_bits, o.model.vocab_size);
  if (o.model.vocab_size != 256)
    throw lowrank::ArgumentError(message("the base has a vocabulary of ", o.model.vocab_size,
                                         ", text is read as 256 bytes: give token ids in .npy or .bin files"));
  return load_text(paths, options);
}

/// The whole run: a base, then every method on it, one after the other.
class Comparison {
 public:
  explicit Comparison(Options& options) : o_(options) {}

  void run() {
    prepare();
    make_base();
    if (!o_.sweep.empty()) return sweep();
    for (const std::string& method : o_.methods) adapt(method);
    print_losses(results_, with_source());
    print_ranks(results_, o_.rank);
    if (!o_.output.empty()) write_files(o_.output, results_, o_.rank);
  }
  /// What has been saved so far, for whoever is interrupted.
  [[nodiscard]] const std::vector<std::string>& written() const { return written_; }

 private:
  [[nodiscard]] bool with_source() const { return !o_.source.empty(); }

  /// Everything a user can get wrong is found before the first minute of training.
  void prepare() {
    check_outputs();
    check_options(o_);
    if (o_.base.empty()) {
      base_ = {o_.model, random_weights<float>(o_.model, o_.seed), nullptr};
    } else {
      base_ = load_checkpoint(o_.base);
      o_.model = base_.config;
    }
    for (const std::string& method : o_.methods) {
      const Adaptation adaptation(o_.model, base_.weights, method, method_options());
      if (!o_.save.empty() && saves_checkpoint(adaptation)) check_layout(o_.save + "/" + method, base_.source);
    }
    target_ = load(o_.target, o_);
    source_ = load(o_.source, o_);
    make_folders(o_);
    if (with_source()) describe("old domain", source_);
    describe("new domain", target_);
  }

  void check_outputs() const {
    if (o_.base.empty()) return;
    if (!o_.checkpoint.empty()) check_apart("--checkpoint", o_.checkpoint, o_.base);
    if (o_.save.empty()) return;
    check_apart("--save", o_.save, o_.base);
    for (const std::string& method : o_.methods) check_apart("--save", o_.save + "/" + method, o_.base);
  }

  void make_base() {
    Model<float> model(o_.model, base_.weights, train_everything());
    std::fprintf(stderr, "base: %td parameters, %td layers of width %td, %td query and %td key-value heads\n",
                 model.parameters().size(), o_.model.num_hidden_layers, o_.model.hidden_size,
                 o_.model.num_attention_heads, o_.model.num_key_value_heads);
    if (o_.base.empty())
      train(model, source_.train,
            {.label = "base",
             .steps = o_.base_steps,
             .batch = o_.batch,
             .window = o_.window,
             .learning_rate = o_.base_rate,
             .weight_decay = 0.1,
             .seed = o_.seed,
             .state = state_options("base", {})});
    Result r;
    r.method = "base";
    measure(model, r);
    if (o_.sample > 0) print_sample("the base", model);
    results_.push_back(std::move(r));
    if (!o_.base.empty()) return;
    base_.weights = model.weights();
    if (!o_.save.empty()) {
      save_checkpoint(o_.save + "/base", o_.model, base_.weights, {.dtype = o_.dtype});
      written_.push_back(o_.save + "/base");
    }
  }

  void adapt(const std::string& method) {
    Result r;
    r.method = method;
    r.learning_rate = rate_of(method, o_);
    const double begin = seconds();
    Adaptation adaptation(o_.model, base_.weights, method, method_options());
    Model<float> model(o_.model, base_.weights, adaptation.recipe());
    r.init_seconds = seconds() - begin;
    r.trainable = model.parameters().size();
    r.first_loss = evaluate(model, target_.test, o_.window, o_.eval_windows);
    std::fprintf(stderr, "%s: %s, %td parameters\n", method.c_str(), adaptation.summary().c_str(), r.trainable);
    TrainOptions training = train_options(method, r.learning_rate);
    training.state = state_options(method, adaptation_settings(method));
    r.training = o_.track.empty() ? train(model, target_.train, training)
                                  : train_tracked(adaptation, model, target_.train, training, o_.track);
    measure(model, r);
    r.changes = adaptation.changes(model);
    if (o_.sample > 0) print_sample(method, model);
    if (!o_.save.empty()) save(adaptation, model);
    results_.push_back(std::move(r));
  }

  void measure(Model<float>& model, Result& r) const {
    r.target_loss = evaluate(model, target_.test, o_.window, o_.eval_windows);
    r.source_loss = with_source() ? evaluate(model, source_.test, o_.window, o_.eval_windows)
                                  : std::numeric_limits<double>::quiet_NaN();
  }

  static bool saves_checkpoint(const Adaptation& a) { return a.method() == "full" || a.quantises(); }

  void save(const Adaptation& adaptation, Model<float>& model) {
    const std::string folder = o_.save + "/" + adaptation.method();
    if (saves_checkpoint(adaptation))
      save_checkpoint(folder, o_.model, model.weights(), {.source = base_.source, .dtype = o_.dtype});
    else
      save_adapter(folder, adaptation, model, o_.base.empty() ? o_.save + "/base" : o_.base);
    written_.push_back(folder);
  }

  void print_sample(const std::string& who, Model<float>& model) const {
    const std::vector<Token> prompt(target_.test.begin(),
                                    target_.test.begin() + std::min<Index>(o_.window, Index(target_.test.size())));
    std::string text;
    for (const Token t : generate(model, prompt, o_.sample, o_.window, 0.7, o_.seed))
      text += t == 9 || t == 10 || (t >= 32 && t < 127) ? char(t) : '?';
    std::printf("\n--- %s writes, after held-out text of the new domain:\n%s\n", who.c_str(), text.c_str());
  }

  /// Validation loss of every method at every rate: how a rate is chosen without looking at the test text.
  void sweep() const {
    std::printf("Validation loss on the new domain after %td steps\n\n  %-12s", o_.steps, "method");
    for (const double rate : o_.sweep) std::printf(" %9.2g", rate);
    std::printf("\n");
    for (const std::string& method : o_.methods) {
      std::printf("  %-12s", method.c_str());
      for (const double rate : o_.sweep) {
        Adaptation adaptation(o_.model, base_.weights, method, method_options());
        Model<float> model(o_.model, base_.weights, adaptation.recipe());
        double loss = std::numeric_limits<double>::quiet_NaN();
        try {
          train(model, target_.train, train_options(method, rate));
          loss = evaluate(model, target_.validation, o_.window, o_.eval_windows);
        } catch (const lowrank::NonFiniteError&) {  // diverged: that is what the table then says
        }
        std::printf(" %9.4f", loss);
        std::fflush(stdout);
      }
      std::printf("\n");
    }
  }

  [[nodiscard]] MethodOptions method_options() const {
    return {.rank = o_.rank,
            .alpha = o_.alpha,
            .rank_stabilised = o_.rank_stabilised,
            .dropout = o_.dropout,
            .targets = o_.targets,
            .train_fully = o_.train_fully,
            .seed = o_.seed};
  }

  [[nodiscard]] TrainOptions train_options(const std::string& label, double rate) const {
    return {.label = label,
            .steps = o_.steps,
            .batch = o_.batch,
            .window = o_.window,
            .learning_rate = rate,
            .weight_decay = o_.weight_decay,
            .lora_plus = o_.lora_plus,
            .seed = o_.seed + 1};
  }

  [[nodiscard]] Settings adaptation_settings(const std::string& method) const {
    std::string fully;
    for (const std::string& kind : o_.train_fully) fully += (fully.empty() ? "" : ",") + kind;
    return {{"method", method},
            {"rank", exact(double(o_.rank))},
            {"alpha", exact(o_.alpha)},
            {"rank-stabilised", o_.rank_stabilised ? "yes" : "no"},
            {"dropout", exact(o_.dropout)},
            {"targets", o_.targets},
            {"trained fully", fully}};
  }

  /// The base as it is now belongs to the settings: it says whether a state is of this model at all.
  [[nodiscard]] StateOptions state_options(const std::string& label, Settings settings) const {
    if (o_.checkpoint.empty()) return {};
    settings["base"] = fingerprint(base_.weights);
    return {.file = state_file(o_, label),
            .every = o_.checkpoint_every,
            .resume = o_.resume,
            .settings = std::move(settings)};
  }

  Options& o_;
  Base base_;
  Corpus target_, source_;
  std::vector<Result> results_;
  std::vector<std::string> written_;
};

/// What an interrupted run leaves behind, and how to go on.
void say_interrupted(const char* where, const std::vector<std::string>& written, bool kept) {
  std::string names;
  for (const std::string& path : written) names += (names.empty() ? "" : ", ") + path;
  std::fprintf(stderr, "\n%s; %s%s\n", where,
               names.empty() ? "no model was saved" : "saved before that: ", names.c_str());
  if (kept) std::fprintf(stderr, "the same command with --resume goes on\n");
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
  Comparison comparison(options);
  try {
    comparison.run();
  } catch (const llama::Interrupted& e) {
    say_interrupted(e.what(), comparison.written(), !found_state(options).empty());
    return 130;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "finetune: %s\n", e.what());
    return 1;
  }
  return 0;
}

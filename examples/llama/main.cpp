// SPDX-License-Identifier: Apache-2.0
// finetune: trains a small language model on one kind of text, adapts it to another in several ways, and compares them.
//
// Read in this order: projection.hpp (how the library is embedded), model.hpp (the transformer around it), methods.cpp
// (what tells LoRA from PiSSA), trainer.cpp (the loop), then this file.
//
// Exit codes: 0 done, 1 the input or the machine was not as expected, 2 the command line was wrong (for both, one line
// on stderr says what), 3 done but for a method that diverged, 130 interrupted.
#include <CLI/CLI.hpp>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <new>

#include "checkpoint.hpp"
#include "common/cli.hpp"
#include "common/outputs.hpp"
#include "common/progress.hpp"
#include "corpus.hpp"
#include "lowrank/core/version.hpp"
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

  /// Gives the exit code.
  int run() {
    prepare();
    make_base();
    if (!o_.sweep.empty()) {
      sweep();
      return common::exit_code::done;
    }
    bool diverged = false;
    for (const std::string& method : o_.methods) {
      adapt(method);
      diverged = diverged || results_.back().diverged_at > 0;
      if (!o_.output.empty()) files_ = write_files(o_.output, results_, o_.rank);  // whatever becomes of the next one
    }
    print_losses(results_, with_source());
    print_ranks(results_, o_.rank);
    print_files();
    return diverged ? common::exit_code::diverged : common::exit_code::done;
  }
  /// What has been saved so far, for whoever is interrupted.
  [[nodiscard]] const std::vector<std::string>& written() const { return written_; }

 private:
  [[nodiscard]] bool with_source() const { return !o_.source.empty(); }

  /// Everything a user can get wrong is found before the first minute of training.
  void prepare() {
    if (!o_.base.empty()) check_places();
    check_options(o_);
    if (!o_.save.empty()) check_models();
    clean_up(o_);
    if (o_.base.empty()) {
      base_ = {o_.model, random_weights<float>(o_.model, o_.seed), nullptr};
    } else {
      base_ = load_checkpoint(o_.base);
      o_.model = base_.config;
    }
    for (const auto& [module, W] : base_.weights) parameters_ += W.size();
    for (const std::string& method : o_.methods) Adaptation(o_.model, base_.weights, method, method_options());
    target_ = load(o_.target, o_);
    source_ = load(o_.source, o_);
    make_folders(o_);
    if (with_source()) describe("old domain", source_);
    describe("new domain", target_);
  }

  /// Nothing is to be written into the base.
  void check_places() const {
    if (!o_.checkpoint.empty()) check_apart("--checkpoint", o_.checkpoint, o_.base);
    if (o_.save.empty()) return;
    check_apart("--save", o_.save, o_.base);
    for (const std::string& method : o_.methods) check_apart("--save", o_.save + "/" + method, o_.base);
  }

  void check_models() const {
    std::vector<std::string> models;
    if (o_.base.empty()) models.emplace_back("base");
    if (o_.sweep.empty()) models.insert(models.end(), o_.methods.begin(), o_.methods.end());
    for (const std::string& model : models) {
      const std::string folder = o_.save + "/" + model;
      // A run that goes on comes to the models it has saved once more: the same ones.
      if (!o_.overwrite && !o_.resume) common::refuse_existing(folder, "--overwrite");
      check_replaceable(folder);
    }
  }

  /// A folder is replaced as a whole: it must be a model's, not one that only bears a method's name.
  static void check_replaceable(const std::string& folder) {
    namespace fs = std::filesystem;
    std::error_code ignored;
    if (!fs::exists(fs::symlink_status(folder, ignored))) return;
    const bool model =
        fs::exists(folder + "/config.json", ignored) || fs::exists(folder + "/adapter_config.json", ignored);
    if (!model && !fs::is_empty(folder, ignored))
      throw lowrank::IoError(
          folder, "is no model's folder, and is not replaced: expected a config.json or adapter_config.json");
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
    if (!std::isfinite(r.target_loss))
      throw lowrank::NonFiniteError(
          message("base: its loss on the new domain must be a number to adapt it, got ", r.target_loss));
    if (o_.sample > 0) print_sample("the base", model);
    results_.push_back(std::move(r));
    if (!o_.base.empty()) return;
    base_.weights = model.weights();
    if (o_.save.empty()) return;
    save_as("base",
            [&](const std::string& folder) { save_checkpoint(folder, o_.model, base_.weights, {.dtype = o_.dtype}); });
  }

  void adapt(const std::string& method) {
    Result r;
    r.method = method;
    r.learning_rate = rate_of(method, o_, parameters_);
    const double begin = seconds();
    Adaptation adaptation(o_.model, base_.weights, method, method_options());
    Model<float> model(o_.model, base_.weights, adaptation.recipe());
    r.init_seconds = seconds() - begin;
    r.trainable = model.parameters().size();
    r.first_loss = evaluate(model, target_.test, o_.window, o_.eval_windows);
    std::fprintf(stderr, "%s: %s, %td parameters, rate %.2g\n", method.c_str(), adaptation.summary().c_str(),
                 r.trainable, r.learning_rate);
    TrainOptions training = train_options(method, r.learning_rate);
    training.state = state_options(method, adaptation_settings(method));
    try {
      r.training = o_.track.empty() ? train(model, target_.train, training)
                                    : train_tracked(adaptation, model, target_.train, training, o_.track);
      measure(model, r);
      if (!std::isfinite(r.target_loss)) throw Diverged(method, r.learning_rate, o_.steps, r.training.losses);
    } catch (const Diverged& e) {  // the other methods and their figures stand
      common::note("finetune", e.what());
      r.diverged_at = e.step;
      r.training.losses = e.losses;
      r.target_loss = r.source_loss = std::numeric_limits<double>::quiet_NaN();
      results_.push_back(std::move(r));
      return;
    }
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

  /// The model's folder appears whole; one that is there stays until then.
  void save_as(const std::string& name, const std::function<void(const std::string&)>& write) {
    common::StagedFolder staged(o_.save + "/" + name);
    write(staged.folder());
    staged.commit();
    written_.push_back(o_.save + "/" + name);
  }

  void save(const Adaptation& adaptation, Model<float>& model) {
    save_as(adaptation.method(), [&](const std::string& folder) {
      if (adaptation.method() == "full" || adaptation.quantises())
        save_checkpoint(folder, o_.model, model.weights(), {.source = base_.source, .dtype = o_.dtype});
      else
        save_adapter(folder, adaptation, model, base_name());
    });
  }

  /// Readers look for a relative path from where they are run, which is seldom here.
  [[nodiscard]] std::string base_name() const {
    if (!o_.base_name.empty()) return o_.base_name;
    if (!o_.base.empty()) return common::absolute(o_.base);
    return o_.save.empty() ? "" : common::absolute(o_.save + "/base");
  }

  void print_sample(const std::string& who, Model<float>& model) const {
    const std::vector<Token> prompt(target_.test.begin(),
                                    target_.test.begin() + std::min<Index>(o_.window, Index(target_.test.size())));
    std::string text;
    for (const Token t : generate(model, prompt, o_.sample, o_.window, 0.7, o_.seed))
      text += t == 9 || t == 10 || (t >= 32 && t < 127) ? char(t) : '?';
    std::printf("\n--- %s writes, after held-out text of the new domain:\n%s\n", who.c_str(), text.c_str());
  }

  void print_files() const {
    if (files_.empty()) return;
    std::string list;
    for (const std::string& file : files_) list += (list.empty() ? "" : ", ") + file;
    std::printf("\nWritten: %s\n", list.c_str());
  }

  /// Validation loss of every method at every rate: how a rate is chosen without looking at the test text. What has
  /// been tried is reported whatever ends the sweep.
  void sweep() {
    std::vector<Trial> trials;
    try {
      for (const std::string& method : o_.methods)
        for (const double rate : o_.sweep) {
          trials.push_back(attempt(method, rate));
          if (!o_.output.empty()) files_ = {write_sweep(o_.output, trials, o_.steps)};
        }
    } catch (...) {
      if (!trials.empty()) print_sweep(trials, o_.methods, o_.sweep, o_.steps);
      std::fflush(stdout);
      throw;
    }
    print_sweep(trials, o_.methods, o_.sweep, o_.steps);
    print_files();
  }

  [[nodiscard]] Trial attempt(const std::string& method, double rate) const {
    Adaptation adaptation(o_.model, base_.weights, method, method_options());
    Model<float> model(o_.model, base_.weights, adaptation.recipe());
    Trial trial{method, rate};
    const std::string label = common::text(method, " at ", rate);
    try {
      train(model, target_.train, train_options(label, rate));
      trial.loss = evaluate(model, target_.validation, o_.window, o_.eval_windows);
      if (!std::isfinite(trial.loss)) throw Diverged(label, rate, o_.steps, std::vector<double>(std::size_t(o_.steps)));
    } catch (const Diverged& e) {
      common::note("finetune", e.what());
      trial.diverged_at = e.step;
      trial.loss = std::numeric_limits<double>::quiet_NaN();
    }
    return trial;
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
  std::vector<std::string> written_, files_;
  Index parameters_ = 0;
};

/// What an interrupted run leaves behind, and how to go on.
void say_interrupted(const std::string& where, const std::vector<std::string>& written, bool kept) {
  std::string names;
  for (const std::string& path : written) names += (names.empty() ? "" : ", ") + path;
  common::note("finetune", where + (names.empty() ? "; no model was saved" : "; saved before that: " + names));
  if (kept) common::note("finetune", "the same command with --resume goes on");
}

int run(Options& options) {
  Comparison comparison(options);
  try {
    const int code = comparison.run();
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      return common::complain("finetune", common::exit_code::failed,
                              common::text("cannot write the tables to stdout: ", std::strerror(errno)));
    return code;
  } catch (const llama::Interrupted& e) {
    say_interrupted(e.what(), comparison.written(), !found_state(options).empty());
    return 128 + SIGINT;
  } catch (const common::UsageError& e) {
    return common::complain("finetune", common::exit_code::usage, e.what());
  } catch (const std::bad_alloc&) {
    return common::complain("finetune", common::exit_code::failed, "not enough memory");
  } catch (const std::exception& e) {
    return common::complain("finetune", common::exit_code::failed, e.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Trains a small Llama-architecture model on bytes of --source, adapts it to --target in several ways, compares "
      "them.",
      "finetune"};
  app.set_version_flag("--version", std::string("finetune (lowrank ") + lowrank::version + ")");
  app.footer(
      "Exit codes: 0 done, 1 the input or the machine was not as expected, 2 the command line was wrong, 3 done but "
      "for a method that diverged, 130 interrupted.");
  app.get_formatter()->column_width(34);
  add_options(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    return common::complain("finetune", common::exit_code::usage, common::explain(app, e));
  }
  note_given(app, options);
  // A limit on file sizes is a disk that is full: an error of the write that met it.
  std::signal(SIGXFSZ, SIG_IGN);
  llama::watch_for_interrupts();
  return run(options);
}

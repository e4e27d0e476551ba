// SPDX-License-Identifier: Apache-2.0
#include "trainer.hpp"

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <numeric>

#include "common/progress.hpp"
#include "common/text.hpp"
#include "corpus.hpp"

namespace llama {
namespace {

volatile std::sig_atomic_t interrupted = 0;
extern "C" void note_signal(int) { interrupted = 1; }

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + std::ptrdiff_t(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

void watch_for_interrupts() {
  std::signal(SIGINT, note_signal);
  std::signal(SIGTERM, note_signal);
}

bool interrupt_requested() { return interrupted != 0; }

void throw_if_interrupted() {
  if (interrupt_requested()) throw Interrupted("interrupted");
}

Diverged::Diverged(const std::string& label, double rate, Index steps, std::vector<double> losses_so_far)
    : NonFiniteError(common::text(label, " diverged at step ", std::min(Index(losses_so_far.size()) + 1, steps), " of ",
                                  steps, ", rate ", rate,
                                  ": its loss or its gradients are not finite; a lower rate may help")),
      step(std::min(Index(losses_so_far.size()) + 1, steps)),
      losses(std::move(losses_so_far)) {}

namespace {

/// One run of train(): begun or resumed, stepped, kept.
class Run {
 public:
  Run(Model<float>& model, const std::vector<Token>& tokens, const TrainOptions& options)
      : model_(model),
        parameters_(model.parameters()),
        tokens_(tokens),
        o_(options),
        adam_(parameters_.size(), {.beta2 = 0.99},
              lowrank::lora_plus_groups(parameters_.table(), o_.lora_plus, o_.weight_decay)),
        rate_({.peak = o_.learning_rate,
               .warmup_steps = std::int64_t(o_.warmup * double(o_.steps)),
               .total_steps = o_.steps,
               .decay = lowrank::Decay::cosine,
               .floor = o_.learning_rate / 10}) {}

  /// Where the state file is if it is to be resumed, else step 0.
  void begin() {
    if (o_.state.file.empty()) return;
    settings_ = o_.state.settings;
    settings_.merge(own_settings());
    if (!o_.state.resume || !std::filesystem::exists(o_.state.file)) return keep();  // fails now if it will
    at_ = load_state(o_.state.file, parameters_, adam_, settings_);
    model_.set_training_passes(at_.step);
    std::fprintf(stderr, "%s: goes on at step %td of %td\n", o_.label.c_str(), at_.step, o_.steps);
  }

  void to_the_end() {
    const auto tokens = [&](Index steps) { return std::uint64_t(steps * o_.batch * o_.window); };
    common::Progress progress({.label = o_.label,
                               .items = std::uint64_t(o_.steps),
                               .item_name = "steps",
                               .work = tokens(o_.steps),
                               .work_name = "tokens",
                               .items_before = std::uint64_t(at_.step),
                               .work_before = tokens(at_.step),
                               .plain_lines = 4});
    std::string loss;
    while (at_.step < o_.steps) {
      stop_if_interrupted();
      step();
      if (o_.after_step) o_.after_step();
      if (at_.step % o_.state.every == 0 || at_.step == o_.steps) keep();
      loss = smoothed_loss();
      progress.update(std::uint64_t(at_.step), tokens(at_.step), loss);
    }
    progress.finish(loss);
  }

  [[nodiscard]] TrainResult result(double seconds) const {
    const double step = median(at_.seconds);
    return {.seconds = seconds,
            .step_ms = 1e3 * step,
            .tokens_per_second = double(o_.batch * o_.window) / step,
            .losses = at_.losses};
  }
  /// What the steps before a resumption took.
  [[nodiscard]] double seconds_before() const { return std::accumulate(at_.seconds.begin(), at_.seconds.end(), 0.0); }

 private:
  void step() {
    const Batch batch = random_batch(tokens_, o_.batch, o_.window, o_.seed, std::uint64_t(at_.step));
    const double begin = now();
    parameters_.zero_gradients();
    const double loss = model_.loss_and_gradients(batch);
    const auto diverged = [&] { return Diverged(o_.label, o_.learning_rate, o_.steps, at_.losses); };
    if (!std::isfinite(loss)) throw diverged();
    try {
      lowrank::clip_gradients<float>(parameters_.gradients(), o_.clip);
    } catch (const lowrank::NonFiniteError&) {
      throw diverged();
    }
    adam_.step(parameters_.values(), parameters_.gradients(), rate_(at_.step));
    at_.seconds.push_back(now() - begin);
    at_.losses.push_back(loss);
    ++at_.step;
  }

  /// A single batch says little.
  std::string smoothed_loss() {
    smoothed_ = std::isnan(smoothed_) ? at_.losses.back() : 0.95 * smoothed_ + 0.05 * at_.losses.back();
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "loss %.3f", smoothed_);
    return buffer;
  }

  void keep() {
    if (!o_.state.file.empty()) save_state(o_.state.file, parameters_, adam_, at_, settings_);
  }

  void stop_if_interrupted() {
    if (!interrupt_requested()) return;
    keep();
    throw Interrupted(message("interrupted at step ", at_.step, " of ", o_.steps, " of ", o_.label,
                              o_.state.file.empty() ? "" : "; its state is in " + o_.state.file));
  }

  [[nodiscard]] Settings own_settings() const {
    return {{"steps", exact(double(o_.steps))},
            {"batch", exact(double(o_.batch))},
            {"window", exact(double(o_.window))},
            {"learning rate", exact(o_.learning_rate)},
            {"warm-up", exact(o_.warmup)},
            {"weight decay", exact(o_.weight_decay)},
            {"clip", exact(o_.clip)},
            {"LoRA+ ratio", exact(o_.lora_plus)},
            {"seed of the batches", std::to_string(o_.seed)},
            {"training text", fingerprint(tokens_)}};
  }

  Model<float>& model_;
  lowrank::FlatParameters<float>& parameters_;
  const std::vector<Token>& tokens_;
  const TrainOptions& o_;
  lowrank::AdamW<float> adam_;
  lowrank::Schedule rate_;
  Settings settings_;
  Progressed at_;
  double smoothed_ = std::numeric_limits<double>::quiet_NaN();
};

}  // namespace

TrainResult train(Model<float>& model, const std::vector<Token>& tokens, const TrainOptions& o) {
  if (o.steps < 1 || o.batch < 1 || o.state.every < 1)
    throw lowrank::ArgumentError(message("train: steps, batch and state.every must be at least 1, got ", o.steps, ", ",
                                         o.batch, " and ", o.state.every));
  if (model.parameters().size() == 0) throw lowrank::ArgumentError("train: the model has nothing trainable");
  Run run(model, tokens, o);
  run.begin();
  const double start = now() - run.seconds_before();
  run.to_the_end();
  return run.result(now() - start);
}

double evaluate(Model<float>& model, const std::vector<Token>& tokens, Index window, Index windows) {
  double sum = 0;
  Index count = 0;
  for (const Batch& batch : even_batches(tokens, windows, window, 8)) {
    throw_if_interrupted();
    sum += model.loss(batch) * double(batch.tokens());
    count += batch.tokens();
  }
  return sum / double(count);
}

std::vector<Token> generate(Model<float>& model, std::vector<Token> prompt, Index count, Index window,
                            double temperature, std::uint64_t seed) {
  const lowrank::CounterRng rng(seed, 0x7e47);
  std::vector<Token> made;
  for (Index i = 0; i < count; ++i) {
    throw_if_interrupted();
    const Index n = std::min(window, Index(prompt.size()));
    const Batch context{1, n, std::vector<Token>(prompt.end() - n, prompt.end()), {}};
    const auto logits = model.forward(context).row(n - 1).template cast<double>().eval();
    const double top = logits.maxCoeff();
    double total = 0;
    for (const double z : logits) total += std::exp((z - top) / temperature);
    double at = rng.uniform(std::uint64_t(i)) * total;
    Token next = 0;
    while (next + 1 < Token(logits.size()) && (at -= std::exp((logits(next) - top) / temperature)) > 0) ++next;
    prompt.push_back(next);
    made.push_back(next);
  }
  return made;
}

}  // namespace llama

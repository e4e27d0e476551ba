// SPDX-License-Identifier: Apache-2.0
#include "trainer.hpp"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>

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

void throw_if_interrupted() {
  if (interrupted != 0) throw Interrupted();
}

Progress::Progress(std::string label, Index steps, Index tokens_per_step)
    : label_(std::move(label)),
      steps_(steps),
      tokens_per_step_(tokens_per_step),
      terminal_(::isatty(STDERR_FILENO) != 0),
      start_(now()) {}

Progress::~Progress() {
  if (open_) std::fputc('\n', stderr);
}

void Progress::update(Index done, double loss) {
  smoothed_ = done == 1 ? loss : 0.95 * smoothed_ + 0.05 * loss;
  const double t = now();
  const bool last = done == steps_;
  // Ten redraws a second are smooth; a log wants a line about every quarter of the run.
  const bool due = terminal_ ? t - drawn_ > 0.1 : done * 4 / steps_ != (done - 1) * 4 / steps_;
  if (!due && !last) return;
  drawn_ = t;
  draw(done, smoothed_, last);
}

void Progress::draw(Index done, double loss, bool last) {
  const double elapsed = now() - start_, rate = double(done * tokens_per_step_) / elapsed;
  const double left = elapsed / double(done) * double(steps_ - done);
  if (!terminal_) {
    std::fprintf(stderr, "%-18s step %5td/%td  loss %.3f  %6.0f tokens/s  %3.0f s left\n", label_.c_str(), done, steps_,
                 loss, rate, left);
    return;
  }
  constexpr Index width = 24;
  const Index full = width * done / steps_;
  std::string bar;
  for (Index i = 0; i < width; ++i) bar += i < full ? "█" : "░";
  std::fprintf(stderr, "\r%-18s %s %3td %%  loss %.3f  %6.0f tokens/s  %s%3.0f s \033[K", label_.c_str(), bar.c_str(),
               100 * done / steps_, loss, rate, last ? "took " : "left ", last ? elapsed : left);
  std::fflush(stderr);
  open_ = !last;
  if (last) std::fputc('\n', stderr);
}

TrainResult train(Model<float>& model, const std::vector<Token>& tokens, const TrainOptions& o) {
  if (o.steps < 1 || o.batch < 1)
    throw lowrank::ArgumentError(message("train: steps and batch must be at least 1, got ", o.steps, " and ", o.batch));
  lowrank::FlatParameters<float>& p = model.parameters();
  if (p.size() == 0) throw lowrank::ArgumentError("train: the model has nothing trainable");
  lowrank::AdamW<float> adam(p.size(), {.beta2 = 0.99},
                             lowrank::lora_plus_groups(p.table(), o.lora_plus, o.weight_decay));
  const lowrank::Schedule rate({.peak = o.learning_rate,
                                .warmup_steps = std::int64_t(o.warmup * double(o.steps)),
                                .total_steps = o.steps,
                                .decay = lowrank::Decay::cosine,
                                .floor = o.learning_rate / 10});
  TrainResult result;
  std::vector<double> times;
  Progress progress(o.label, o.steps, o.batch * o.window);
  const double start = now();
  for (Index step = 0; step < o.steps; ++step) {
    throw_if_interrupted();
    const Batch batch = random_batch(tokens, o.batch, o.window, o.seed, std::uint64_t(step));
    const double begin = now();
    p.zero_gradients();
    const double loss = model.loss_and_gradients(batch);
    lowrank::clip_gradients<float>(p.gradients(), o.clip);
    adam.step(p.values(), p.gradients(), rate(step));
    times.push_back(now() - begin);
    result.losses.push_back(loss);
    if (o.after_step) o.after_step();
    progress.update(step + 1, loss);
  }
  result.seconds = now() - start;
  result.step_ms = 1e3 * median(times);
  result.tokens_per_second = double(o.batch * o.window) / median(times);
  return result;
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

// SPDX-License-Identifier: Apache-2.0
// The model and the loop as a whole: starts, determinism, causality, merging, and what is refused.
#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "corpus.hpp"
#include "lowrank/spectrum/tracker.hpp"
#include "methods.hpp"
#include "support/temp_dir.hpp"
#include "tiny.hpp"
#include "trainer.hpp"

using namespace llama;
using tiny::Choice;

namespace {

const ModelConfig learner{.hidden_size = 32,
                          .intermediate_size = 48,
                          .num_hidden_layers = 2,
                          .num_attention_heads = 4,
                          .num_key_value_heads = 2,
                          .head_dim = 8};

/// Something a model can learn: words in an order with rules.
std::vector<Token> sentences(std::uint64_t seed) {
  const std::vector<std::string> who{"the cat ", "a dog ", "my bird "}, does{"sees ", "likes ", "eats "};
  std::vector<Token> tokens;
  const lowrank::CounterRng rng(seed);
  for (std::uint64_t i = 0; i < 400; ++i)
    for (const std::string& part :
         {who[rng.below(3 * i, 3)], does[rng.below(3 * i + 1, 3)], who[rng.below(3 * i + 2, 3)]})
      for (const char c : part) tokens.push_back(Token(c));
  return tokens;
}

double largest_difference(const Mat<float>& a, const Mat<float>& b) { return double((a - b).cwiseAbs().maxCoeff()); }

TrainOptions quick(double rate, Index steps = 60) {
  return {.label = "test", .steps = steps, .batch = 4, .window = 24, .learning_rate = rate, .seed = 3};
}

}  // namespace

TEST_CASE("every method starts as the base, except those that round it") {
  const auto base = tiny::weights<float>(learner);
  const Batch batch = random_batch(sentences(1), 3, 20, 1, 0);
  Model<float> frozen(learner, base, tiny::recipe<float>([](const std::string&) { return Choice::frozen; }));
  const Mat<float> want = frozen.forward(batch);
  const auto difference = [&](const std::string& method, double alpha) {
    Adaptation adaptation(learner, base, method, {.rank = 4, .alpha = alpha, .targets = "all"});
    Model<float> model(learner, base, adaptation.recipe());
    CHECK(model.parameters().size() > 0);
    return largest_difference(model.forward(batch), want);
  };
  for (const double alpha : {4.0, 7.5}) {  // α = r and α ≠ r
    CHECK(difference("full", alpha) == 0);
    CHECK(difference("lora", alpha) == 0);
    // PiSSA and OLoRA split W in float: each weight comes back to some eps, and activations are of order 1.
    CHECK(difference("pissa", alpha) < 1e-4);
    CHECK(difference("olora", alpha) < 1e-4);
  }
  for (const std::string bits : {"4", "2"}) {
    CAPTURE(bits);
    CHECK(difference("qlora" + bits, 8) > 1e-3);
  }
}

TEST_CASE("LoftQ starts from a lower loss than QLoRA, in 4 and in 2 bits, on a base that was trained") {
  Weights<float> base = tiny::weights<float>(learner);
  {
    Model<float> model(learner, base, train_everything());
    train(model, sentences(1), quick(3e-3, 300));
    Weights<float> trained = model.weights();
    base = std::move(trained);
  }
  const auto held_out = sentences(2);
  const auto start = [&](const std::string& method) {
    Adaptation adaptation(learner, base, method, {.rank = 4, .alpha = 8});
    Model<float> model(learner, base, adaptation.recipe());
    return evaluate(model, held_out, 24, 128);
  };
  const double exact_base = start("lora");
  CHECK(exact_base < 1);  // it has learnt its words
  for (const std::string bits : {"4", "2"}) {
    CAPTURE(bits);
    const double plain = start("qlora" + bits), corrected = start("loftq" + bits);
    MESSAGE(bits, " bits: base ", exact_base, ", QLoRA ", plain, ", LoftQ ", corrected);
    CHECK(plain > exact_base);
    CHECK(corrected < plain);
    CHECK(start("loftq" + bits) == corrected);  // deterministic
  }
}

TEST_CASE("LoftQ starts nearer to the base than plain rounding, in weights") {
  const auto base = tiny::weights<float>(learner);
  for (const std::string bits : {"4", "2"}) {
    const auto error = [&](const std::string& method) {
      Adaptation adaptation(learner, base, method + bits, {.rank = 4, .alpha = 8});
      Model<float> model(learner, base, adaptation.recipe());
      CHECK(adaptation.bytes_per_weight() < (bits == "4" ? 0.6 : 0.35));
      double sum = 0;
      for (const auto& [module, W] : model.weights())
        for (Index i = 0; i < W.size(); ++i)
          sum += std::pow(double(W.data()[i]) - double(base.at(module).data()[i]), 2);
      return std::sqrt(sum);
    };
    const double plain = error("qlora"), loftq = error("loftq"), qpissa = error("qpissa");
    CAPTURE(bits);
    CHECK(loftq < plain);
    CHECK(qpissa < plain);
  }
}

TEST_CASE("training lowers the loss with every method, and the same seed gives the same bits") {
  const auto base = tiny::weights<float>(learner);
  const auto tokens = sentences(1), held_out = sentences(2);
  for (const std::string method : {"full", "lora", "pissa", "olora", "qlora4", "loftq2"}) {
    CAPTURE(method);
    const auto run = [&] {
      Adaptation adaptation(learner, base, method,
                            {.rank = 4, .alpha = 8, .dropout = method == "lora" ? 0.1 : 0.0, .seed = 1});
      Model<float> model(learner, base, adaptation.recipe());
      const double before = evaluate(model, held_out, 24, 16);
      const TrainResult result = train(model, tokens, quick(method == "full" ? 3e-3 : 1e-2));
      CHECK(result.losses.size() == 60);
      CHECK(evaluate(model, held_out, 24, 16) < before - 0.5);
      const auto values = model.parameters().values();
      return std::vector<float>(values.begin(), values.end());
    };
    CHECK(run() == run());
  }
}

TEST_CASE("merged weights give the adapted model's output") {
  const auto base = tiny::weights<float>(learner);
  const auto tokens = sentences(1);
  const Batch batch = random_batch(tokens, 3, 20, 1, 0);
  for (const bool tied : {false, true}) {
    ModelConfig c = learner;
    c.tie_word_embeddings = tied;
    for (const std::string method : {"full", "lora", "pissa", "loftq4"}) {
      CAPTURE(method);
      CAPTURE(tied);
      Adaptation adaptation(c, base, method, {.rank = 4, .alpha = 6, .targets = "all"});
      if (method == "loftq4" && tied) continue;
      Model<float> model(c, base, adaptation.recipe());
      train(model, tokens, quick(5e-3, 20));
      const Mat<float> want = model.forward(batch);
      const Weights<float> merged = model.weights();
      ModelConfig untied = c;
      untied.tie_word_embeddings = merged.count("lm_head") == 0;
      Model<float> plain(untied, merged, tiny::recipe<float>([](const std::string&) { return Choice::frozen; }));
      CHECK(largest_difference(plain.forward(batch), want) < 1e-4 * double(want.cwiseAbs().maxCoeff()));
    }
  }
}

TEST_CASE("what training did, as factors and as spectrum, is the difference of the weights") {
  const auto base = tiny::weights<float>(learner);
  for (const std::string method : {"full", "lora", "pissa"}) {
    CAPTURE(method);
    Adaptation adaptation(learner, base, method, {.rank = 4, .alpha = 6});
    Model<float> model(learner, base, adaptation.recipe());
    train(model, sentences(1), quick(5e-3, 20));
    const Weights<float> now = model.weights();
    const auto changes = adaptation.changes(model);
    CHECK(changes.size() == (method == "full" ? now.size() : 14));
    for (const auto& change : changes) {
      double dense = 0, sigma = 0;
      const auto &a = now.at(change.module), &b = base.at(change.module);
      for (Index i = 0; i < a.size(); ++i) dense += std::pow(double(a.data()[i]) - double(b.data()[i]), 2);
      for (const double s : change.sigma) sigma += s * s;
      // The dense difference carries the rounding of W' and W, some 1e-7 of each weight.
      CHECK(std::sqrt(sigma) == doctest::Approx(std::sqrt(dense)).epsilon(1e-3));
      if (method != "full") CHECK(Index(change.sigma.size()) == (method == "lora" ? 4 : 8));
    }
    for (const auto& [module, f] : adaptation.factors(model)) {
      const auto delta = lowrank::delta_weight(f);
      const auto &a = now.at(module), &b = base.at(module);
      double worst = 0;
      for (Index i = 0; i < a.size(); ++i)
        worst = std::max(worst, std::abs(double(a.data()[i]) - double(b.data()[i]) - double(delta.data()[i])));
      CHECK(worst < 1e-5);
    }
  }
}

TEST_CASE("a tracker in the loop ends at the changes found afterwards") {
  const auto base = tiny::weights<float>(learner);
  for (const std::string method : {"full", "lora", "pissa", "loftq4"}) {
    CAPTURE(method);
    Adaptation adaptation(learner, base, method, {.rank = 4, .alpha = 8});
    Model<float> model(learner, base, adaptation.recipe());
    const test::TempDir folder;
    {
      lowrank::Tracker<float> tracker(folder / "run.jsonl", {.every = 10, .rank = 32});
      adaptation.watch(tracker, model);
      TrainOptions o = quick(1e-2, 20);
      o.after_step = [&] { tracker.step(); };
      train(model, sentences(1), o);
      CHECK(tracker.steps() == 20);
      CHECK(tracker.records() == 2);
    }
    std::map<std::string, std::pair<double, double>> last;  // module: norm, largest value
    std::ifstream in(folder / "run.jsonl");
    std::size_t lines = 0;
    for (std::string line; std::getline(in, line); ++lines) {
      const auto j = nlohmann::json::parse(line);
      last[j["module"]] = {j["frobenius_norm"], j["spectral_norm"]};
    }
    std::size_t matched = 0;
    for (const auto& c : adaptation.changes(model)) {
      const auto at = last.find(method + "/" + c.module);
      if (at == last.end()) continue;  // norms and embeddings are no projections
      ++matched;
      CAPTURE(c.module);
      CHECK(at->second.first == doctest::Approx(lowrank::frobenius_norm(c.sigma)).epsilon(1e-3));
      CHECK(at->second.second == doctest::Approx(c.sigma[0]).epsilon(1e-3));
    }
    CHECK(matched == last.size());
    CHECK(matched >= 14);
    CHECK(lines == 2 * last.size());
  }
}

TEST_CASE("a logit depends on no later token, and on the position of earlier ones") {
  const auto base = tiny::weights<float>(learner);
  Model<float> model(learner, base, tiny::recipe<float>([](const std::string&) { return Choice::frozen; }));
  Batch batch = random_batch(sentences(1), 2, 70, 1, 0);  // more than one block of attention rows
  const Mat<float> before = model.forward(batch);
  batch.inputs[40] = 'Z';  // of the first window
  const Mat<float> after = model.forward(batch);
  CHECK(largest_difference(before.topRows(40), after.topRows(40)) == 0);
  CHECK(largest_difference(before.bottomRows(70), after.bottomRows(70)) == 0);
  for (Index i = 40; i < 70; ++i) CHECK((before.row(i) - after.row(i)).cwiseAbs().maxCoeff() > 1e-6F);
  std::swap(batch.inputs[3], batch.inputs[7]);
  REQUIRE(batch.inputs[3] != batch.inputs[7]);
  CHECK(largest_difference(model.forward(batch).middleRows(60, 1), after.middleRows(60, 1)) > 1e-6);
}

TEST_CASE(
    "the loss of a model that knows nothing is log of the vocabulary; generated text is the same for the same seed") {
  auto base = tiny::weights<float>(learner);
  std::fill_n(base.at("lm_head").data(), base.at("lm_head").size(), 0.0F);
  Model<float> model(learner, base, tiny::recipe<float>([](const std::string&) { return Choice::frozen; }));
  CHECK(evaluate(model, sentences(1), 24, 8) == doctest::Approx(std::log(256.0)).epsilon(1e-6));
  const auto made = generate(model, {1, 2, 3}, 20, 8, 1.0, 5);
  CHECK(made.size() == 20);
  CHECK(made == generate(model, {1, 2, 3}, 20, 8, 1.0, 5));
  CHECK(made != generate(model, {1, 2, 3}, 20, 8, 1.0, 6));
}

TEST_CASE("what cannot be trained is refused with a reason") {
  const auto base = tiny::weights<float>(learner);
  const auto text = [](auto&& f) -> std::string {
    try {
      f();
    } catch (const lowrank::Error& e) {
      return e.what();
    }
    return "no exception";
  };
  const auto adapt = [&](const std::string& method, const MethodOptions& o) {
    return text([&] {
      Adaptation a(learner, base, method, o);
      Model<float> m(learner, base, a.recipe());
    });
  };
  CHECK(adapt("lara", {}).find("did you mean 'lora'?") != std::string::npos);
  CHECK(adapt("zebra", {}).find("expected one of full, lora, pissa") != std::string::npos);
  CHECK(adapt("lora", {.rank = 0}).find("rank must lie in [1, min(") != std::string::npos);
  CHECK(adapt("pissa", {.rank = 17}).find("rank must lie in [1, min(") != std::string::npos);  // k_proj is 16×32
  CHECK(adapt("lora", {.alpha = -1}).find("alpha must be positive") != std::string::npos);
  CHECK(adapt("lora", {.dropout = 1}).find("dropout must lie in [0, 1)") != std::string::npos);
  CHECK(adapt("lora", {.targets = "q_prj"}).find("q_prj") != std::string::npos);
  CHECK(adapt("lora", {.train_fully = {"head"}}).find("no module is called 'head'") != std::string::npos);
  ModelConfig c = learner;
  c.head_dim = 7;
  CHECK(text([&] { check(c); }).find("head_dim must be even and at least 2, got 7") != std::string::npos);
  c = learner;
  c.num_key_value_heads = 3;
  CHECK(text([&] { check(c); }).find("num_key_value_heads must be a divisor") != std::string::npos);
  c = learner;
  c.num_hidden_layers = 3;
  CHECK(text([&] { Model<float>(c, base, train_everything()); }).find("no weight 'model.layers.2.") !=
        std::string::npos);
  c = learner;
  c.intermediate_size = 49;
  CHECK(text([&] { Model<float>(c, base, train_everything()); }).find("must be 49x32, got 48x32") != std::string::npos);
  c = learner;
  c.tie_word_embeddings = true;
  CHECK(text([&] {
          Model<float> m(c, base, tiny::recipe<float>([](const std::string& m_) {
                           return m_ == "lm_head" ? Choice::full : Choice::frozen;
                         }));
        }).find("tied") != std::string::npos);
  Model<float> model(learner, base, train_everything());
  CHECK(text([&] { model.loss({1, 2, {1, 256}, {1, 2}}); }).find("got 256") != std::string::npos);
  CHECK(text([&] { model.loss({1, 2, {1, 2}, {1, -1}}); }).find("got -1") != std::string::npos);
  CHECK(text([&] { model.loss({1, 2, {1, 2}, {1}}); }).find("expected 2 targets, got 1") != std::string::npos);
  CHECK(text([&] { model.loss({2, 2, {1, 2}, {1, 2}}); }).find("expected 2x2 tokens, got 2") != std::string::npos);
  Model<float> frozen(learner, base, tiny::recipe<float>([](const std::string&) { return Choice::frozen; }));
  CHECK(text([&] { train(frozen, sentences(1), quick(1e-3)); }).find("nothing trainable") != std::string::npos);
  CHECK(text([&] { train(model, sentences(1), {.steps = 0}); }).find("at least 1") != std::string::npos);
  CHECK(text([&] { train(model, sentences(1), quick(1e30)); }).find("gradient") != std::string::npos);  // diverges
}

// SPDX-License-Identifier: Apache-2.0
// One training step against PyTorch: loss, every gradient, every value after AdamW, the loss after. See
// make_fixture.py.
//
// Both sides compute in double but sum in different orders and through different exponentials: relative differences of
// some hundred eps. An AdamW step divides a gradient by its own magnitude, so errors stay relative there too.
#include <doctest/doctest.h>

#include <fstream>
#include <map>
#include <sstream>

#include "lowrank/optim/adamw.hpp"
#include "tiny.hpp"

using llama::Index;
using lowrank::Matrix;

namespace {

constexpr double rounding = 1e-11;

struct Fixture {
  std::map<std::string, Matrix<double>> of[4];  // loss, gradient, value, loss_after

  explicit Fixture(const std::string& name) {
    std::ifstream in(std::string(LLAMA_FIXTURES) + "/" + name);
    REQUIRE_MESSAGE(in.good(), "missing fixture ", name);
    const std::string kinds[4] = {"loss", "gradient", "value", "loss_after"};
    for (std::string line; std::getline(in, line);) {
      std::istringstream fields(line);
      std::string kind, entry;
      Index rows = 0, cols = 0;
      fields >> kind >> entry >> rows >> cols;
      Matrix<double> m(rows, cols);
      for (Index i = 0; i < m.size(); ++i) fields >> m.data()[i];
      REQUIRE(!fields.fail());
      const auto at = std::find(std::begin(kinds), std::end(kinds), kind);
      REQUIRE(at != std::end(kinds));
      of[at - std::begin(kinds)].emplace(entry, std::move(m));
    }
  }
};

Matrix<double> formula(Index rows, Index cols, int number, double amplitude = 0.5, double offset = 0) {
  Matrix<double> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = offset + amplitude * std::sin(1 + 0.7 * double(i) + 1.3 * number);
  return m;
}

void compare(const char* fixture_name, const llama::ModelConfig& c, bool adapted) {
  CAPTURE(fixture_name);
  const Fixture fixture(fixture_name);
  llama::Weights<double> weights;
  std::map<std::string, int> number;
  llama::for_each_weight(c, [&](const std::string& module, Index rows, Index cols) {
    const int t = int(number.size());
    number.emplace(module, t);
    const bool norm = module.find("norm") != std::string::npos;
    weights.emplace(module, norm ? formula(rows, cols, t, 0.3, 1) : formula(rows, cols, t));
  });
  const auto factors = [&](const std::string& module, Index out, Index in) {
    const int t = number.at(module);
    return lowrank::LoraFactors<double>{formula(2, in, 100 + t), formula(out, 2, 200 + t), 1.5};
  };
  llama::Recipe<double> recipe;
  recipe.linear = [&](const std::string& module, const Matrix<double>& W) -> llama::LinearLayer<double> {
    if (!adapted) return lowrank::FullLinear<double>(W);
    return lowrank::LoraLinear<double>(lowrank::DenseBase<double>(W.view()), factors(module, W.rows(), W.cols()));
  };
  recipe.embedding = [&](const std::string& module, const Matrix<double>& W) -> llama::EmbeddingLayer<double> {
    if (!adapted) return lowrank::FullEmbedding<double>(W);
    return lowrank::LoraEmbedding<double>(lowrank::DenseBase<double>(W.view()), factors(module, W.cols(), W.rows()));
  };
  recipe.train_norm = [&](const std::string&) { return !adapted; };
  llama::Model<double> model(c, weights, recipe);

  llama::Batch batch{2, 5, {}, {}};
  for (int i = 0; i < 10; ++i) {
    batch.inputs.push_back((3 * i * i + 2 * i + 1) % 7);
    batch.targets.push_back((5 * i * i + i + 2) % 7);
  }
  auto& p = model.parameters();
  p.zero_gradients();
  CHECK(model.loss_and_gradients(batch) == doctest::Approx(fixture.of[0].at("loss")(0, 0)).epsilon(rounding));

  const auto check_block = [&](int what, std::span<const double> block) {
    REQUIRE(p.table().size() == fixture.of[what].size());
    for (const auto& entry : p.table()) {
      CAPTURE(entry.name);
      const auto& want = fixture.of[what].at(entry.name);
      REQUIRE(entry.rows == want.rows());
      REQUIRE(entry.cols == want.cols());
      double worst = 0, scale = 0;
      for (Index i = 0; i < want.size(); ++i) {
        worst = std::max(worst, std::abs(block[std::size_t(entry.offset + i)] - want.data()[i]));
        scale = std::max(scale, std::abs(want.data()[i]));
      }
      CHECK(scale > 1e-4);
      CHECK(worst < rounding * scale);
    }
  };
  check_block(1, p.gradients());
  lowrank::AdamW<double> adam(p.size(), {.beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-8, .weight_decay = 0.1});
  adam.step(p.values(), p.gradients(), 1e-2);
  check_block(2, p.values());
  CHECK(model.loss(batch) == doctest::Approx(fixture.of[3].at("loss")(0, 0)).epsilon(rounding));
}

}  // namespace

TEST_CASE("one step of full training as PyTorch does it") { compare("full_step.txt", tiny::config(false), false); }
TEST_CASE("one step with a tied head") { compare("full_step_tied.txt", tiny::config(true), false); }
TEST_CASE("one step of adapters on every weight matrix") { compare("lora_step.txt", tiny::config(false), true); }
TEST_CASE("one step with the positions of longer windows, linear and as Llama 3.1 has them") {
  using Rule = llama::RopeScaling::Rule;
  auto c = tiny::config(false);
  c.head_dim = 8;
  c.rope_scaling = {.rule = Rule::linear, .factor = 2.5};
  compare("full_step_linear.txt", c, false);
  c.rope_scaling = {.rule = Rule::llama3, .factor = 8, .original_max_position_embeddings = 100};
  compare("full_step_llama3.txt", c, false);
}

TEST_CASE("llama3 keeps fast features, divides slow ones, and passes from one to the other without a step") {
  const llama::RopeScaling s{.rule = llama::RopeScaling::Rule::llama3,
                             .factor = 32,
                             .low_freq_factor = 1,
                             .high_freq_factor = 4,
                             .original_max_position_embeddings = 8192};
  const double turn = 2 * std::numbers::pi / 8192;  // the frequency of one turn in the window
  CHECK(llama::scaled_frequency(1, s) == 1);
  CHECK(llama::scaled_frequency(turn / 2, s) == turn / 2 / 32);
  for (const double turns : {1.0, 4.0}) {
    const double below = llama::scaled_frequency(turn * (turns - 1e-9), s),
                 above = llama::scaled_frequency(turn * (turns + 1e-9), s);
    CHECK(above == doctest::Approx(below).epsilon(1e-7));
  }
  CHECK(llama::scaled_frequency(turn * 2.5, s) == doctest::Approx(turn * 2.5 * (1 + 1.0 / 32) / 2).epsilon(1e-14));
  CHECK(llama::scaled_frequency(0.5, {.rule = llama::RopeScaling::Rule::linear, .factor = 4}) == 0.125);
  CHECK(llama::scaled_frequency(0.5, {}) == 0.5);
}

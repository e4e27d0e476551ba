// SPDX-License-Identifier: Apache-2.0
// Every gradient of the transformer against finite differences of its loss, in double.
//
// Five points with step h leave h⁴·f⁽⁵⁾/30 of truncation and about 1.5·eps·|f|/h of rounding. At h = 2e-4 and a loss
// near 2 the latter is some 3e-12; fifth derivatives of up to 1e7 keep the former below 5e-10.
#include <doctest/doctest.h>

#include "support/capture.hpp"
#include "tiny.hpp"

using llama::Index;
using llama::Model;
using tiny::Choice;

namespace {

constexpr double h = 2e-4, tolerance = 1e-9;

/// Compares the gradient of every trainable scalar; returns how many there were.
Index check_gradients(Model<double>& model, const llama::Batch& batch) {
  auto& p = model.parameters();
  p.zero_gradients();
  const double loss = model.loss_and_gradients(batch);
  CHECK(loss == doctest::Approx(model.loss(batch)).epsilon(1e-14));
  for (const auto& entry : p.table()) {
    double worst = 0, largest = 0;
    for (Index i = entry.offset; i < entry.offset + entry.size(); ++i) {
      double& value = p.values()[std::size_t(i)];
      const double old = value;
      const auto at = [&](double offset) {
        value = old + offset;
        return model.loss(batch);
      };
      const double slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
      value = old;
      const double gradient = p.gradients()[std::size_t(i)];
      worst = std::max(worst, std::abs(slope - gradient));
      largest = std::max(largest, std::abs(gradient));
    }
    CAPTURE(entry.name);
    CHECK(worst < tolerance);
    CHECK(largest > 1e4 * tolerance);  // a gradient that is zero everywhere would pass the line above
  }
  return p.size();
}

}  // namespace

TEST_CASE("full training: all weights of the transformer, tied and untied") {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    const auto c = tiny::config(tied);
    const auto w = tiny::weights<double>(c);
    Model<double> model(c, w, tiny::recipe<double>([](const std::string&) { return Choice::full; }));
    Index all = 0;
    llama::for_each_weight(c, [&](const std::string&, Index rows, Index cols) { all += rows * cols; });
    CHECK(check_gradients(model, tiny::batch()) == all);
  }
}

TEST_CASE("adapters everywhere, tied and untied, alpha unequal to the rank and B not zero") {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    const auto c = tiny::config(tied);
    const auto w = tiny::weights<double>(c);
    Model<double> model(c, w, tiny::recipe<double>([](const std::string&) { return Choice::adapted; }));
    check_gradients(model, tiny::batch());
  }
}

TEST_CASE("each kind of module alone, adapted and trained in full") {
  const auto c = tiny::config();
  const auto w = tiny::weights<double>(c);
  std::set<std::string> kinds;
  llama::for_each_weight(c, [&](const std::string& module, Index, Index) { kinds.insert(llama::kind_of(module)); });
  REQUIRE(kinds.size() == 12);  // embed_tokens, 2 norms a layer, 7 matrices, norm, lm_head
  for (const std::string& kind : kinds)
    for (const Choice choice : {Choice::full, Choice::adapted}) {
      CAPTURE(kind);
      Model<double> model(c, w, tiny::recipe<double>([&](const std::string& module) {
                            return llama::kind_of(module) == kind ? choice : Choice::frozen;
                          }));
      check_gradients(model, tiny::batch());
    }
}

TEST_CASE("scaled positions: attention's weights alone, where the rotation acts") {
  auto c = tiny::config();
  c.head_dim = 8;
  for (const auto rule : {llama::RopeScaling::Rule::linear, llama::RopeScaling::Rule::llama3}) {
    c.rope_scaling = {.rule = rule, .factor = 4, .original_max_position_embeddings = 100};
    const auto w = tiny::weights<double>(c);
    const auto attention = tiny::recipe<double>([](const std::string& module) {
      return module.find("self_attn") != std::string::npos ? Choice::full : Choice::frozen;
    });
    Model<double> model(c, w, attention);
    check_gradients(model, tiny::batch());
    auto plain = c;
    plain.rope_scaling = {};
    Model<double> other(plain, w, attention);
    CHECK(std::abs(other.loss(tiny::batch()) - model.loss(tiny::batch())) > 1e-6);
  }
}

TEST_CASE("only an upper layer: the backward pass stops there and its gradients are right") {
  const auto c = tiny::config();
  const auto w = tiny::weights<double>(c);
  Model<double> model(c, w, tiny::recipe<double>([](const std::string& module) {
                        return module.starts_with("model.layers.1.self_attn") ? Choice::adapted : Choice::frozen;
                      }));
  CHECK(check_gradients(model, tiny::batch()) == 2 * ((16 + 5) + (8 + 5) + (8 + 5) + (5 + 16)));
}

TEST_CASE("windows of several attention blocks, one window, one token") {
  auto c = tiny::config();
  c.num_hidden_layers = 1;
  c.num_attention_heads = 2;
  c.num_key_value_heads = 1;
  const auto w = tiny::weights<double>(c);
  const auto qkvo = tiny::recipe<double>([](const std::string& module) {
    return module.find("self_attn") != std::string::npos ? Choice::adapted : Choice::frozen;
  });
  for (const auto& [windows, time] : {std::pair<Index, Index>{1, 130}, {3, 65}, {1, 1}}) {
    CAPTURE_BOUND(time);
    Model<double> model(c, w, qkvo);
    if (time > 1) {
      check_gradients(model, tiny::batch(windows, time));
    } else {  // a lone token attends to itself with probability 1, whatever q and k are
      model.parameters().zero_gradients();
      model.loss_and_gradients(tiny::batch(windows, time));
      for (const auto& entry : model.parameters().table())
        if (entry.name.find("q_proj") != std::string::npos || entry.name.find("k_proj") != std::string::npos)
          for (Index i = entry.offset; i < entry.offset + entry.size(); ++i)
            CHECK(std::abs(model.parameters().gradients()[std::size_t(i)]) < 1e-15);
    }
  }
}

TEST_CASE("gradients of several batches add up") {
  const auto c = tiny::config();
  const auto w = tiny::weights<double>(c);
  Model<double> model(c, w, tiny::recipe<double>([](const std::string&) { return Choice::full; }));
  auto& p = model.parameters();
  const auto one = tiny::batch(1, 6, 1), two = tiny::batch(1, 6, 2);
  const auto gradients = [&](std::initializer_list<const llama::Batch*> batches) {
    p.zero_gradients();
    for (const auto* b : batches) model.loss_and_gradients(*b);
    return std::vector<double>(p.gradients().begin(), p.gradients().end());
  };
  const auto a = gradients({&one}), b = gradients({&two}), both = gradients({&one, &two});
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(both[i] == doctest::Approx(a[i] + b[i]).epsilon(1e-12));
}

// AdamW and clipping against PyTorch's figures, schedules against their formulas, groups, bad input.
#include <doctest/doctest.h>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/optim/adamw.hpp"
#include "lowrank/optim/clip.hpp"
#include "lowrank/optim/schedule.hpp"
#include "support/compare.hpp"
#include "support/fixture.hpp"

using namespace lowrank;
using test::deviation;

TEST_CASE("three steps of AdamW with a learning rate for A and one for B are PyTorch's, and so is clipping") {
  const test::Fixture fx("lora_step.txt");
  LoraLinear<double> layer(
      DenseBase<double>(fx["W"].view()),
      LoraFactors<double>{Matrix<double>(fx["A"].view()), Matrix<double>(fx["B"].view()), lora_scale(5.0, 3)}, {},
      std::vector<double>(fx["bias"].data(), fx["bias"].data() + 9));
  Parameters<double>& p = layer.parameters();
  AdamW<double> adam(p.size(), {.beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-6}, lora_plus_groups(p.table(), 16, 0.1));
  LoraWorkspace<double> ws;
  Matrix<double> Y(7, 9);
  for (int step = 0; step < 3; ++step) {
    layer.forward(fx["X"], Y, ws);
    for (Index i = 0; i < Y.size(); ++i) Y.data()[i] -= fx["target"].data()[i];
    layer.backward(fx["X"], Y, ws, {.gradients = Update::assign});
    adam.step(p.values(), p.gradients(), 0.01);
  }
  CHECK(deviation(layer.A(), fx["A_after"]) < 1e-12);
  CHECK(deviation(layer.B(), fx["B_after"]) < 1e-12);
  CHECK(adam.steps() == 3);
  CHECK(clip_gradients(p.gradients(), 1.0) == doctest::Approx(fx["grad_norm"](0, 0)).epsilon(1e-12));
  // PyTorch divides by norm + 1e-6; the difference is that share of the norm.
  CHECK(deviation(p.gradient(0), fx["dA_clipped"]) < 2e-6 / fx["grad_norm"](0, 0) + 1e-12);
}

TEST_CASE("restored moments and step count continue a run bit for bit") {
  std::vector<float> x(1000), g(1000);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(i % 13) - 6;
  AdamW<float> a(1000, {.weight_decay = 0.01});
  auto gradient = [&](const std::vector<float>& at) {
    for (std::size_t i = 0; i < g.size(); ++i) g[i] = std::sin(at[i] + float(i));
  };
  for (int t = 0; t < 5; ++t) gradient(x), a.step(std::span(x), std::span<const float>(g), 0.01);
  AdamW<float> b(1000, {.weight_decay = 0.01});
  std::copy(a.first_moments().begin(), a.first_moments().end(), b.first_moments().begin());
  std::copy(a.second_moments().begin(), a.second_moments().end(), b.second_moments().begin());
  b.set_steps(a.steps());
  std::vector<float> y = x;
  for (int t = 0; t < 5; ++t) gradient(x), a.step(std::span(x), std::span<const float>(g), 0.01);
  for (int t = 0; t < 5; ++t) gradient(y), b.step(std::span(y), std::span<const float>(g), 0.01);
  CHECK(x == y);
}

TEST_CASE("groups not named get the default; groups may be given in any order") {
  std::vector<double> x(10, 1.0), g(10, 1.0);
  AdamW<double> adam(10, {.weight_decay = 0.5}, {{6, 2, 0.0, 0.0}, {2, 3, 2.0, 0.0}});
  adam.step(std::span(x), std::span<const double>(g), 0.1);
  CHECK(x[0] == doctest::Approx(0.95 - 0.1).epsilon(1e-6));  // decay 0.1·0.5, first Adam step is lr
  CHECK(x[2] == doctest::Approx(1 - 0.2).epsilon(1e-6));
  CHECK(x[6] == 1.0);
  CHECK(x[9] == x[0]);
}

TEST_CASE("schedules follow their formulas") {
  const auto at = [](Decay d, std::int64_t t) {
    return Schedule({.peak = 2, .warmup_steps = 4, .total_steps = 14, .decay = d, .floor = 0.5})(t);
  };
  for (const Decay d : {Decay::constant, Decay::linear, Decay::cosine}) {
    CHECK(at(d, 0) == 0.5);
    CHECK(at(d, 3) == 2.0);
    CHECK(at(d, 4) == 2.0);
  }
  CHECK(at(Decay::constant, 1000) == 2.0);
  CHECK(at(Decay::linear, 9) == doctest::Approx(1.25));
  CHECK(at(Decay::cosine, 9) == doctest::Approx(1.25));
  CHECK(at(Decay::cosine, 6) == doctest::Approx(0.5 + 1.5 * (1 + std::cos(0.2 * 3.14159265358979)) / 2));
  CHECK(at(Decay::linear, 14) == doctest::Approx(0.5));
  CHECK(at(Decay::cosine, 1000) == doctest::Approx(0.5));
  CHECK(Schedule({.peak = 1, .warmup_steps = 0, .total_steps = 1})(0) == 1.0);
}

TEST_CASE("bad input") {
  CHECK_THROWS_AS(Schedule({.peak = -1}), ArgumentError);
  CHECK_THROWS_WITH_AS((void)Schedule({.peak = 1, .warmup_steps = 2, .total_steps = 10})(-5),
                       "Schedule: the step must not be negative, got -5", ArgumentError);
  CHECK_THROWS_AS((void)Schedule({.peak = 1})(-1), ArgumentError);
  CHECK_THROWS_AS(Schedule({.peak = NAN}), ArgumentError);
  CHECK_THROWS_AS(Schedule({.peak = 1, .floor = 2}), ArgumentError);
  CHECK_THROWS_AS(Schedule({.peak = 1, .warmup_steps = 5, .total_steps = 4}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {.beta1 = 1}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {.epsilon = 0}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {.weight_decay = -1}), ArgumentError);
  CHECK_THROWS_WITH_AS(AdamW<float>(4, {.weight_decay = 0.5}, {{0, 1, 1.0, 0.0}, {1, 3, 1.0, 0.0}}),
                       doctest::Contains("weight_decay 0.5 is for parameters in no group, and the 2 groups hold all 4"),
                       ArgumentError);
  CHECK_NOTHROW(AdamW<float>(4, {.weight_decay = 0.5}, {{0, 3, 1.0, 0.0}}));
  CHECK_THROWS_AS(AdamW<float>(4, {}, {{0, 3}, {2, 1}}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {}, {{3, 2}}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {}, {{1, std::numeric_limits<Index>::max()}}), ArgumentError);
  CHECK_THROWS_WITH_AS(AdamW<float>(-1), "AdamW: the number of parameters must not be negative, got -1", ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {.epsilon = INFINITY}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {.weight_decay = INFINITY}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {}, {{0, 4, INFINITY, 0}}), ArgumentError);
  CHECK_THROWS_AS(AdamW<float>(4, {}, {{0, 4, 1, INFINITY}}), ArgumentError);
  CHECK_NOTHROW(AdamW<float>(0));
  AdamW<float> adam(4);
  std::vector<float> four(4), three(3);
  CHECK_THROWS_AS(adam.step(std::span(three), std::span<const float>(four), 0.1), ShapeError);
  CHECK_THROWS_AS(adam.step(std::span(four), std::span<const float>(four), NAN), ArgumentError);
  CHECK(adam.steps() == 0);
  four[2] = INFINITY;
  CHECK_THROWS_WITH_AS(clip_gradients(std::span(four), 1.0), "clip_gradients: gradient 2 of 4 is inf", NonFiniteError);
  CHECK_THROWS_AS(clip_gradients(std::span(three), 0.0), ArgumentError);
  for (const double ratio : {-1.0, 0.0, double(INFINITY), double(NAN)})
    CHECK_THROWS_AS((void)lora_plus_groups({}, ratio), ArgumentError);
  for (const double decay : {-1.0, double(INFINITY), double(NAN)})
    CHECK_THROWS_AS((void)lora_plus_groups({}, 16, decay), ArgumentError);
}

// SPDX-License-Identifier: Apache-2.0
// The tracker's lines against metrics computed directly; its budget; its files after a crash.
#include "lowrank/spectrum/tracker.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/spectrum/balance.hpp"
#include "support/oracle.hpp"
#include "support/temp_dir.hpp"

using namespace lowrank;

namespace {

struct TemporaryFile {
  lowrank::test::TempDir folder;
  std::string path;
  explicit TemporaryFile(const char* suffix) : path(folder / ("run" + std::string(suffix))) {}
  [[nodiscard]] std::vector<std::string> lines() const {
    std::ifstream in(path);
    std::vector<std::string> all;
    for (std::string line; std::getline(in, line);) all.push_back(line);
    return all;
  }
};

std::vector<std::string> cells(const std::string& line) {
  std::vector<std::string> out{""};
  bool quoted = false;
  for (const char c : line) {
    if (c == '"')
      quoted = !quoted;
    else if (c == ',' && !quoted)
      out.emplace_back();
    else
      out.back() += c;
  }
  return out;
}

LoraFactors<float> factors(Index m, Index n, Index r, std::uint64_t seed) {
  LoraFactors<float> f{Matrix<float>(r, n), Matrix<float>(m, r), 0.5F};
  CounterRng(seed).fill_normal(f.A.view());
  CounterRng(seed + 1).fill_normal(f.B.view());
  return f;
}

}  // namespace

TEST_CASE("a LoRA update's line holds its metrics") {
  const TemporaryFile file(".csv");
  auto f = factors(30, 20, 4, 1);
  {
    Tracker<float> tracker(file.path, {.every = 2});
    tracker.watch("layer \"0\", q", f);
    for (int step = 0; step < 6; ++step) {
      f.B(0, 0) += 1;
      CHECK(tracker.step() == (step % 2 == 1));
    }
    CHECK(tracker.records() == 3);
    CHECK(tracker.steps() == 6);
  }
  const auto lines = file.lines();
  REQUIRE(lines.size() == 4);
  const auto head = cells(lines[0]), last = cells(lines[3]);
  REQUIRE(head.size() == last.size());
  CHECK(head[0] == "step");
  CHECK(last[0] == "6");
  CHECK(last[2] == "layer 0, q");
  const auto truth = spectrum_metrics(singular_values(f).values, 30, 20);
  std::size_t column = 3;
  for_each_metric(truth, [&](const char* name, auto value) {
    CHECK(head[column] == name);
    CHECK(std::stod(last[column]) == doctest::Approx(double(value)).epsilon(1e-12));
    ++column;
  });
}

TEST_CASE("an adapter that did not start at zero is followed from its start") {
  const TemporaryFile file(".csv");
  const Index m = 30, n = 20, r = 4;
  const auto start = factors(m, n, r, 11);
  auto f = start;
  Tracker<float> tracker(file.path, {.every = 1});
  tracker.watch("pissa", f.A.view(), f.B.view(), f.scale, start);
  tracker.step();
  for (Index i = 0; i < m; ++i) f.B(i, 1) += 0.01F * float(i % 7);
  for (Index j = 0; j < n; ++j) f.A(2, j) -= 0.02F * float(j % 5);
  tracker.step();
  // The oracle: the values of the dense difference, in double.
  Matrix<double> delta(m, n);
  for (const auto& [g, sign] : {std::pair<const LoraFactors<float>*, double>{&f, 1.0}, {&start, -1.0}})
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j)
        for (Index k = 0; k < r; ++k) delta(i, j) += sign * double(g->scale) * double(g->B(i, k)) * double(g->A(k, j));
  const auto truth = spectrum_metrics(lowrank_test::oracle_singular_values(delta), m, n);
  const auto lines = file.lines();
  REQUIRE(lines.size() == 3);
  const auto head = cells(lines[0]), still = cells(lines[1]), moved = cells(lines[2]);
  const auto at = [&](const char* name) {
    return std::size_t(std::find(head.begin(), head.end(), name) - head.begin());
  };
  // Nothing has moved: what is left is the rounding of products of size one in double.
  CHECK(std::stod(still[at("frobenius_norm")]) < 1e-12);
  for (const char* name : {"spectral_norm", "frobenius_norm", "nuclear_norm", "stable_rank", "effective_rank"}) {
    CAPTURE(name);
    double expected = 0;
    for_each_metric(truth, [&](const char* metric, auto value) {
      if (std::string_view(metric) == name) expected = double(value);
    });
    CHECK(std::stod(moved[at(name)]) == doctest::Approx(expected).epsilon(1e-10));
  }
  CHECK(std::stod(moved[at("energy_rank_90")]) == double(truth.energy_rank_90));
  CHECK_THROWS_AS(tracker.watch("other", f.A.view(), f.B.view(), f.scale, factors(m, n + 1, r, 1)), ShapeError);
}

TEST_CASE("a dense weight is followed from where it was, warm from record to record") {
  const TemporaryFile file(".csv");
  const Index m = 60, n = 50;
  Matrix<float> W(m, n);
  CounterRng(3).fill_normal(W.view());
  const Matrix<float> start = W;
  const auto f = factors(m, n, 3, 5);
  Tracker<float> tracker(file.path, {.every = 1, .rank = 5});
  tracker.watch("w", W.view());
  tracker.step();
  gemm(0.1F, f.B.view(), f.A.view(), W.view(), Update::accumulate);
  tracker.step();
  W(4, 4) = NAN;
  tracker.step();
  const auto lines = file.lines();
  REQUIRE(lines.size() == 4);
  const auto head = cells(lines[0]), zero = cells(lines[1]), moved = cells(lines[2]), broken = cells(lines[3]);
  const auto at = [&](const char* name) {
    return std::size_t(std::find(head.begin(), head.end(), name) - head.begin());
  };
  CHECK(std::stod(zero[at("frobenius_norm")]) == 0);
  LoraFactors<float> scaled = f;
  scaled.scale = 0.1F;
  const auto truth = spectrum_metrics(singular_values(scaled).values, m, n);
  CHECK(std::stod(moved[at("frobenius_norm")]) == doctest::Approx(truth.frobenius_norm).epsilon(1e-3));
  CHECK(std::stod(moved[at("spectral_norm")]) == doctest::Approx(truth.spectral_norm).epsilon(1e-3));
  CHECK(std::stod(moved[at("energy_rank_90")]) == double(truth.energy_rank_90));
  CHECK(std::stod(moved[at("stable_rank")]) == doctest::Approx(truth.stable_rank).epsilon(2e-3));
  CHECK(std::stod(moved[at("captured")]) == doctest::Approx(1).epsilon(1e-3));
  CHECK(broken[at("spectral_norm")].empty());  // noted, and training goes on
  CHECK(broken[0] == "3");
}

TEST_CASE("the file survives a crash in the middle of a line, and a second run appends") {
  const TemporaryFile file(".csv");
  const auto f = factors(8, 9, 2, 7);
  for (int run = 0; run < 2; ++run) {
    Tracker<float> tracker(file.path, {.every = 1});
    tracker.watch("a", f);
    tracker.step();
    std::ofstream(file.path, std::ios::app) << "2,0.5,\"torn";  // what a killed process may leave
  }
  Tracker<float> third(file.path, {.every = 1});
  const auto lines = file.lines();
  REQUIRE(lines.size() == 3);  // one head, two whole lines
  CHECK(lines[0].starts_with("step,"));
  CHECK(cells(lines[1]).size() == cells(lines[0]).size());
  CHECK(cells(lines[2]).size() == cells(lines[0]).size());
}

TEST_CASE("JSON lines") {
  const TemporaryFile file(".jsonl");
  const auto f = factors(8, 9, 2, 7);
  Tracker<float> tracker(file.path, {.every = 1});
  tracker.watch("a\"b\\c\n", f);
  tracker.step();
  const auto lines = file.lines();
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].starts_with("{\"step\":1,\"seconds\":"));
  CHECK(lines[0].find("\"module\":\"a\\\"b\\\\c\\u000a\"") != std::string::npos);
  CHECK(lines[0].find("\"energy_rank_90\":2") != std::string::npos);
  CHECK(lines[0].ends_with("}"));
}

TEST_CASE("the default keeps to its share of the time") {
  const TemporaryFile file(".csv");
  const auto f = factors(200, 200, 8, 9);
  Tracker<float> tracker(file.path);
  tracker.watch("a", f);
  for (int step = 0; step < 150; ++step) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    tracker.step();
  }
  CHECK(tracker.records() >= 1);
  // Every record but the first was allowed only when it, at the cost of the one before, fitted the budget. A loaded
  // machine may make one dearer than its forerunner; how much dearer is not ours to say, so only the count is bounded
  // here.
  CHECK(tracker.records() < 150);
}

TEST_CASE("bad options and files") {
  const TemporaryFile file(".csv");
  CHECK_THROWS_AS(Tracker<float>(file.path, {.every = -1}), ArgumentError);
  CHECK_THROWS_AS(Tracker<float>(file.path, {.budget = 0}), ArgumentError);
  CHECK_THROWS_AS(Tracker<float>(file.path, {.rank = 0}), ArgumentError);
  CHECK_THROWS_AS(Tracker<float>("/nonexistent/run.csv"), IoError);
  CHECK_THROWS_AS(Tracker<float>("/dev/null"), IoError);
  Tracker<float> tracker(file.path);
  const Matrix<float> A(2, 5), B(4, 3);
  CHECK_THROWS_AS(tracker.watch("x", A.view(), B.view(), 1.0F), ShapeError);
}

TEST_CASE("jobs are balanced: largest first, to whom has least") {
  const std::vector<double> costs{1, 8, 3, 5, 2, 7};
  CHECK(balance_jobs(costs, 1) == std::vector<int>(6, 0));
  const auto owner = balance_jobs(costs, 2);
  double load[2] = {0, 0};
  for (std::size_t i = 0; i < costs.size(); ++i) load[owner[i]] += costs[i];
  CHECK(load[0] == 13);
  CHECK(load[1] == 13);
  CHECK(balance_jobs({}, 3).empty());
  CHECK_THROWS_AS(balance_jobs(costs, 0), ArgumentError);
  const std::vector<double> bad{1, -1};
  CHECK_THROWS_AS(balance_jobs(bad, 2), ArgumentError);
}

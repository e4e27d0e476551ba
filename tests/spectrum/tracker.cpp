// SPDX-License-Identifier: Apache-2.0
// The tracker's lines against metrics computed directly; its budget; its files after a crash.
#include "lowrank/spectrum/tracker.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "lowrank/core/balance.hpp"
#include "lowrank/core/rng.hpp"
#include "support/oracle.hpp"
#include "support/temp_dir.hpp"

using namespace lowrank;

namespace {

struct TemporaryFile {
  test::TempDir folder;
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

/// One unit of the last digit written: what a cell may be off by.
double last_unit(const std::string& cell) {
  const std::size_t e = cell.find('e'), point = cell.find('.'), digits = e == std::string::npos ? cell.size() : e;
  const double decimals = point < digits ? double(digits - point - 1) : 0;
  return std::pow(10.0, (e == std::string::npos ? 0 : std::stod(cell.substr(e + 1))) - decimals);
}

LoraFactors<float> factors(Index m, Index n, Index r, std::uint64_t seed) {
  LoraFactors<float> f{Matrix<float>(r, n), Matrix<float>(m, r), 0.5F};
  CounterRng(seed).fill_normal(f.A.view());
  CounterRng(seed + 1).fill_normal(f.B.view());
  return f;
}

/// What a layer shows of itself.
struct Layer {
  LoraFactors<float> f;
  [[nodiscard]] MatrixView<const float> A() const { return f.A.view(); }
  [[nodiscard]] MatrixView<const float> B() const { return f.B.view(); }
  [[nodiscard]] float scale() const { return f.scale; }
};
template <class X>
concept CanWatch = requires(Tracker<float>& tracker, X&& x) {
  tracker.watch("name", std::forward<X>(x));
};
static_assert(CanWatch<LoraFactors<float>&> && CanWatch<const LoraFactors<float>&> && CanWatch<const Layer&>);
static_assert(CanWatch<Matrix<float>&> && CanWatch<MatrixView<float>>);
static_assert(!CanWatch<LoraFactors<float>> && !CanWatch<Matrix<float>>, "what dies at once cannot be followed");

}  // namespace

TEST_CASE("a layer is followed as its factors are") {
  const TemporaryFile one(".csv"), other(".csv");
  Layer layer{factors(30, 20, 4, 1)};
  {
    Tracker<float> a(one.path, {.every = 1, .clock = [] { return 0.0; }}),
        b(other.path, {.every = 1, .clock = [] { return 0.0; }});
    a.watch("q", layer);
    b.watch("q", layer.f.A, layer.f.B, layer.f.scale);
    for (int step = 0; step < 2; ++step) {
      layer.f.B(3, 1) += 1;  // in place, as an optimizer does
      a.step();
      b.step();
    }
  }
  CHECK(one.lines() == other.lines());
  CHECK(one.lines().size() == 3);
  CHECK(cells(one.lines()[1]) != cells(one.lines()[2]));
}

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
    CAPTURE(last[column]);
    CHECK(std::abs(std::stod(last[column]) - double(value)) <= last_unit(last[column]));
    // Ten digits are certain, and the whole of a rank.
    CHECK(last_unit(last[column]) <= (std::is_integral_v<decltype(value)> ? 1 : 1e-9 * double(value)));
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
  const auto truth = spectrum_metrics(test::oracle_singular_values(delta), m, n);
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
    const std::string& cell = moved[at(name)];
    CHECK(std::abs(std::stod(cell) - expected) <= last_unit(cell));
    CHECK(last_unit(cell) <= 1e-6 * expected);  // the difference of two products of size one, itself some 1e-2
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

namespace {
/// A clock that stands still but for what the test adds, and 0.3 ms at every look: recording looks at it, so it costs.
double the_time = 0;
double test_clock() { return the_time += 3e-4; }
}  // namespace

TEST_CASE("recording keeps to its share of the time, and uses it") {
  for (const double budget : {0.0, 0.005, 0.1}) {  // 0: the default, 2 %
    CAPTURE(budget);
    const TemporaryFile file(".csv");
    const auto f = factors(6, 5, 2, 9);
    TrackerOptions o{.clock = test_clock};
    if (budget > 0) o.budget = budget;
    Tracker<float> tracker(file.path, o);
    tracker.watch("a", f);
    const int steps = 20000;
    for (int step = 0; step < steps; ++step) {
      the_time += 1e-3;
      tracker.step();
      // The first record is made whatever it costs; after it never more than the share of the time trained.
      if (tracker.records() > 1)
        REQUIRE(tracker.seconds_spent() <= o.budget * (tracker.seconds_elapsed() - tracker.seconds_spent()) + 1e-9);
    }
    const double trained = tracker.seconds_elapsed() - tracker.seconds_spent();
    CHECK(trained >= steps * 1e-3);
    CHECK(tracker.seconds_spent() >= 0.9 * o.budget * trained);
    CHECK(Index(file.lines().size()) == tracker.records() + 1);
  }
}

TEST_CASE("the metrics chosen, and no others") {
  const auto f = factors(8, 9, 2, 7);
  for (const char* suffix : {".csv", ".jsonl"}) {
    const TemporaryFile file(suffix);
    {
      Tracker<float> tracker(file.path, {.every = 1, .metrics = {"stable_rank", "frobenius_norm"}});
      tracker.watch("a", f);
      tracker.step();
    }
    const auto line = file.lines().back();
    if (std::string_view(suffix) == ".csv") {
      CHECK(file.lines()[0] == "step,seconds,module,frobenius_norm,stable_rank,captured");
      const auto last = cells(line);
      REQUIRE(last.size() == 6);
      const auto sigma = singular_values(f).values;
      CHECK(std::stod(last[3]) == doctest::Approx(frobenius_norm(sigma)).epsilon(1e-9));
      CHECK(std::stod(last[4]) == doctest::Approx(stable_rank(sigma)).epsilon(1e-9));
      // Another choice would put its numbers under the wrong names.
      CHECK_THROWS_WITH_AS(Tracker<float>(file.path), doctest::Contains("got 'step,seconds,module,frobenius_norm,stab"),
                           IoError);
    } else {
      CHECK(line.find("\"stable_rank\":") != std::string::npos);
      CHECK(line.find("\"energy_rank_90\":") == std::string::npos);
      CHECK_NOTHROW(Tracker<float>(file.path));
    }
  }
}

TEST_CASE("a resumed run goes on counting where it stood") {
  const TemporaryFile file(".csv");
  const auto f = factors(8, 9, 2, 7);
  Index stands = 0;
  for (int run = 0; run < 2; ++run) {
    Tracker<float> tracker(file.path, {.every = 4, .first_step = stands});
    tracker.watch("a", f);
    for (int k = 0; k < 6; ++k) tracker.step();
    stands = tracker.steps();
  }
  CHECK(stands == 12);
  std::vector<std::string> steps;
  for (const auto& line : file.lines()) steps.push_back(cells(line)[0]);
  CHECK(steps == std::vector<std::string>{"step", "4", "8", "12"});
}

TEST_CASE("every digit written is certain") {
  // A slowly decaying spectrum, few of whose values are followed, and one the followed values are all of.
  for (const auto& [rank, decay] : {std::pair<Index, double>{8, 0.35}, {8, 0.8}, {40, 0.5}, {12, 1.5}}) {
    CAPTURE(rank);
    CAPTURE(decay);
    const Index m = 60, n = 40;
    Matrix<float> W(m, n), D(m, n), U(m, n), V(n, n);
    CounterRng(3).fill_normal(W.view());
    CounterRng(4).fill_normal(U.view());
    CounterRng(5).fill_normal(V.view());
    for (Index k = 0; k < n; ++k)
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < n; ++j) D(i, j) += U(i, k) * V(j, k) * 0.01F * float(std::pow(double(k + 1), -decay));
    const TemporaryFile file(".csv");
    const Matrix<float> start = W;
    Tracker<float> tracker(file.path, {.every = 1, .rank = rank});
    tracker.watch("w", W.view());
    for (int step = 0; step < 3; ++step) {
      for (Index i = 0; i < W.size(); ++i) W.data()[i] += D.data()[i];
      tracker.step();
      Matrix<double> delta(m, n);
      for (Index i = 0; i < W.size(); ++i) delta.data()[i] = double(W.data()[i]) - double(start.data()[i]);
      const auto truth = spectrum_metrics(test::oracle_singular_values(delta), m, n);
      const auto last = cells(file.lines().back());
      std::size_t column = 3, known = 0;
      for_each_metric(truth, [&](const char* name, auto value) {
        const std::string& cell = last[column++];
        CAPTURE(name);
        CAPTURE(cell);
        if (cell.empty()) return;
        ++known;
        CHECK(std::abs(std::stod(cell) - double(value)) <= last_unit(cell));
      });
      CHECK(known >= (rank == n ? 9 : 2));
    }
  }
}

TEST_CASE("a file of somebody else's is refused and left as it was") {
  const auto write = [](const std::string& path, const std::string& text) {
    std::ofstream(path, std::ios::binary) << text;
  };
  const auto read = [](const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  std::string head;
  {
    const TemporaryFile file(".csv");
    Tracker<float> tracker(file.path);
    head = read(file.path);
  }
  const std::string foreign[] = {"my only notes, no newline",
                                 "a,b,c\n1,2,3\n",
                                 "a,b,c\n1,2,3\n4,5",
                                 "\n",
                                 "\n\n\n",
                                 "step,seconds\n1,2\n",
                                 std::string(10000, 'x'),
                                 std::string(3, '\0'),
                                 head.substr(0, head.size() - 1) + ",more\n",
                                 " " + head,
                                 "{\"steps\":1}\n"};
  for (const char* suffix : {".csv", ".jsonl"})
    for (const std::string& text : foreign) {
      CAPTURE(text);
      const TemporaryFile file(suffix);
      write(file.path, text);
      CHECK_THROWS_WITH_AS(Tracker<float>(file.path), doctest::Contains("its first line must"), IoError);
      CHECK(read(file.path) == text);
    }
  // Each kind is foreign to the other.
  {
    const TemporaryFile file(".jsonl");
    write(file.path, head);
    CHECK_THROWS_AS(Tracker<float>(file.path), IoError);
    CHECK(read(file.path) == head);
  }
  // Ours: empty, torn within the first line, torn later, whole; long files too.
  std::string lines;
  for (int i = 0; i < 3000; ++i) lines += "1,2,\"a\",3\n";
  for (const std::string& text : {std::string(), std::string("step,sec"), head.substr(0, head.size() - 1)}) {
    const TemporaryFile file(".csv");
    write(file.path, text);
    Tracker<float> tracker(file.path);
    CHECK(read(file.path) == head);
  }
  for (const std::string& torn : {std::string(), std::string("1,2"), std::string(9000, '7')}) {
    const TemporaryFile file(".csv");
    write(file.path, head + lines + torn);
    Tracker<float> tracker(file.path);
    CHECK(read(file.path) == head + lines);
  }
  for (const std::string& torn : {std::string("{\"st"), std::string("{\"step\":1,\"sec")}) {
    const TemporaryFile file(".jsonl");
    write(file.path, torn);
    Tracker<float> tracker(file.path);
    CHECK(read(file.path).empty());
  }
}

TEST_CASE("bad options and files") {
  const TemporaryFile file(".csv");
  CHECK_THROWS_AS(Tracker<float>(file.path, {.every = -1}), ArgumentError);
  CHECK_THROWS_AS(Tracker<float>(file.path, {.budget = 0}), ArgumentError);
  CHECK_THROWS_AS(Tracker<float>(file.path, {.rank = 0}), ArgumentError);
  CHECK_THROWS_AS(Tracker<float>(file.path, {.first_step = -1}), ArgumentError);
  CHECK_THROWS_WITH_AS(Tracker<float>(file.path, {.metrics = {"stable_rank", "rank"}}), doctest::Contains("got 'rank'"),
                       ArgumentError);
  CHECK_FALSE(std::filesystem::exists(file.path));  // nothing is made before the options are known to be good
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

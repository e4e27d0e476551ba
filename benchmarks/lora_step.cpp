// SPDX-License-Identifier: Apache-2.0
// What a LoRA step costs over the frozen layer's: forward + backward to X, A and B against forward + dX.
//
// Google Benchmark program; arguments of each case are tokens / width / rank, W is width×width, float. `error` is the
// largest deviation of sampled outputs from a double-precision sum, relative to the largest output.
// benchmarks/lora_step.py runs it with repetitions in random order beside PyTorch and prints the ratios.
//
//   benchmark_lora_step --grid    every rank x tokens x width: frozen and LoRA step in turn, medians, and the median of
//                                 the pairs' ratios, which a slow drift of the machine leaves alone
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "lowrank/adapter/linear.hpp"
#include "lowrank/adapter/lora.hpp"
#include "lowrank/core/rng.hpp"

namespace {

using namespace lowrank;

struct Problem {
  Matrix<float> W, X, Y, G, dX;
  LoraFactors<float> factors;

  Problem(Index tokens, Index width, Index rank)
      : W(width, width),
        X(tokens, width),
        Y(tokens, width),
        G(tokens, width),
        dX(tokens, width),
        factors{Matrix<float>(rank, width), Matrix<float>(width, rank),
                float(lora_scale(2.0 * double(rank) + 1, rank))} {
    CounterRng(1).fill_normal(W.view(), 0, 1 / std::sqrt(double(width)));
    CounterRng(2).fill_normal(X.view());
    CounterRng(3).fill_normal(G.view());
    CounterRng(4).fill_normal(factors.A.view(), 0, 1 / std::sqrt(double(width)));
    CounterRng(5).fill_normal(factors.B.view(), 0, 0.02);
  }

  /// Largest deviation of 64 sampled outputs of Y = X·Wᵀ + s·X·Aᵀ·Bᵀ (s = 0: frozen) from the sum in double.
  [[nodiscard]] double error(double s) const {
    double worst = 0, largest = 0;
    for (std::uint64_t k = 0; k < 64; ++k) {
      const Index t = Index(CounterRng(6).below(2 * k, std::uint64_t(X.rows())));
      const Index j = Index(CounterRng(6).below(2 * k + 1, std::uint64_t(W.rows())));
      double y = 0;
      for (Index i = 0; i < W.cols(); ++i) y += double(X(t, i)) * double(W(j, i));
      for (Index r = 0; s != 0 && r < factors.rank(); ++r) {
        double xa = 0;
        for (Index i = 0; i < W.cols(); ++i) xa += double(X(t, i)) * double(factors.A(r, i));
        y += s * xa * double(factors.B(j, r));
      }
      worst = std::max(worst, std::abs(y - double(Y(t, j))));
      largest = std::max(largest, std::abs(y));
    }
    return worst / largest;
  }
};

void report(benchmark::State& state, const Problem& p, double s, double flops) {
  state.counters["error"] = p.error(s);
  state.counters["GF/s"] = benchmark::Counter(flops * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
}

void frozen_step(benchmark::State& state) {
  Problem p(state.range(0), state.range(1), state.range(2));
  FrozenLinear<float> layer(DenseBase<float>(p.W.view()));
  LoraWorkspace<float> ws;
  for (auto _ : state) {
    layer.forward(p.X, p.Y, ws);
    layer.backward(p.X, p.G, ws, p.dX);
  }
  report(state, p, 0, 4.0 * double(p.X.rows()) * double(p.W.size()));
}

void lora_step(benchmark::State& state) {
  Problem p(state.range(0), state.range(1), state.range(2));
  LoraLinear<float> layer(DenseBase<float>(p.W.view()), p.factors);
  LoraWorkspace<float> ws;
  for (auto _ : state) {
    layer.forward(p.X, p.Y, ws);
    layer.backward(p.X, p.G, ws, p.dX, {.gradients = Update::assign});
  }
  const double low = 6.0 * double(p.X.rows()) * double(p.factors.rank()) * double(p.W.rows() + p.W.cols());
  report(state, p, p.factors.scale, 4.0 * double(p.X.rows()) * double(p.W.size()) + low);
}

void full_step(benchmark::State& state) {
  Problem p(state.range(0), state.range(1), state.range(2));
  FullLinear<float> layer(p.W);
  LoraWorkspace<float> ws;
  for (auto _ : state) {
    layer.forward(p.X, p.Y, ws);
    layer.backward(p.X, p.G, ws, p.dX, {.gradients = Update::assign});
  }
  report(state, p, 0, 6.0 * double(p.X.rows()) * double(p.W.size()));
}

/// The ceiling every figure is a share of: one square product of the cache-friendly size.
void gemm_ceiling(benchmark::State& state) {
  const Index n = state.range(0);
  Problem p(n, n, 1);
  for (auto _ : state) gemm(1.0F, p.X.view(), p.W.view().transposed(), p.Y.view());
  report(state, p, 0, 2.0 * double(n) * double(n) * double(n));
}

void cases(benchmark::internal::Benchmark* b) {
  for (const int width : {1024, 2048, 4096})
    for (const int tokens : {1, 64, 512, 2048})
      for (const int rank : {8, 16, 64, 256}) b->Args({tokens, width, rank});
  b->Unit(benchmark::kMillisecond)->UseRealTime();
}
void frozen_cases(benchmark::internal::Benchmark* b) {
  for (const int width : {1024, 2048, 4096})
    for (const int tokens : {1, 64, 512, 2048}) b->Args({tokens, width, 1});
  b->Unit(benchmark::kMillisecond)->UseRealTime();
}

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + std::ptrdiff_t(x.size() / 2), x.end());
  return x[x.size() / 2];
}

/// One line of the grid: the two steps in turn for about two thirds of a second, at least five times.
void grid_case(Index tokens, Index width, Index rank) {
  Problem p(tokens, width, rank), q(tokens, width, rank);
  FrozenLinear<float> frozen(DenseBase<float>(p.W.view()));
  LoraLinear<float> lora(DenseBase<float>(p.W.view()), p.factors);
  LoraWorkspace<float> frozen_ws, lora_ws;
  const auto seconds = [](auto&& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const auto frozen_once = [&] {
    frozen.forward(q.X, q.Y, frozen_ws);
    frozen.backward(q.X, q.G, frozen_ws, q.dX);
  };
  const auto lora_once = [&] {
    lora.forward(p.X, p.Y, lora_ws);
    lora.backward(p.X, p.G, lora_ws, p.dX, {.gradients = Update::assign});
  };
  frozen_once();
  const double first = seconds(lora_once);
  std::vector<double> frozen_times, lora_times, ratios;
  const int pairs = int(std::clamp(1 / (3 * first), 5.0, 400.0));
  for (int i = 0; i < pairs; ++i) {
    frozen_times.push_back(seconds(frozen_once));
    lora_times.push_back(seconds(lora_once));
    ratios.push_back(lora_times.back() / frozen_times.back());
  }
  const double low = 6.0 * double(rank) * 2 * double(width), all = 4.0 * double(width) * double(width);
  std::printf("| %td | %td | %td | %.3f | %.3f | %.2f | %.2f | %.0e |\n", width, tokens, rank,
              1e3 * median(frozen_times), 1e3 * median(lora_times), median(ratios), 1 + low / all,
              p.error(p.factors.scale));
}

int grid() {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  std::printf(
      "| width | tokens | r | frozen, ms | LoRA, ms | ratio | flops | error |\n|---|---|---|---|---|---|---|---|\n");
  for (const Index width : {1024, 2048, 4096})
    for (const Index tokens : {1, 64, 512, 2048})
      for (const Index rank : {8, 16, 64, 256}) grid_case(tokens, width, rank);
  return 0;
}

BENCHMARK(gemm_ceiling)->Arg(2048)->Unit(benchmark::kMillisecond)->UseRealTime();
BENCHMARK(frozen_step)->Apply(frozen_cases);
BENCHMARK(full_step)->Apply(frozen_cases);
BENCHMARK(lora_step)->Apply(cases);

}  // namespace

/// Google Benchmark's main, with `--smoke` for one quick round of a small case of each kind.
int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--grid") return grid();
  std::vector<char*> arguments(argv, argv + argc);
  std::string filter = "--benchmark_filter=step/64/1024/(1|16)/", time = "--benchmark_min_time=0.01";
  if (argc == 2 && std::string_view(argv[1]) == "--smoke") arguments = {argv[0], filter.data(), time.data()};
  int count = int(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

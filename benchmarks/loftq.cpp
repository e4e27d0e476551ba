// SPDX-License-Identifier: Apache-2.0
// LoftQ and QPiSSA: seconds and error beside the same iteration with SVDs converged to rounding.
//
//   benchmark_loftq [--smoke] [size]
// PEFT up to 0.19 runs LoftQ on a CPU too; benchmarks/loftq.py times its algorithm in PyTorch on the same matrix.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "lowrank/init/loftq.hpp"
#include "lowrank/init/qpissa.hpp"

using namespace lowrank;

namespace {

/// 0.02·noise + U·diag(8·k^−0.7, k = 1 … n/8)·Vᵀ with (nearly) orthonormal U and V: the spectrum of a trained weight.
Matrix<float> decaying(Index n) {
  const Index k = n / 8;
  Matrix<float> W(n, n), U(n, k), V(k, n);
  CounterRng(1).fill_normal(W.view(), 0, 0.02);
  CounterRng(2).fill_normal(U.view(), 0, 1 / std::sqrt(double(n)));
  CounterRng(3).fill_normal(V.view(), 0, 1 / std::sqrt(double(n)));
  for (Index i = 0; i < k; ++i)
    for (Index j = 0; j < n; ++j) V(i, j) *= float(8 * std::pow(double(i + 1), -0.7));
  gemm(1.0F, U.view(), V.view(), W.view(), Update::accumulate);
  return W;
}

template <class F>
void line(const char* weight, const char* what, int repeats, F&& run) {
  auto best = run();
  for (int i = 1; i < repeats; ++i) {
    auto again = run();
    if (again.report.seconds < best.report.seconds) best = std::move(again);
  }
  std::printf("%-9s %-34s %8.3f s  error %.6f of ||W||, %.4f of plain; passes", weight, what, best.report.seconds,
              best.report.result().frobenius / best.report.weight_norm, 1 - best.report.error_reduction());
  for (const auto& s : best.report.steps) std::printf(" %td", s.passes);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines appear as they are measured
  const bool smoke = argc > 1 && std::string(argv[1]) == "--smoke";
  const Index n = smoke ? 256 : argc > 1 ? std::atol(argv[1]) : 2048;
  const int repeats = smoke ? 1 : 3;
  std::printf("# %td x %td float, r = 16, %d threads, best of %d\n", n, n, max_threads(), repeats);
  Matrix<float> noise(n, n);
  CounterRng(4).fill_normal(noise.view(), 0, 0.02);
  const Matrix<float> trained = decaying(n);
  for (const auto& [name, W] :
       {std::pair<const char*, const Matrix<float>*>{"decaying", &trained}, {"noise", &noise}}) {
    const auto options = [&](const Codebook& book, int iterations) {
      return LoftqOptions{.quantise = {.codebook = book}, .iterations = iterations, .stop_when_worse = false};
    };
    line(name, "loftq nf4 T=5", repeats, [&] { return loftq(*W, options(Codebook::nf4(), 5)); });
    line(name, "loftq nf4 T=5, SVDs to 1e-7", 1, [&] {
      auto o = options(Codebook::nf4(), 5);
      o.svd_slack = 1e-7;
      return loftq(*W, o);
    });
    line(name, "loftq nf4 T=1", repeats, [&] { return loftq(*W, options(Codebook::nf4(), 1)); });
    line(name, "qpissa nf4 T=1", repeats, [&] { return qpissa(*W, options(Codebook::nf4(), 1)); });
    line(name, "qpissa nf4 T=5", repeats, [&] { return qpissa(*W, options(Codebook::nf4(), 5)); });
    line(name, "loftq nf2 T=5", repeats, [&] { return loftq(*W, options(Codebook::nf2(), 5)); });
    line(name, "loftq nf2 T=5, scale search 16", 1, [&] {
      auto o = options(Codebook::nf2(), 5);
      o.quantise.scale_search = 16;
      return loftq(*W, o);
    });
    std::printf("\n");
  }
}

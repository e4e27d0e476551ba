// SPDX-License-Identifier: Apache-2.0
// Speed of quantising and dequantising beside the machine's ceilings for reading and writing, with the error.
//
//   benchmark_quantise [--smoke]
//
// What the portable code costs on a machine that has more: build it without -march=native and run it again.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/quant/quantise.hpp"

using namespace lowrank;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Best of `repeats` runs, in seconds.
template <class F>
double best(int repeats, F&& f) {
  double least = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double t = now();
    f();
    least = std::min(least, now() - t);
  }
  return least;
}

double mean_error(const Matrix<float>& a, const Matrix<float>& b) {
  double sum = 0;
  for (Index i = 0; i < a.size(); ++i) sum += std::abs(double(a.data()[i]) - double(b.data()[i]));
  return sum / double(a.size());
}

/// The largest magnitude of n floats, eight at a time so that a compiler vectorises it without reordering sums.
float largest_magnitude(const float* x, Index n) {
  float most[8] = {};
  Index i = 0;
  for (; i + 8 <= n; i += 8)
    for (Index k = 0; k < 8; ++k) most[k] = std::max(most[k], std::abs(x[i + k]));
  for (; i < n; ++i) most[0] = std::max(most[0], std::abs(x[i]));
  return *std::max_element(most, most + 8);
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines appear as they are measured
  const bool smoke = argc > 1 && std::string(argv[1]) == "--smoke";
  const Index n = smoke ? 512 : 4096;
  const int repeats = smoke ? 2 : 9;
  Matrix<float> W, out;
  W.resize(n, n);
  out.resize(n, n);
  const CounterRng rng(1);
  parallel_ranges(n, 64, [&](Index i0, Index i1) {
    rng.fill_normal(W.view().middle_rows(i0, i1 - i0), 0, 1, std::uint64_t(i0 * n));
  });
  const double elements = double(W.size());
  std::printf("# %td x %td float, %d threads, best of %d\n", n, n, max_threads(), repeats);

  const double fill = best(repeats, [&] {
    parallel_ranges(W.size(), 65536, [&](Index a, Index b) { std::memset(out.data() + a, 1, std::size_t(b - a) * 4); });
  });
  std::vector<float> sums(64);
  const double read = best(repeats, [&] {
    parallel_ranges(W.size(), 65536,
                    [&](Index a, Index b) { sums[std::size_t(a % 64)] = largest_magnitude(W.data() + a, b - a); });
  });
  std::printf("ceiling: memset %.1f GB/s = %.2f G elements/s; reading (maximum) %.1f GB/s = %.2f G elements/s\n\n",
              elements * 4 / fill * 1e-9, elements / fill * 1e-9, elements * 4 / read * 1e-9, elements / read * 1e-9);

  std::printf("%-24s %8s %14s %16s %12s\n", "codebook", "bits/w", "quantise G/s", "dequantise G/s", "mean |err|");
  const auto line = [&](const char* name, const QuantiseOptions& options) {
    auto q = quantise(W, options);
    const double tq = best(repeats, [&] { q.assign(W.view()); });
    const double td = best(repeats, [&] { q.dequantise(out.view()); });
    std::printf("%-24s %8.3f %14.2f %16.2f %12.5f\n", name, q.bits_per_weight(), elements / tq * 1e-9,
                elements / td * 1e-9, mean_error(W, out));
  };
  line("nf4", {});
  line("nf4 double-quantised", {.double_quantise = true});
  line("nf4 scale search 16", {.scale_search = 16});
  line("fp4", {.codebook = Codebook::fp4()});
  line("nf3", {.codebook = Codebook::nf3()});
  line("nf2", {.codebook = Codebook::nf2()});
  line("nf2 scale search 16", {.codebook = Codebook::nf2(), .scale_search = 16});
  line("uniform4", {.codebook = Codebook::uniform(4)});
  line("uniform4 asymmetric", {.codebook = Codebook::uniform_asymmetric(4)});
  line("nf8", {.codebook = Codebook::normal_float(8)});
  line("int8 by rows", {.codebook = Codebook::int8(), .blocking = Blocking::row});
}

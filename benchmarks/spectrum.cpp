// SPDX-License-Identifier: Apache-2.0
// One layer of a 1B-shaped difference (seven matrices): all singular values and every metric; the largest 64 as well.
// benchmarks/spectrum.py runs numpy's LAPACK on the same shapes.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/spectrum/bounds.hpp"
#include "lowrank/spectrum/noise.hpp"
#include "lowrank/spectrum/power_law.hpp"

using namespace lowrank;

int main(int argc, char** argv) {
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  const Index d = smoke ? 128 : 2048;
  const std::pair<Index, Index> shapes[] = {{d, d}, {d / 4, d}, {d / 4, d}, {d, d}, {4 * d, d}, {4 * d, d}, {d, 4 * d}};
  double full = 0, top = 0;
  for (const auto& [m, n] : shapes) {
    Matrix<float> W(m, n);
    CounterRng(1, std::uint64_t(m)).fill_normal(W.view(), 0, 1e-3);
    const auto seconds = [begin = std::chrono::steady_clock::now()] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    const auto sv = singular_values(W);
    const auto metrics = spectrum_metrics(sv.values, m, n);
    const auto bounds = spectrum_bounds(sv, m, n);
    const auto noise = noise_metrics(m, n);
    const auto fit = fit_power_law(sv.values, {.max_candidates = 256});
    const double t = seconds();
    const auto few =
        truncated_svd(W, std::min<Index>(64, std::min(m, n)), {.energy_tolerance = 0, .residual_tolerance = 1e-4});
    const double t1 = seconds() - t;
    full += t;
    top += t1;
    std::printf(
        "%5td x %5td: all values %.3f s (error %.1e of the largest, r90 %td, noise %td, %s, alpha %.2f); top 64 %.3f "
        "s, largest off by %.1e\n",
        m, n, t, sv.absolute_error / sv.values[0], metrics.energy_rank_90, noise.energy_rank_90,
        bounds.exact(&SpectrumMetrics::energy_rank_90) ? "exact" : "bounded", fit.alpha, t1,
        std::abs(double(few.S[0]) / sv.values[0] - 1));
  }
  std::printf("a layer: all values %.2f s, top 64 %.2f s; sixteen layers take sixteen times that\n", full, top);
  return 0;
}

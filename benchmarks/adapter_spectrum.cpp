// SPDX-License-Identifier: Apache-2.0
// Every metric of every update of a 7B-shaped rank-16 adapter (224 modules), beside the noise of its shape. With
// --check one module of each shape is also judged by the SVD of its dense product.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/spectrum/bounds.hpp"
#include "lowrank/spectrum/noise.hpp"

using namespace lowrank;

int main(int argc, char** argv) {
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  const int layers = smoke ? 2 : 32;
  const Index d = smoke ? 256 : 4096, h = smoke ? 688 : 11008, r = 16;
  const std::pair<Index, Index> shapes[] = {{d, d}, {d, d}, {d, d}, {d, d}, {h, d}, {h, d}, {d, h}};
  // One set of factors a shape is enough to time: the arithmetic does not depend on the numbers.
  std::map<std::pair<Index, Index>, LoraFactors<float>> factors;
  for (const auto& [m, n] : shapes) {
    LoraFactors<float> f{Matrix<float>(r, n), Matrix<float>(m, r), 2.0F};
    CounterRng(1, std::uint64_t(m)).fill_normal(f.A.view(), 0, 1 / std::sqrt(double(n)));
    CounterRng(2, std::uint64_t(n)).fill_normal(f.B.view(), 0, 0.01);
    factors.insert_or_assign({m, n}, std::move(f));
  }
  const auto begin = std::chrono::steady_clock::now();
  std::map<std::pair<Index, Index>, SpectrumMetrics> noise;
  double sum = 0;
  int modules = 0, exact = 0;
  for (int layer = 0; layer < layers; ++layer)
    for (const auto& shape : shapes) {
      const auto sv = singular_values(factors.at(shape));
      const auto metrics = spectrum_metrics(sv.values, shape.first, shape.second);
      const auto bounds = spectrum_bounds(sv, shape.first, shape.second);
      if (!noise.contains(shape)) noise[shape] = noise_metrics(shape.first, shape.second);
      sum += metrics.effective_rank / noise[shape].effective_rank;
      exact += bounds.exact(&SpectrumMetrics::energy_rank_90) ? 1 : 0;
      ++modules;
    }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%d modules, rank %td, d = %td: %.3f s; r90 exact for %d; mean effective rank / noise %.4f\n", modules, r,
              d, seconds, exact, sum / modules);
  if (smoke || (argc > 1 && std::strcmp(argv[1], "--check") == 0))
    for (const auto& [shape, f] : factors) {
      Matrix<double> W(shape.first, shape.second);
      const Matrix<double> B(f.B.view()), A(f.A.view());
      gemm(double(f.scale), B.view(), A.view(), W.view());
      const auto dense = singular_values(W).values, ours = singular_values(f).values;
      double error = 0;
      for (std::size_t i = 0; i < ours.size(); ++i) error = std::max(error, std::abs(dense[i] - ours[i]));
      std::printf("  %td x %td: largest difference to the dense product's values %.1e of the largest\n", shape.first,
                  shape.second, error / ours[0]);
    }
  return 0;
}

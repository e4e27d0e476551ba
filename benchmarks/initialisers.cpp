// SPDX-License-Identifier: Apache-2.0
// Every initialiser on one weight: seconds, how exactly base + s·B·A gives W back, the energy captured against the
// optimum.
//
//   benchmark_initialisers [--smoke] [--rank R] [--size M N] [--weights FILE]
//
// FILE holds M·N floats, row-major; without it the weight is a decaying spectrum over noise (256 values 8·k^-0.7, noise
// of deviation 0.02). initialisers.py writes such a file, runs this program and PyTorch in turn, and prints the ratios.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "lowrank/adapter/extract.hpp"
#include "lowrank/adapter/undo.hpp"
#include "lowrank/init/corda.hpp"
#include "lowrank/init/eva.hpp"
#include "lowrank/init/gaussian.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/lora_ga.hpp"
#include "lowrank/init/lora_xs.hpp"
#include "lowrank/init/milora.hpp"
#include "lowrank/init/olora.hpp"
#include "lowrank/init/orthogonal.hpp"
#include "lowrank/init/pissa.hpp"

using namespace lowrank;

namespace {

Matrix<float> decaying_over_noise(Index m, Index n) {
  const Index k = std::min<Index>(256, std::min(m, n));
  Matrix<float> W(m, n), U(m, k), V(n, k);
  CounterRng(1).fill_normal(W.view(), 0, 0.02);
  CounterRng(2).fill_normal(U.view());
  CounterRng(3).fill_normal(V.view());
  orthonormalise(U.view());
  orthonormalise(V.view());
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < k; ++j) U(i, j) *= float(8 * std::pow(double(j + 1), -0.7));
  gemm(1.0F, U.view(), V.view().transposed(), W.view(), Update::accumulate);
  return W;
}

/// ‖base + s·B·A − W‖_F / ‖W‖_F in double.
template <class Init, class S>
double split_error(const Init& init, const Matrix<S>& W) {
  const auto& f = init.factors;
  double off = 0, all = 0;
  Matrix<double> A(f.A), row(1, W.cols()), b(1, f.rank());
  for (Index i = 0; i < W.rows(); i += std::max<Index>(1, W.rows() / 64)) {  // a sample of rows
    for (Index k = 0; k < f.rank(); ++k) b(0, k) = double(f.B(i, k));
    gemm(double(f.scale), b.view(), A.view(), row.view());
    for (Index j = 0; j < W.cols(); ++j) {
      const double w = double(W(i, j)), d = row(0, j) + double(init.base(i, j)) - w;
      off += d * d;
      all += w * w;
    }
  }
  return std::sqrt(off / all);
}

template <class F>
auto timed(const char* name, int repeats, F&& f) {
  std::vector<double> seconds;
  auto result = f();
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    result = f();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(seconds.begin(), seconds.begin() + repeats / 2, seconds.end());
  std::printf("%-20s %10.4f", name, seconds[std::size_t(repeats / 2)]);
  return result;
}

template <class Init, class S>
void row(const Init& init, const Matrix<S>& W) {
  const InitReport& r = init.report;
  if (init.base_changed)
    std::printf(" %11.2e", split_error(init, W));
  else
    std::printf(" %11s", "-");
  std::printf(" %14.6f %7ld  %s\n", r.captured_energy, long(r.passes), r.notes.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  Index m = 2048, n = 2048, rank = 16;
  bool smoke = false;
  std::string file;
  for (int i = 1; i < argc; ++i) {
    const std::string a = argv[i];
    if (a == "--smoke") {
      smoke = true;
      m = n = 320;
    } else if (a == "--rank" && i + 1 < argc) {
      rank = std::atol(argv[++i]);
    } else if (a == "--size" && i + 2 < argc) {
      m = std::atol(argv[++i]);
      n = std::atol(argv[++i]);
    } else if (a == "--weights" && i + 1 < argc) {
      file = argv[++i];
    } else {
      std::fprintf(stderr, "usage: %s [--smoke] [--rank R] [--size M N] [--weights FILE]\n", argv[0]);
      return 2;
    }
  }
  const int repeats = smoke ? 1 : 3;
  Matrix<float> W;
  if (file.empty()) {
    W = decaying_over_noise(m, n);
  } else {
    W = Matrix<float>(m, n);
    std::FILE* in = std::fopen(file.c_str(), "rb");
    const bool ok = in != nullptr && std::fread(W.data(), sizeof(float), std::size_t(m * n), in) == std::size_t(m * n);
    if (in != nullptr) std::fclose(in);
    if (!ok) {
      std::fprintf(stderr, "%s: cannot read %ld floats\n", file.c_str(), long(m * n));
      return 1;
    }
  }
  const double alpha = 2 * double(rank);
  std::printf("# %ld x %ld, rank %ld, %d threads, median of %d after one warm-up\n", long(m), long(n), long(rank),
              max_threads(), repeats);
  std::printf("%-20s %10s %11s %14s %7s  %s\n", "method", "seconds", "split error", "captured", "passes", "notes");

  const auto run = [&](const char* name, auto&& make) { row(timed(name, repeats, make), W); };
  run("kaiming", [&] { return kaiming<float>(m, n, {.rank = rank, .alpha = alpha}); });
  run("gaussian", [&] { return gaussian<float>(m, n, {.rank = rank, .alpha = alpha}); });
  run("orthogonal", [&] { return orthogonal<float>(m, n, {.rank = rank, .alpha = alpha}); });
  run("pissa", [&] { return pissa(W, {.rank = rank, .alpha = alpha}); });
  run("pissa_tight", [&] {
    return pissa(W, {.rank = rank, .alpha = alpha, .svd = {.energy_tolerance = 0, .residual_tolerance = 1e-6}});
  });
  {
    const Matrix<bf16> narrow(W);
    const auto init = timed("pissa_bf16", repeats, [&] {
      return pissa<float, bf16>(narrow, {.rank = rank, .alpha = alpha, .factor_storage = FactorStorage::bf16});
    });
    row(init, narrow);
  }
  run("olora", [&] { return olora(W, {.rank = rank, .alpha = alpha}); });
  run("milora", [&] { return milora(W, {.rank = rank, .alpha = alpha}); });
  run("mica", [&] { return mica(W, {.rank = rank, .alpha = alpha}); });

  Matrix<float> X(512, n), G(m, n);
  CounterRng(7).fill_normal(X.view());
  for (Index i = 0; i < X.rows(); ++i)
    for (Index j = 0; j < n; ++j) X(i, j) *= float(std::pow(double(j + 1), -0.3));
  CounterRng(8).fill_normal(G.view());
  ActivationCovariance<float> covariance(n);
  covariance.add(X.view());
  run("corda", [&] { return corda(W, covariance, {.rank = rank, .alpha = alpha}); });
  run("corda_knowledge",
      [&] { return corda(W, covariance, {.rank = rank, .alpha = alpha, .mode = CordaMode::knowledge}); });
  run("eva (4 batches)", [&] {
    ActivationSvd<float> stream(n, {.components = 2 * rank});
    for (Index b = 0; b < 4; ++b) stream.add(X.view().middle_rows(128 * b, 128));
    return eva(m, stream, {.rank = rank, .alpha = alpha});
  });
  run("lora_ga", [&] { return lora_ga(W, G, {.rank = rank, .alpha = alpha}); });

  const auto xs = timed("lora_xs", repeats, [&] { return lora_xs(W, {.rank = rank, .alpha = alpha}); });
  std::printf(" %11s %14.6f %7ld\n", "", xs.report.captured_energy, long(xs.report.passes));

  const auto start = pissa(W, {.rank = rank, .alpha = alpha});
  LoraFactors<float> trained = start.factors;
  Matrix<float> step(m, rank), step_a(rank, n);
  CounterRng(9).fill_normal(step.view(), 0, 0.01);
  CounterRng(10).fill_normal(step_a.view(), 0, 0.01);
  for (Index i = 0; i < step.size(); ++i) trained.B.data()[i] += step.data()[i];
  for (Index i = 0; i < step_a.size(); ++i) trained.A.data()[i] += step_a.data()[i];
  const auto undone = timed("undo to rank r", repeats, [&] { return undo_residual(trained, start.factors, rank); });
  std::printf(" distance %.3e of %.3e\n", undone.distance, undone.sum_norm);
  Matrix<float> tuned = W;
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) tuned(i, j) += 1e-3F * G(i, j) + (j < rank ? 0.5F * step(i, j) : 0.0F);
  const auto extracted = timed("extract", repeats, [&] { return extract_adapter(tuned, W, {.rank = rank}); });
  std::printf(" error %.3e of %.3e, %ld passes\n", extracted.error, extracted.norm, long(extracted.passes));
  return 0;
}

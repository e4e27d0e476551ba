// SPDX-License-Identifier: Apache-2.0
// truncated_svd beside Spectra's PartialSVDSolver in the same process, in turn; error beside time.
//
//   benchmark_truncated_svd                     2048x2048, both spectra: energy and residual targets, warm start
//   benchmark_truncated_svd --big               4096x4096, 4096x11008 and 32000x4096: minutes, most for the references
//   benchmark_truncated_svd --size m n          one of those
//   benchmark_truncated_svd --llama [divisor]   the 224 matrices of LLaMA-2-7B in bf16, r = 16, sizes divided (default
//   8) benchmark_truncated_svd --growth            time against m, n and r with the flops done, as CSV
//   benchmark_truncated_svd --file F m n k tol  float32 row-major from F: best ms, passes; values to F.values
//   benchmark_truncated_svd --smoke             a second
//
// truncated_svd_torch.py runs the --file form beside torch.svd_lowrank.
// GCC 12 sees uninitialised vectors in its own AVX-512 headers when Eigen is inlined deep enough.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/qr.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

#if __has_include(<Spectra/contrib/PartialSVDSolver.h>)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wpedantic"
#include <Spectra/contrib/PartialSVDSolver.h>
#pragma GCC diagnostic pop
#define HAVE_SPECTRA 1
#endif

using namespace lowrank;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
template <class F>
double best_of(int repeats, F&& f) {
  double best = 1e30;
  for (int k = 0; k < repeats; ++k) {
    const double start = now();
    f();
    best = std::min(best, now() - start);
  }
  return best;
}

/// 0.02·N(0, 1); with `decaying`, plus U·diag(8·k^-0.7, k ≤ min(m, n)/8)·Vᵀ of random orthonormal U, V.
Matrix<float> test_matrix(Index m, Index n, bool decaying) {
  Matrix<float> W(m, n);
  parallel_ranges(m, 1, [&](Index i0, Index i1) {
    for (Index i = i0; i < i1; ++i)
      CounterRng(1).fill_normal(W.view().middle_rows(i, 1), 0, 0.02, std::uint64_t(i * n));
  });
  if (!decaying) return W;
  const Index k = std::max<Index>(1, std::min(m, n) / 8);
  Matrix<float> U(m, k), V(n, k);
  CounterRng(2).fill_normal(U.view());
  CounterRng(3).fill_normal(V.view());
  orthonormalise(U.view());
  orthonormalise(V.view());
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < k; ++j) U(i, j) *= float(8 * std::pow(double(j + 1), -0.7));
  gemm(1.0F, U.view(), V.view().transposed(), W.view(), Update::accumulate);
  return W;
}

/// What the products of this library reach here: 512×2048×2048 in float.
double gemm_ceiling() {
  Matrix<float> A(512, 2048), B(2048, 2048), C(512, 2048);
  CounterRng(5).fill_uniform(A.view(), -1, 1);
  CounterRng(6).fill_uniform(B.view(), -1, 1);
  return 2.0 * 512 * 2048 * 2048 / best_of(5, [&] { gemm(1.0F, A.view(), B.view(), C.view()); });
}

double deficit(const std::vector<double>& exact, const std::vector<float>& ours) {
  double best = 0, got = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    best += exact[i] * exact[i];
    got += double(ours[i]) * double(ours[i]);
  }
  return (best - got) / best;
}

/// max ‖Aᵀu − σv‖, ‖Av − σu‖ over the triplets, relative to σ₁, in double.
double worst_residual(const Matrix<double>& A, const Matrix<double>& U, const std::vector<float>& S,
                      const Matrix<double>& V) {
  const Matrix<double> AV = multiply<double>(A.view(), V.view()),
                       AtU = multiply<double>(A.view().transposed(), U.view());
  double worst = 0;
  for (Index i = 0; i < U.cols(); ++i) {
    double left = 0, right = 0;
    const double s = double(S[std::size_t(i)]);
    for (Index j = 0; j < A.rows(); ++j) left += std::pow(AV(j, i) - s * U(j, i), 2);
    for (Index j = 0; j < A.cols(); ++j) right += std::pow(AtU(j, i) - s * V(j, i), 2);
    worst = std::max({worst, left, right});
  }
  return std::sqrt(worst) / double(S[0]);
}

void energy(const Matrix<float>& W, const std::vector<double>& exact, const char* kind, Index k, double tolerance) {
  TruncatedSvd<float> r;
  const double t = best_of(5, [&] { r = truncated_svd(W, k, {.energy_tolerance = tolerance}); });
  std::printf(
      "energy   %5td x %-5td %-8s top-%-3td  asked %.0e: %8.1f ms  deficit %9.2e  (estimated %.1e)  %td passes of "
      "%td\n",
      W.rows(), W.cols(), kind, k, tolerance, 1e3 * t, deficit(exact, r.S), r.energy_deficit, r.passes, r.block);
}

void residual(const Matrix<float>& W, const Matrix<double>& wide, const char* kind, Index k, int repeats) {
  TruncatedSvd<float> r;
  const double t =
      best_of(repeats, [&] { r = truncated_svd(W, k, {.energy_tolerance = 0, .residual_tolerance = 1e-6}); });
  std::printf("residual %5td x %-5td %-8s top-%-3td  ours    %8.1f ms  residual %.1e  %td passes of %td%s\n", W.rows(),
              W.cols(), kind, k, 1e3 * t, worst_residual(wide, Matrix<double>(r.U), r.S, Matrix<double>(r.V)), r.passes,
              r.block, r.converged ? "" : "  NOT CONVERGED");
#if defined(HAVE_SPECTRA)
  const Eigen::MatrixXf A =
      Eigen::Map<const Eigen::Matrix<float, -1, -1, Eigen::RowMajor>>(W.data(), W.rows(), W.cols());
  // The loosest of its tolerances whose result is as accurate as asked for, else the tightest.
  for (const float tolerance : {1e-3F, 1e-4F, 1e-5F, 1e-6F, 1e-7F}) {
    double theirs = 1e30, error = INFINITY;
    for (int repeat = 0; repeat < repeats; ++repeat) {
      const double start = now();
      Spectra::PartialSVDSolver<Eigen::MatrixXf> solver(A, int(k), int(2 * k + 1));
      const auto found = solver.compute(1000, tolerance);
      const Eigen::MatrixXf U = solver.matrix_U(k), V = solver.matrix_V(k);
      theirs = std::min(theirs, now() - start);
      if (Index(found) < k) break;
      if (repeat > 0) continue;
      const Eigen::VectorXf S = solver.singular_values();
      Matrix<double> u(W.rows(), k), v(W.cols(), k);
      for (Index i = 0; i < k; ++i) {
        for (Index j = 0; j < W.rows(); ++j) u(j, i) = double(U(j, i));
        for (Index j = 0; j < W.cols(); ++j) v(j, i) = double(V(j, i));
      }
      error = worst_residual(wide, u, std::vector<float>(S.data(), S.data() + k), v);
      if (error > 1e-6 && tolerance > 1e-7F) break;
    }
    if (error > 1e-6 && tolerance > 1e-7F) continue;
    std::printf("%43sSpectra %8.1f ms  residual %.1e  tolerance %.0e; ours %.2fx its time\n", "", 1e3 * theirs, error,
                double(tolerance), t / theirs);
    break;
  }
#endif
}

void warm_start(const Matrix<float>& W, const std::vector<double>& exact, Index k) {
  const TruncatedSvdOptions options{.energy_tolerance = 1e-4};
  // An earlier checkpoint: W moved by 1 % of its norm.
  Matrix<float> earlier = W;
  const Matrix<float> step = test_matrix(W.rows(), W.cols(), false);
  double norm = 0, step_norm = 0;
  for (Index i = 0; i < W.size(); ++i) {
    norm += double(W.data()[i]) * double(W.data()[i]);
    step_norm += double(step.data()[i]) * double(step.data()[i]);
  }
  const auto factor = float(0.01 * std::sqrt(norm / step_norm));
  // Another draw than W's own noise: shifted by half.
  for (Index i = 0; i < W.size(); ++i) earlier.data()[i] += factor * step.data()[(i + W.size() / 2) % W.size()];
  const auto before = truncated_svd(earlier, k, options);
  TruncatedSvd<float> cold, warm;
  const double t_cold = best_of(3, [&] { cold = truncated_svd(W, k, options); });
  const double t_warm = best_of(3, [&] { warm = truncated_svd(W, k, options, before.V.view()); });
  std::printf(
      "warm     %5td x %-5td top-%-3td  cold %.1f ms, %td passes, deficit %.1e; warm %.1f ms, %td passes, deficit "
      "%.1e\n",
      W.rows(), W.cols(), k, 1e3 * t_cold, cold.passes, deficit(exact, cold.S), 1e3 * t_warm, warm.passes,
      deficit(exact, warm.S));
}

void llama(Index divisor) {
  const Index h = 4096 / divisor, f = 11008 / divisor;
  struct Kind {
    Index m, n;
    int count;
  };
  double total = 0, values = 0;
  const Kind kinds[] = {{h, h, 128}, {f, h, 64}, {h, f, 32}};
  for (const Kind& kind : kinds) {
    Matrix<bf16> W;
    {
      const Matrix<float> wide = test_matrix(kind.m, kind.n, true);
      W.assign(wide.view());
    }
    // One matrix of every shape, decomposed as often as the model has that shape, each time from another seed.
    double slowest = 0, sum = 0;
    Index passes = 0;
    for (int i = 0; i < kind.count; ++i) {
      const double start = now();
      const auto r = truncated_svd(W, 16, {.energy_tolerance = 1e-4, .seed = std::uint64_t(i)});
      const double t = now() - start;
      slowest = std::max(slowest, t);
      sum += t;
      passes += r.passes;
      values += double(W.size());
    }
    std::printf("llama    %5td x %-5td bf16 x%-3d  %8.1f ms each (slowest %.1f), %.1f passes\n", kind.m, kind.n,
                kind.count, 1e3 * sum / kind.count, 1e3 * slowest, double(passes) / kind.count);
    total += sum;
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::printf(
      "llama    224 matrices, %.3g values, r = 16: %.2f s; peak memory %.0f MiB, the float copy the test matrix is "
      "made of included\n",
      values, total, double(usage.ru_maxrss) / 1024);
}

void growth(bool smoke) {
  const double ceiling = gemm_ceiling();
  std::printf("m,n,r,block,passes,basis,ms,gflop,gflops_per_s,share_of_gemm\n");
  const auto point = [&](Index m, Index n, Index r) {
    const Matrix<float> W = test_matrix(m, n, true);
    TruncatedSvd<float> d;
    const double t = best_of(3, [&] { d = truncated_svd(W, r, {.energy_tolerance = 1e-3}); });
    // Two products of 2·m·n·block flops in every iteration, two of rank r to finish; orthogonalisation, twice 4·n·d a
    // vector of an average basis of half its final size.
    const double steps = double(d.passes - 2), mn = double(m) * double(n);
    const double flops = 4 * mn * double(d.block) * steps + 4 * mn * double(r) +
                         4 * double(n) * double(d.basis) * double(d.block) * steps;
    std::printf("%td,%td,%td,%td,%td,%td,%.3f,%.4f,%.1f,%.3f\n", m, n, r, d.block, d.passes, d.basis, 1e3 * t,
                1e-9 * flops, 1e-9 * flops / t, flops / t / ceiling);
  };
  const Index base = smoke ? 256 : 2048;
  for (const Index r : {8, 16, 32, 64, 128, 256})
    if (r < base / 2) point(base, base, r);
  // The smallest matrices of LLaMA-2-7B.
  if (!smoke)
    for (const Index r : {64, 128, 256}) point(2 * base, 2 * base, r);
  for (const Index m : {base / 2, 2 * base, 4 * base}) point(m, base, 16);
  for (const Index n : {base / 2, 2 * base, 4 * base}) point(base, n, 16);
}

int from_file(char** argv) {
  const Index m = std::atol(argv[3]), n = std::atol(argv[4]), k = std::atol(argv[5]);
  const double tolerance = std::atof(argv[6]);
  Matrix<float> W(m, n);
  std::FILE* in = std::fopen(argv[2], "rb");
  if (in == nullptr || std::fread(W.data(), sizeof(float), std::size_t(W.size()), in) != std::size_t(W.size()))
    return 1;
  std::fclose(in);
  TruncatedSvd<float> r;
  const double t = best_of(7, [&] { r = truncated_svd(W, k, {.energy_tolerance = tolerance}); });
  std::printf("%.3f %td\n", 1e3 * t, r.passes);
  std::FILE* out = std::fopen((std::string(argv[2]) + ".values").c_str(), "wb");
  if (out == nullptr) return 1;
  std::fwrite(r.S.data(), sizeof(float), r.S.size(), out);
  return std::fclose(out);
}

void suite(Index m, Index n, int repeats) {
  for (const bool decaying : {true, false}) {
    const char* kind = decaying ? "decaying" : "flat";
    const Matrix<float> W = test_matrix(m, n, decaying);
    const Matrix<double> wide(W.view());
    const std::vector<double> exact = singular_values(W.view()).values;
    for (const Index k : {16, 128})
      if (3 * k < std::min(m, n))
        for (const double tolerance : {1e-3, 1e-4, 1e-5}) energy(W, exact, kind, k, tolerance);
    for (const Index k : {16, 64}) residual(W, wide, kind, k, repeats);
    warm_start(W, exact, 16);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--file" && argc == 7) return from_file(argv);
  std::printf("# %d threads, best of several; gemm ceiling %.0f GF/s (512x2048x2048, float)\n", max_threads(),
              1e-9 * gemm_ceiling());
  if (mode == "--smoke") {
    suite(256, 192, 1);
    llama(64);
    growth(true);
  } else if (mode == "--big") {
    suite(4096, 4096, 1);
    suite(4096, 11008, 1);
    suite(32000, 4096, 1);
  } else if (mode == "--size" && argc == 4) {
    suite(std::atol(argv[2]), std::atol(argv[3]), 1);
  } else if (mode == "--llama") {
    llama(argc > 2 ? std::max(1L, std::atol(argv[2])) : 8);
  } else if (mode == "--growth") {
    growth(false);
  } else {
    suite(2048, 2048, 3);
  }
}

// SPDX-License-Identifier: Apache-2.0
// Intruder dimensions of a weight with a rank-16 update. Alone it times itself on made-up matrices;
// benchmarks/intruders.py hands it files and runs the peer, two full SVDs, on the same ones.
//
//     benchmark_intruders [--smoke] [rows cols]
//     benchmark_intruders BASE.f32 TUNED.f32 rows cols repeats      (raw row-major float32; prints the indices found)
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/qr.hpp"
#include "lowrank/spectrum/intruders.hpp"

using namespace lowrank;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Median seconds and the report.
template <class F>
std::pair<double, IntruderReport> timed(int repeats, F&& f) {
  std::vector<double> t;
  IntruderReport r;
  for (int i = 0; i < repeats; ++i) {
    const double begin = now();
    r = f();
    t.push_back(now() - begin);
  }
  std::sort(t.begin(), t.end());
  return {t[t.size() / 2], std::move(r)};
}

void show(const char* what, double seconds, const IntruderReport& r) {
  std::printf("%s: %.3f s, %zu intruders of %zu, energy share %.4f%s; proofs:", what, seconds, r.intruders().size(),
              r.vectors.size(), r.energy_share, r.used_full_svd ? ", full SVD used" : "");
  for (const auto& v : r.vectors) std::printf(" %s (%td)", proof_name(v.proof), v.steps);
  std::printf("\n");
}

Matrix<float> read(const char* path, Index m, Index n) {
  Matrix<float> W(m, n);
  std::FILE* f = std::fopen(path, "rb");
  if (f == nullptr || std::fread(W.data(), sizeof(float), std::size_t(W.size()), f) != std::size_t(W.size())) {
    std::fprintf(stderr, "cannot read %s\n", path);
    std::exit(1);
  }
  std::fclose(f);
  return W;
}

/// 0.02·noise, with U·diag(8·k^−0.7)·Vᵀ of rank 256 on top when `decaying`.
Matrix<float> base(Index m, Index n, bool decaying) {
  Matrix<float> W(m, n);
  CounterRng(1).fill_normal(W.view(), 0, 0.02);
  if (!decaying) return W;
  const Index r = std::min<Index>(256, std::min(m, n));
  Matrix<float> U(m, r), V(n, r);
  CounterRng(3).fill_normal(U.view());
  CounterRng(4).fill_normal(V.view());
  orthonormalise(U.view());
  orthonormalise(V.view());
  for (Index i = 0; i < m; ++i)
    for (Index k = 0; k < r; ++k) U(i, k) *= float(8 * std::pow(double(k + 1), -0.7));
  gemm(1.0F, U.view(), V.view().transposed(), W.view(), Update::accumulate);
  return W;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 6) {
    const Index m = std::atol(argv[3]), n = std::atol(argv[4]);
    const auto W = read(argv[1], m, n), W1 = read(argv[2], m, n);
    const auto [seconds, r] = timed(std::atoi(argv[5]), [&] { return find_intruders(W, W1); });
    std::printf("%.6f %d %.6f", seconds, int(r.used_full_svd), r.energy_share);
    for (const Index i : r.intruders()) std::printf(" %td", i);
    std::printf("\n");
    return 0;
  }
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  const Index m = smoke      ? 192
                  : argc > 2 ? std::atol(argv[1])
                             : 2048,
              n = smoke      ? 160
                  : argc > 2 ? std::atol(argv[2])
                             : m;
  for (const bool decaying : {false, true}) {
    const auto W = base(m, n, decaying);
    for (const double size : {0.02, 0.1, 1.0}) {
      LoraFactors<float> f{Matrix<float>(16, n), Matrix<float>(m, 16), float(size)};
      CounterRng(5).fill_normal(f.A.view(), 0, 1 / std::sqrt(double(n)));
      CounterRng(6).fill_normal(f.B.view(), 0, 1);
      const auto [seconds, r] = timed(smoke ? 1 : 5, [&] { return find_intruders(W, f); });
      char what[96];
      std::snprintf(what, sizeof what, "%td x %td, %s, update %g", m, n, decaying ? "decaying over noise" : "noise",
                    size);
      show(what, seconds, r);
    }
  }
  return 0;
}

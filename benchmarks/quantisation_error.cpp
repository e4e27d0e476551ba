// SPDX-License-Identifier: Apache-2.0
// How much of the quantisation error each method removes, in the nuclear norm, as the QPiSSA paper counts:
// 1 − ‖W − (Q + s·B·A)‖_* / ‖W − quant(W)‖_*, percent. QLoRA is 0 by definition.
//
//   benchmark_quantisation_error [--smoke] [--size n] [name.f32 rows cols ...]
// Files are raw little-endian floats, row by row: any weight a script can dump.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "lowrank/init/loftq.hpp"
#include "lowrank/init/qpissa.hpp"

using namespace lowrank;

namespace {

Matrix<float> noise(Index m, Index n) {
  Matrix<float> W(m, n);
  CounterRng(4).fill_normal(W.view(), 0, 0.02);
  return W;
}
/// Noise plus a spectrum that decays as k^−0.7, as trained weights have.
Matrix<float> decaying(Index n) {
  const Index k = n / 8;
  Matrix<float> W = noise(n, n), U(n, k), V(k, n);
  CounterRng(2).fill_normal(U.view(), 0, 1 / std::sqrt(double(n)));
  CounterRng(3).fill_normal(V.view(), 0, 1 / std::sqrt(double(n)));
  const double top = 8 * std::sqrt(double(n) / 2048);
  for (Index i = 0; i < k; ++i)
    for (Index j = 0; j < n; ++j) V(i, j) *= float(top * std::pow(double(i + 1), -0.7));
  gemm(1.0F, U.view(), V.view(), W.view(), Update::accumulate);
  return W;
}

void table(const char* name, const Matrix<float>& W, bool smoke) {
  std::printf("\n%s, %td x %td: error reduction in percent of the nuclear norm (Frobenius norm in brackets)\n", name,
              W.rows(), W.cols());
  std::printf(
      "| bits | rank | QLoRA | LoftQ T=1 | LoftQ T=5 | QPiSSA T=1 | QPiSSA T=5 |\n|---|---|---|---|---|---|---|\n");
  for (const int bits : {2, 3, 4, 8})
    for (const Index rank : {16, 64, 128}) {
      if (rank > std::min(W.rows(), W.cols()) || (smoke && (bits != 4 || rank != 16))) continue;
      std::printf("| %d | %td | 0 |", bits, rank);
      for (const bool pissa : {false, true})
        for (const int iterations : {1, 5}) {
          const LoftqOptions o{.rank = rank,
                               .quantise = {.codebook = Codebook::normal_float(bits)},
                               .iterations = iterations,
                               .stop_when_worse = false,
                               .nuclear = true};
          const auto r = pissa ? qpissa(W, o) : loftq(W, o);
          std::printf(" %.1f (%.1f) |", 100 * r.report.nuclear_error_reduction(), 100 * r.report.error_reduction());
        }
      std::printf("\n");
    }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  bool smoke = false;
  Index n = 512;
  int i = 1;
  for (; i < argc && argv[i][0] == '-'; ++i) {
    const std::string flag = argv[i];
    if (flag == "--smoke")
      smoke = true;
    else if (flag == "--size" && i + 1 < argc)
      n = std::atol(argv[++i]);
    else
      return std::fprintf(stderr, "usage: %s [--smoke] [--size n] [file rows cols ...]\n", argv[0]), 2;
  }
  if (smoke) n = 128;
  std::printf("# NormalFloat codebooks, blocks of 64; best iterate of T\n");
  if (i == argc) {
    table("decaying spectrum over noise", decaying(n), smoke);
    table("noise", noise(n, n), smoke);
  }
  for (; i + 2 < argc; i += 3) {
    Matrix<float> W(std::atol(argv[i + 1]), std::atol(argv[i + 2]));
    std::FILE* f = std::fopen(argv[i], "rb");
    const bool read = f != nullptr && std::fread(W.data(), 4, std::size_t(W.size()), f) == std::size_t(W.size());
    if (f != nullptr) std::fclose(f);
    if (!read) return std::fprintf(stderr, "%s does not hold %td x %td floats\n", argv[i], W.rows(), W.cols()), 1;
    table(argv[i], W, smoke);
  }
}

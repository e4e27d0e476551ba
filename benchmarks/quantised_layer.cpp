// SPDX-License-Identifier: Apache-2.0
// A frozen layer over 4-bit and bf16 weights beside the dense float one, with the same product underneath: forward and
// dX, many tokens and few, within the caches and out of them.
//
//   benchmark_quantised_layer [--smoke]
#include <chrono>
#include <cmath>
#include <cstdio>
#include <string>
#include <tuple>

#include "lowrank/quant/quantise.hpp"

using namespace lowrank;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void fill(MatrixView<float> m, std::uint64_t seed) {
  // A cheap hash: these matrices are large, and only their spread matters here.
  parallel_ranges(m.rows(), 16, [&](Index i0, Index i1) {
    for (Index i = i0; i < i1; ++i)
      for (Index j = 0; j < m.cols(); ++j) {
        std::uint64_t h = (std::uint64_t(i) * 0x9E3779B97F4A7C15ULL + std::uint64_t(j) + seed) * 0xD1B54A32D192ED03ULL;
        h ^= h >> 29;
        h *= 0xBF58476D1CE4E5B9ULL;
        m(i, j) = 0.04F * (float(h >> 40) * 0x1p-23F - 1.0F);
      }
  });
}

double relative_difference(const Matrix<float>& a, const Matrix<float>& b) {
  double d = 0, s = 0;
  for (Index i = 0; i < a.size(); ++i) {
    d += (double(a.data()[i]) - double(b.data()[i])) * (double(a.data()[i]) - double(b.data()[i]));
    s += double(b.data()[i]) * double(b.data()[i]);
  }
  return std::sqrt(d / s);
}

struct Times {
  double forward = 1e30, backward = 1e30;
};

/// Forward and dX of every base in turn, round by round, so that all of them see the same state of the machine.
template <class... Bases>
void compare(int rounds, Index tokens, const char* const (&names)[sizeof...(Bases)], const Bases&... bases) {
  const auto& first = std::get<0>(std::tie(bases...));
  const Index in = first.cols(), out = first.rows();
  Matrix<float> X(tokens, in), G(tokens, out);
  fill(X.view(), 5);
  fill(G.view(), 6);
  Times times[sizeof...(Bases)];
  Matrix<float> Y[sizeof...(Bases)], dX[sizeof...(Bases)];
  for (int r = 0; r < rounds; ++r) {
    std::size_t i = 0;
    const auto one = [&](const auto& base) {
      Y[i].resize(tokens, out);
      dX[i].resize(tokens, in);
      double t = now();
      base.forward(X.view(), Y[i].view(), Update::assign);
      times[i].forward = std::min(times[i].forward, now() - t);
      t = now();
      base.backward(G.view(), dX[i].view(), Update::assign);
      times[i].backward = std::min(times[i].backward, now() - t);
      ++i;
    };
    (one(bases), ...);
  }
  const double flops = 2.0 * double(tokens) * double(in) * double(out);
  for (std::size_t i = 0; i < sizeof...(Bases); ++i)
    std::printf("%5td x %5td %4td tokens  %-22s %9.3f ms %7.1f GF/s %5.2fx   dX %9.3f ms %7.1f GF/s %5.2fx   %.4f\n",
                out, in, tokens, names[i], times[i].forward * 1e3, flops / times[i].forward * 1e-9,
                times[0].forward / times[i].forward, times[i].backward * 1e3, flops / times[i].backward * 1e-9,
                times[0].backward / times[i].backward, relative_difference(Y[i], Y[0]));
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // lines appear as they are measured
  const bool smoke = argc > 1 && std::string(argv[1]) == "--smoke";
  std::printf("# %d threads; speed relative to the dense float layer; last: relative difference of Y\n", max_threads());
  const auto shape = [&](Index out, Index in, std::initializer_list<Index> token_counts) {
    Matrix<float> W;
    W.resize(out, in);
    fill(W.view(), 1);
    Matrix<bf16> half;
    half.resize(out, in);
    parallel_ranges(W.size(), 65536, [&](Index a, Index b) {
      for (Index k = a; k < b; ++k) half.data()[k] = bf16(W.data()[k]);
    });
    const DenseBase<float> dense(W.view());
    const DenseBase<float, bf16> narrow(std::as_const(half).view());
    const auto nf4 = quantise(W), nested = quantise(W, {.double_quantise = true});
    const auto nf3 = quantise(W, {.codebook = Codebook::nf3()}), nf2 = quantise(W, {.codebook = Codebook::nf2()});
    const auto int8 = quantise(W, {.codebook = Codebook::int8(), .blocking = Blocking::row});
    static constexpr const char* names[] = {"float", "bf16", "nf4", "nf4 double-quantised", "nf3", "nf2", "int8"};
    for (const Index tokens : token_counts)
      compare(smoke ? 2 : tokens > 16 ? 5 : 15, tokens, names, dense, narrow, nf4, nested, nf3, nf2, int8);
    std::printf("\n");
  };
  if (smoke) return shape(256, 512, {1, 4, 64}), 0;
  shape(4096, 4096, {1, 4, 512});
  shape(8192, 28672, {1});
}

// SPDX-License-Identifier: Apache-2.0
// Speed of quantising and dequantising beside the machine's ceilings for reading and writing, with the error.
//
//   benchmark_quantise [--smoke]
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

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

/// Blocks through one path, without the matrix around them: what the portable code costs on this machine.
template <detail::Path P>
void encode_all(const Matrix<float>& W, const Codebook& book, std::vector<std::uint8_t>& codes,
                std::vector<float>& scales) {
  const detail::Encoder<P> encoder(book);
  parallel_ranges(W.size() / 64, 256, [&](Index b0, Index b1) {
    for (Index b = b0; b < b1; ++b) {
      const float* x = W.data() + 64 * b;
      const float s = std::bit_cast<float>(detail::largest_magnitude_bits(x, 64));
      scales[std::size_t(b)] = s;
      encoder.table_block(x, 64, s, codes.data() + b * 8 * book.bits());
    }
  });
}
template <detail::Path P>
void decode_all(Matrix<float>& W, const Codebook& book, const std::vector<std::uint8_t>& codes,
                const std::vector<float>& scales) {
  parallel_ranges(W.size() / 64, 256, [&](Index b0, Index b1) {
    for (Index b = b0; b < b1; ++b)
      detail::decode_span<P>(book, codes.data() + b * 8 * book.bits(), 0, 64, {scales[std::size_t(b)], 0},
                             W.data() + 64 * b);
  });
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
  std::printf("# %td x %td float, %d threads, vectors of %d bytes, best of %d\n", n, n, max_threads(),
              detail::vector_bytes, repeats);

  const double fill = best(repeats, [&] {
    parallel_ranges(W.size(), 65536, [&](Index a, Index b) { std::memset(out.data() + a, 1, std::size_t(b - a) * 4); });
  });
  std::vector<float> sums(64);
  const double read = best(repeats, [&] {
    parallel_ranges(W.size(), 65536, [&](Index a, Index b) {
      sums[std::size_t(a % 64)] = std::bit_cast<float>(detail::largest_magnitude_bits(W.data() + a, b - a));
    });
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

  std::printf("\n%-24s %14s %16s\n", "nf4 blocks alone", "quantise G/s", "dequantise G/s");
  const Codebook nf4 = Codebook::nf4();
  std::vector<std::uint8_t> codes(std::size_t(W.size() / 2 + detail::code_padding));
  std::vector<float> scales(std::size_t(W.size() / 64));
  const auto path = [&]<detail::Path P>(const char* name) {
    const double tq = best(repeats, [&] { encode_all<P>(W, nf4, codes, scales); });
    const double td = best(repeats, [&] { decode_all<P>(out, nf4, codes, scales); });
    std::printf("%-24s %14.2f %16.2f\n", name, elements / tq * 1e-9, elements / td * 1e-9);
  };
  if (detail::native_path != detail::Path::portable) path.template operator()<detail::native_path>("native path");
  path.template operator()<detail::Path::portable>("portable path");
}

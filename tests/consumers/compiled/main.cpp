// SPDX-License-Identifier: Apache-2.0
// PiSSA, LoftQ, a step of a QLoRA layer and a search for intruders: over lowrank::compiled, and without it. Prints a
// number made of every bit of the results, so that the two can be compared.
#include <cmath>
#include <cstdint>
#include <cstdio>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/init/loftq.hpp"
#include "lowrank/init/pissa.hpp"
#include "lowrank/spectrum/intruders.hpp"

namespace {

std::uint64_t hash = 0xcbf29ce484222325U;
void add(const void* data, std::size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (std::size_t i = 0; i < bytes; ++i) hash = (hash ^ p[i]) * 0x100000001b3U;
}
void add(const lowrank::Matrix<float>& m) { add(m.data(), std::size_t(m.size()) * sizeof(float)); }

lowrank::Matrix<float> random_matrix(lowrank::Index rows, lowrank::Index cols, std::uint64_t seed) {
  lowrank::Matrix<float> m(rows, cols);
  lowrank::CounterRng(seed).fill_normal(m.view());
  return m;
}
bool near(double x, double want, double relative) { return std::abs(x - want) <= relative * std::abs(want); }

int failed = 0;
void check(bool good, const char* what) {
  if (good) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  failed = 1;
}

}  // namespace

int main() {
  const lowrank::Index out = 67, in = 90, rank = 5, tokens = 9;
  const auto W = random_matrix(out, in, 1);

  const auto p = lowrank::pissa(W, {.rank = rank, .alpha = 11});
  add(p.base);
  add(p.factors.A);
  add(p.factors.B);
  double worst = 0;  // base + s·B·A is W
  for (lowrank::Index i = 0; i < out; ++i)
    for (lowrank::Index j = 0; j < in; ++j) {
      double sum = p.base(i, j);
      for (lowrank::Index k = 0; k < rank; ++k)
        sum += double(p.factors.scale) * double(p.factors.B(i, k)) * double(p.factors.A(k, j));
      worst = std::max(worst, std::abs(sum - double(W(i, j))));
    }
  check(worst < 1e-5, "pissa");

  auto q = lowrank::loftq(W, {.rank = rank, .alpha = 11});
  check(q.report.result().frobenius < q.report.plain.frobenius, "loftq");
  lowrank::LoraLinear<float, lowrank::QuantisedMatrix<float>> layer(std::move(q.base), q.factors);
  const auto X = random_matrix(tokens, in, 2), G = random_matrix(tokens, out, 3);
  lowrank::Matrix<float> Y(tokens, out), dX(tokens, in);
  lowrank::LoraWorkspace<float> ws;
  layer.forward(X, Y, ws);
  layer.backward(X, G, ws, dX);
  add(Y);
  add(dX);
  double left = 0, right = 0;  // <G, X·Wᵀ> = <G·W, X>
  for (lowrank::Index i = 0; i < tokens; ++i) {
    for (lowrank::Index j = 0; j < out; ++j) left += double(G(i, j)) * double(Y(i, j));
    for (lowrank::Index j = 0; j < in; ++j) right += double(dX(i, j)) * double(X(i, j));
  }
  check(near(left, right, 1e-4), "the layer's gradient");

  lowrank::Matrix<float> tuned(W);
  for (lowrank::Index i = 0; i < out; ++i)
    for (lowrank::Index j = 0; j < in; ++j) tuned(i, j) += (i % 2 == 0 ? 3.0F : -3.0F) * float(j % 7 - 3);
  const auto report = lowrank::find_intruders(W, tuned, {.k = 4});
  check(report.vectors.size() == 4 && report.vectors[0].intruder, "find_intruders");
  for (const auto& v : report.vectors) add(&v.cosine, sizeof v.cosine);

  std::printf("%016llx\n", static_cast<unsigned long long>(hash));
  return failed;
}

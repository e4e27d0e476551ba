// SPDX-License-Identifier: Apache-2.0
// A stranger's file, compiled with the stranger's warnings as errors and no flag of ours: layers, initialisers, a step
// of QLoRA.
#include "lowrank/lowrank.hpp"

#include <cstdio>
#include <vector>

namespace {

using lowrank::Index;
using lowrank::Matrix;

Matrix<float> normal(Index rows, Index cols, std::uint64_t seed) {
  Matrix<float> m(rows, cols);
  lowrank::CounterRng(seed).fill_normal(m.view());
  return m;
}

/// The loss ‖Y − target‖²/2 of one layer falls in a few steps of AdamW.
template <class Layer, class Workspace>
bool learns(Layer& layer, Workspace& ws, Index in, Index out) {
  constexpr Index tokens = 8;
  const Matrix<float> X = normal(tokens, in, 90), target = normal(tokens, out, 91);
  Matrix<float> Y(tokens, out), G(tokens, out), dX(tokens, in);
  lowrank::AdamW<float> adam(layer.parameters().size());
  double first = 0, loss = 0;
  for (int step = 0; step < 20; ++step) {
    layer.forward(X, Y, ws);
    loss = 0;
    for (Index i = 0; i < tokens; ++i)
      for (Index j = 0; j < out; ++j) {
        G(i, j) = Y(i, j) - target(i, j);
        loss += 0.5 * double(G(i, j)) * double(G(i, j));
      }
    if (step == 0) first = loss;
    layer.backward(X, G, ws, dX, {.gradients = lowrank::Update::assign});
    adam.step(layer.parameters().values(), layer.parameters().gradients(), 1e-2F);
  }
  std::printf("%g -> %g\n", first, loss);
  return loss < first;
}

}  // namespace

int main() {
  constexpr Index in = 96, out = 64;
  const Matrix<float> W = normal(out, in, 1);
  bool ok = true;
  lowrank::LoraWorkspace<float> ws;

  auto pissa = lowrank::pissa(W, {.rank = 4, .alpha = 8});
  lowrank::LoraLinear<float> lora(lowrank::DenseBase<float>(std::move(pissa.base)), pissa.factors);
  ok = learns(lora, ws, in, out) && ok;

  auto loftq = lowrank::loftq(W, {.rank = 4, .alpha = 8});
  lowrank::LoraLinear<float, lowrank::QuantisedMatrix<float>> qlora(std::move(loftq.base), loftq.factors);
  lowrank::LoraWorkspace<float> qws;
  ok = learns(qlora, qws, in, out) && ok;

  lowrank::DoraLinear<float> dora(lowrank::DenseBase<float>(lowrank::view_of(W)),
                                  lowrank::kaiming<float>(out, in, {.rank = 4, .alpha = 8}).factors);
  lowrank::DoraWorkspace<float> dws;
  ok = learns(dora, dws, in, out) && ok;

  const Matrix<float> merged = lowrank::merged_weight(W, lora.factors());
  return ok && merged.rows() == out ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// Batched activations [batch, sequence, in] of xtensor go through a layer as they are: the batch is a stride, not a
// copy.
#undef NDEBUG
#include "lowrank/xtensor.hpp"

#include <cassert>
#include <cstdio>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/init/kaiming.hpp"

using namespace lowrank;

int main() {
  constexpr std::size_t batch = 4, sequence = 6, in = 16, out = 8;
  xt::xtensor<float, 2> W = xt::xtensor<float, 2>::from_shape({out, in});
  xt::xtensor<float, 3> X = xt::xtensor<float, 3>::from_shape({batch, sequence, in});
  CounterRng(1).fill_normal(view_of(W));
  CounterRng(2).fill_normal(view_of(X));  // (batch·sequence)×in
  LoraLinear<float> layer(DenseBase<float>(view_of(W)), kaiming<float>(out, in, {.rank = 4, .alpha = 8}).factors);
  CounterRng(3).fill_normal(layer.B());  // as if it had been trained

  xt::xtensor<float, 3> Y = xt::xtensor<float, 3>::from_shape({batch, sequence, out}), G = Y, dX = X;
  G.fill(1.0F);
  LoraWorkspace<float> ws;
  layer.forward(X, Y, ws);
  layer.backward(X, G, ws, dX);

  // Sequences 1 and 2 alone give the same rows; a slice of the sequence would be refused, with the copy to make named.
  xt::xtensor<float, 3> part = xt::xtensor<float, 3>::from_shape({2, sequence, out});
  layer.forward(xt::view(X, xt::range(1, 3)), part, ws, Phase::eval);
  float worst = 0;
  for (std::size_t b = 0; b < 2; ++b)
    for (std::size_t s = 0; s < sequence; ++s)
      for (std::size_t o = 0; o < out; ++o) worst = std::max(worst, std::abs(part(b, s, o) - Y(b + 1, s, o)));
  bool refused = false;
  try {
    layer.forward(xt::view(X, xt::all(), xt::range(0, 2)), part, ws);
  } catch (const ShapeError& error) {
    refused = true;
    std::printf("%s\n", error.what());
  }
  assert(worst < 1e-5F && refused && dX(0, 0, 0) != 0.0F);
}

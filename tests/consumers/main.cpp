// SPDX-License-Identifier: Apache-2.0
// A user's program in two translation units that both include the library: it must link, and one layer must work in
// both.
#include "lowrank/adapter/lora.hpp"

#include <cmath>
#include <cstdio>

#include "lowrank/core/version.hpp"
#include "lowrank/init/kaiming.hpp"

double loss_from_the_other_unit(const lowrank::LoraLinear<float>& layer, lowrank::MatrixView<const float> x);

int main() {
  constexpr lowrank::Index in = 6, out = 5, tokens = 4;
  lowrank::Matrix<float> W(out, in), X(tokens, in), Y(tokens, out), G(tokens, out);
  lowrank::CounterRng(1).fill_normal(W.view());
  lowrank::CounterRng(2).fill_normal(X.view());
  G.set_zero();
  G(1, 2) = 1;
  lowrank::LoraLinear<float> layer(lowrank::DenseBase<float>(lowrank::view_of(W)),
                                   lowrank::kaiming<float>(out, in, {.rank = 2, .alpha = 4}).factors);
  lowrank::LoraWorkspace<float> ws;
  layer.forward(X, Y, ws);
  double mine = 0;
  for (lowrank::Index i = 0; i < tokens; ++i)
    for (lowrank::Index j = 0; j < out; ++j) mine += double(Y(i, j)) * double(Y(i, j));
  layer.backward(X, G, ws);
  float largest = 0;
  for (const float g : layer.parameters().gradients()) largest = std::max(largest, std::abs(g));
  const double theirs = loss_from_the_other_unit(layer, X.view());
  std::printf("lowrank %s: loss %.6f here, %.6f there; %d parameters, largest gradient %g\n", lowrank::version, mine,
              theirs, int(layer.parameters().size()), double(largest));
  return mine == theirs && mine > 0 && largest > 0 && layer.parameters().size() == 2 * in + out * 2 ? 0 : 1;
}

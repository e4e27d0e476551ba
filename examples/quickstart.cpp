// SPDX-License-Identifier: Apache-2.0
// A frozen weight learns to behave like another one, through a rank-4 adapter and nothing else.
#undef NDEBUG
#include <cassert>
#include <cstdio>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/eigen.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/optim/adamw.hpp"

using namespace lowrank;

int main() {
  constexpr Index in = 48, out = 32, tokens = 128;
  const Eigen::MatrixXf W = Eigen::MatrixXf::Random(out, in), X = Eigen::MatrixXf::Random(tokens, in);
  const Eigen::MatrixXf update = Eigen::MatrixXf::Random(out, 4) * Eigen::MatrixXf::Random(4, in);
  const Eigen::MatrixXf target = X * (W + 0.2F * update).transpose();  // what a tuned weight would say

  LoraLinear<float> layer(DenseBase<float>(view_of(W)),  // looks at W, never writes it
                          kaiming<float>(out, in, {.rank = 4, .alpha = 8}).factors);
  LoraWorkspace<float> ws;
  AdamW<float> optimizer(layer.parameters().size());
  Eigen::MatrixXf Y(tokens, out), G(tokens, out);
  float first = 0, last = 0;
  for (int step = 0; step < 400; ++step) {
    layer.forward(X, Y, ws);
    G = (Y - target) * (2.0F / float(Y.size()));  // gradient of the mean squared error
    last = (Y - target).squaredNorm() / float(Y.size());
    if (step == 0) first = last;
    layer.backward(X, G, ws, {.gradients = Update::assign});
    optimizer.step(layer.parameters().values(), layer.parameters().gradients(), 2e-2);
  }
  std::printf("loss %.4f -> %.2g, training %d of %d values\n", double(first), double(last),
              int(layer.parameters().size()), int(W.size()));
  assert(last < 1e-3F * first);
}

// SPDX-License-Identifier: Apache-2.0
// Eigen's usual layout, activations as columns, through a layer that speaks rows: the transpose is free. Then the
// merge.
#undef NDEBUG
#include <cassert>
#include <cstdio>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/adapter/merge.hpp"
#include "lowrank/eigen.hpp"
#include "lowrank/init/pissa.hpp"

using namespace lowrank;

int main() {
  constexpr Index in = 40, out = 24, tokens = 10;
  const Eigen::MatrixXf W = Eigen::MatrixXf::Random(out, in);
  const Eigen::MatrixXf X = Eigen::MatrixXf::Random(in, tokens);  // one column a token
  Eigen::MatrixXf Y(out, tokens);

  // PiSSA: the adapter starts as W's leading 8 directions, the base keeps the rest; together they are still W.
  const auto start = pissa(W, {.rank = 8, .alpha = 8});
  const LoraLinear<float> layer(DenseBase<float>(start.base.view()), start.factors);
  LoraWorkspace<float> ws;
  layer.forward(X.transpose(), Y.transpose(), ws);  // the same bytes, read as tokens×in and tokens×out
  const float unchanged = (Y - W * X).norm() / Y.norm();

  // The merged weight says the same, in one product; as_eigen is a map of it, not a copy.
  const Matrix<float> merged = merged_weight<float>(start.base, layer.factors());
  const float same = (as_eigen(merged) * X - Y).norm() / Y.norm();
  std::printf("layer against W·X: %.1e, merged against layer: %.1e\n", double(unchanged), double(same));
  assert(unchanged < 1e-5F && same < 1e-5F);
}

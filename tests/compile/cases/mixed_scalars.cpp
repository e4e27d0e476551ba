// SPDX-License-Identifier: Apache-2.0
// A double activation into a float layer is a mistake, not a conversion.
// expect: deleted
// expect within ten lines: MatrixOf
// expect within ten lines: [Cc]ast
#include "lowrank/adapter/lora.hpp"
#include "lowrank/eigen.hpp"

#ifdef FIXED
using X = Eigen::MatrixXf;
#else
using X = Eigen::MatrixXd;
#endif

void bad(const lowrank::LoraLinear<float>& layer, const X& x, Eigen::MatrixXf& y, lowrank::LoraWorkspace<float>& ws) {
  layer.forward(x, y, ws);
}

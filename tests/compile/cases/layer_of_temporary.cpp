// SPDX-License-Identifier: Apache-2.0
// expect: deleted
// expect within ten lines: MatrixOf
// expect within ten lines: [Ee]valuate
#include "lowrank/adapter/lora.hpp"
#include "lowrank/eigen.hpp"

void bad(const lowrank::LoraLinear<float>& layer, const Eigen::MatrixXf& x, Eigen::MatrixXf& y,
         lowrank::LoraWorkspace<float>& ws) {
#ifdef FIXED
  layer.forward(x, y, ws);
#else
  layer.forward(x * 2.0F, y, ws);
#endif
}

// SPDX-License-Identifier: Apache-2.0
#include "lowrank/adapter/lora.hpp"

double loss_from_the_other_unit(const lowrank::LoraLinear<float>& layer, lowrank::MatrixView<const float> x) {
  lowrank::LoraWorkspace<float> ws;
  lowrank::Matrix<float> y(x.rows(), layer.out_features());
  layer.forward(x, y, ws);
  double sum = 0;
  for (lowrank::Index i = 0; i < y.rows(); ++i)
    for (lowrank::Index j = 0; j < y.cols(); ++j) sum += double(y(i, j)) * double(y(i, j));
  return sum;
}

// SPDX-License-Identifier: Apache-2.0
// dX is written; so are the gradients of a double loss refused where the layer is float.
// expect: deleted
// expect within ten lines: MatrixOf
// expect within ten lines: [Ee]valuate
#include "lowrank/adapter/dora.hpp"

#ifdef FIXED
using DX = lowrank::Matrix<float>;
#else
using DX = const lowrank::Matrix<float>;
#endif

void bad(lowrank::DoraLinear<float>& layer, const lowrank::Matrix<float>& x, DX& dx,
         lowrank::DoraWorkspace<float>& ws) {
  layer.backward(x, x, ws, dx, {.gradients = lowrank::Update::assign});
  layer.backward(x, x, ws, {.gradients = lowrank::Update::assign});
}

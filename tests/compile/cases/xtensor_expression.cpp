// SPDX-License-Identifier: Apache-2.0
// expect: deleted
// expect: ExpressionToEvaluateFirst
#include "lowrank/xtensor.hpp"

auto bad(const xt::xtensor<float, 3>& x) {
#ifdef FIXED
  return lowrank::view_of(x).rows();
#else
  return lowrank::view_of(x * 2.0F).rows();
#endif
}

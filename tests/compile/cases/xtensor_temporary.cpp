// SPDX-License-Identifier: Apache-2.0
// expect: deleted
// expect: TemporaryToNameFirst
#include "lowrank/xtensor.hpp"

auto bad(const xt::xtensor<float, 3>& x) {
#ifdef FIXED
  const xt::xtensor<float, 3> y = x * 2.0F;
  return lowrank::view_of(y).rows();
#else
  return lowrank::view_of(xt::xtensor<float, 3>(x)).rows();
#endif
}

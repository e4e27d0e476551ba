// SPDX-License-Identifier: Apache-2.0
// A matrix that dies at the end of the expression cannot be viewed.
// expect: deleted
// expect: TemporaryToNameFirst
#include "lowrank/core/matrix.hpp"

auto bad() {
#ifdef FIXED
  lowrank::Matrix<float> m(3, 4);
  return lowrank::view_of(m).rows();
#else
  return lowrank::view_of(lowrank::Matrix<float>(3, 4));
#endif
}

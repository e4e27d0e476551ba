// SPDX-License-Identifier: Apache-2.0
// expect: deleted
// expect: TemporaryToNameFirst
#include "lowrank/eigen.hpp"

auto bad(const Eigen::MatrixXf& a) {
#ifdef FIXED
  return lowrank::view_of(a);
#else
  return lowrank::view_of(Eigen::MatrixXf(a));
#endif
}

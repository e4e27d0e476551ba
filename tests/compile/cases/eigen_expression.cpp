// SPDX-License-Identifier: Apache-2.0
// expect: deleted
// expect: ExpressionToEvaluateFirst
#include "lowrank/eigen.hpp"

auto bad(const Eigen::MatrixXf& a, const Eigen::MatrixXf& b) {
#ifdef FIXED
  const Eigen::MatrixXf sum = a + b;
  return lowrank::view_of(sum).rows();
#else
  return lowrank::view_of(a + b).rows();
#endif
}

// SPDX-License-Identifier: Apache-2.0
// expect: MatrixView<(const )?float>
#include "lowrank/eigen.hpp"
#include "lowrank/linalg/gemm.hpp"

#ifdef FIXED
using C = Eigen::MatrixXf;
#else
using C = const Eigen::MatrixXf;
#endif

void bad(const Eigen::MatrixXf& a, C& c) {
  const lowrank::MatrixView<float> out = lowrank::view_of(c);
  lowrank::gemm(1.0F, lowrank::view_of(a), lowrank::view_of(a), out);
}

// SPDX-License-Identifier: Apache-2.0
// expect: MatrixLike
// expect: constraint
#include "lowrank/eigen.hpp"

#ifdef FIXED
using M = Eigen::MatrixXd;
#else
using M = Eigen::MatrixXi;
#endif

auto bad(const M& m) { return lowrank::view_of(m); }

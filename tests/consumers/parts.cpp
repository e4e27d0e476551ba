// SPDX-License-Identifier: Apache-2.0
// The optional parts, each through its own target.
#include "lowrank/lowrank.hpp"
#ifdef WITH_EIGEN
#include "lowrank/eigen.hpp"
#endif
#ifdef WITH_IO
#include "lowrank/io/safetensors.hpp"
#endif
#ifdef WITH_XTENSOR
#include "lowrank/xtensor.hpp"
#endif
#ifdef WITH_MPI
#include "lowrank/mpi.hpp"
#endif
#ifdef WITH_TORCH
#include "lowrank/torch.hpp"
#endif

int main() {
  const lowrank::Matrix<float> own(3, 4);
  bool ok = lowrank::view_of(own).data() == own.data();
#ifdef WITH_EIGEN
  Eigen::MatrixXf m = Eigen::MatrixXf::Ones(3, 4);
  ok = ok && lowrank::view_of(m).data() == m.data();
#endif
#ifdef WITH_XTENSOR
  xt::xtensor<float, 3> x = xt::xtensor<float, 3>::from_shape({2, 3, 4});
  ok = ok && lowrank::view_of(x).rows() == 6;
#endif
#ifdef WITH_MPI
  const lowrank::MpiWorld world;  // a world of one, without mpirun
  ok = ok && world.gather("text").size() == (world.rank() == 0 ? 1U : 0U);
#endif
#ifdef WITH_TORCH
  const at::Tensor t = lowrank::as_torch(lowrank::Matrix<float>(3, 4));
  ok = ok && lowrank::view_of<float>(t).data() == t.data_ptr();
#endif
  return ok ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// What rank does an update really have? r90, the r90 noise of the same shape would show, and the intruder dimensions of
// two Eigen matrices: eight lines between the rulers. The rest makes an example and checks the answer.
#include <lowrank/eigen.hpp>
#include <lowrank/linalg/singular_values.hpp>
#include <lowrank/spectrum/intruders.hpp>
#include <lowrank/spectrum/noise.hpp>

#include <cstdio>

namespace {

struct Answer {
  lowrank::Index rank, noise_rank;
  std::vector<lowrank::Index> intruders;
};

// ---------------------------------------------------------------------------------------------------------------------
Answer look(const Eigen::MatrixXf& base, const Eigen::MatrixXf& tuned) {
  const Eigen::MatrixXf delta = tuned - base;
  const auto sigma = lowrank::singular_values(delta).values;
  const auto rank = lowrank::energy_rank(sigma, 0.9);
  const auto noise = lowrank::noise_metrics(delta.rows(), delta.cols()).energy_rank_90;
  const auto intruders = lowrank::find_intruders(base, tuned, {.k = 10, .epsilon = 0.5}).intruders();
  return {rank, noise, intruders};
}
// ---------------------------------------------------------------------------------------------------------------------

}  // namespace

int main() {
  // A base, and an update of rank 3 whose two strongest directions the base does not have; the third is the base's own.
  std::srand(1);
  const Eigen::MatrixXf base = 0.05F * Eigen::MatrixXf::Random(160, 240);
  const auto top = lowrank::truncated_svd(base, 1);
  Eigen::MatrixXf tuned = base;
  for (int i = 0; i < 2; ++i)
    tuned += (3.0F - float(i)) * Eigen::VectorXf::Random(160).normalized() *
             Eigen::VectorXf::Random(240).normalized().transpose();
  tuned += 1.5F * lowrank::as_eigen(top.U) * lowrank::as_eigen(top.V).transpose();

  const Answer a = look(base, tuned);
  std::printf("r90 of the update %td, of noise %td; intruders:", a.rank, a.noise_rank);
  for (const auto i : a.intruders) std::printf(" %td", i);
  std::printf("\n");
  return a.rank <= 3 && a.noise_rank > 80 && a.intruders.size() >= 2 && a.intruders[0] == 0 ? 0 : 1;
}

// SPDX-License-Identifier: Apache-2.0
// The frame of docs/initialisers.md.

#include "lowrank/adapter/merge.hpp"

TEST_CASE("initialisers.md") {
  constexpr lowrank::Index out = 48, in = 64;
  const auto W = test::random_matrix<float>(out, in, 1);
  //@ block
  CHECK(init.base_changed);
  CHECK(init.factors.scale == 2);
  lowrank::Matrix<float> sum = lowrank::merged_weight<float>(init.base, init.factors);
  CHECK(test::deviation(sum, W) < 1e-6);
  //@ block
  CHECK_FALSE(test::same_bits(q.factors.A, v.factors.A));
  CHECK(test::same_bits(again.factors.A, v.factors.A));
  //@ block
  CHECK(tight.report.converged);

  std::vector<lowrank::Matrix<float>> batches;
  for (std::uint64_t i = 0; i < 4; ++i) batches.push_back(test::random_matrix<float>(40, in, 10 + i));
  lowrank::ActivationSvd<float> other(in, {.components = 32});
  const auto elsewhere = test::random_matrix<float>(200, in, 20);
  other.add(elsewhere);
  //@ block
  CHECK(a.factors.rank() == 16);
  CHECK(test::deviation(lowrank::merged_weight<float>(a.base, a.factors), W) < 1e-5);
  CHECK(ranks.size() == 2);
  CHECK(ranks[0] + ranks[1] == 32);
  CHECK(b.factors.rank() == ranks[0]);

  lowrank::LoraFactors<float> layer_factors = init.factors;  // as if trained
  lowrank::CounterRng(3).fill_normal(layer_factors.B.view());
  //@ block
  CHECK(exported.factors.rank() == 16);
  CHECK(exported.distance > 0);
  CHECK(lowrank::undo_residual(layer_factors, init.factors, 32).distance < 1e-5 * exported.sum_norm);
}

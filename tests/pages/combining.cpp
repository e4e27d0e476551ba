// SPDX-License-Identifier: Apache-2.0
// The frame of docs/combining.md.
#include <cstdio>

#include "lowrank/adapter/merge.hpp"

namespace {

lowrank::LoraFactors<float> adapter(lowrank::Index out, lowrank::Index in, lowrank::Index rank, std::uint64_t seed) {
  return {test::random_matrix<float>(rank, in, seed), test::random_matrix<float>(out, rank, seed + 1), 0.5F};
}

}  // namespace

TEST_CASE("combining.md: several adapters as one") {
  const auto style = adapter(40, 30, 6, 1), facts = adapter(40, 30, 20, 3);
  //@ block
  CHECK(one.factors.rank() == 16);
  CHECK(one.factors.scale == 1);
  lowrank::Matrix<float> sum = lowrank::delta_weight(facts);
  const lowrank::Matrix<float> other = lowrank::delta_weight(style);
  for (lowrank::Index i = 0; i < sum.size(); ++i) sum.data()[i] += 0.7F * other.data()[i];
  const lowrank::Matrix<float> reached = lowrank::delta_weight(one.factors);
  double squared = 0, distance = 0;
  for (lowrank::Index i = 0; i < sum.size(); ++i) {
    squared += double(sum.data()[i]) * double(sum.data()[i]);
    distance += std::pow(double(sum.data()[i]) - double(reached.data()[i]), 2);
  }
  CHECK(one.sum_norm == doctest::Approx(std::sqrt(squared)).epsilon(1e-5));
  CHECK(one.distance == doctest::Approx(std::sqrt(distance)).epsilon(1e-4));
}

TEST_CASE("combining.md: smaller") {
  const auto factors = adapter(40, 30, 20, 5);
  //@ block
  CHECK(small.factors.rank() < 20);
  CHECK(small.error <= std::sqrt(0.05) * small.norm);
}

TEST_CASE("combining.md: out of a full fine-tune") {
  const auto W_base = test::random_matrix<float>(80, 60, 7);
  const auto W_tuned = lowrank::merged_weight<float>(W_base, adapter(80, 60, 40, 8));
  //@ block
  CHECK(x.sigma.size() == 32);
  CHECK(x.factors.scale == 0.5F);
  CHECK(x.error > 0);
  CHECK(x.error < x.norm);
}

TEST_CASE("combining.md: which modules") {
  std::vector<lowrank::ModuleInfo> modules;
  for (int layer = 0; layer < 32; ++layer)
    for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
      modules.push_back({"model.layers." + std::to_string(layer) + "." + name, lowrank::ModuleKind::linear, 64, 64});
  modules.push_back({"model.embed_tokens", lowrank::ModuleKind::embedding, 100, 64});
  modules.push_back({"lm_head", lowrank::ModuleKind::linear, 100, 64});
  //@ block
  CHECK(chosen.summary() == "adapting 6 of 226 modules (0 excluded, 58 in other layers)");
  CHECK(ranks.find("model.layers.0.self_attn.q_proj", 16) == 32);
  CHECK(ranks.find("model.layers.5.self_attn.q_proj", 16) == 8);
  CHECK(ranks.find("model.layers.5.self_attn.k_proj", 16) == 16);
}

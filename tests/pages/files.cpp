// SPDX-License-Identifier: Apache-2.0
// The frame of docs/files.md: its blocks run in a folder that holds the files they name.
#include <cstdio>
#include <filesystem>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/io/safetensors_writer.hpp"
#include "support/temp_dir.hpp"

namespace {

/// A folder of its own for one test, entered and left.
class Folder {
 public:
  Folder() { std::filesystem::current_path(dir_.path()); }
  ~Folder() { std::filesystem::current_path(before_); }

 private:
  std::filesystem::path before_ = std::filesystem::current_path();
  test::TempDir dir_;
};

lowrank::LoraFactors<float> some_factors() {
  return {test::random_matrix<float>(4, 24, 2), test::random_matrix<float>(20, 4, 3), 0.5F};
}

}  // namespace

TEST_CASE("files.md: safetensors") {
  const Folder folder;
  const auto M = test::random_matrix<float>(5, 8, 1);
  lowrank::io::SafeTensorsWriter out("model.safetensors",
                                     {{"model.layers.0.mlp.up_proj.weight", lowrank::io::Dtype::BF16, {5, 8}}});
  out.write_matrix("model.layers.0.mlp.up_proj.weight", M.view());
  out.commit();
  //@ block
  CHECK(in_place.rows() == 5);
  CHECK(test::deviation(copy, M) < 4e-3);
}

TEST_CASE("files.md: PEFT") {
  const Folder folder;
  const auto W = test::random_matrix<float>(20, 24, 1);
  const lowrank::LoraLinear<float> layer(lowrank::DenseBase<float>(lowrank::view_of(W)), some_factors());
  //@ block
  REQUIRE(back.modules.size() == 1);
  CHECK(back.config.r == 4);
  CHECK(back.config.lora_alpha == 2);
  CHECK(test::same_bits(back.modules[0].factors.B, layer.factors().B));
}

TEST_CASE("files.md: 8-bit weights") {
  const Folder folder;
  std::filesystem::create_directory("DeepSeek-V3");
  const std::string name = "model.layers.3.mlp.experts.0.up_proj.weight";
  lowrank::io::SafeTensorsWriter out(
      "DeepSeek-V3/model.safetensors",
      {{name, lowrank::io::Dtype::F8_E4M3, {2, 3}}, {name + "_scale_inv", lowrank::io::Dtype::F32, {1, 1}}});
  const unsigned char ones[6] = {0x38, 0x38, 0x38, 0x38, 0x38, 0x40};  // 1, …, 2
  const float scale = 0.5F;
  out.write(name, std::as_bytes(std::span(ones)));
  out.write(name + "_scale_inv", std::as_bytes(std::span(&scale, 1)));
  out.commit();
  //@ block
  CHECK(values(0, 0) == 0.5F);
  CHECK(values(1, 2) == 1);
}

TEST_CASE("files.md: training state") {
  const Folder folder;
  const auto W = test::random_matrix<float>(20, 24, 1);
  lowrank::LoraLinear<float> layer(lowrank::DenseBase<float>(lowrank::view_of(W)), some_factors());
  lowrank::FlatParameters<float> flat;
  flat.add("q_proj", layer.parameters());
  flat.pack();
  lowrank::AdamW<float> adam(flat.size());
  adam.set_steps(7);
  //@ block
  CHECK(adam.steps() == 7);
}

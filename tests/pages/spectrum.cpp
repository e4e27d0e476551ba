// SPDX-License-Identifier: Apache-2.0
// The frame of docs/spectrum.md.
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/eigen.hpp"
#include "support/temp_dir.hpp"

TEST_CASE("spectrum.md: what rank does this update have") {
  std::srand(1);
  const Eigen::MatrixXf base = 0.05F * Eigen::MatrixXf::Random(60, 80);
  const Eigen::MatrixXf tuned = base + Eigen::VectorXf::Random(60) * Eigen::VectorXf::Random(80).transpose();
  //@ block
  CHECK(rank == 1);
  CHECK(null > 30);
  REQUIRE(intruders.size() >= 1);
  CHECK(intruders[0] == 0);
}

TEST_CASE("spectrum.md: while training") {
  const test::TempDir dir;
  const auto here = std::filesystem::current_path();
  std::filesystem::current_path(dir.path());
  const auto W = test::random_matrix<float>(20, 24, 1);
  lowrank::LoraLinear<float> layer(
      lowrank::DenseBase<float>(lowrank::view_of(W)),
      lowrank::LoraFactors<float>{test::random_matrix<float>(4, 24, 2), test::random_matrix<float>(20, 4, 3), 0.5F});
  const auto train_one_step = [&] { layer.B()(0, 0) += 1; };
  {
    //@ block
  }
  std::ifstream csv("run.csv");
  std::string header, first;
  CHECK(std::getline(csv, header));
  CHECK(std::getline(csv, first));
  CHECK(first.find("q_proj") != std::string::npos);
  std::filesystem::current_path(here);
}

// SPDX-License-Identifier: Apache-2.0
// The frame of docs/quantisation.md.

TEST_CASE("quantisation.md: LoftQ") {
  const auto W = test::random_matrix<float>(48, 128, 1);
  //@ block
  CHECK(layer.rank() == 16);
  CHECK(init.report.error_reduction() > 0);
}

TEST_CASE("quantisation.md: GPTQ") {
  const auto W = test::random_matrix<float>(48, 64, 2), X = test::random_matrix<float>(256, 64, 3);
  lowrank::Matrix<float> H(64, 64);
  lowrank::gemm(1.0F, X.view().transposed(), X.view(), H.view());
  const auto factors = lowrank::kaiming<float>(48, 64, {.rank = 4, .alpha = 8}).factors;
  //@ block
  CHECK(r.report.weighted < r.report.plain_weighted);
  CHECK(layer.base().rows() == 48);
}

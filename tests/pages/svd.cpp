// SPDX-License-Identifier: Apache-2.0
// The frame of docs/svd.md.
#include <cstdio>

#include "lowrank/adapter/merge.hpp"

TEST_CASE("svd.md: truncated") {
  const auto W = test::random_matrix<float>(90, 60, 1);
  lowrank::Matrix<float> W2 = W;
  W2(3, 4) += 0.1F;
  //@ block
  CHECK(t.converged);
  CHECK(u.S.size() == 16);
  CHECK(v.converged);
}

namespace {
//@ block
}  // namespace

TEST_CASE("svd.md: an operator of one's own") {
  const auto W = test::random_matrix<float>(90, 60, 1);
  const auto t = lowrank::truncated_svd(Mine{W.view()}, 8, {.energy_tolerance = 0, .residual_tolerance = 1e-5});
  const auto full = lowrank::svd(W);
  for (std::size_t i = 0; i < 8; ++i) CHECK(t.S[i] == doctest::Approx(full.S[i]).epsilon(1e-5));
}

TEST_CASE("svd.md: full decompositions") {
  const auto W = test::random_matrix<float>(50, 30, 2);
  const lowrank::LoraFactors<float> update{test::random_matrix<float>(4, 30, 3), test::random_matrix<float>(50, 4, 4),
                                           0.5F};
  //@ block
  CHECK(s.values.size() == 30);
  for (std::size_t i = 0; i < 30; ++i) CHECK(p.values[i] == doctest::Approx(double(f.S[i])).epsilon(1e-4));
  CHECK(d.S.size() == 4);
  double squares = 0;
  for (const float x : d.S) squares += double(x) * double(x);
  CHECK(n == doctest::Approx(std::sqrt(squares)).epsilon(1e-6));
}

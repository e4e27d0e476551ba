// SPDX-License-Identifier: Apache-2.0
// The frame of docs/embedding.md.
#include <vector>

#include "lowrank/adapter/merge.hpp"

namespace {

constexpr lowrank::Index in = 24, out = 20, tokens = 12, dim = 16, vocab = 50;

/// A layer whose B is not zero, with what it computes.
struct OneLayer {
  lowrank::Matrix<float> W = test::random_matrix<float>(out, in, 1);
  lowrank::LoraFactors<float> factors{test::random_matrix<float>(4, in, 2), test::random_matrix<float>(out, 4, 3),
                                      0.5F};
  lowrank::LoraLinear<float> layer{lowrank::DenseBase<float>(lowrank::view_of(W)), factors};
  lowrank::LoraWorkspace<float> ws;

  [[nodiscard]] lowrank::Matrix<float> expected(lowrank::MatrixView<const float> X) const {
    lowrank::Matrix<float> Y(X.rows(), out);
    const auto merged = lowrank::merged_weight<float>(W, factors);
    lowrank::gemm(1.0F, X, merged.view().transposed(), Y.view());
    return Y;
  }
};

void my_allreduce(float*, lowrank::Index) {}
lowrank::Index optimised = 0;
void my_optimizer(float*, const float*, lowrank::Index size) { optimised = size; }

}  // namespace

TEST_CASE("embedding.md: Eigen") {
  OneLayer one;
  auto& layer = one.layer;
  auto& ws = one.ws;
  //@ block
  CHECK(test::deviation(Y, one.expected(lowrank::view_of(X))) < 1e-5);
}

TEST_CASE("embedding.md: xtensor") {
  OneLayer one;
  auto& layer = one.layer;
  auto& ws = one.ws;
#if defined(WITH_XTENSOR)
  constexpr std::size_t batch = 3, sequence = 4, in = 24, out = 20;
  //@ block
  CHECK(test::deviation(lowrank::view_of(Y), one.expected(lowrank::view_of(X))) < 1e-5);
#endif
}

//@ elsewhere: tests/torch
//@ elsewhere: tests/torch
//@ elsewhere: tests/torch

TEST_CASE("embedding.md: raw memory") {
  constexpr lowrank::Index rows = 3, cols = 4, leading = 6;
  std::vector<float> memory(leading * cols);
  for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = float(i);
  float* pointer = memory.data();
  //@ block
  CHECK(x(1, 2) == 6);
  CHECK(y(1, 2) == 13);
}

//@ block

TEST_CASE("embedding.md: your own type") {
  OneLayer one;
  const auto X = test::random_matrix<float>(tokens, in, 7);
  std::vector<float> xs(tokens * 30), ys(tokens * 40);
  MyTensor x{xs.data(), tokens, in, 30}, y{ys.data(), tokens, out, 40};
  for (lowrank::Index i = 0; i < tokens; ++i)
    for (lowrank::Index j = 0; j < in; ++j) xs[std::size_t(i * 30 + j)] = X(i, j);
  one.layer.forward(x, y, one.ws);
  CHECK(test::deviation(lowrank::view_of(y), one.expected(X.view())) < 1e-5);
}

TEST_CASE("embedding.md: forward and backward") {
  OneLayer one;
  auto& layer = one.layer;
  const auto X = test::random_matrix<float>(tokens, in, 7), G = test::random_matrix<float>(tokens, out, 8);
  lowrank::Matrix<float> Y(tokens, out), dX(tokens, in);
  //@ block
  CHECK(test::deviation(Y, one.expected(X.view())) < 1e-5);
}

TEST_CASE("embedding.md: your optimizer") {
  struct Start {
    lowrank::LoraFactors<float> factors;
  };
  const std::vector<lowrank::Matrix<float>> weights{test::random_matrix<float>(out, in, 1),
                                                    test::random_matrix<float>(out, in, 5)};
  std::vector<Start> starts;
  for (std::uint64_t seed : {11U, 13U})
    starts.push_back({{test::random_matrix<float>(4, in, seed), test::random_matrix<float>(out, 4, seed + 1), 0.5F}});
  //@ block
  CHECK(optimised == 2 * 4 * (in + out));
  {
    for (float& g : flat.gradients()) g = 1;
    const std::vector<float> before(flat.values().begin(), flat.values().end());
    //@ block
    CHECK(lowrank::norm(std::span<const float>(flat.gradients())) == doctest::Approx(1));
    // The first step of Adam is the rate long in every coordinate, up to the decay: 2e-6, in B 16 times that.
    const float a = before[0] - flat.values()[0], b = before[4 * in] - flat.values()[4 * in];
    CHECK(a == doctest::Approx(2e-6).epsilon(0.2));
    CHECK(b == doctest::Approx(32e-6).epsilon(0.2));
  }
  const auto X = test::random_matrix<float>(tokens, in, 7), G = test::random_matrix<float>(tokens, out, 8);
  lowrank::Matrix<float> Y(tokens, out);
  for (auto& layer : layers) {
    lowrank::LoraWorkspace<float> ws;
    layer.forward(X, Y, ws);
    layer.backward(X, G, ws);
  }
  auto &q = layers[0], &v = layers[1];
  const lowrank::Matrix<float> before(q.parameters().gradient(0));
  //@ block
  CHECK(test::deviation(q.parameters().gradient(0), before) > 1e-3);
}

TEST_CASE("embedding.md: DoRA, embeddings") {
  OneLayer one;
  const auto& W = one.W;
  const auto& factors = one.factors;
  const auto table = test::random_matrix<float>(vocab, dim, 4), X = test::random_matrix<float>(tokens, in, 7),
             G = test::random_matrix<float>(tokens, out, 8), dE = test::random_matrix<float>(tokens, dim, 9);
  lowrank::Matrix<float> Y(tokens, out), dX(tokens, in), E(tokens, dim);
  std::vector<std::int32_t> ids(tokens, 3);
  lowrank::LoraWorkspace<float> ws;
  //@ block
  CHECK(dora.rank() == 4);
  CHECK(test::deviation(lowrank::Matrix<float>(E.view().middle_rows(0, 1)),
                        lowrank::Matrix<float>(table.view().middle_rows(3, 1))) < 1e-6);
}

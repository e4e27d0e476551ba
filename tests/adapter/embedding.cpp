// LoraEmbedding and FullEmbedding: PyTorch's figures, the tied head, bad ids.
#include "lowrank/adapter/embedding.hpp"

#include <doctest/doctest.h>

#include "lowrank/adapter/lora_functions.hpp"
#include "support/compare.hpp"
#include "support/fixture.hpp"

using namespace lowrank;
using test::deviation;
using test::random_matrix;
using test::rounding;

TEST_CASE("an embedding with an adapter is PyTorch's") {
  const test::Fixture fx("lora_step.txt");
  std::vector<std::int32_t> ids;
  for (Index i = 0; i < 5; ++i) ids.push_back(std::int32_t(fx["eids"](0, i)));
  LoraEmbedding<double> layer(
      DenseBase<double>(fx["E"].view()),
      LoraFactors<double>{Matrix<double>(fx["eA"].view()), Matrix<double>(fx["eB"].view()), lora_scale(5.0, 3)});
  LoraWorkspace<double> ws;
  Matrix<double> Y(5, 6);
  layer.forward(ids, Y, ws);
  CHECK(deviation(Y, fx["eY"]) < rounding<double>(10));
  layer.parameters().gradient(0)(0, 0) = 1e9;  // assign must clear columns of tokens not seen
  layer.backward(ids, fx["eG"], ws, Update::assign);
  CHECK(deviation(layer.parameters().gradient(0), fx["deA"]) < rounding<double>(20));
  CHECK(deviation(layer.parameters().gradient(1), fx["deB"]) < rounding<double>(20));
  const Matrix<double> once(layer.parameters().gradient(0));
  layer.backward(ids, fx["eG"], ws, Update::accumulate);
  for (Index i = 0; i < once.size(); ++i)
    CHECK(layer.parameters().gradients()[std::size_t(i)] == doctest::Approx(2 * once.data()[i]));
}

TEST_CASE("a trained table collects its gradient row by row, repeated tokens included") {
  const Matrix<float> E = random_matrix<float>(7, 3, 1), G = random_matrix<float>(4, 3, 2);
  const std::vector<std::int32_t> ids{6, 2, 6, 0};
  FullEmbedding<float> layer(E);
  LoraWorkspace<float> ws;
  Matrix<float> Y(4, 3);
  layer.forward(ids, Y, ws);
  for (Index t = 0; t < 4; ++t)
    for (Index j = 0; j < 3; ++j) CHECK(Y(t, j) == E(ids[std::size_t(t)], j));
  layer.backward(ids, G, ws, Update::assign);
  const auto d = layer.parameters().gradient(0);
  for (Index j = 0; j < 3; ++j) {
    CHECK(d(6, j) == G(0, j) + G(2, j));
    CHECK(d(2, j) == G(1, j));
    CHECK(d(1, j) == 0);
  }
}

TEST_CASE("the head of a tied embedding uses the same factors, transposed views of them") {
  // Y = X·(E + ΔE)ᵀ with ΔE = (s·B·A)ᵀ, vocab×dim: A_head = Bᵀ (r×dim), B_head = Aᵀ (vocab×r).
  const Index vocab = 13, dim = 8, r = 3, tokens = 6;
  const Matrix<double> E = random_matrix<double>(vocab, dim, 1), X = random_matrix<double>(tokens, dim, 2);
  const Matrix<double> A = random_matrix<double>(r, vocab, 3), B = random_matrix<double>(dim, r, 4);
  const double s = 1.7;
  LoraWorkspace<double> ws;
  Matrix<double> Y(tokens, vocab);
  lora_forward<double>(DenseBase<double>(E.view()), B.view().transposed(), A.view().transposed(), s, X.view(), Y.view(),
                       ws);
  for (Index t = 0; t < tokens; ++t)
    for (Index v = 0; v < vocab; ++v) {
      double y = 0;
      for (Index j = 0; j < dim; ++j) {
        double e = E(v, j);
        for (Index k = 0; k < r; ++k) e += s * B(j, k) * A(k, v);
        y += X(t, j) * e;
      }
      CHECK(Y(t, v) == doctest::Approx(y).epsilon(1e-12));
    }
}

TEST_CASE("a bad token id is refused by position and value") {
  const Matrix<float> E(7, 3);
  LoraWorkspace<float> ws;
  Matrix<float> Y(2, 3);
  LoraEmbedding<float> lora(DenseBase<float>(E.view()),
                            LoraFactors<float>{Matrix<float>(2, 7), Matrix<float>(3, 2), 1.F});
  FullEmbedding<float> full(E);
  const std::vector<std::int32_t> high{1, 7}, negative{-1, 2}, fine{1, 2};
  CHECK_THROWS_WITH_AS(lora.forward(high, Y, ws),
                       "LoraEmbedding::forward: token id must lie in [0, 7), got 7 at position 1", ArgumentError);
  CHECK_THROWS_AS(full.forward(negative, Y, ws), ArgumentError);
  CHECK_THROWS_AS(lora.backward(fine, Y, ws), ArgumentError);  // no forward yet
  CHECK_THROWS_AS(LoraEmbedding<float>(DenseBase<float>(E.view()),
                                       LoraFactors<float>{Matrix<float>(2, 3), Matrix<float>(7, 2), 1.F}),
                  ShapeError);  // factors of the table, not of its transpose
}

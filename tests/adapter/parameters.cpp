// Flat blocks: packing keeps values, one optimizer step on the block reaches every layer.
#include "lowrank/adapter/parameters.hpp"

#include <doctest/doctest.h>

#include "lowrank/adapter/linear.hpp"
#include "support/compare.hpp"

using namespace lowrank;
using test::random_matrix;

TEST_CASE("packing moves layers into one block without changing them") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  LoraLinear<float> q(DenseBase<float>(W.view()), {random_matrix<float>(2, 5, 3), random_matrix<float>(6, 2, 4), 1.5F});
  FullLinear<float> v(W, std::vector<float>(6, 0.25F));
  LoraWorkspace<float> ws;
  Matrix<float> before(3, 6), after(3, 6);
  q.forward(X, before, ws);

  FlatParameters<float> flat;
  flat.add("layers.0.q_proj", q.parameters());
  flat.add("layers.0.v_proj", v.parameters());
  flat.pack();
  q.forward(X, after, ws);
  CHECK(test::same_bits(before, after));
  CHECK(flat.size() == 2 * 5 + 6 * 2 + 6 * 5 + 6);
  REQUIRE(flat.table().size() == 4);
  CHECK(flat.table()[1].name == "layers.0.q_proj.lora_B");
  CHECK(flat.table()[3].name == "layers.0.v_proj.bias");
  CHECK(flat.table()[3].offset == 10 + 12 + 30);
  CHECK(q.B().data() == flat.values().data() + 10);
  CHECK(flat.value("layers.0.v_proj.weight").data() == v.weight().data());
  CHECK_THROWS_AS((void)flat.value("layers.0.k_proj.weight"), ArgumentError);

  for (float& x : flat.values()) x = 0;  // an optimizer that knows a pointer and a length
  q.forward(X, after, ws);
  Matrix<float> frozen(3, 6);
  DenseBase<float>(W.view()).forward(X.view(), frozen.view());
  CHECK(test::same_bits(after, frozen));

  const Matrix<float> G = random_matrix<float>(3, 6, 7);
  for (float& x : flat.values()) x = 0.5F;
  q.forward(X, after, ws);
  q.backward(X, G, ws);
  CHECK(flat.gradients()[0] == q.parameters().gradient(0)(0, 0));
  CHECK(flat.gradients()[0] != 0);
  CHECK(flat.gradients()[10] == q.parameters().gradient(1)(0, 0));
  CHECK(flat.gradients()[10] != 0);
  flat.zero_gradients();
  CHECK(q.parameters().gradient(1)(0, 0) == 0);
  CHECK_THROWS_AS(flat.pack(), ArgumentError);
}

TEST_CASE("a layer that moves takes its parameters along") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1);
  std::vector<LoraLinear<float>> layers;
  for (int i = 0; i < 5; ++i)  // the vector reallocates
    layers.emplace_back(DenseBase<float>(W.view()),
                        LoraFactors<float>{random_matrix<float>(2, 5, 3), random_matrix<float>(6, 2, 4), 1.5F});
  for (const auto& layer : layers) CHECK(layer.A()(1, 2) == layers[0].A()(1, 2));
}

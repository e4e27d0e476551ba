// Flat blocks: packing keeps values, one optimizer step on the block reaches every layer.
#include "lowrank/adapter/parameters.hpp"

#include <doctest/doctest.h>

#include "lowrank/adapter/linear.hpp"
#include "lowrank/adapter/lora.hpp"
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

TEST_CASE("what would leave a layer outside the blocks, or two of one name inside, is refused") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1);
  const auto layer = [&] {
    return LoraLinear<float>(DenseBase<float>(W.view()),
                             {random_matrix<float>(2, 5, 3), random_matrix<float>(6, 2, 4), 1.5F});
  };
  LoraLinear<float> a = layer(), b = layer(), c = layer();
  FrozenLinear<float> frozen{DenseBase<float>(W.view())}, frozen_too{DenseBase<float>(W.view())};
  FlatParameters<float> flat;
  flat.add("a", a.parameters());
  CHECK(flat.size() == 0);
  CHECK(flat.values().empty());
  CHECK_THROWS_WITH_AS((void)flat.value("a.lora_A"), "FlatParameters::value: 'a.lora_A' has no place before pack()",
                       ArgumentError);
  CHECK_THROWS_WITH_AS(flat.add("again", a.parameters()), "FlatParameters::add: 'again' was added already, as 'a'",
                       ArgumentError);
  CHECK_THROWS_WITH_AS(flat.add("a", b.parameters()), "FlatParameters::add: the name 'a.lora_A' is taken",
                       ArgumentError);
  flat.add("f", frozen.parameters());  // nothing in them, so nothing to clash
  flat.add("f", frozen_too.parameters());
  CHECK(flat.table().size() == 2);  // what was refused has left no trace
  flat.add("c", c.parameters());
  flat.pack();
  CHECK(flat.size() == 2 * (2 * 5 + 6 * 2));
  CHECK(flat.size() == Index(flat.values().size()));
  CHECK(flat.size() == Index(flat.gradients().size()));
  CHECK_THROWS_WITH_AS(flat.add("b", b.parameters()), "FlatParameters::add: 'b' comes after pack()", ArgumentError);
  CHECK_THROWS_AS((void)flat.value("b.lora_B"), ArgumentError);
  CHECK(flat.size() == Index(flat.values().size()));
  CHECK(flat.table().size() == 4);
  FlatParameters<float> other;
  CHECK_THROWS_WITH_AS(other.add("elsewhere", a.parameters()),
                       "FlatParameters::add: 'elsewhere' is packed already, as 'a'", ArgumentError);
  CHECK(a.parameters().name() == "a");
  CHECK(b.parameters().name().empty());
}

TEST_CASE("factors that do not fit or have no finite scale are not put in") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1);
  const LoraFactors<float> f{random_matrix<float>(2, 5, 3), random_matrix<float>(6, 2, 4), 1.5F};
  LoraLinear<float> layer(DenseBase<float>(W.view()), f);
  CHECK_THROWS_AS(layer.set_factors({random_matrix<float>(2, 5, 7), random_matrix<float>(6, 2, 8), NAN}),
                  ArgumentError);
  CHECK_THROWS_AS(layer.set_factors({random_matrix<float>(2, 5, 7), random_matrix<float>(6, 3, 8), 1.F}), ShapeError);
  CHECK(test::same_bits(layer.factors().A, f.A));
  CHECK(layer.scale() == 1.5F);
}

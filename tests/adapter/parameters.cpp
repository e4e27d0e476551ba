// Flat blocks: packing keeps values, one optimizer step on the block reaches every layer.
#include "lowrank/adapter/parameters.hpp"

#include <doctest/doctest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/adapter/dora.hpp"
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
  CHECK(std::as_const(flat).values().empty());
  for (const auto use :
       {+[](FlatParameters<float>& f) { (void)f.values(); }, +[](FlatParameters<float>& f) { (void)f.gradients(); },
        +[](FlatParameters<float>& f) { f.zero_gradients(); }})
    CHECK_THROWS_WITH_AS(use(flat), doctest::Contains("layers were added and pack() was not called"), ArgumentError);
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

namespace {

/// A layer whose factors tell it from others, and what it computes, for the tests of moving.
LoraLinear<float> numbered_layer(const Matrix<float>& W, int i) {
  return {DenseBase<float>(W.view()), LoraFactors<float>{random_matrix<float>(2, 5, std::uint64_t(10 + i)),
                                                         random_matrix<float>(6, 2, std::uint64_t(20 + i)), 1.5F}};
}
Matrix<float> output_of(const LoraLinear<float>& layer, const Matrix<float>& X) {
  LoraWorkspace<float> ws;
  Matrix<float> Y(X.rows(), 6);
  layer.forward(X, Y, ws);
  return Y;
}
/// Whether the layer's forward reads the named entry of `flat`, and its backward writes there.
bool lives_in(FlatParameters<float>& flat, const std::string& name, LoraLinear<float>& layer, const Matrix<float>& X) {
  const MatrixView<float> B = flat.value(name + ".lora_B");
  const Matrix<float> kept(B), before = output_of(layer, X), G = random_matrix<float>(X.rows(), 6, 77);
  B(0, 0) += 1;
  const bool reads = !test::same_bits(output_of(layer, X), before);
  B(0, 0) = kept(0, 0);
  flat.zero_gradients();
  LoraWorkspace<float> ws;
  Matrix<float> Y(X.rows(), 6);
  layer.forward(X, Y, ws);
  layer.backward(X, G, ws);
  double sum = 0;
  for (const ParameterInfo& p : flat.table())
    if (p.name == name + ".lora_B")
      for (Index k = 0; k < p.size(); ++k) sum += std::abs(double(flat.gradients()[std::size_t(p.offset + k)]));
  return reads && sum > 0 && test::same_bits(output_of(layer, X), before);
}

}  // namespace

TEST_CASE("the natural loop: a vector that grows between add and pack, and after") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  std::vector<LoraLinear<float>> layers;
  FlatParameters<float> flat;
  for (int i = 0; i < 5; ++i) {
    layers.emplace_back(numbered_layer(W, i));
    flat.add("layers." + std::to_string(i), layers.back().parameters());
  }
  flat.pack();
  REQUIRE(flat.size() == 5 * (2 * 5 + 6 * 2));
  for (int i = 0; i < 5; ++i) {
    CAPTURE(i);
    LoraLinear<float>& layer = layers[std::size_t(i)];
    CHECK(layer.parameters().name() == "layers." + std::to_string(i));
    CHECK(test::same_bits(output_of(layer, X), output_of(numbered_layer(W, i), X)));
    CHECK(lives_in(flat, "layers." + std::to_string(i), layer, X));
  }
  for (int i = 5; i < 40; ++i) layers.emplace_back(numbered_layer(W, i));  // none of the model's, but all move
  std::swap(layers[0], layers[3]);
  CHECK(lives_in(flat, "layers.3", layers[0], X));
  CHECK(lives_in(flat, "layers.0", layers[3], X));
  CHECK(lives_in(flat, "layers.4", layers[4], X));
}

TEST_CASE("layers that change places between add and pack keep their names") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  LoraLinear<float> a = numbered_layer(W, 0), b = numbered_layer(W, 1);
  FlatParameters<float> flat;
  flat.add("a", a.parameters());
  flat.add("b", b.parameters());
  std::swap(a, b);
  FlatParameters<float> moved = std::move(flat);
  moved.pack();
  CHECK(b.parameters().name() == "a");
  CHECK(lives_in(moved, "a", b, X));
  CHECK(lives_in(moved, "b", a, X));
  flat.add("new", numbered_layer(W, 2).parameters());  // what was moved from is as new
  CHECK(flat.size() == 0);
}

TEST_CASE("a layer that is gone before pack is an error that names it, and nothing has moved") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  LoraLinear<float> a = numbered_layer(W, 0);
  const char* message = "FlatParameters::pack: the layer 'b' was destroyed, or another assigned to it, after add()";
  {
    FlatParameters<float> flat;
    flat.add("a", a.parameters());
    {
      LoraLinear<float> b = numbered_layer(W, 1);
      flat.add("b", b.parameters());
    }
    CHECK_THROWS_WITH_AS(flat.pack(), message, ArgumentError);
    CHECK_FALSE(a.parameters().relocated());
    CHECK(test::same_bits(output_of(a, X), output_of(numbered_layer(W, 0), X)));
  }
  {
    FlatParameters<float> flat;
    LoraLinear<float> b = numbered_layer(W, 1);
    flat.add("b", b.parameters());
    b = numbered_layer(W, 2);
    CHECK_THROWS_WITH_AS(flat.pack(), message, ArgumentError);
  }
  {
    FlatParameters<float> one, two;
    one.add("a", a.parameters());
    two.add("x", a.parameters());
    two.pack();
    CHECK_THROWS_WITH_AS(one.pack(), "FlatParameters::pack: the layer 'a' was packed elsewhere, as 'x', after add()",
                         ArgumentError);
  }
}

TEST_CASE("a packed layer that is destroyed leaves its values; one that is replaced is not trained in silence") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  std::vector<LoraLinear<float>> layers;
  FlatParameters<float> flat;
  for (int i = 0; i < 3; ++i) {
    layers.emplace_back(numbered_layer(W, i));
    flat.add("l" + std::to_string(i), layers.back().parameters());
  }
  flat.pack();
  const float value = flat.values()[0];
  layers.erase(layers.begin());  // the others move up
  CHECK(flat.values()[0] == value);
  CHECK(lives_in(flat, "l1", layers[0], X));
  CHECK(lives_in(flat, "l2", layers[1], X));
  layers[0] = numbered_layer(W, 7);
  const char* rest =
      "after pack() the layer 'l1' was relocated or replaced by another, which is not in these blocks and "
      "would not be trained; pack anew";
  CHECK_THROWS_WITH_AS((void)flat.gradients(), (std::string("FlatParameters::gradients: ") + rest).c_str(),
                       ArgumentError);
  CHECK_THROWS_AS((void)flat.values(), ArgumentError);
  CHECK_THROWS_AS(flat.zero_gradients(), ArgumentError);
  CHECK(std::as_const(flat).values()[0] == value);
}

TEST_CASE("layers outlive the FlatParameters they were packed by") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  LoraLinear<float> a = numbered_layer(W, 0), b = numbered_layer(W, 1);
  const Matrix<float> before = output_of(a, X);
  std::optional<FlatParameters<float>> flat(std::in_place);
  flat->add("a", a.parameters());
  flat->add("b", b.parameters());
  flat->pack();
  FlatParameters<float> moved = std::move(*flat);
  flat.reset();
  CHECK(lives_in(moved, "a", a, X));
  moved = FlatParameters<float>();
  CHECK(test::same_bits(output_of(a, X), before));
  LoraLinear<float> c = std::move(a);
  CHECK(test::same_bits(output_of(c, X), before));
}

TEST_CASE("what was moved from is empty and says so") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2);
  LoraLinear<float> a(DenseBase<float>(W.view()), numbered_layer(W, 0).factors(), {.train_bias = true},
                      std::vector<float>(6, 1.F));
  FullLinear<float> full(W, std::vector<float>(6, 1.F));
  const LoraLinear<float> b = std::move(a);
  const FullLinear<float> full_too = std::move(full);
  CHECK(b.bias().size() == 6);
  // NOLINTBEGIN(bugprone-use-after-move): that is what this test is about
  CHECK(a.parameters().size() == 0);
  CHECK(a.parameters().values().empty());
  CHECK(a.parameters().table().empty());
  CHECK(a.parameters().name().empty());
  CHECK(a.bias().empty());
  CHECK(a.rank() == 0);
  CHECK(full.bias().empty());
  LoraWorkspace<float> ws;
  Matrix<float> Y(3, 6);
  CHECK_THROWS_WITH_AS(a.forward(X, Y, ws),
                       "LoraLinear::forward: this layer was moved from; use the one it was moved to", ArgumentError);
  CHECK_THROWS_AS(full.forward(X, Y, ws), ArgumentError);
  FlatParameters<float> flat;
  CHECK_THROWS_WITH_AS(flat.add("a", a.parameters()), "FlatParameters::add: 'a' is a layer that was moved from",
                       ArgumentError);
  // NOLINTEND(bugprone-use-after-move)
}

TEST_CASE("a workspace knows whose forward pass it holds, wherever that layer moves") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1), X = random_matrix<float>(3, 5, 2),
                      G = random_matrix<float>(3, 6, 3);
  LoraLinear<float> a = numbered_layer(W, 0), b = numbered_layer(W, 1);
  FlatParameters<float> flat;
  flat.add("layers.0.q_proj", a.parameters());
  flat.add("layers.1.q_proj", b.parameters());
  flat.pack();
  LoraWorkspace<float> ws;
  Matrix<float> Y(3, 6);
  a.forward(X, Y, ws);
  CHECK_THROWS_WITH_AS(b.backward(X, G, ws),
                       "LoraLinear::backward: the workspace holds a pass of 3 tokens through another layer "
                       "'layers.0.q_proj', this is 'layers.1.q_proj' a layer of 6x5 and rank 2; give each layer a "
                       "workspace of its own",
                       ArgumentError);
  for (const float g : std::as_const(b).parameters().gradients()) CHECK(g == 0);
  LoraLinear<float> moved = std::move(a);
  CHECK_NOTHROW(moved.backward(X, G, ws));
  b.forward(X, Y, ws);  // any layer may take a workspace over
  CHECK_NOTHROW(b.backward(X, G, ws));
  {
    LoraLinear<float> gone = numbered_layer(W, 2);
    gone.forward(X, Y, ws);
  }
  LoraLinear<float> late = numbered_layer(W, 3);  // perhaps at the very address
  CHECK_THROWS_AS(late.backward(X, G, ws), ArgumentError);
  lora_forward<float>(b.base(), b.A(), b.B(), b.scale(), X.view(), Y.view(), ws);  // nobody's, as far as b can know
  CHECK_THROWS_AS(b.backward(X, G, ws), ArgumentError);

  DoraLinear<float> c(DenseBase<float>(W.view()), late.factors()), d(DenseBase<float>(W.view()), late.factors());
  DoraWorkspace<float> wd;
  c.forward(X, Y, wd);
  CHECK_THROWS_AS(d.backward(X, G, wd), ArgumentError);
  CHECK_NOTHROW(c.backward(X, G, wd));

  LoraEmbedding<float> e(DenseBase<float>(W.view()), {random_matrix<float>(2, 6, 4), random_matrix<float>(5, 2, 5), 1});
  LoraEmbedding<float> f(DenseBase<float>(W.view()), {random_matrix<float>(2, 6, 4), random_matrix<float>(5, 2, 5), 1});
  const std::vector<std::int32_t> ids{3, 0, 3};
  Matrix<float> E(3, 5);
  e.forward(ids, E, ws);
  CHECK_THROWS_AS(f.backward(ids, E, ws), ArgumentError);
  CHECK_NOTHROW(e.backward(ids, E, ws));
}

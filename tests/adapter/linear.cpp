// FrozenLinear and FullLinear: the same interface, gradients by finite differences, W untouched where it is frozen.
#include "lowrank/adapter/linear.hpp"

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace lowrank;
using test::random_matrix;

TEST_CASE("FullLinear: gradients agree with finite differences") {
  const Matrix<double> W = random_matrix<double>(4, 5, 1), C = random_matrix<double>(6, 4, 3);
  Matrix<double> X = random_matrix<double>(6, 5, 2), Y(6, 4), dX(6, 5);
  FullLinear<double> layer(W, {0.1, -0.2, 0.3, 0.4});
  LoraWorkspace<double> ws;
  const auto loss = [&] {
    layer.forward(X, Y, ws);
    double sum = 0;
    for (Index i = 0; i < Y.size(); ++i) sum += C.data()[i] * Y.data()[i];
    return sum;
  };
  layer.backward(X, C, ws, dX, {.gradients = Update::assign});
  const auto numeric = [&](double& x) { return test::central_difference(x, loss); };
  const auto values = layer.parameters().values();
  for (std::size_t i = 0; i < values.size(); ++i)
    CHECK(numeric(values[i]) == doctest::Approx(layer.parameters().gradients()[i]).epsilon(1e-8).scale(10));
  for (Index i = 0; i < X.size(); ++i)
    CHECK(numeric(X.data()[i]) == doctest::Approx(dX.data()[i]).epsilon(1e-8).scale(10));
  CHECK(layer.parameters().table()[0].name == "weight");
  CHECK(layer.parameters().table()[1].name == "bias");
}

TEST_CASE("FullLinear starts from two-byte storage and any order") {
  const Matrix<bf16> W(random_matrix<float>(4, 5, 1).view());
  FullLinear<float> a(W), b(W.view().transposed());
  for (Index i = 0; i < 4; ++i)
    for (Index j = 0; j < 5; ++j) {
      CHECK(a.weight()(i, j) == float(W(i, j)));
      CHECK(b.weight()(j, i) == float(W(i, j)));
    }
}

TEST_CASE("FrozenLinear gives the product, has no parameters and never touches W") {
  const Matrix<double> W = random_matrix<double>(4, 5, 1), X = random_matrix<double>(6, 5, 2),
                       G = random_matrix<double>(6, 4, 3);
  const Matrix<double> before(W.view());
  FrozenLinear<double> layer{DenseBase<double>(W.view()), {1, 2, 3, 4}};
  LoraWorkspace<double> ws;
  Matrix<double> Y(6, 4), dX(6, 5);
  layer.forward(X, Y, ws);
  layer.backward(X, G, ws, dX);
  layer.backward(X, G, ws);
  CHECK(layer.parameters().size() == 0);
  CHECK(test::same_bits(W, before));
  double y = 3, dx = 0;
  for (Index i = 0; i < 5; ++i) y += X(5, i) * W(2, i);
  for (Index o = 0; o < 4; ++o) dx += G(5, o) * W(o, 3);
  CHECK(Y(5, 2) == doctest::Approx(y));
  CHECK(dX(5, 3) == doctest::Approx(dx));
  CHECK_THROWS_AS(FrozenLinear<double>(DenseBase<double>(W.view()), {1, 2}), ShapeError);
  CHECK_THROWS_AS(FullLinear<double>(W, {1, 2}), ShapeError);
}

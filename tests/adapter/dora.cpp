// DoraLinear: PyTorch's figures, the start as LoRA, norms without the dense product.
#include "lowrank/adapter/dora.hpp"

#include <doctest/doctest.h>

#include "lowrank/adapter/merge.hpp"
#include "support/compare.hpp"
#include "support/fixture.hpp"

using namespace lowrank;
using test::deviation;
using test::random_matrix;
using test::rounding;

TEST_CASE("one DoRA step is PyTorch's") {
  const test::Fixture fx("lora_step.txt");
  DoraLinear<double> layer(
      DenseBase<double>(fx["W"].view()),
      LoraFactors<double>{Matrix<double>(fx["doraA"].view()), Matrix<double>(fx["doraB"].view()), lora_scale(5.0, 3)},
      {}, std::vector<double>(fx["doram"].data(), fx["doram"].data() + 9));
  DoraWorkspace<double> ws;
  Matrix<double> Y(7, 9), dX(7, 10);
  layer.forward(fx["doraX"], Y, ws);
  CHECK(deviation(Y, fx["doraY"]) < rounding<double>(60));
  layer.backward(fx["doraX"], fx["doraG"], ws, dX, {.gradients = Update::assign});
  CHECK(deviation(dX, fx["dora_dX"]) < rounding<double>(120));
  CHECK(deviation(layer.parameters().gradient(0), fx["dora_dA"]) < rounding<double>(120));
  CHECK(deviation(layer.parameters().gradient(1), fx["dora_dB"]) < rounding<double>(120));
  CHECK(deviation(layer.parameters().gradient(2), fx["dora_dm"]) < rounding<double>(120));
}

TEST_CASE_TEMPLATE("it starts as LoRA does, for dense and narrow bases", T, float, double) {
  const Matrix<T> W = random_matrix<T>(40, 30, 1), X = random_matrix<T>(20, 30, 2), G = random_matrix<T>(20, 40, 3);
  const LoraFactors<T> f{random_matrix<T>(5, 30, 4), random_matrix<T>(40, 5, 5), T(0.7)};
  DoraLinear<T> dora(DenseBase<T>(W.view()), f);
  LoraLinear<T> lora(DenseBase<T>(W.view()), f);
  DoraWorkspace<T> wd;
  LoraWorkspace<T> wl;
  Matrix<T> yd(20, 40), yl(20, 40), dd(20, 30), dl(20, 30);
  dora.forward(X, yd, wd);
  lora.forward(X, yl, wl);
  CHECK(deviation(yd, yl) < rounding<T>(40));
  dora.backward(X, G, wd, dd);
  lora.backward(X, G, wl, dl);
  CHECK(deviation(dd, dl) < rounding<T>(60));
  // The magnitudes are the row norms of the merged weight.
  const Matrix<T> merged = merged_weight<T>(W, f);
  for (Index j = 0; j < 40; ++j) {
    double square = 0;
    for (Index i = 0; i < 30; ++i) square += double(merged(j, i)) * double(merged(j, i));
    CHECK(double(dora.magnitude()(0, j)) == doctest::Approx(std::sqrt(square)).epsilon(rounding<T>(60)));
  }
}

TEST_CASE("norms follow the factors in training and stand still in eval") {
  const Matrix<float> W = random_matrix<float>(8, 6, 1), X = random_matrix<float>(5, 6, 2);
  DoraLinear<float> layer(DenseBase<float>(W.view()),
                          {random_matrix<float>(2, 6, 4), random_matrix<float>(8, 2, 5), 2.F});
  DoraWorkspace<float> ws;
  Matrix<float> a(5, 8), b(5, 8), c(5, 8);
  layer.B()(3, 1) += 5;
  layer.forward(X, a, ws, Phase::eval);
  layer.forward(X, b, ws, Phase::train);
  layer.forward(X, c, ws, Phase::eval);
  CHECK_FALSE(test::same_bits(a, b));
  CHECK(test::same_bits(b, c));
}

TEST_CASE("bad input") {
  const Matrix<float> W = random_matrix<float>(8, 6, 1);
  const LoraFactors<float> f{random_matrix<float>(2, 6, 4), random_matrix<float>(8, 2, 5), 2.F};
  CHECK_THROWS_AS(DoraLinear<float>(DenseBase<float>(W.view()), f, {}, std::vector<float>(7)), ShapeError);
  CHECK_THROWS_AS(DoraLinear<float>(DenseBase<float>(W.view()), f, {.train_bias = true}), ArgumentError);
  CHECK_THROWS_AS(DoraLinear<float>(DenseBase<float>(W.view()), f, {.dropout = 1}), ArgumentError);
  DoraLinear<float> layer(DenseBase<float>(W.view()), f);
  DoraWorkspace<float> ws;
  Matrix<float> X(3, 6), Y(3, 8), wrong(3, 7);
  CHECK_THROWS_AS(layer.backward(X, Y, ws), ArgumentError);
  CHECK_THROWS_AS(layer.forward(X, wrong, ws), ShapeError);
}

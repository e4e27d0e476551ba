// DoraLinear: PyTorch's figures, the start as LoRA, norms without the dense product.
#include "lowrank/adapter/dora.hpp"

#include <doctest/doctest.h>

#include "lowrank/adapter/merge.hpp"
#include "lowrank/adapter/parameters.hpp"
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

TEST_CASE("evaluation uses the factors as they are, whoever changed them") {
  const Matrix<float> W = random_matrix<float>(8, 6, 1), X = random_matrix<float>(5, 6, 2),
                      G = random_matrix<float>(5, 8, 3);
  const LoraFactors<float> f{random_matrix<float>(2, 6, 4), random_matrix<float>(8, 2, 5), 2.F};
  DoraLinear<float> layer(DenseBase<float>(W.view()), f);
  FlatParameters<float> flat;
  flat.add("d", layer.parameters());
  flat.pack();
  DoraWorkspace<float> ws;
  Matrix<float> Y(5, 8);
  // The oracle: the merged weight, row by row in double, from what the parameters hold.
  const auto expect_right = [&](Phase phase) {
    layer.forward(X, Y, ws, phase);
    const Matrix<double> A(layer.A()), B(layer.B());
    Matrix<double> want(5, 8);
    for (Index i = 0; i < 8; ++i) {
      std::vector<double> row(6);
      double square = 0;
      for (Index j = 0; j < 6; ++j) {
        double w = double(W(i, j));
        for (Index k = 0; k < 2; ++k) w += double(layer.scale()) * B(i, k) * A(k, j);
        row[std::size_t(j)] = w;
        square += w * w;
      }
      for (Index t = 0; t < 5; ++t)
        for (Index j = 0; j < 6; ++j)
          want(t, i) += double(layer.magnitude()(0, i)) / std::sqrt(square) * row[std::size_t(j)] * double(X(t, j));
    }
    CHECK(deviation(Y, want) < rounding<float>(60));
  };
  expect_right(Phase::eval);
  layer.B()(3, 1) += 5;  // by hand
  expect_right(Phase::eval);
  layer.forward(X, Y, ws);
  layer.backward(X, G, ws);
  for (std::size_t i = 0; i < flat.values().size(); ++i) flat.values()[i] -= 0.1F * flat.gradients()[i];  // a step
  expect_right(Phase::eval);
  for (float& x : layer.parameters().values()) x *= 1.25F;  // a checkpoint read into the block
  expect_right(Phase::eval);
  layer.set_factors({{f.A, f.B, -0.5F}, std::vector<float>(8, 3.F)});  // another scale, and magnitudes
  expect_right(Phase::eval);
  expect_right(Phase::train);
  // Another layer's norms, whatever the factors: here the very same on another base.
  const Matrix<float> V = random_matrix<float>(8, 6, 9);
  DoraLinear<float> other(DenseBase<float>(V.view()), f), alone(DenseBase<float>(V.view()), f);
  DoraLinear<float> same(DenseBase<float>(W.view()), f);
  DoraWorkspace<float> shared, own;
  Matrix<float> a(5, 8), b(5, 8);
  same.forward(X, a, shared);
  other.forward(X, a, shared, Phase::eval);
  alone.forward(X, b, own, Phase::eval);
  CHECK(test::same_bits(a, b));
}

TEST_CASE_TEMPLATE("a merged DoRA weight is what the layer computes, in every storage", S, float, bf16, f16) {
  const Matrix<float> wide = random_matrix<float>(9, 7, 1), X = random_matrix<float>(4, 7, 2);
  const Matrix<S> W(wide);
  DoraFactors<float> f{{random_matrix<float>(3, 7, 3), random_matrix<float>(9, 3, 4), 1.75F}, std::vector<float>(9)};
  for (std::size_t i = 0; i < 9; ++i) f.magnitude[i] = 0.5F + 0.25F * float(i);
  DoraLinear<float, DenseBase<float, S>> layer(DenseBase<float, S>(W.view()), f.lora, {}, f.magnitude);
  CHECK(test::same_bits(layer.factors().lora.B, f.lora.B));
  CHECK(layer.factors().magnitude == f.magnitude);
  DoraWorkspace<float> ws;
  Matrix<float> unmerged(4, 9), merged(4, 9);
  layer.forward(X, unmerged, ws, Phase::eval);
  const Matrix<float> M = merged_weight<float>(W, layer.factors());
  DenseBase<float>(M.view()).forward(X.view(), merged.view());
  CHECK(deviation(merged, unmerged) < rounding<float>(60));

  // Rows have the magnitudes for norms, and dora_row_norms are those of W + s·B·A.
  const Matrix<float> sum = merged_weight<float>(W, f.lora);
  const std::vector<double> norms = dora_row_norms<float>(W, f.lora), of_layer = layer.row_norms();
  for (Index i = 0; i < 9; ++i) {
    double m = 0, n = 0;
    for (Index j = 0; j < 7; ++j) {
      m += double(M(i, j)) * double(M(i, j));
      n += double(sum(i, j)) * double(sum(i, j));
    }
    CHECK(std::sqrt(m) == doctest::Approx(double(f.magnitude[std::size_t(i)])).epsilon(rounding<float>(20)));
    CHECK(norms[std::size_t(i)] == doctest::Approx(std::sqrt(n)).epsilon(rounding<float>(20)));
    CHECK(of_layer[std::size_t(i)] == doctest::Approx(std::sqrt(n)).epsilon(rounding<float>(60)));
  }

  // In place, and out again to the bit; the report is of the whole change.
  Matrix<S> stored(W);
  MergedWeight<S> in_place = merge_into<float>(stored, f);
  for (Index i = 0; i < stored.size(); ++i) CHECK(double(stored.data()[i]) == double(S(M.data()[i])));
  in_place.restore();
  CHECK(test::same_bits(stored, W));
  const MergeReport report = checked_merge<float>(stored, f);
  double intended = 0, effective = 0;
  for (Index i = 0; i < stored.size(); ++i) {
    CHECK(double(stored.data()[i]) == double(S(M.data()[i])));
    intended += std::pow(double(M.data()[i]) - double(W.data()[i]), 2);
    effective += std::pow(double(stored.data()[i]) - double(W.data()[i]), 2);
  }
  CHECK(report.intended_norm == doctest::Approx(std::sqrt(intended)).epsilon(rounding<float>(60)));
  CHECK(report.effective_norm == doctest::Approx(std::sqrt(effective)).epsilon(1e-12));
  CHECK(report.correlation > 0.99);
}

TEST_CASE("DoRA merges that are refused leave the weight alone; a row of zeros stays") {
  Matrix<float> wide = random_matrix<float>(5, 6, 1);
  DoraFactors<float> f{{random_matrix<float>(2, 6, 3), random_matrix<float>(5, 2, 4), 1.F}, std::vector<float>(5, 2.F)};
  for (Index j = 0; j < 6; ++j) wide(1, j) = 0;
  for (Index k = 0; k < 2; ++k) f.lora.B(1, k) = 0;
  const Matrix<float> M = merged_weight<float>(wide, f);
  for (Index j = 0; j < 6; ++j) CHECK(M(1, j) == 0);

  // An update far below half a bf16 step: all of it is lost.
  Matrix<bf16> W(wide);
  const std::vector<double> norms = dora_row_norms<float>(W, LoraFactors<float>{f.lora.A, f.lora.B, 0.F});
  DoraFactors<float> tiny{{f.lora.A, f.lora.B, 1e-6F}, {}};
  for (const double n : norms) tiny.magnitude.push_back(float(n));
  const Matrix<bf16> before(W);
  CHECK_THROWS_AS(checked_merge<float>(W, tiny), MergeRefused);
  CHECK(test::same_bits(W, before));
  CHECK(merge_report<float>(W, tiny).suggestion == "float, or keep the adapter apart");
  CHECK_NOTHROW(checked_merge<float>(W, tiny, {.allow_lossy = true}));

  f.magnitude[2] = 1e6F;  // beyond f16
  Matrix<f16> H(wide);
  const Matrix<f16> kept(H);
  CHECK_THROWS_AS(merge_into<float>(H, f), ArgumentError);
  CHECK_THROWS_AS(checked_merge<float>(H, f), NonFiniteError);
  CHECK(test::same_bits(H, kept));
  f.magnitude.pop_back();
  CHECK_THROWS_AS((void)merged_weight<float>(wide, f), ShapeError);
  CHECK_THROWS_AS((void)merge_report<float>(wide, f), ShapeError);
  CHECK_THROWS_AS((void)dora_row_norms<float>(wide.view().middle_rows(0, 4), f.lora), ShapeError);
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

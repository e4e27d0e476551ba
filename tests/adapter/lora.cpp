// LoraLinear: PyTorch's figures, finite differences, merged = unmerged, every order, storage, option and bad input.
#include "lowrank/adapter/lora.hpp"

#include <doctest/doctest.h>

#include "lowrank/adapter/linear.hpp"
#include "lowrank/adapter/merge.hpp"
#include "support/capture.hpp"
#include "support/compare.hpp"
#include "support/fixture.hpp"

using namespace lowrank;
using test::deviation;
using test::random_matrix;
using test::rounding;

namespace {

template <class T>
LoraFactors<T> random_factors(Index out, Index in, Index r, std::uint64_t seed, double scale = 1.75) {
  return {random_matrix<T>(r, in, seed), random_matrix<T>(out, r, seed + 1), T(scale)};
}

/// The matrix copied into another order with a gap after each row or column; the view reads the same numbers.
template <class T>
struct Strided {
  Buffer<T> memory;
  MatrixView<T> view;
  Strided(const Matrix<T>& m, Order order) : memory((m.rows() + 3) * (m.cols() + 3)) {
    for (T& x : memory) x = std::numeric_limits<T>::quiet_NaN();  // a gap that is read shows
    view = order == Order::row_major ? view_of(memory.data(), m.rows(), m.cols(), order, m.cols() + 3)
                                     : view_of(memory.data(), m.rows(), m.cols(), order, m.rows() + 2);
    for (Index i = 0; i < m.rows(); ++i)
      for (Index j = 0; j < m.cols(); ++j) view(i, j) = m(i, j);
  }
};

template <class T>
Matrix<T> naive_forward(const Matrix<T>& W, const LoraFactors<T>& f, const Matrix<T>& X) {
  Matrix<T> Y(X.rows(), W.rows());
  for (Index t = 0; t < X.rows(); ++t)
    for (Index o = 0; o < W.rows(); ++o) {
      double y = 0;
      for (Index i = 0; i < W.cols(); ++i) y += double(X(t, i)) * double(W(o, i));
      for (Index k = 0; k < f.rank(); ++k) {
        double xa = 0;
        for (Index i = 0; i < W.cols(); ++i) xa += double(X(t, i)) * double(f.A(k, i));
        y += double(f.scale) * xa * double(f.B(o, k));
      }
      Y(t, o) = T(y);
    }
  return Y;
}

}  // namespace

TEST_CASE("one LoRA step is PyTorch's") {
  const test::Fixture fx("lora_step.txt");
  const std::vector<double> bias(fx["bias"].data(), fx["bias"].data() + 9);
  LoraLinear<double> layer(
      DenseBase<double>(fx["W"].view()),
      LoraFactors<double>{Matrix<double>(fx["A"].view()), Matrix<double>(fx["B"].view()), lora_scale(5.0, 3)},
      {.train_bias = true}, bias);
  LoraWorkspace<double> ws;
  Matrix<double> Y(7, 9), G(7, 9), dX(7, 10);
  layer.forward(fx["X"], Y, ws);
  CHECK(deviation(Y, fx["Y"]) < rounding<double>(30));
  for (Index i = 0; i < G.size(); ++i) G.data()[i] = Y.data()[i] - fx["target"].data()[i];
  layer.backward(fx["X"], G, ws, dX, {.gradients = Update::assign});
  CHECK(deviation(dX, fx["dX"]) < rounding<double>(60));
  CHECK(deviation(layer.parameters().gradient(0), fx["dA"]) < rounding<double>(60));
  CHECK(deviation(layer.parameters().gradient(1), fx["dB"]) < rounding<double>(60));
  CHECK(deviation(layer.parameters().gradient(2), fx["dbias"]) < rounding<double>(60));
}

TEST_CASE("gradients agree with finite differences") {
  // L = Σ C∘Y is quadratic in any one entry's perturbation at most, so central differences are exact up to rounding:
  // error about eps·|L|/h with h = 1e-5.
  const Index tokens = 6, in = 8, out = 7, r = 3;
  for (const double dropout : {0.0, 0.4}) {
    CAPTURE(dropout);
    Matrix<double> W = random_matrix<double>(out, in, 1), X = random_matrix<double>(tokens, in, 2);
    const Matrix<double> C = random_matrix<double>(tokens, out, 3);
    LoraLinear<double> layer(DenseBase<double>(W.view()), random_factors<double>(out, in, r, 4, 5.0 / 3),
                             {.dropout = dropout, .seed = 9, .train_bias = true}, std::vector<double>(out, 0.5));
    LoraWorkspace<double> ws;
    Matrix<double> Y(tokens, out), dX(tokens, in);
    const auto loss = [&] {
      ws.call = 41;  // the same mask every time
      layer.forward(X, Y, ws);
      double sum = 0;
      for (Index i = 0; i < Y.size(); ++i) sum += C.data()[i] * Y.data()[i];
      return sum;
    };
    loss();
    layer.backward(X, C, ws, dX, {.gradients = Update::assign});
    const auto numeric = [&](double& x) { return test::central_difference(x, loss); };
    const auto values = layer.parameters().values();
    for (std::size_t i = 0; i < values.size(); ++i)
      CHECK(numeric(values[i]) == doctest::Approx(layer.parameters().gradients()[i]).epsilon(1e-8).scale(10));
    for (Index i = 0; i < X.size(); ++i)
      CHECK(numeric(X.data()[i]) == doctest::Approx(dX.data()[i]).epsilon(1e-8).scale(10));
  }
}

TEST_CASE_TEMPLATE("every order of X, W, Y, G and dX gives the same answer", T, float, double) {
  for (const auto& [tokens, in, out, r] : {std::array<Index, 4>{1, 5, 4, 2},
                                           {3, 1, 1, 1},
                                           {4, 17, 33, 4},
                                           {37, 40, 30, 30},
                                           {0, 6, 5, 2},
                                           {65, 300, 31, 16}}) {
    CAPTURE_BOUND(tokens);
    const Matrix<T> W = random_matrix<T>(out, in, 1), X = random_matrix<T>(tokens, in, 2),
                    G = random_matrix<T>(tokens, out, 3);
    const LoraFactors<T> f = random_factors<T>(out, in, r, 4, 0.3);
    const Matrix<T> expected = naive_forward(W, f, X);
    Matrix<T> first_dX, first_dA;
    for (int orders = 0; orders < 32; ++orders) {
      const auto order = [&](int bit) { return (orders >> bit) & 1 ? Order::col_major : Order::row_major; };
      Strided<T> w(W, order(0)), x(X, order(1)), y(Matrix<T>(tokens, out), order(2)), g(G, order(3)),
          dx(Matrix<T>(tokens, in), order(4));
      LoraLinear<T> layer(DenseBase<T>(w.view), f);
      LoraWorkspace<T> ws;
      layer.forward(x.view, y.view, ws);
      // Sums of in + r products of size about |x||w|, compared relative to the largest output.
      CHECK(deviation(y.view, expected) < rounding<T>(double(in + r)));
      layer.backward(x.view, g.view, ws, dx.view, {.gradients = Update::assign});
      if (orders == 0) {
        first_dX.assign(dx.view);
        first_dA.assign(layer.parameters().gradient(0));
      }
      CHECK(deviation(dx.view, first_dX) < rounding<T>(double(out + r)));
      CHECK(deviation(layer.parameters().gradient(0), first_dA) < rounding<T>(double(tokens + out)));
    }
  }
}

TEST_CASE_TEMPLATE("merged and unmerged forward agree", T, float, double) {
  for (const Index tokens : {Index(2), Index(50)}) {
    const Index in = 70, out = 45, r = 12;
    const Matrix<T> W = random_matrix<T>(out, in, 1), X = random_matrix<T>(tokens, in, 2);
    const LoraFactors<T> f = random_factors<T>(out, in, r, 5, lora_scale(7, r));
    LoraLinear<T> layer(DenseBase<T>(W.view()), f);
    LoraWorkspace<T> ws;
    Matrix<T> Y(tokens, out), merged(tokens, out);
    layer.forward(X, Y, ws);
    DenseBase<T>(merged_weight<T>(W, layer.factors())).forward(X.view(), merged.view());
    CHECK(deviation(Y, merged) < rounding<T>(double(in + r)));
    CHECK(deviation(Y, naive_forward(W, f, X)) < rounding<T>(double(in + r)));
  }
}

TEST_CASE("a bf16 or f16 base gives what its widened copy gives, bit for bit") {
  const Index in = 100, out = 60;
  const Matrix<float> X = random_matrix<float>(33, in, 2), G = random_matrix<float>(33, out, 3);
  const LoraFactors<float> f = random_factors<float>(out, in, 8, 4);
  const auto run = [&]<class S>(const Matrix<S>& narrow) {
    const Matrix<float> wide(narrow.view());
    LoraLinear<float, DenseBase<float, S>> a(DenseBase<float, S>(narrow.view()), f);
    LoraLinear<float> b(DenseBase<float>(wide.view()), f);
    LoraWorkspace<float> wa, wb;
    Matrix<float> ya(33, out), yb(33, out), da(33, in), db(33, in);
    a.forward(X, ya, wa);
    b.forward(X, yb, wb);
    a.backward(X, G, wa, da);
    b.backward(X, G, wb, db);
#if defined(LOWRANK_USE_BLAS)  // the dense product is BLAS', the narrow one ours: equal up to rounding only
    CHECK(deviation(ya, yb) < rounding<float>(100));
    CHECK(deviation(da, db) < rounding<float>(100));
#else
    CHECK(test::same_bits(ya, yb));
    CHECK(test::same_bits(da, db));
#endif
  };
  run(Matrix<bf16>(random_matrix<float>(out, in, 7).view()));
  run(Matrix<f16>(random_matrix<float>(out, in, 8).view()));
}

TEST_CASE("gradients accumulate or are assigned, dX likewise, and dX may take X's place") {
  const Index tokens = 20, in = 30, out = 25;
  const Matrix<double> W = random_matrix<double>(out, in, 1), G = random_matrix<double>(tokens, out, 3);
  Matrix<double> X = random_matrix<double>(tokens, in, 2), Y(tokens, out), dX(tokens, in);
  LoraLinear<double> layer(DenseBase<double>(W.view()), random_factors<double>(out, in, 4, 5));
  LoraWorkspace<double> ws;
  layer.forward(X, Y, ws);
  layer.backward(X, G, ws, dX, {.gradients = Update::assign});
  const std::vector<double> once(layer.parameters().gradients().begin(), layer.parameters().gradients().end());
  Matrix<double> twice(dX);
  layer.backward(X, G, ws, twice, {.gradients = Update::accumulate, .dx = Update::accumulate});
  for (std::size_t i = 0; i < once.size(); ++i)
    CHECK(layer.parameters().gradients()[i] == doctest::Approx(2 * once[i]));
  for (Index i = 0; i < dX.size(); ++i) CHECK(twice.data()[i] == doctest::Approx(2 * dX.data()[i]));
  layer.backward(X, G, ws, {.gradients = Update::assign});  // no dX
  CHECK(std::equal(once.begin(), once.end(), layer.parameters().gradients().begin()));
  layer.backward(X, G, ws, X, {.gradients = Update::assign});  // in place
  CHECK(std::equal(once.begin(), once.end(), layer.parameters().gradients().begin()));
  CHECK(test::same_bits(X, dX));
}

TEST_CASE("dropout acts in training only, drops its share, and leaves the frozen path alone") {
  const Index tokens = 400, in = 101, out = 30;
  const Matrix<float> W(out, in);  // zero: only the low-rank path speaks
  Matrix<float> X(tokens, in), Y(tokens, out), Z(tokens, out);
  std::fill(X.data(), X.data() + X.size(), 1.0F);
  LoraFactors<float> f = random_factors<float>(out, in, 1, 5);
  std::fill(f.A.data(), f.A.data() + in, 1.0F);
  LoraLinear<float> layer(DenseBase<float>(W.view()), f, {.dropout = 0.25, .seed = 3});
  LoraWorkspace<float> ws;
  layer.forward(X, Y, ws);
  Index kept = 0;
  for (Index i = 0; i < X.size(); ++i) {
    const double x = ws.dropped.data()[i];
    const bool valid = x == 0 || x == doctest::Approx(4.0 / 3);
    REQUIRE(valid);
    kept += x != 0;
  }
  // Binomial(40400, 0.75): five standard deviations.
  CHECK(std::abs(double(kept) - 0.75 * double(X.size())) < 5 * std::sqrt(double(X.size()) * 0.75 * 0.25));
  layer.forward(X, Z, ws);
  CHECK_FALSE(test::same_bits(Y, Z));  // a new mask
  ws.call = 0;
  layer.forward(X, Z, ws);
  CHECK(test::same_bits(Y, Z));  // the first mask again
  layer.forward(X, Z, ws, Phase::eval);
  for (Index t = 0; t < tokens; ++t) CHECK(Z(t, 0) == doctest::Approx(f.scale * float(in) * f.B(0, 0)));
}

TEST_CASE("the same seed gives the same bits for any number of threads") {
  const Index tokens = 130, in = 257, out = 140;
  const Matrix<float> W = random_matrix<float>(out, in, 1), X = random_matrix<float>(tokens, in, 2),
                      G = random_matrix<float>(tokens, out, 3);
  std::vector<Matrix<float>> results;
  for ([[maybe_unused]] const int threads : {1, 2, 3}) {
#if defined(_OPENMP)
    omp_set_num_threads(threads);
#endif
    LoraLinear<float> layer(DenseBase<float>(W.view()), random_factors<float>(out, in, 9, 4),
                            {.dropout = 0.1, .seed = 5});
    LoraWorkspace<float> ws;
    Matrix<float> Y(tokens, out), dX(tokens, in);
    layer.forward(X, Y, ws);
    layer.backward(X, G, ws, dX);
    results.push_back(std::move(Y));
    results.push_back(std::move(dX));
    results.emplace_back(layer.parameters().gradient(0));
    results.emplace_back(layer.parameters().gradient(1));
  }
#if defined(_OPENMP)
  omp_set_num_threads(omp_get_num_procs());
#endif
  for (std::size_t i = 4; i < results.size(); ++i) CHECK(test::same_bits(results[i], results[i % 4]));
}

TEST_CASE("one layer serves several forward passes at a time") {
  const Matrix<double> W = random_matrix<double>(6, 5, 1);
  LoraLinear<double> layer(DenseBase<double>(W.view()), random_factors<double>(6, 5, 2, 4));
  const Matrix<double> X1 = random_matrix<double>(4, 5, 2), X2 = random_matrix<double>(9, 5, 3),
                       G1 = random_matrix<double>(4, 6, 5), G2 = random_matrix<double>(9, 6, 6);
  LoraWorkspace<double> w1, w2;
  Matrix<double> y1(4, 6), y2(9, 6), d1(4, 5), d2(9, 5), alone(4, 5);
  layer.forward(X1, y1, w1);
  layer.backward(X1, G1, w1, alone, {.gradients = Update::assign});
  layer.forward(X1, y1, w1);
  layer.forward(X2, y2, w2);
  layer.backward(X2, G2, w2, d2);
  layer.backward(X1, G1, w1, d1);
  CHECK(test::same_bits(d1, alone));
}

TEST_CASE("bad input is refused with what was expected and what came") {
  const Matrix<float> W = random_matrix<float>(6, 5, 1);
  const auto base = [&] { return DenseBase<float>(W.view()); };
  const auto make = [&](Index out, Index in, Index r, LoraLinearOptions o = {}) {
    return LoraLinear<float>(base(), random_factors<float>(out, in, r, 4), o);
  };
  CHECK_THROWS_WITH_AS(make(6, 5, 0), "LoraLinear: rank must lie in [1, min(6, 5)], got 0", ArgumentError);
  CHECK_THROWS_AS(make(6, 5, 6), ArgumentError);
  CHECK_THROWS_WITH_AS(make(6, 4, 2), "LoraLinear: A must be 2x5, got 2x4", ShapeError);
  CHECK_THROWS_AS(make(7, 5, 2), ShapeError);
  for (const double p : {-0.1, 1.0, 1.5, double(NAN)}) CHECK_THROWS_AS(make(6, 5, 2, {.dropout = p}), ArgumentError);
  LoraFactors<float> f = random_factors<float>(6, 5, 2, 4);
  f.scale = INFINITY;
  CHECK_THROWS_AS(LoraLinear<float>(base(), f), ArgumentError);
  f.scale = 1;
  CHECK_THROWS_AS(LoraLinear<float>(base(), f, {}, std::vector<float>(5)), ShapeError);
  for (const double alpha : {0.0, -1.0, double(INFINITY), double(NAN)}) {
    CHECK_THROWS_AS((void)lora_scale(alpha, 4), ArgumentError);
    CHECK_THROWS_AS((void)rslora_scale(alpha, 4), ArgumentError);
  }
  CHECK_THROWS_AS((void)lora_scale(8, 0), ArgumentError);
  CHECK(rslora_scale(8, 16) == 2.0);
  CHECK(lora_scale(8, 16) == 0.5);

  LoraLinear<float> layer(base(), f);
  LoraWorkspace<float> ws;
  Matrix<float> X = random_matrix<float>(3, 5, 2), Y(3, 6), wide(3, 7), dX(3, 5);
  CHECK_THROWS_WITH_AS(layer.forward(wide, Y, ws), "LoraLinear::forward: X must be 3x5, got 3x7", ShapeError);
  CHECK_THROWS_WITH_AS(layer.forward(X, wide, ws), "LoraLinear::forward: Y must be 3x6, got 3x7", ShapeError);
  CHECK_THROWS_AS(layer.backward(X, Y, ws, dX), ArgumentError);  // no forward yet
  layer.forward(X, Y, ws);
  CHECK_THROWS_AS(layer.backward(X, Y, ws, wide), ShapeError);
  const Matrix<float> fewer = random_matrix<float>(2, 5, 2);
  CHECK_THROWS_AS(layer.backward(fewer, Y, ws, dX), ShapeError);
  CHECK_THROWS_AS(layer.backward(fewer.view(), Y.view().middle_rows(0, 2), ws, dX.view().middle_rows(0, 2)),
                  ArgumentError);  // the workspace holds three tokens
  Buffer<float> shared(3 * 11);
  const auto y = view_of(shared.data(), 3, 6), overlapping = view_of(shared.data() + 10, 3, 5);
  std::fill(shared.begin(), shared.end(), 0.F);
  CHECK_THROWS_AS(layer.forward(overlapping, y, ws), ArgumentError);
  CHECK_THROWS_AS(layer.backward(X, y, ws, overlapping), ArgumentError);
}

// SPDX-License-Identifier: Apache-2.0
// Products with codes against products with the values they stand for, in double; rows; QLoRA layers and their
// gradients.
#include <doctest/doctest.h>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/quant/quantise.hpp"
#include "support/capture.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

static_assert(PackableBase<QuantisedMatrix<float>, float>);
static_assert(PackableBase<QuantisedMatrix<double>, double>);
static_assert(!FrozenBase<QuantisedMatrix<float>, double>);

/// The largest deviation of `got` from initial + P·Q (or P·Qᵀ) in double, in units of the sum of the magnitudes added:
/// what rounding errors are proportional to.
template <class Got, class T>
double product_error(Got&& got, const Matrix<T>& p, const Matrix<double>& q, bool transpose_q,
                     const Matrix<T>& initial) {
  const auto c = view_of(got);
  double worst = 0;
  for (Index i = 0; i < c.rows(); ++i)
    for (Index j = 0; j < c.cols(); ++j) {
      double sum = initial.empty() ? 0.0 : double(initial(i, j)), size = std::abs(sum);
      for (Index k = 0; k < p.cols(); ++k) {
        const double term = double(p(i, k)) * (transpose_q ? q(j, k) : q(k, j));
        sum += term;
        size += std::abs(term);
      }
      const double error = std::abs(double(c(i, j)) - sum);
      worst = std::max(worst, std::isfinite(error) ? (size > 0 ? error / size : error) : INFINITY);
    }
  return worst;
}

template <class T>
Matrix<double> widened(const QuantisedMatrix<T>& q) {
  const Matrix<T> values = q.dequantise();
  return Matrix<double>(values);
}

std::vector<QuantiseOptions> kinds() {
  return {{},
          {.double_quantise = true},
          {.codebook = Codebook::fp4(), .block_size = 32},
          {.codebook = Codebook::nf3()},
          {.codebook = Codebook::nf2(), .blocking = Blocking::restart_rows},
          {.codebook = Codebook::normal_float(8), .block_size = 128},
          {.codebook = Codebook::int8(), .blocking = Blocking::row},
          {.codebook = Codebook::uniform_asymmetric(4)},
          {.codebook = Codebook::uniform_asymmetric(8)},
          {.codebook = Codebook::uniform(1)},
          {.codebook = Codebook::uniform(5), .blocking = Blocking::restart_rows}};
}

}  // namespace

TEST_CASE_TEMPLATE("forward and backward are products with the dequantised weight", T, float, double) {
  for (const QuantiseOptions& o : kinds())
    for (const auto& [out, in] :
         {std::pair<Index, Index>{40, 128}, {33, 200}, {1, 64}, {70, 1}, {17, 77}, {9, 1100}, {19, 512}}) {
      CAPTURE(o.codebook.name());
      CAPTURE_BOUND(out);
      CAPTURE_BOUND(in);
      const auto q = quantise(test::random_matrix<T>(out, in, 1).view(), o);
      const Matrix<double> W = widened(q);
      for (const Index tokens : {1, 2, 3, 4, 5, 40}) {
        CAPTURE(tokens);
        const Matrix<T> X = test::random_matrix<T>(tokens, in, 2), G = test::random_matrix<T>(tokens, out, 3);
        const Matrix<T> none;
        Matrix<T> Y = test::random_matrix<T>(tokens, out, 4), dX = test::random_matrix<T>(tokens, in, 5);
        const Matrix<T> Y0 = Y, dX0 = dX;
        // Sums of n products of order 1 against the largest of order sqrt(n): n·eps is generous.
        q.forward(X.view(), Y.view(), Update::accumulate);
        CHECK(product_error(Y, X, W, true, Y0) < test::rounding<T>(double(in) + 8));
        q.forward(X.view(), Y.view());
        CHECK(product_error(Y, X, W, true, none) < test::rounding<T>(double(in) + 8));
        q.backward(G.view(), dX.view(), Update::accumulate);
        CHECK(product_error(dX, G, W, false, dX0) < test::rounding<T>(double(out) + 8));
        q.backward(G.view(), dX.view());
        CHECK(product_error(dX, G, W, false, none) < test::rounding<T>(double(out) + 8));
      }
    }
}

TEST_CASE("column-major activations, and the portable kernels") {
  const auto q = quantise(test::random_matrix<float>(48, 192, 1).view());
  const Matrix<double> W = widened(q);
  for (const Index tokens : {2, 3, 20}) {
    const Matrix<float> X = test::random_matrix<float>(tokens, 192, 2), G = test::random_matrix<float>(tokens, 48, 3);
    Matrix<float> Xt(192, tokens), Yt(48, tokens), Gt(48, tokens), dXt(192, tokens), none;
    for (Index i = 0; i < tokens; ++i) {
      for (Index j = 0; j < 192; ++j) Xt(j, i) = X(i, j);
      for (Index j = 0; j < 48; ++j) Gt(j, i) = G(i, j);
    }
    q.forward(view_of(std::as_const(Xt)).transposed(), Yt.view().transposed());
    CHECK(product_error(Yt.view().transposed(), X, W, true, none) < test::rounding<float>(200));
    q.backward(view_of(std::as_const(Gt)).transposed(), dXt.view().transposed());
    CHECK(product_error(dXt.view().transposed(), G, W, false, none) < test::rounding<float>(60));
    if (tokens > 4) continue;
    Matrix<float> Y(tokens, 48), dX(tokens, 192);
    detail::quantised_few_forward<detail::Path::portable>(X.view(), q, false, Y.view());
    CHECK(product_error(Y, X, W, true, none) < test::rounding<float>(200));
    detail::quantised_few_backward<detail::Path::portable>(G.view(), q, false, dX.view());
    CHECK(product_error(dX, G, W, false, none) < test::rounding<float>(60));
  }
}

TEST_CASE("the same bits for any number of threads") {
#if defined(_OPENMP)
  const auto q = quantise(test::random_matrix<float>(512, 1024, 1).view());
  for (const Index tokens : {1, 3, 33}) {
    const Matrix<float> X = test::random_matrix<float>(tokens, 1024, 2), G = test::random_matrix<float>(tokens, 512, 3);
    Matrix<float> Y1(tokens, 512), Yn(tokens, 512), D1(tokens, 1024), Dn(tokens, 1024);
    const int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    q.forward(X.view(), Y1.view());
    q.backward(G.view(), D1.view());
    omp_set_num_threads(3);
    q.forward(X.view(), Yn.view());
    q.backward(G.view(), Dn.view());
    omp_set_num_threads(threads);
    CHECK(test::same_bits(Y1, Yn));
    CHECK(test::same_bits(D1, Dn));
  }
#endif
}

TEST_CASE("degenerate shapes and bad arguments of products") {
  const Matrix<float> nothing(0, 64), narrow(8, 0);
  const auto no_rows = quantise(nothing), no_cols = quantise(narrow);
  Matrix<float> X(3, 64), Y(3, 8), none(3, 0), dX = test::random_matrix<float>(3, 64, 1);
  no_rows.forward(X.view(), none.view());
  no_rows.backward(none.view(), dX.view());  // an empty sum
  CHECK(test::deviation(dX, X) == 0);
  Y = test::random_matrix<float>(3, 8, 1);
  no_cols.forward(none.view(), Y.view());
  CHECK(test::deviation(Y, Matrix<float>(3, 8)) == 0);
  const auto q = quantise(test::random_matrix<float>(8, 64, 1).view());
  CHECK_THROWS_AS(q.forward(X.view().middle_cols(0, 63), Y.view()), ShapeError);
  CHECK_THROWS_AS(q.forward(X.view().middle_rows(0, 2), Y.view()), ShapeError);
  CHECK_THROWS_AS(q.backward(Y.view().middle_cols(0, 7), X.view()), ShapeError);
  CHECK_THROWS_AS(q.backward(Y.view(), X.view().middle_cols(0, 60)), ShapeError);
  Matrix<float> S(3, 64);
  const auto square = quantise(test::random_matrix<float>(64, 64, 1).view());
  CHECK_THROWS_AS(square.forward(S.view(), S.view()), ArgumentError);
  CHECK_THROWS_AS(square.backward(S.view(), S.view()), ArgumentError);
  const Matrix<float> no_tokens(0, 64);
  Matrix<float> no_output(0, 8);
  q.forward(no_tokens.view(), no_output.view());
}

TEST_CASE_TEMPLATE("rows for an embedding", T, float, double) {
  for (const QuantiseOptions& o : kinds()) {
    const auto q = quantise(test::random_matrix<T>(50, 77, 1).view(), o);
    const Matrix<T> W = q.dequantise();
    const std::vector<Index> ids{3, 49, 0, 3};
    Matrix<T> out(4, 77), out_t(77, 4);
    q.lookup(ids, out.view());
    q.lookup(ids, out_t.view().transposed());
    std::vector<T> row(77);
    q.row(17, row);
    Index wrong = 0;
    for (Index j = 0; j < 77; ++j) {
      for (Index k = 0; k < 4; ++k) {
        wrong += out(k, j) != W(ids[std::size_t(k)], j);
        wrong += out_t(j, k) != W(ids[std::size_t(k)], j);
      }
      wrong += row[std::size_t(j)] != W(17, j);
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE_TEMPLATE("QLoRA: a layer over codes is the layer over their values, gradients by differences", T, float,
                   double) {
  const Index out = 48, in = 128, r = 4;
  for (const Index tokens : {3, 21}) {
    auto q = quantise(test::random_matrix<T>(out, in, 1, 0.1).view(), {.double_quantise = true});
    const Matrix<T> W = q.dequantise();
    auto factors = kaiming<T>(out, in, {.rank = r, .alpha = 12}).factors;
    factors.B = test::random_matrix<T>(out, r, 2, 0.1);
    LoraLinear<T, QuantisedMatrix<T>> layer(std::move(q), factors);
    LoraLinear<T> dense(DenseBase<T>(W.view()), factors);
    const Matrix<T> X = test::random_matrix<T>(tokens, in, 3), G = test::random_matrix<T>(tokens, out, 4);
    Matrix<T> Y(tokens, out), Yd(tokens, out), dX(tokens, in), dXd(tokens, in);
    LoraWorkspace<T> ws, wsd;
    layer.forward(X, Y, ws);
    layer.backward(X, G, ws, dX);
    dense.forward(X, Yd, wsd);
    dense.backward(X, G, wsd, dXd);
    CHECK(test::deviation(Y, Yd) < test::rounding<T>(in));
    CHECK(test::deviation(dX, dXd) < test::rounding<T>(in));
    const auto g = layer.parameters().gradients(), gd = dense.parameters().gradients();
    double worst = 0;
    for (std::size_t i = 0; i < g.size(); ++i) worst = std::max(worst, std::abs(double(g[i]) - double(gd[i])));
    CHECK(worst < test::rounding<T>(double(in) * double(tokens)));

    if constexpr (std::same_as<T, double>) {
      // d⟨G, Y⟩/dp by central differences: exact up to rounding, as Y is bilinear in the factors.
      const auto loss = [&] {
        Matrix<T> y(tokens, out);
        LoraWorkspace<T> w;
        layer.forward(X, y, w);
        double sum = 0;
        for (Index i = 0; i < y.size(); ++i) sum += y.data()[i] * G.data()[i];
        return sum;
      };
      const auto values = layer.parameters().values();
      for (std::size_t i = 0; i < values.size(); i += 37) {
        const double keep = values[i], h = 1e-3;
        values[i] = keep + h;
        const double up = loss();
        values[i] = keep - h;
        const double down = loss();
        values[i] = keep;
        CHECK(g[i] == doctest::Approx((up - down) / (2 * h)).epsilon(1e-7));
      }
    }
  }
}

// SPDX-License-Identifier: Apache-2.0
// Embeddings and DoRA over codes, against the same layers over the values the codes stand for.
#include <doctest/doctest.h>

#include "lowrank/adapter/dora.hpp"
#include "lowrank/adapter/embedding.hpp"
#include "lowrank/quant/quantise.hpp"
#include "support/capture.hpp"
#include "support/compare.hpp"

using namespace lowrank;
using test::deviation;
using test::random_matrix;
using test::rounding;

namespace {

static_assert(RowReadable<QuantisedMatrix<float>, float>);
static_assert(RowReadable<QuantisedMatrix<double>, double>);
static_assert(!RowReadable<QuantisedMatrix<float>, double>);

std::vector<QuantiseOptions> kinds() {
  return {{},  // blocks run on over the ends of rows
          {.double_quantise = true},
          {.codebook = Codebook::fp4(), .block_size = 32, .blocking = Blocking::restart_rows},
          {.codebook = Codebook::nf3()},
          {.codebook = Codebook::nf2(), .block_size = 128},
          {.codebook = Codebook::int8(), .blocking = Blocking::row},
          {.codebook = Codebook::uniform_asymmetric(5)}};
}

}  // namespace

TEST_CASE_TEMPLATE("an embedding over codes is the embedding over their values, to the bit", T, float, double) {
  const std::vector<std::int32_t> ids{12, 0, 3, 12, 7, 1};
  for (const auto& [vocab, dim] : {std::pair<Index, Index>{13, 70}, {13, 64}, {13, 1}, {13, 600}})
    for (const QuantiseOptions& o : kinds()) {
      CAPTURE(o.codebook.name());
      CAPTURE_BOUND(dim);
      const Index r = std::min<Index>(3, dim), tokens = Index(ids.size());
      const Matrix<T> W = random_matrix<T>(vocab, dim, 1);
      const auto codes = quantise(W, o);
      const Matrix<T> values = codes.dequantise(), G = random_matrix<T>(tokens, dim, 2);
      const LoraFactors<T> f{random_matrix<T>(r, vocab, 3), random_matrix<T>(dim, r, 4), T(1.7)};
      LoraEmbedding<T, QuantisedMatrix<T>> layer(codes, f);
      LoraEmbedding<T> oracle(DenseBase<T>(values.view()), f);
      LoraWorkspace<T> a, b;
      Matrix<T> Y(tokens, dim), want(tokens, dim);
      layer.forward(ids, Y, a);
      oracle.forward(ids, want, b);
      CHECK(test::same_bits(Y, want));
      layer.backward(ids, G, a, Update::assign);
      oracle.backward(ids, G, b, Update::assign);
      CHECK(std::ranges::equal(layer.parameters().gradients(), oracle.parameters().gradients()));
    }
}

TEST_CASE_TEMPLATE("DoRA over codes is DoRA over their values", T, float, double) {
  struct Shape {
    Index out, in, tokens;
  };
  for (const auto& [out, in, tokens] : {Shape{40, 96, 20}, {33, 70, 1}, {24, 128, 3}})
    for (const QuantiseOptions& o : kinds()) {
      CAPTURE(o.codebook.name());
      CAPTURE_BOUND(in);
      const Index r = 4;
      const Matrix<T> W = random_matrix<T>(out, in, 1);
      const auto codes = quantise(W, o);
      const Matrix<T> values = codes.dequantise(), X = random_matrix<T>(tokens, in, 2),
                      G = random_matrix<T>(tokens, out, 3);
      const LoraFactors<T> f{random_matrix<T>(r, in, 4), random_matrix<T>(out, r, 5), T(0.7)};
      DoraLinear<T, QuantisedMatrix<T>> layer(codes, f);
      DoraLinear<T> oracle(DenseBase<T>(values.view()), f);
      // The rows are the same numbers, and so are their norms; A·Wᵀ comes from another kernel.
      CHECK(deviation(layer.magnitude(), oracle.magnitude()) <= rounding<T>(double(in)));
      DoraWorkspace<T> a, b;
      Matrix<T> Y(tokens, out), want(tokens, out), dX(tokens, in), dX_want(tokens, in);
      layer.forward(X, Y, a);
      oracle.forward(X, want, b);
      CHECK(deviation(Y, want) <= rounding<T>(double(in + r)));
      layer.backward(X, G, a, dX, {.gradients = Update::assign});
      oracle.backward(X, G, b, dX_want, {.gradients = Update::assign});
      CHECK(deviation(dX, dX_want) <= rounding<T>(double(2 * out + r)));
      for (std::size_t p = 0; p < 3; ++p)
        CHECK(deviation(layer.parameters().gradient(Index(p)), oracle.parameters().gradient(Index(p))) <=
              rounding<T>(double(in + out + tokens)));
    }
}

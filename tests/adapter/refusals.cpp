// What a layer does when it refuses its arguments: gradients, parameters and outputs stay as they were, to the bit, and
// whatever overlaps is refused by every layer on every base.
#include <doctest/doctest.h>

#include "lowrank/adapter/dora.hpp"
#include "lowrank/adapter/linear.hpp"
#include "lowrank/quant/quantise.hpp"
#include "lowrank/quant/quantised_matrix.hpp"
#include "support/compare.hpp"

using namespace lowrank;
using test::random_matrix;

namespace {

constexpr Index tokens = 5, width = 32;

/// A user's kernel that checks nothing: the layers must.
struct TrustingBase {
  Matrix<float> W;
  [[nodiscard]] Index rows() const { return W.rows(); }
  [[nodiscard]] Index cols() const { return W.cols(); }
  void forward(MatrixView<const float> X, MatrixView<float> Y, Update update) const {
    multiply_to(X, W.view().transposed(), Y, update);
  }
  void backward(MatrixView<const float> G, MatrixView<float> dX, Update update) const {
    multiply_to(G, W.view(), dX, update);
  }
  static void multiply_to(MatrixView<const float> P, MatrixView<const float> Q, MatrixView<float> C, Update update) {
    for (Index i = 0; i < P.rows(); ++i)
      for (Index j = 0; j < Q.cols(); ++j) {
        if (update == Update::assign) C(i, j) = 0;
        for (Index k = 0; k < P.cols(); ++k) C(i, j) += P(i, k) * Q(k, j);
      }
  }
};

LoraFactors<float> factors(Index r = 3) {
  return {random_matrix<float>(r, width, 11), random_matrix<float>(width, r, 12), 1.5F};
}

std::vector<float> all_bits(const Parameters<float>& p, std::initializer_list<MatrixView<const float>> outputs) {
  std::vector<float> all(p.values().begin(), p.values().end());
  all.insert(all.end(), p.gradients().begin(), p.gradients().end());
  for (const auto& m : outputs)
    for (Index i = 0; i < m.rows(); ++i)
      for (Index j = 0; j < m.cols(); ++j) all.push_back(m(i, j));
  return all;
}

/// Calls `refused` twice over: it must throw a lowrank::Error and leave parameters, gradients and `outputs` alone.
template <class F>
void check_refused(const std::string& what, Parameters<float>& p,
                   std::initializer_list<MatrixView<const float>> outputs, F&& refused) {
  CAPTURE(what);
  for (std::size_t i = 0; i < p.gradients().size(); ++i) p.gradients()[i] = float(i % 7) - 2.5F;
  const std::vector<float> before = all_bits(p, outputs);
  for (const Update update : {Update::assign, Update::accumulate}) {
    CHECK_THROWS_AS(refused(update), Error);
    const std::vector<float> after = all_bits(p, outputs);
    CHECK(before.size() == after.size());
    // A frozen layer without outputs to watch has no bits at all, and memcmp takes no null pointer.
    CHECK((before.empty() || std::memcmp(before.data(), after.data(), before.size() * sizeof(float)) == 0));
  }
}

/// All a linear layer may be asked wrongly. `keeps_forward`: its backward needs the forward pass of the same tokens.
template <class Workspace, class Layer>
void check_linear(Layer& layer, bool keeps_forward) {
  Parameters<float>& p = layer.parameters();
  const Matrix<float> X = random_matrix<float>(tokens, width, 2), fewer_X = random_matrix<float>(tokens - 1, width, 2),
                      wide = random_matrix<float>(tokens, width + 1, 4);
  Matrix<float> G = random_matrix<float>(tokens, width, 3), Y(tokens, width), dX(tokens, width),
                dX_fewer(tokens - 1, width), dX_wide(tokens, width + 1);
  const Matrix<float> fewer_G(G.view().middle_rows(0, tokens - 1));
  Workspace ws, other;
  const auto grads = [](Update u) { return BackwardOptions{.gradients = u, .dx = u}; };
  if (keeps_forward) {
    check_refused("no forward", p, {dX.view()}, [&](Update u) { layer.backward(X, G, ws, dX, grads(u)); });
    check_refused("no forward, no dX", p, {}, [&](Update u) { layer.backward(X, G, ws, grads(u)); });
    layer.forward(X, Y, ws);
    check_refused("another batch", p, {dX_fewer.view()},
                  [&](Update u) { layer.backward(fewer_X, fewer_G, ws, dX_fewer, grads(u)); });
  }
  layer.forward(X, Y, ws);
  check_refused("wide X", p, {dX.view()}, [&](Update u) { layer.backward(wide, G, ws, dX, grads(u)); });
  check_refused("wide X, no dX", p, {}, [&](Update u) { layer.backward(wide, G, ws, grads(u)); });
  check_refused("wide G", p, {dX.view()}, [&](Update u) { layer.backward(X, wide, ws, dX, grads(u)); });
  check_refused("wide G, no dX", p, {}, [&](Update u) { layer.backward(X, wide, ws, grads(u)); });
  check_refused("fewer X", p, {dX.view()}, [&](Update u) { layer.backward(fewer_X, G, ws, dX, grads(u)); });
  check_refused("fewer G", p, {dX.view()}, [&](Update u) { layer.backward(X, fewer_G, ws, dX, grads(u)); });
  check_refused("wide dX", p, {dX_wide.view()}, [&](Update u) { layer.backward(X, G, ws, dX_wide, grads(u)); });
  check_refused("fewer dX", p, {dX_fewer.view()}, [&](Update u) { layer.backward(X, G, ws, dX_fewer, grads(u)); });
  check_refused("dX is G", p, {G.view()}, [&](Update u) { layer.backward(X, G, ws, G, grads(u)); });
  Buffer<float> shared(2 * tokens * width);
  std::fill(shared.begin(), shared.end(), 0.25F);
  const auto a = view_of(shared.data(), tokens, width), b = view_of(shared.data() + 3, tokens, width);
  check_refused("dX overlaps G", p, {a}, [&](Update u) { layer.backward(X, a, ws, b, grads(u)); });
  check_refused("Y is X", p, {a}, [&](Update) { layer.forward(a, a, other); });
  check_refused("Y overlaps X", p, {b}, [&](Update) { layer.forward(a, b, other, Phase::eval); });
  check_refused("wide Y", p, {dX_wide.view()}, [&](Update) { layer.forward(X, dX_wide, other); });
  check_refused("X too wide", p, {Y.view()}, [&](Update) { layer.forward(wide, Y, other); });
  // The workspace of the accepted pass has survived all that.
  layer.backward(X, G, ws, dX, {.gradients = Update::assign});
  for (Index i = 0; i < dX.size(); ++i) CHECK(std::isfinite(dX.data()[i]));
}

}  // namespace

TEST_CASE("LoRA refuses before it writes, on every base") {
  Matrix<float> W = random_matrix<float>(width, width, 1);
  for (const double dropout : {0.0, 0.3})
    for (const bool train_bias : {false, true}) {
      CAPTURE(dropout);
      CAPTURE(train_bias);
      const LoraLinearOptions o{.dropout = dropout, .train_bias = train_bias};
      LoraLinear<float> dense(DenseBase<float>(W.view()), factors(), o, std::vector<float>(width, 0.5F));
      check_linear<LoraWorkspace<float>>(dense, true);
      const Matrix<bf16> narrow(W.view());
      LoraLinear<float, DenseBase<float, bf16>> two_bytes(DenseBase<float, bf16>(narrow.view()), factors(), o);
      check_linear<LoraWorkspace<float>>(two_bytes, true);
      LoraLinear<float, QuantisedMatrix<float>> coded(quantise(W), factors(), o);
      check_linear<LoraWorkspace<float>>(coded, true);
      LoraLinear<float, TrustingBase> trusting(TrustingBase{Matrix<float>(W.view())}, factors(), o);
      check_linear<LoraWorkspace<float>>(trusting, true);
    }
}

TEST_CASE("DoRA refuses before it writes") {
  const Matrix<float> W = random_matrix<float>(width, width, 1);
  for (const double dropout : {0.0, 0.3}) {
    CAPTURE(dropout);
    DoraLinear<float> layer(DenseBase<float>(W.view()), factors(), {.dropout = dropout});
    check_linear<DoraWorkspace<float>>(layer, true);
  }
}

TEST_CASE("a mask that backward has consumed is asked for before anything is written") {
  const Matrix<float> W = random_matrix<float>(width, width, 1), X = random_matrix<float>(tokens, width, 2),
                      G = random_matrix<float>(tokens, width, 3);
  Matrix<float> Y(tokens, width), dX(tokens, width);
  LoraLinear<float> lora(DenseBase<float>(W.view()), factors(), {.dropout = 0.3, .train_bias = true});
  LoraWorkspace<float> wl;
  lora.forward(X, Y, wl);
  lora.backward(X, G, wl, dX);
  check_refused("LoRA", lora.parameters(), {dX.view()},
                [&](Update u) { lora.backward(X, G, wl, dX, {.gradients = u}); });
  DoraLinear<float> dora(DenseBase<float>(W.view()), factors(), {.dropout = 0.3});
  DoraWorkspace<float> wd;
  dora.forward(X, Y, wd);
  dora.backward(X, G, wd, dX);
  check_refused("DoRA", dora.parameters(), {dX.view()},
                [&](Update u) { dora.backward(X, G, wd, dX, {.gradients = u}); });
}

TEST_CASE("full and frozen layers refuse before they write, on every base") {
  const Matrix<float> W = random_matrix<float>(width, width, 1);
  const std::vector<float> bias(width, 0.5F);
  FullLinear<float> plain(W), biased(W, bias);
  check_linear<LoraWorkspace<float>>(plain, false);
  check_linear<LoraWorkspace<float>>(biased, false);
  FrozenLinear<float> dense(DenseBase<float>(W.view()), bias);
  check_linear<LoraWorkspace<float>>(dense, false);
  FrozenLinear<float, QuantisedMatrix<float>> coded(quantise(W), bias);
  check_linear<LoraWorkspace<float>>(coded, false);
  FrozenLinear<float, TrustingBase> trusting(TrustingBase{Matrix<float>(W.view())}, bias);
  check_linear<LoraWorkspace<float>>(trusting, false);
}

TEST_CASE("embeddings refuse before they write") {
  const Index vocab = 7, dim = 6;
  const Matrix<float> E = random_matrix<float>(vocab, dim, 1);
  const std::vector<std::int32_t> ids{6, 2, 0}, high{1, 2, 7}, more{1, 2, 3, 4};
  const Matrix<float> G = random_matrix<float>(3, dim, 3), wide = random_matrix<float>(3, dim + 1, 3),
                      more_G = random_matrix<float>(4, dim, 3);
  Matrix<float> Y(3, dim);
  LoraWorkspace<float> ws;
  LoraEmbedding<float> lora(DenseBase<float>(E.view()), LoraFactors<float>{random_matrix<float>(2, vocab, 3),
                                                                           random_matrix<float>(dim, 2, 4), 1.F});
  FullEmbedding<float> full(E);
  check_refused("no forward", lora.parameters(), {}, [&](Update u) { lora.backward(ids, G, ws, u); });
  const Matrix<float> W = random_matrix<float>(4, 4, 1), X3 = random_matrix<float>(3, 4, 1);
  Matrix<float> Y3(3, 4);
  LoraLinear<float> stranger(DenseBase<float>(W.view()),
                             {random_matrix<float>(1, 4, 3), random_matrix<float>(4, 1, 4), 1.F});
  stranger.forward(X3, Y3, ws);  // three tokens, but of another rank
  check_refused("another layer's workspace", lora.parameters(), {}, [&](Update u) { lora.backward(ids, G, ws, u); });
  lora.forward(ids, Y, ws);
  check_refused("high id", lora.parameters(), {}, [&](Update u) { lora.backward(high, G, ws, u); });
  check_refused("wide G", lora.parameters(), {}, [&](Update u) { lora.backward(ids, wide, ws, u); });
  check_refused("other tokens", lora.parameters(), {}, [&](Update u) { lora.backward(more, more_G, ws, u); });
  check_refused("high id", full.parameters(), {}, [&](Update u) { full.backward(high, G, ws, u); });
  check_refused("wide G", full.parameters(), {}, [&](Update u) { full.backward(ids, wide, ws, u); });
  check_refused("high id", full.parameters(), {Y.view()}, [&](Update) { full.forward(high, Y, ws); });
  check_refused("Y is the table", full.parameters(), {},
                [&](Update) { full.forward(ids, full.weight().middle_rows(0, 3), ws); });
  Matrix<float> table = random_matrix<float>(vocab, dim, 1);
  LoraEmbedding<float> on_table(
      DenseBase<float>(table.view()),
      LoraFactors<float>{random_matrix<float>(2, vocab, 3), random_matrix<float>(dim, 2, 4), 1.F});
  check_refused("Y is the table", on_table.parameters(), {table.view()},
                [&](Update) { on_table.forward(ids, table.view().middle_rows(0, 3), ws); });
}

TEST_CASE("an output in the memory of W is refused") {
  Matrix<float> W = random_matrix<float>(width, width, 1);
  const Matrix<float> X = random_matrix<float>(tokens, width, 2), G = random_matrix<float>(tokens, width, 3);
  Matrix<float> Y(tokens, width);
  const auto inside = W.view().middle_rows(0, tokens);
  LoraWorkspace<float> ws;
  LoraLinear<float> lora(DenseBase<float>(W.view()), factors(), {.train_bias = true});
  FrozenLinear<float> frozen{DenseBase<float>(W.view())};
  FullLinear<float> full(W);
  lora.forward(X, Y, ws);
  const auto own = full.weight().middle_rows(0, tokens);
  check_refused("LoRA Y", lora.parameters(), {inside}, [&](Update) { lora.forward(X, inside, ws); });
  check_refused("LoRA dX", lora.parameters(), {inside},
                [&](Update u) { lora.backward(X, G, ws, inside, {.gradients = u}); });
  check_refused("frozen Y", frozen.parameters(), {inside}, [&](Update) { frozen.forward(X, inside, ws); });
  check_refused("frozen dX", frozen.parameters(), {inside},
                [&](Update u) { frozen.backward(X, G, ws, inside, {.dx = u}); });
  check_refused("full Y", full.parameters(), {own}, [&](Update) { full.forward(X, own, ws); });
  check_refused("full dX", full.parameters(), {own}, [&](Update u) { full.backward(X, G, ws, own, {.gradients = u}); });
}

TEST_CASE("a dense base refuses overlap itself, in every storage") {
  Matrix<float> X = random_matrix<float>(width, width, 2);
  const Matrix<float> W = random_matrix<float>(width, width, 1), before(X.view());
  const auto check = [&](const auto& base) {
    for (const Update u : {Update::assign, Update::accumulate}) {
      CHECK_THROWS_WITH_AS(base.forward(X.view(), X.view(), u), "DenseBase::forward: Y must not overlap X",
                           ArgumentError);
      CHECK_THROWS_WITH_AS(base.backward(X.view(), X.view(), u), "DenseBase::backward: dX must not overlap G",
                           ArgumentError);
      CHECK_THROWS_AS(base.forward(X.view(), X.view().transposed(), u), ArgumentError);
    }
    CHECK(test::same_bits(X, before));
  };
  const Matrix<bf16> b(W.view());
  const Matrix<f16> h(W.view());
  check(DenseBase<float>(W.view()));
  check(DenseBase<float, bf16>(b.view()));
  check(DenseBase<float, f16>(h.view()));
  // Side by side in one buffer is not overlap: q, k and v are often views of one product.
  Matrix<float> both(tokens, 2 * width);
  DenseBase<float>(W.view()).forward(X.view().middle_rows(0, tokens), both.view().middle_cols(0, width));
  CHECK_NOTHROW(
      DenseBase<float>(W.view()).forward(both.view().middle_cols(0, width), both.view().middle_cols(width, width)));
}

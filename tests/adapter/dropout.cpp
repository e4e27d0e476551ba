// Masks of dropout: independent between passes in flight and between layers, the same again from the same seed, and
// restored with a training state.
#include <doctest/doctest.h>

#include "lowrank/adapter/dora.hpp"
#include "lowrank/optim/adamw.hpp"
#include "support/compare.hpp"

using namespace lowrank;
using test::random_matrix;

namespace {

constexpr Index mask_tokens = 64, mask_in = 96, mask_out = 40;

LoraLinear<float> make_layer(const Matrix<float>& W, LoraLinearOptions options = {.dropout = 0.5}) {
  return {DenseBase<float>(W.view()),
          {random_matrix<float>(4, mask_in, 11), random_matrix<float>(mask_out, 4, 12), 1.5F},
          options};
}

/// The mask of the next training forward, 0 or 1 an element.
template <class Layer>
std::vector<int> next_mask(Layer& layer, LoraWorkspace<float>& ws) {
  Matrix<float> X(mask_tokens, mask_in), Y(mask_tokens, mask_out);
  std::fill(X.data(), X.data() + X.size(), 1.0F);
  layer.forward(X, Y, ws);
  std::vector<int> mask;
  for (Index i = 0; i < X.size(); ++i) mask.push_back(ws.dropped.data()[i] != 0);
  return mask;
}

/// Independent masks of p = 1/2 agree in half of their n elements: Binomial(n, 1/2), six standard deviations allowed.
void check_independent(const std::vector<int>& a, const std::vector<int>& b) {
  REQUIRE(a.size() == b.size());
  double agree = 0;
  for (std::size_t i = 0; i < a.size(); ++i) agree += a[i] == b[i];
  const double n = double(a.size());
  CHECK(std::abs(agree - n / 2) < 6 * std::sqrt(n / 4));
}

std::uint64_t fnv(const std::string& name) {
  std::uint64_t h = 0xcbf29ce484222325U;
  for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return h;
}

}  // namespace

TEST_CASE("fresh workspaces on one layer draw masks of their own") {
  const Matrix<float> W = random_matrix<float>(mask_out, mask_in, 1);
  LoraLinear<float> layer = make_layer(W), same = make_layer(W);
  std::vector<std::vector<int>> masks;
  std::array<LoraWorkspace<float>, 3> mine, theirs;
  for (int pass = 0; pass < 2; ++pass)
    for (std::size_t w = 0; w < 3; ++w) {
      masks.push_back(next_mask(layer, mine[w]));
      CHECK(masks.back() == next_mask(same, theirs[w]));  // same seed, same order of passes: same bits
    }
  for (std::size_t a = 0; a < masks.size(); ++a)
    for (std::size_t b = 0; b < a; ++b) check_independent(masks[a], masks[b]);

  LoraLinear<float> moved = std::move(layer);  // takes its numbering along
  LoraWorkspace<float> fresh;
  const std::vector<int> next = next_mask(moved, fresh);
  for (const auto& mask : masks) check_independent(next, mask);
  CHECK(fresh.stream == 3);
}

TEST_CASE("a pass is repeated by setting stream and call, and backward uses the mask of its own pass") {
  const Matrix<float> W(mask_out, mask_in), X = random_matrix<float>(mask_tokens, mask_in, 2),
                                            G = random_matrix<float>(mask_tokens, mask_out, 3);
  LoraLinear<float> layer = make_layer(W);
  LoraWorkspace<float> first, second, again;
  Matrix<float> Y(mask_tokens, mask_out), dX(mask_tokens, mask_in);
  (void)next_mask(layer, first);
  const std::vector<int> mask = next_mask(layer, second);
  again.stream = second.stream;
  again.call = second.call - 1;
  CHECK(next_mask(layer, again) == mask);
  // W = 0, so dX = mask∘(U·A)/(1−p): zero exactly where the pass dropped.
  layer.forward(X, Y, first);
  layer.backward(X, G, second, dX);
  for (Index i = 0; i < dX.size(); ++i) CHECK((dX.data()[i] != 0) == (mask[std::size_t(i)] == 1));
}

TEST_CASE("layers with the same seed draw masks of their own once they have names") {
  const Matrix<float> W = random_matrix<float>(mask_out, mask_in, 1);
  const auto masks = [&](const std::vector<std::string>& names, auto seed_of) {
    std::vector<LoraLinear<float>> layers;
    for (const std::string& name : names) layers.push_back(make_layer(W, {.dropout = 0.5, .seed = seed_of(name)}));
    FlatParameters<float> flat;
    for (std::size_t i = 0; i < names.size(); ++i) flat.add(names[i], layers[i].parameters());
    flat.pack();
    std::vector<std::vector<int>> result;
    for (auto& layer : layers) {
      LoraWorkspace<float> ws;
      result.push_back(next_mask(layer, ws));
    }
    return result;
  };
  const std::vector<std::string> names{"layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", ""};
  // Neither the default seed nor one that already has the name in it makes two of them equal.
  for (const int kind : {0, 1, 2}) {
    const auto seed = [&](const std::string& name) {
      return kind == 0 ? std::uint64_t(0) : kind == 1 ? 7 ^ fnv(name) : std::uint64_t(0) - fnv(name);
    };
    const auto m = masks(names, seed);
    CHECK(m == masks(names, seed));
    for (std::size_t a = 0; a < m.size(); ++a)
      for (std::size_t b = 0; b < a; ++b) check_independent(m[a], m[b]);
  }
}

TEST_CASE("a run that stops and goes on equals one that did not, two micro-batches in flight") {
  const Matrix<float> W = random_matrix<float>(mask_out, mask_in, 1);
  struct Run {
    LoraLinear<float> layer;
    FlatParameters<float> flat;
    AdamW<float> adam;
    std::array<LoraWorkspace<float>, 2> ws;
    Matrix<float> Y{mask_tokens, mask_out}, dX{mask_tokens, mask_in};
    explicit Run(const Matrix<float>& w)
        : layer(make_layer(w, {.dropout = 0.3, .seed = 5})), adam(layer.parameters().size()) {
      flat.add("proj", layer.parameters());
      flat.pack();
    }
    void steps(std::uint64_t from, std::uint64_t to) {
      for (std::uint64_t t = from; t < to; ++t) {
        flat.zero_gradients();
        const Matrix<float> X[2] = {random_matrix<float>(mask_tokens, mask_in, 100 + 2 * t),
                                    random_matrix<float>(mask_tokens, mask_in, 101 + 2 * t)},
                            G = random_matrix<float>(mask_tokens, mask_out, 3);
        for (std::size_t b = 0; b < 2; ++b) layer.forward(X[b], Y, ws[b]);
        for (std::size_t b = 0; b < 2; ++b) layer.backward(X[b], G, ws[b], dX);
        adam.step(flat.values(), flat.gradients(), 0.01);
      }
    }
  };
  Run whole(W), first(W), second(W);
  whole.steps(0, 5);
  first.steps(0, 2);
  std::copy(first.flat.values().begin(), first.flat.values().end(), second.flat.values().begin());
  std::copy(first.adam.first_moments().begin(), first.adam.first_moments().end(), second.adam.first_moments().begin());
  std::copy(first.adam.second_moments().begin(), first.adam.second_moments().end(),
            second.adam.second_moments().begin());
  second.adam.set_steps(first.adam.steps());
  for (auto& ws : second.ws) ws.call = std::uint64_t(first.adam.steps());  // the step count is all there is to restore
  second.steps(2, 5);
  CHECK(std::equal(whole.flat.values().begin(), whole.flat.values().end(), second.flat.values().begin()));
}

TEST_CASE("DoRA numbers its workspaces too") {
  const Matrix<float> W = random_matrix<float>(mask_out, mask_in, 1), X = random_matrix<float>(mask_tokens, mask_in, 2);
  DoraLinear<float> layer(DenseBase<float>(W.view()),
                          {random_matrix<float>(4, mask_in, 11), random_matrix<float>(mask_out, 4, 12), 1.5F},
                          {.dropout = 0.5});
  DoraWorkspace<float> a, b;
  Matrix<float> Ya(mask_tokens, mask_out), Yb(mask_tokens, mask_out);
  layer.forward(X, Ya, a);
  layer.forward(X, Yb, b);
  CHECK_FALSE(test::same_bits(a.lora.dropped, b.lora.dropped));
}

TEST_CASE("probabilities the masks cannot express are refused") {
  const Matrix<float> W = random_matrix<float>(mask_out, mask_in, 1);
  for (const double p : {0.999995, 1 - 0x1p-17, 0x1p-18, 1e-300})
    CHECK_THROWS_AS(make_layer(W, {.dropout = p}), ArgumentError);
  CHECK_THROWS_AS(DoraLinear<float>(DenseBase<float>(W.view()),
                                    {random_matrix<float>(4, mask_in, 11), random_matrix<float>(mask_out, 4, 12), 1.5F},
                                    {.dropout = 0.999995}),
                  ArgumentError);
  // The ends of what they can: one unit of 65536 dropped or kept.
  for (const double p : {0x1p-17, 1 - 0x1p-16}) {
    LoraLinear<float> layer = make_layer(W, {.dropout = p});
    LoraWorkspace<float> ws;
    double kept = 0, n = 0;
    for (int pass = 0; pass < 200; ++pass)
      for (const int k : next_mask(layer, ws)) kept += k, n += 1;
    const double expected = p < 0.5 ? 1 - 0x1p-16 : 0x1p-16;
    CHECK(std::abs(kept - n * expected) < 6 * std::sqrt(n * 0x1p-16));
    CHECK(kept > 0);
    CHECK(kept < n);
  }
}

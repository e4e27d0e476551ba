// SPDX-License-Identifier: Apache-2.0
// Training throughput of the example transformer as a share of the GEMM ceiling of this machine, measured in this
// process.
//
//   benchmark_transformer [--smoke]
//
// The ceiling is our packed product on 512×2048×2048, best of several. Useful work counts what the mathematics needs
// and no more: 2 flops a weight and token for Y, 2 for dX, 2 for dW where W is trained, the rank-r products of
// adapters, and the causal half of attention. Norms, softmax, SwiGLU, the loss and the optimizer count as no work, only
// as time.
#include <chrono>
#include <cstdio>
#include <cstring>

#include "../examples/llama/model.cpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/optim/adamw.hpp"
#include "lowrank/optim/clip.hpp"

namespace {

using llama::Index;
using llama::Mat;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

/// Best time of one call among `repeats`.
template <class F>
double best_of(int repeats, F&& f) {
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const double start = seconds();
    f();
    best = std::min(best, seconds() - start);
  }
  return best;
}

double gemm_ceiling(bool smoke) {
  const Index m = 512, n = smoke ? 512 : 2048;
  lowrank::Matrix<float> A(m, n), B(n, n), C(m, n);
  lowrank::CounterRng(1).fill_uniform(A.view(), -1, 1);
  lowrank::CounterRng(2).fill_uniform(B.view(), -1, 1);
  const double t = best_of(smoke ? 3 : 20, [&] { lowrank::gemm(1.0F, A.view(), B.view(), C.view()); });
  return 2.0 * double(m) * double(n) * double(n) / t;
}

enum class Method { full, lora };

llama::Recipe<float> recipe(Method method, Index rank) {
  return {.linear = [=](const std::string& module, const lowrank::Matrix<float>& W) -> llama::LinearLayer<float> {
            if (method == Method::full) return lowrank::FullLinear<float>(W);
            if (module == "lm_head") return lowrank::FrozenLinear<float>(lowrank::DenseBase<float>(W.view()));
            return lowrank::LoraLinear<float>(
                lowrank::DenseBase<float>(W.view()),
                lowrank::kaiming<float>(W.rows(), W.cols(), {.rank = rank, .alpha = 2.0 * double(rank)}).factors);
          },
          .embedding = [=](const std::string&, const lowrank::Matrix<float>& W) -> llama::EmbeddingLayer<float> {
            if (method == Method::full) return lowrank::FullEmbedding<float>(W);
            return llama::FrozenEmbedding<float>(W.view());
          },
          .train_norm = [=](const std::string&) { return method == Method::full; }};
}

/// Useful flops of a training step.
double step_flops(const llama::ModelConfig& c, Method method, Index rank, Index batch, Index time) {
  const double tokens = double(batch * time), layers = double(c.num_hidden_layers);
  const double weights = double(llama::multiplies_per_token(c));
  double flops = tokens * weights * (method == Method::full ? 6 : 4);
  if (method == Method::lora)
    for (const auto& s : llama::layer_linears(c)) flops += layers * 6 * tokens * double(rank * (s.out + s.in));
  // Causal half: scores and values forward, dP, dV, dQ, dK backward, 2 flops each.
  flops += layers * 6 * tokens * double(time + 1) / 2 * double(c.query_size()) * 2;
  return flops;
}

void measure(const char* name, const llama::ModelConfig& c, Method method, Index rank, Index batch, Index time,
             double ceiling, bool smoke) {
  const auto weights = llama::random_weights<float>(c, 1);
  llama::Model<float> model(c, weights, recipe(method, rank));
  lowrank::AdamW<float> adam(model.parameters().size());
  llama::Batch b{batch, time, {}, {}};
  const lowrank::CounterRng rng(2);
  for (Index i = 0; i < batch * time; ++i) {
    b.inputs.push_back(llama::Token(rng.below(2 * std::uint64_t(i), std::uint64_t(c.vocab_size))));
    b.targets.push_back(llama::Token(rng.below(2 * std::uint64_t(i) + 1, std::uint64_t(c.vocab_size))));
  }
  const int repeats = smoke ? 2 : 30;
  auto& p = model.parameters();
  const auto step = [&] {
    p.zero_gradients();
    model.loss_and_gradients(b);
    lowrank::clip_gradients<float>(p.gradients(), 1.0);
    adam.step(p.values(), p.gradients(), 1e-4);
  };
  step();
  const double t = best_of(repeats, step);
  const double optimizer = best_of(repeats, [&] {
    p.zero_gradients();
    lowrank::clip_gradients<float>(p.gradients(), 1e9);
    adam.step(p.values(), p.gradients(), 0);
  });

  // The parts without a weight, alone, on matrices of the step's sizes: what the products do not explain.
  const Index n = batch * time;
  const llama::AttentionShape shape{batch, time, c.num_attention_heads, c.num_key_value_heads, c.head_dim};
  Mat<float> q = Mat<float>::Random(n, c.query_size()), k = Mat<float>::Random(n, c.key_value_size()), v = k, P, y, dq,
             dk, dv;
  Mat<float> x = Mat<float>::Random(n, c.hidden_size), h, dx = x;
  Mat<float> gate = Mat<float>::Random(n, c.intermediate_size), up = gate, act, dgate, dup,
             logits = Mat<float>::Random(n, c.vocab_size);
  llama::RowVec<float> w = llama::RowVec<float>::Ones(c.hidden_size);
  llama::ColVec<float> inv;
  const llama::Rope<float> rope(time, c.head_dim, c.rope_theta);
  const double attention = double(c.num_hidden_layers) * best_of(repeats, [&] {
                             llama::attention(shape, q, k, v, P, y);
                             llama::attention_backward(shape, q, k, v, P, y, dq, dk, dv);
                           });
  const double elementwise = double(c.num_hidden_layers) * best_of(repeats,
                                                                   [&] {
                                                                     for (int i = 0; i < 2; ++i) {
                                                                       llama::rms_norm(x, w, 1e-5, inv, h);
                                                                       llama::rms_norm_backward(x, w, inv, h, dx);
                                                                       llama::rotate(rope, time, c.head_dim, q);
                                                                       llama::rotate(rope, time, c.head_dim, k);
                                                                     }
                                                                     llama::swiglu(gate, up, act);
                                                                     llama::swiglu_backward(gate, up, act, dgate, dup);
                                                                   }) +
                             best_of(repeats, [&] { llama::cross_entropy(logits, b.targets, true); });

  const double rate = step_flops(c, method, rank, batch, time) / t;
  std::printf(
      "%-34s %8.2f ms %9.0f tok/s %7.0f GF/s %5.0f %% of ceiling | attention %2.0f %%, elementwise %2.0f %%, optimizer "
      "%2.0f %%, "
      "products and rest %2.0f %%\n",
      name, t * 1e3, double(n) / t, rate * 1e-9, 100 * rate / ceiling, 100 * attention / t, 100 * elementwise / t,
      100 * optimizer / t, 100 * (t - attention - elementwise - optimizer) / t);
}

}  // namespace

int main(int argc, char** argv) {
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  const double ceiling = gemm_ceiling(smoke);
  std::printf("GEMM ceiling, float, %d threads: %.0f GF/s\n", lowrank::max_threads(), ceiling * 1e-9);
  const llama::ModelConfig demo;
  llama::ModelConfig wide = demo;
  wide.hidden_size = 512;
  wide.intermediate_size = 1408;
  wide.num_attention_heads = 8;
  wide.num_key_value_heads = 4;
  wide.head_dim = 64;
  measure("demo, full, 8x128 tokens", demo, Method::full, 0, 8, 128, ceiling, smoke);
  measure("demo, LoRA r=16, 8x128 tokens", demo, Method::lora, 16, 8, 128, ceiling, smoke);
  measure("width 512, full, 8x128 tokens", wide, Method::full, 0, 8, 128, ceiling, smoke);
  measure("width 512, LoRA r=16, 8x128 tokens", wide, Method::lora, 16, 8, 128, ceiling, smoke);
  return 0;
}

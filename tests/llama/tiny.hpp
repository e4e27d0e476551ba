// SPDX-License-Identifier: Apache-2.0
// A transformer small enough to differentiate by brute force, and recipes that put any layer anywhere in it.
#pragma once

#include <set>
#include <string>

#include "lowrank/init/kaiming.hpp"
#include "model.hpp"

namespace tiny {

using llama::Index;

/// Grouped queries, an odd number of features, head_dim unequal to hidden_size / heads.
inline llama::ModelConfig config(bool tied = false) {
  return {.vocab_size = 7,
          .hidden_size = 5,
          .intermediate_size = 6,
          .num_hidden_layers = 2,
          .num_attention_heads = 4,
          .num_key_value_heads = 2,
          .head_dim = 4,
          .rope_theta = 100,
          .rms_norm_eps = 1e-5,
          .tie_word_embeddings = tied};
}

/// Windows longer than one block of attention rows are tested separately; these are short.
inline llama::Batch batch(Index windows = 2, Index time = 5, std::uint64_t seed = 3, Index vocabulary = 7) {
  llama::Batch b{windows, time, {}, {}};
  const lowrank::CounterRng rng(seed);
  for (Index i = 0; i < windows * time; ++i) {
    b.inputs.push_back(llama::Token(rng.below(2 * std::uint64_t(i), std::uint64_t(vocabulary))));
    b.targets.push_back(llama::Token(rng.below(2 * std::uint64_t(i) + 1, std::uint64_t(vocabulary))));
  }
  return b;
}

/// Norm weights away from 1, so that forgetting one shows.
template <class T>
llama::Weights<T> weights(const llama::ModelConfig& c, std::uint64_t seed = 1) {
  llama::Weights<T> w = llama::random_weights<T>(c, seed);
  std::uint64_t stream = 1000;
  for (auto& [name, m] : w)
    if (name.find("norm") != std::string::npos) lowrank::CounterRng(seed, stream++).fill_uniform(m.view(), 0.5, 1.5);
  return w;
}

enum class Choice { frozen, full, adapted };

/// Factors with B ≠ 0 and α ≠ r, so that every term counts.
template <class T>
lowrank::LoraFactors<T> factors(Index out, Index in, Index rank, double alpha, std::uint64_t seed) {
  lowrank::LoraFactors<T> f = lowrank::kaiming<T>(out, in, {.rank = rank, .alpha = alpha, .seed = seed}).factors;
  lowrank::CounterRng(seed, 1).fill_normal(f.B.view(), 0, 0.3);
  return f;
}

/// A recipe from a function that says what happens to a module.
template <class T, class F>
llama::Recipe<T> recipe(F choose, double dropout = 0) {
  return {.linear = [=](const std::string& module, const lowrank::Matrix<T>& W) -> llama::LinearLayer<T> {
            const lowrank::MatrixView<const T> view = W.view();
            switch (choose(module)) {
              case Choice::frozen:
                return lowrank::FrozenLinear<T>(lowrank::DenseBase<T>(view));
              case Choice::full:
                return lowrank::FullLinear<T>(view);
              case Choice::adapted:
                break;
            }
            return lowrank::LoraLinear<T>(lowrank::DenseBase<T>(view),
                                          factors<T>(W.rows(), W.cols(), 2, 3, std::hash<std::string>{}(module)),
                                          {.dropout = dropout, .seed = 5});
          },
          .embedding = [=](const std::string& module, const lowrank::Matrix<T>& W) -> llama::EmbeddingLayer<T> {
            const lowrank::MatrixView<const T> view = W.view();
            switch (choose(module)) {
              case Choice::frozen:
                return llama::FrozenEmbedding<T>(view);
              case Choice::full:
                return lowrank::FullEmbedding<T>(view);
              case Choice::adapted:
                break;
            }
            return lowrank::LoraEmbedding<T>(lowrank::DenseBase<T>(view), factors<T>(W.cols(), W.rows(), 2, 3, 17));
          },
          .train_norm = [=](const std::string& module) { return choose(module) != Choice::frozen; }};
}

}  // namespace tiny

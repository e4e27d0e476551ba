// SPDX-License-Identifier: Apache-2.0
// A decoder-only transformer of the Llama architecture: embedding, layers of attention and SwiGLU with RMSNorm before
// each, a head, and the loss; the backward pass mirrors the forward pass line by line.
//
//   h = norm₁(x)       q, k, v = projections of h, q and k rotated       x ← x + o_proj(attention(q, k, v))
//   h = norm₂(x)       x ← x + down_proj(silu(gate_proj(h)) ∘ up_proj(h))
#pragma once

#include <memory>

#include "attention.hpp"
#include "config.hpp"
#include "kernels.hpp"
#include "lowrank/core/rng.hpp"
#include "projection.hpp"
#include "rope.hpp"

namespace llama {

/// An RMSNorm's weight, frozen or trained.
template <class T>
class Norm {
 public:
  Norm(const lowrank::Matrix<T>& w, bool train)
      : weight_(Eigen::Map<const RowVec<T>>(w.data(), w.size())),
        parameters_(train ? std::vector<lowrank::ParameterInfo>{{"weight", 1, w.size()}}
                          : std::vector<lowrank::ParameterInfo>{}) {
    if (train) std::copy_n(w.data(), w.size(), parameters_.values().data());
  }

  void forward(const Mat<T>& x, double eps, Mat<T>& y) {
    if (trained()) weight_ = Eigen::Map<const RowVec<T>>(parameters_.values().data(), weight_.size());
    rms_norm(x, weight_, eps, inv_, y);
  }
  /// dx += …
  void backward(const Mat<T>& x, const Mat<T>& g, Mat<T>& dx) {
    weight_backward(x, g);
    rms_norm_backward(x, weight_, inv_, g, dx);
  }
  void weight_backward(const Mat<T>& x, const Mat<T>& g) {
    if (trained())
      rms_norm_weight_gradient(x, inv_, g, Eigen::Map<RowVec<T>>(parameters_.gradients().data(), weight_.size()));
  }
  [[nodiscard]] bool trained() const { return parameters_.size() > 0; }
  [[nodiscard]] lowrank::Parameters<T>& parameters() { return parameters_; }
  [[nodiscard]] lowrank::Matrix<T> weight() const {
    lowrank::Matrix<T> w(1, weight_.size());
    std::copy_n(trained() ? parameters_.values().data() : weight_.data(), w.size(), w.data());
    return w;
  }

 private:
  RowVec<T> weight_;
  ColVec<T> inv_;
  lowrank::Parameters<T> parameters_;
};

template <class T>
class Model {
 public:
  /// `weights` must outlive the model: frozen layers look at them. Throws ArgumentError for an impossible
  /// configuration, a weight that is missing, or a tied head whose table is to be trained while the recipe freezes it;
  /// ShapeError for a weight of the wrong shape.
  Model(const ModelConfig& config, const Weights<T>& weights, const Recipe<T>& recipe);

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] lowrank::FlatParameters<T>& parameters() { return flat_; }

  /// Logits of every position, tokens × vocabulary.
  Mat<T>& forward(const Batch& batch, lowrank::Phase phase = lowrank::Phase::eval);

  /// Mean cross-entropy of the targets, in nats a token.
  double loss(const Batch& batch);

  /// The loss, and its gradient added to parameters().gradients().
  double loss_and_gradients(const Batch& batch);

  /// Every weight as it now is, adapters merged in. A tied head that carries an adapter of its own comes out as
  /// "lm_head".
  [[nodiscard]] Weights<T> weights();

  /// Calls f(module name, projection) for every projection, head last.
  template <class F>
  void for_each_projection(F&& f) {
    for (Index l = 0; l < config_.num_hidden_layers; ++l)
      layers_[std::size_t(l)]->for_each_module([&](const char* name, auto& module) {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(module)>, Projection<T>>)
          f(layer_name(l) + name, module);
      });
    if (head_) f(std::string("lm_head"), *head_);
  }
  [[nodiscard]] EmbeddingLayer<T>& embedding() { return embedding_; }

  /// Says that `count` training passes have been made, which is all that dropout's masks depend on beside their seed.
  void set_training_passes(Index count) {
    for_each_projection([&](const std::string&, Projection<T>& p) { p.set_training_passes(count); });
  }

 private:
  /// What the forward pass of a layer leaves for its backward pass.
  struct Kept {
    Mat<T> x, h1, q, k, v, P, attended, x_mid, h2, gate, up, activated;
  };
  struct Layer {
    Norm<T> norm1, norm2;
    Projection<T> q, k, v, o, gate, up, down;
    Kept kept;

    template <class F>
    void for_each_module(F&& f) {
      f("input_layernorm", norm1);
      f("self_attn.q_proj", q);
      f("self_attn.k_proj", k);
      f("self_attn.v_proj", v);
      f("self_attn.o_proj", o);
      f("post_attention_layernorm", norm2);
      f("mlp.gate_proj", gate);
      f("mlp.up_proj", up);
      f("mlp.down_proj", down);
    }
    [[nodiscard]] bool trained() {
      bool any = false;
      for_each_module([&](const char*, auto& module) { any = any || module.parameters().size() > 0; });
      return any;
    }
  };

  void layer_forward(Layer& layer, Mat<T>& next, lowrank::Phase phase);

  /// dx_ holds ∂L/∂(the layer's output) and leaves as ∂L/∂(its input), unless nobody below needs it.
  void layer_backward(Layer& layer, bool need_dx);

  void check_targets(const Batch& batch) const;
  lowrank::FullEmbedding<T>* full_embedding() { return std::get_if<lowrank::FullEmbedding<T>>(&embedding_); }
  lowrank::Parameters<T>& embedding_parameters() {
    return std::visit([](auto& e) -> lowrank::Parameters<T>& { return e.parameters(); }, embedding_);
  }

  ModelConfig config_;
  EmbeddingLayer<T> embedding_;
  std::vector<std::unique_ptr<Layer>>
      layers_;  // pointers: flat_ remembers where each layer's parameters live until packed
  Norm<T> final_norm_;
  std::optional<Projection<T>> head_;
  lowrank::FlatParameters<T> flat_;
  Index lowest_trained_ = 0;  // no gradient is wanted below this layer

  AttentionShape shape_;
  Rope<T> rope_;
  lowrank::LoraWorkspace<T> embedding_workspace_;
  Mat<T> x_final_, h_final_, logits_;
  Mat<T> dx_, dh_, dq_, dk_, dv_, dattended_, dgate_, dup_, dactivated_;  // shared by the layers, one is done at a time
};

/// Random weights to start a base from: normal, std 1/√in for what enters the residual stream's branches, smaller by
/// √(2·layers) for what is added back; norms 1.
template <class T>
Weights<T> random_weights(const ModelConfig& config, std::uint64_t seed);

}  // namespace llama

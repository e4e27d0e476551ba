// SPDX-License-Identifier: Apache-2.0
// The two passes: forward and backward of the model, and of a layer, in the same order so that they can be read side by
// side.
#include "model.hpp"

namespace llama {

template <class T>
Model<T>::Model(const ModelConfig& config, const Weights<T>& weights, const Recipe<T>& recipe)
    : config_((check(config), config)),
      embedding_(recipe.embedding("model.embed_tokens", weight_at(weights, "model.embed_tokens"))),
      final_norm_(weight_at(weights, "model.norm"), recipe.train_norm("model.norm")) {
  for_each_weight(config_, [&](const std::string& module, Index rows, Index cols) {
    const auto& w = weight_at(weights, module);
    if (w.rows() != rows || w.cols() != cols)
      throw lowrank::ShapeError(
          message("llama::Model: weight '", module, "' must be ", rows, "x", cols, ", got ", w.rows(), "x", w.cols()));
  });
  for (Index l = 0; l < config_.num_hidden_layers; ++l) {
    const auto linear = [&](const char* name) {
      const std::string module = layer_name(l) + name;
      return Projection<T>(recipe.linear(module, weight_at(weights, module)));
    };
    const auto norm = [&](const char* name) {
      const std::string module = layer_name(l) + name;
      return Norm<T>(weight_at(weights, module), recipe.train_norm(module));
    };
    layers_.push_back(std::make_unique<Layer>(Layer{norm("input_layernorm"),
                                                    norm("post_attention_layernorm"),
                                                    linear("self_attn.q_proj"),
                                                    linear("self_attn.k_proj"),
                                                    linear("self_attn.v_proj"),
                                                    linear("self_attn.o_proj"),
                                                    linear("mlp.gate_proj"),
                                                    linear("mlp.up_proj"),
                                                    linear("mlp.down_proj"),
                                                    {}}));
  }
  // A tied head multiplies with the embedding's table. Trained in full the two are one parameter; otherwise the head is
  // a layer of its own on the same frozen table, and may carry an adapter.
  if (!(config_.tie_word_embeddings && full_embedding() != nullptr)) {
    const std::string table = config_.tie_word_embeddings ? "model.embed_tokens" : "lm_head";
    head_.emplace(recipe.linear("lm_head", weight_at(weights, table)));
    if (config_.tie_word_embeddings && std::holds_alternative<lowrank::FullLinear<T>>(head_->layer()))
      throw lowrank::ArgumentError("llama::Model: lm_head is tied to embed_tokens; train both in full or neither");
  }
  // Every trainable value into one block, every gradient into another: one pointer and one length for the optimizer.
  flat_.add("model.embed_tokens", std::visit(
                                      [](auto& e) -> auto& { return e.parameters(); }, embedding_));
  for (Index l = 0; l < config_.num_hidden_layers; ++l)
    layers_[std::size_t(l)]->for_each_module(
        [&](const char* name, auto& module) { flat_.add(layer_name(l) + name, module.parameters()); });
  flat_.add("model.norm", final_norm_.parameters());
  if (head_) flat_.add("lm_head", head_->parameters());
  flat_.pack();
  lowest_trained_ = 0;
  if (embedding_parameters().size() == 0)
    while (lowest_trained_ < config_.num_hidden_layers && !layers_[std::size_t(lowest_trained_)]->trained())
      ++lowest_trained_;
}

template <class T>
Mat<T>& Model<T>::forward(const Batch& batch, lowrank::Phase phase) {
  const Index tokens = batch.tokens();
  if (Index(batch.inputs.size()) != tokens)
    throw lowrank::ShapeError(message("llama::Model::forward: expected ", batch.batch, "x", batch.time, " tokens, got ",
                                      batch.inputs.size()));
  if (rope_.cos.rows() < batch.time)
    rope_ = Rope<T>(batch.time, config_.head_dim, config_.rope_theta, config_.rope_scaling);
  shape_ = {batch.batch, batch.time, config_.num_attention_heads, config_.num_key_value_heads, config_.head_dim};

  Mat<T>* x = &layers_.front()->kept.x;
  x->resize(tokens, config_.hidden_size);
  std::visit([&](auto& e) { e.forward(std::span<const Token>(batch.inputs), *x, embedding_workspace_); }, embedding_);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    Mat<T>& next = l + 1 < layers_.size() ? layers_[l + 1]->kept.x : x_final_;
    layer_forward(*layers_[l], next, phase);
    x = &next;
  }
  final_norm_.forward(*x, config_.rms_norm_eps, h_final_);
  if (head_) {
    head_->forward(h_final_, logits_, phase);
  } else {
    logits_.resize(tokens, config_.vocab_size);
    lowrank::DenseBase<T>(full_embedding()->weight()).forward(lowrank::view_of(h_final_), lowrank::view_of(logits_));
  }
  return logits_;
}

template <class T>
double Model<T>::loss(const Batch& batch) {
  check_targets(batch);
  return cross_entropy(forward(batch, lowrank::Phase::eval), batch.targets, false);
}

template <class T>
double Model<T>::loss_and_gradients(const Batch& batch) {
  check_targets(batch);
  const double value = cross_entropy(forward(batch, lowrank::Phase::train), batch.targets, true);
  Mat<T>& dlogits = logits_;  // overwritten by their gradient
  if (head_) {
    head_->backward(h_final_, dlogits, dh_);
  } else {
    dh_.resize(h_final_.rows(), h_final_.cols());
    lowrank::DenseBase<T>(full_embedding()->weight()).backward(lowrank::view_of(dlogits), lowrank::view_of(dh_));
    lowrank::gemm(T(1), lowrank::view_of(dlogits).transposed(), lowrank::view_of(h_final_),
                  full_embedding()->parameters().gradient(0), lowrank::Update::accumulate);
  }
  dx_.setZero(h_final_.rows(), h_final_.cols());
  final_norm_.backward(x_final_, dh_, dx_);
  for (Index l = config_.num_hidden_layers - 1; l >= lowest_trained_; --l)
    layer_backward(*layers_[std::size_t(l)], l > lowest_trained_ || embedding_parameters().size() > 0);
  std::visit(
      [&](auto& e) {
        if (e.parameters().size() > 0) e.backward(std::span<const Token>(batch.inputs), dx_, embedding_workspace_);
      },
      embedding_);
  return value;
}

template <class T>
Weights<T> Model<T>::weights() {
  Weights<T> all;
  all.emplace("model.embed_tokens", embedding_weight(embedding_));
  for (Index l = 0; l < config_.num_hidden_layers; ++l)
    layers_[std::size_t(l)]->for_each_module(
        [&](const char* name, auto& module) { all.emplace(layer_name(l) + name, module.weight()); });
  all.emplace("model.norm", final_norm_.weight());
  if (head_ && (!config_.tie_word_embeddings || head_->parameters().size() > 0 || embedding_parameters().size() > 0))
    all.emplace("lm_head", head_->weight());
  return all;
}

template <class T>
void Model<T>::layer_forward(Layer& layer, Mat<T>& next, lowrank::Phase phase) {
  Kept& k = layer.kept;
  layer.norm1.forward(k.x, config_.rms_norm_eps, k.h1);
  layer.q.forward(k.h1, k.q, phase);
  layer.k.forward(k.h1, k.k, phase);
  layer.v.forward(k.h1, k.v, phase);
  rotate(rope_, shape_.time, shape_.head_dim, k.q);
  rotate(rope_, shape_.time, shape_.head_dim, k.k);
  attention(shape_, k.q, k.k, k.v, k.P, k.attended);
  layer.o.forward(k.attended, k.x_mid, phase);
  k.x_mid += k.x;

  layer.norm2.forward(k.x_mid, config_.rms_norm_eps, k.h2);
  layer.gate.forward(k.h2, k.gate, phase);
  layer.up.forward(k.h2, k.up, phase);
  swiglu(k.gate, k.up, k.activated);
  layer.down.forward(k.activated, next, phase);
  next += k.x_mid;
}

template <class T>
void Model<T>::layer_backward(Layer& layer, bool need_dx) {
  using lowrank::Update;
  Kept& k = layer.kept;
  layer.down.backward(k.activated, dx_, dactivated_);
  swiglu_backward(k.gate, k.up, dactivated_, dgate_, dup_);
  layer.gate.backward(k.h2, dgate_, dh_);
  layer.up.backward(k.h2, dup_, dh_, Update::accumulate);
  layer.norm2.backward(k.x_mid, dh_, dx_);  // adds to dx_, which already is the gradient through the residual path

  layer.o.backward(k.attended, dx_, dattended_);
  attention_backward(shape_, k.q, k.k, k.v, k.P, dattended_, dq_, dk_, dv_);
  rotate(rope_, shape_.time, shape_.head_dim, dq_, T(-1));
  rotate(rope_, shape_.time, shape_.head_dim, dk_, T(-1));
  if (!need_dx && !layer.norm1.trained()) {
    layer.q.backward(k.h1, dq_);
    layer.k.backward(k.h1, dk_);
    layer.v.backward(k.h1, dv_);
    return;
  }
  layer.q.backward(k.h1, dq_, dh_);
  layer.k.backward(k.h1, dk_, dh_, Update::accumulate);
  layer.v.backward(k.h1, dv_, dh_, Update::accumulate);
  layer.norm1.backward(k.x, dh_, dx_);
}

template <class T>
void Model<T>::check_targets(const Batch& batch) const {
  if (batch.targets.size() != batch.inputs.size())
    throw lowrank::ShapeError(
        message("llama::Model: expected ", batch.inputs.size(), " targets, got ", batch.targets.size()));
  check_tokens("llama::Model", batch.targets, config_.vocab_size);
}

template <class T>
Weights<T> random_weights(const ModelConfig& config, std::uint64_t seed) {
  check(config);
  Weights<T> weights;
  std::uint64_t stream = 0;
  for_each_weight(config, [&](const std::string& module, Index rows, Index cols) {
    lowrank::Matrix<T> w(rows, cols);
    const std::string kind = kind_of(module);
    const bool adds_back = kind == "o_proj" || kind == "down_proj";
    const double residual = adds_back ? 1 / std::sqrt(2.0 * double(config.num_hidden_layers)) : 1.0;
    if (rows == 1 && kind.find("norm") != std::string::npos)
      std::fill_n(w.data(), w.size(), T(1));
    else
      lowrank::CounterRng(seed, stream).fill_normal(w.view(), 0, residual / std::sqrt(double(cols)));
    ++stream;
    weights.emplace(module, std::move(w));
  });
  return weights;
}

template class Model<float>;
template Weights<float> random_weights<float>(const ModelConfig&, std::uint64_t);

}  // namespace llama

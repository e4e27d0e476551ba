// SPDX-License-Identifier: Apache-2.0
// The shape of a Llama-architecture model, and the names its weights have in a Hugging Face checkpoint.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "lowrank/core/errors.hpp"
#include "rope.hpp"

namespace llama {

/// FNV-1a: the same number for the same text on every machine.
inline std::uint64_t hash_bytes(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325U;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return h;
}

/// "what must be …, got …" from strings and numbers.
template <class... Parts>
std::string message(const Parts&... parts) {
  const auto text = [](const auto& part) {
    if constexpr (std::is_arithmetic_v<std::remove_cvref_t<decltype(part)>>)
      return std::to_string(part);
    else
      return std::string(part);
  };
  return (std::string() + ... + text(parts));
}

/// Field names follow config.json's; the defaults are the demo's model.
struct ModelConfig {
  Index vocab_size = 256;  ///< bytes
  Index hidden_size = 128;
  Index intermediate_size = 352;
  Index num_hidden_layers = 4;
  Index num_attention_heads = 4;
  Index num_key_value_heads = 2;  ///< fewer than heads: grouped-query attention
  Index head_dim = 32;
  double rope_theta = 10000;
  RopeScaling rope_scaling = {};
  double rms_norm_eps = 1e-5;
  bool tie_word_embeddings = false;

  [[nodiscard]] Index query_size() const { return num_attention_heads * head_dim; }
  [[nodiscard]] Index key_value_size() const { return num_key_value_heads * head_dim; }
};

/// Throws ArgumentError that names the field, what it must be and what it is.
inline void check(const ModelConfig& c) {
  const auto need = [](bool ok, const char* field, const char* expected, auto got) {
    if (!ok) throw lowrank::ArgumentError(message("ModelConfig: ", field, " must be ", expected, ", got ", got));
  };
  need(c.vocab_size >= 2, "vocab_size", "at least 2", c.vocab_size);
  need(c.hidden_size >= 1, "hidden_size", "at least 1", c.hidden_size);
  need(c.intermediate_size >= 1, "intermediate_size", "at least 1", c.intermediate_size);
  need(c.num_hidden_layers >= 1, "num_hidden_layers", "at least 1", c.num_hidden_layers);
  need(c.num_attention_heads >= 1, "num_attention_heads", "at least 1", c.num_attention_heads);
  need(c.num_key_value_heads >= 1 && c.num_attention_heads % c.num_key_value_heads == 0, "num_key_value_heads",
       "a divisor of num_attention_heads", c.num_key_value_heads);
  need(c.head_dim >= 2 && c.head_dim % 2 == 0, "head_dim", "even and at least 2", c.head_dim);
  need(c.rope_theta > 0 && std::isfinite(c.rope_theta), "rope_theta", "positive and finite", c.rope_theta);
  const RopeScaling& rope = c.rope_scaling;
  need(rope.factor > 0 && std::isfinite(rope.factor), "rope_scaling.factor", "positive and finite", rope.factor);
  need(rope.low_freq_factor > 0, "rope_scaling.low_freq_factor", "positive", rope.low_freq_factor);
  need(rope.high_freq_factor > rope.low_freq_factor, "rope_scaling.high_freq_factor", "above low_freq_factor",
       rope.high_freq_factor);
  need(rope.original_max_position_embeddings >= 1, "rope_scaling.original_max_position_embeddings", "at least 1",
       rope.original_max_position_embeddings);
  need(c.rms_norm_eps > 0 && std::isfinite(c.rms_norm_eps), "rms_norm_eps", "positive and finite", c.rms_norm_eps);
}

inline std::string layer_name(Index layer) { return "model.layers." + std::to_string(layer) + "."; }

/// The kind of a module: the last part of its dotted name, "q_proj" of "model.layers.3.self_attn.q_proj".
inline std::string kind_of(const std::string& module) { return module.substr(module.rfind('.') + 1); }

/// The seven matrices of every layer, in the order they are used.
struct LinearShape {
  const char* module;  ///< below the layer's name
  Index out, in;
};
inline std::vector<LinearShape> layer_linears(const ModelConfig& c) {
  const Index d = c.hidden_size, q = c.query_size(), kv = c.key_value_size(), f = c.intermediate_size;
  return {{"self_attn.q_proj", q, d}, {"self_attn.k_proj", kv, d}, {"self_attn.v_proj", kv, d},
          {"self_attn.o_proj", d, q}, {"mlp.gate_proj", f, d},     {"mlp.up_proj", f, d},
          {"mlp.down_proj", d, f}};
}

/// Calls f(module, rows, cols) for every weight of the model; a norm has one row. The weight's tensor is module +
/// ".weight".
inline void for_each_weight(const ModelConfig& c, const std::function<void(const std::string&, Index, Index)>& f) {
  f("model.embed_tokens", c.vocab_size, c.hidden_size);
  for (Index l = 0; l < c.num_hidden_layers; ++l) {
    f(layer_name(l) + "input_layernorm", 1, c.hidden_size);
    f(layer_name(l) + "post_attention_layernorm", 1, c.hidden_size);
    for (const LinearShape& s : layer_linears(c)) f(layer_name(l) + s.module, s.out, s.in);
  }
  f("model.norm", 1, c.hidden_size);
  if (!c.tie_word_embeddings) f("lm_head", c.vocab_size, c.hidden_size);
}

/// Multiply-adds of the weights a token meets: everything but the embedding's lookup and the norms.
inline Index multiplies_per_token(const ModelConfig& c) {
  Index n = c.vocab_size * c.hidden_size;
  for (const LinearShape& s : layer_linears(c)) n += c.num_hidden_layers * s.out * s.in;
  return n;
}

}  // namespace llama

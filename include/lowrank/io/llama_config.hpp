// SPDX-License-Identifier: Apache-2.0
// config.json of a Llama-architecture checkpoint: the sizes and constants a forward pass needs.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/io/json.hpp"

namespace lowrank::io {

/// Rotary-embedding scaling as Llama 3.1 defines it.
struct Llama3RopeScaling {
  double factor = 8, low_freq_factor = 1, high_freq_factor = 4;
  Index original_max_position_embeddings = 8192;
  friend bool operator==(const Llama3RopeScaling&, const Llama3RopeScaling&) = default;
};

/// The architecture of a Hugging Face Llama checkpoint, with transformers' defaults for what the file leaves out.
///
/// **Shapes** q_proj (heads·head_dim)×hidden; k_proj, v_proj (kv_heads·head_dim)×hidden; o_proj
/// hidden×(heads·head_dim); gate_proj, up_proj intermediate×hidden; down_proj hidden×intermediate; embed_tokens,
/// lm_head vocab×hidden.
struct LlamaConfig {
  std::string model_type = "llama";
  Index vocab_size = 32000, hidden_size = 4096, intermediate_size = 11008;
  Index num_hidden_layers = 32, num_attention_heads = 32, num_key_value_heads = 32, head_dim = 128;
  Index max_position_embeddings = 2048;
  double rms_norm_eps = 1e-6, rope_theta = 10000;
  /// "" (none), "linear" (positions divided by rope_factor) or "llama3".
  std::string rope_scaling = {};
  double rope_factor = 1;
  Llama3RopeScaling llama3 = {};
  bool tie_word_embeddings = false, attention_bias = false, mlp_bias = false;
  std::int64_t bos_token_id = -1, eos_token_id = -1;  ///< -1: none (a list of eos tokens: the first)
  std::string torch_dtype = "float32";

  friend bool operator==(const LlamaConfig&, const LlamaConfig&) = default;
};

/// Reads the text of a config.json.
///
/// Accepts the architectures whose layers are Llama's: "llama", and "mistral" without a sliding window.
/// **Throws** IoError naming `path` and the key: another model_type, activation other than silu, a rope scaling that is
/// not known, sizes that are missing, not positive, or do not divide (hidden by heads, heads by kv_heads), an odd
/// head_dim.
inline LlamaConfig parse_llama_config(const std::string& path, std::string_view text) {
  const Json json = parse_json(path, text);
  if (!json.is_object()) throw IoError(path, "must hold a JSON object");
  const detail::JsonReader in(path, json);
  LlamaConfig c;
  c.model_type = in.string("model_type", "llama");
  if (c.model_type != "llama" && c.model_type != "mistral")
    throw IoError(path, "model_type", "is \"" + c.model_type + "\", expected llama or mistral");
  if (c.model_type == "mistral" && in.find("sliding_window") != nullptr)
    throw IoError(path, "sliding_window", "is not supported: attention would see more than the model was trained on");
  if (const std::string act = in.string("hidden_act", "silu"); act != "silu" && act != "swish")
    throw IoError(path, "hidden_act", "is \"" + act + "\", expected silu");
  constexpr std::int64_t limit = std::int64_t(1) << 31;
  const auto size = [&](const char* key, Index& value) {
    if (in.find(key) == nullptr) throw IoError(path, key, "is missing");
    value = in.integer(key, 0, 1, limit);
  };
  size("vocab_size", c.vocab_size);
  size("hidden_size", c.hidden_size);
  size("intermediate_size", c.intermediate_size);
  size("num_hidden_layers", c.num_hidden_layers);
  size("num_attention_heads", c.num_attention_heads);
  c.num_key_value_heads = in.integer("num_key_value_heads", c.num_attention_heads, 1, limit);
  if (c.num_attention_heads % c.num_key_value_heads != 0)
    throw IoError(path, "num_key_value_heads",
                  lowrank::detail::text("must divide the ", c.num_attention_heads, " attention heads, got ",
                                        c.num_key_value_heads));
  if (in.find("head_dim") == nullptr && c.hidden_size % c.num_attention_heads != 0)
    throw IoError(path, "hidden_size",
                  lowrank::detail::text("must be a multiple of the ", c.num_attention_heads, " heads"));
  c.head_dim = in.integer("head_dim", c.hidden_size / c.num_attention_heads, 1, limit);
  if (c.head_dim % 2 != 0) throw IoError(path, "head_dim", "must be even for rotary embeddings");
  c.max_position_embeddings = in.integer("max_position_embeddings", c.max_position_embeddings, 1, limit);
  c.rms_norm_eps = in.number("rms_norm_eps", c.rms_norm_eps);
  c.rope_theta = in.number("rope_theta", c.rope_theta);
  // Newer files keep all of it in rope_parameters.
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const Json* s = in.find(key);
    if (s == nullptr) continue;
    if (!s->is_object()) in.fail(key, "an object", *s);
    const detail::JsonReader rope(path, *s);
    c.rope_theta = rope.number("rope_theta", c.rope_theta);
    const std::string type = rope.string("rope_type", rope.string("type", "default"));
    if (type == "default") continue;
    if (type != "linear" && type != "llama3") throw IoError(path, key, "rope type \"" + type + "\" is not supported");
    c.rope_scaling = type;
    c.rope_factor = rope.number("factor", 1);
    if (!(c.rope_factor > 0)) throw IoError(path, key, "factor must be positive");
    if (type == "llama3") {
      c.llama3.factor = c.rope_factor;
      c.llama3.low_freq_factor = rope.number("low_freq_factor", 1);
      c.llama3.high_freq_factor = rope.number("high_freq_factor", 4);
      c.llama3.original_max_position_embeddings = rope.integer("original_max_position_embeddings", 8192, 1, limit);
      if (!(c.llama3.high_freq_factor > c.llama3.low_freq_factor && c.llama3.low_freq_factor > 0))
        throw IoError(path, key, "needs 0 < low_freq_factor < high_freq_factor");
    }
  }
  if (!(c.rms_norm_eps >= 0 && std::isfinite(c.rms_norm_eps)))
    throw IoError(path, "rms_norm_eps", "must not be negative");
  if (!(c.rope_theta > 0 && std::isfinite(c.rope_theta))) throw IoError(path, "rope_theta", "must be positive");
  c.tie_word_embeddings = in.boolean("tie_word_embeddings", false);
  c.attention_bias = in.boolean("attention_bias", false);
  c.mlp_bias = in.boolean("mlp_bias", false);
  const auto token = [&](const char* key) -> std::int64_t {
    const Json* v = in.find(key);
    if (v != nullptr && v->is_array()) return v->empty() ? -1 : in.as_integer(key, v->front(), -1, limit);
    return in.integer(key, -1, -1, limit);
  };
  c.bos_token_id = token("bos_token_id");
  c.eos_token_id = token("eos_token_id");
  c.torch_dtype = in.string("torch_dtype", in.string("dtype", "float32"));
  return c;
}

/// Reads `directory`/config.json. **Throws** IoError as parse_llama_config.
inline LlamaConfig read_llama_config(const std::string& directory) {
  const std::string path = directory + "/config.json";
  return parse_llama_config(path, read_text(path));
}

/// The text of a config.json that transformers loads.
inline std::string llama_config_text(const LlamaConfig& c) {
  nlohmann::json j;
  j["architectures"] = {c.model_type == "mistral" ? "MistralForCausalLM" : "LlamaForCausalLM"};
  j["model_type"] = c.model_type;
  j["vocab_size"] = c.vocab_size;
  j["hidden_size"] = c.hidden_size;
  j["intermediate_size"] = c.intermediate_size;
  j["num_hidden_layers"] = c.num_hidden_layers;
  j["num_attention_heads"] = c.num_attention_heads;
  j["num_key_value_heads"] = c.num_key_value_heads;
  j["head_dim"] = c.head_dim;
  j["max_position_embeddings"] = c.max_position_embeddings;
  j["rms_norm_eps"] = c.rms_norm_eps;
  j["rope_theta"] = c.rope_theta;
  j["rope_scaling"] = nullptr;
  if (c.rope_scaling == "linear") j["rope_scaling"] = {{"rope_type", "linear"}, {"factor", c.rope_factor}};
  if (c.rope_scaling == "llama3")
    j["rope_scaling"] = {{"rope_type", "llama3"},
                         {"factor", c.llama3.factor},
                         {"low_freq_factor", c.llama3.low_freq_factor},
                         {"high_freq_factor", c.llama3.high_freq_factor},
                         {"original_max_position_embeddings", c.llama3.original_max_position_embeddings}};
  j["hidden_act"] = "silu";
  j["tie_word_embeddings"] = c.tie_word_embeddings;
  j["attention_bias"] = c.attention_bias;
  j["mlp_bias"] = c.mlp_bias;
  const auto token = [](std::int64_t t) { return t < 0 ? nlohmann::json(nullptr) : nlohmann::json(t); };
  j["bos_token_id"] = token(c.bos_token_id);
  j["eos_token_id"] = token(c.eos_token_id);
  j["torch_dtype"] = c.torch_dtype;
  return j.dump(2) + "\n";
}

}  // namespace lowrank::io

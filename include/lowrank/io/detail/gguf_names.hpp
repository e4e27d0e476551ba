// SPDX-License-Identifier: Apache-2.0
// What llama.cpp calls the weights of each architecture, and in which order it wants their rows: data, and two
// look-ups.
#pragma once

#include <array>
#include <span>
#include <string>
#include <string_view>

#include "lowrank/core/errors.hpp"
#include "lowrank/core/matrix.hpp"

namespace lowrank::io::detail {

/// How the rows of a weight in GGUF differ from those of Hugging Face's.
enum class GgufRows {
  as_is,
  query_pairs,  ///< within each head the two halves that are rotated together become pairs
  key_pairs,    ///< the same with the number of key-value heads
  grouped_qkv,  ///< for each key-value head its queries, its key, its value; GGUF has all queries, all keys, all values
};

struct GgufName {
  std::string_view hf, gguf;
  GgufRows rows = GgufRows::as_is;
};

/// The names of one architecture. Empty entries mean nothing. Of prefixes and of names with the same counterpart, the
/// first is what reading gives.
struct GgufArchitecture {
  std::string_view name;
  std::array<std::string_view, 3> layers;  ///< what stands before the number of a layer
  std::array<GgufName, 12> in_layer;
  std::array<GgufName, 4> outside;
};

inline constexpr std::array<GgufName, 12> gguf_llama_layer{{{"self_attn.q_proj", "attn_q", GgufRows::query_pairs},
                                                            {"self_attn.k_proj", "attn_k", GgufRows::key_pairs},
                                                            {"self_attn.v_proj", "attn_v"},
                                                            {"self_attn.o_proj", "attn_output"},
                                                            {"mlp.gate_proj", "ffn_gate"},
                                                            {"mlp.up_proj", "ffn_up"},
                                                            {"mlp.down_proj", "ffn_down"},
                                                            {"block_sparse_moe.gate", "ffn_gate_inp"}}};
/// The same names, rows as they are.
inline constexpr std::array<GgufName, 12> gguf_plain_layer{{{"self_attn.q_proj", "attn_q"},
                                                            {"self_attn.k_proj", "attn_k"},
                                                            {"self_attn.v_proj", "attn_v"},
                                                            {"self_attn.o_proj", "attn_output"},
                                                            {"mlp.gate_proj", "ffn_gate"},
                                                            {"mlp.up_proj", "ffn_up"},
                                                            {"mlp.down_proj", "ffn_down"},
                                                            {"mlp.gate", "ffn_gate_inp"},
                                                            {"mlp.shared_expert_gate", "ffn_gate_inp_shexp"},
                                                            {"mlp.shared_expert.gate_proj", "ffn_gate_shexp"},
                                                            {"mlp.shared_expert.up_proj", "ffn_up_shexp"},
                                                            {"mlp.shared_expert.down_proj", "ffn_down_shexp"}}};
inline constexpr std::array<GgufName, 12> gguf_fused_layer{
    {{"self_attention.query_key_value", "attn_qkv", GgufRows::grouped_qkv},
     {"self_attention.dense", "attn_output"},
     {"mlp.dense_h_to_4h", "ffn_up"},
     {"mlp.dense_4h_to_h", "ffn_down"}}};
inline constexpr std::array<GgufName, 4> gguf_llama_outside{
    {{"model.embed_tokens", "token_embd"}, {"lm_head", "output"}}};
inline constexpr std::array<std::string_view, 3> gguf_llama_layers{"model.layers."};

inline constexpr GgufArchitecture gguf_architectures[] = {
    {"llama", gguf_llama_layers, gguf_llama_layer, gguf_llama_outside},
    {"qwen2", gguf_llama_layers, gguf_plain_layer, gguf_llama_outside},
    {"qwen2moe", gguf_llama_layers, gguf_plain_layer, gguf_llama_outside},
    {"qwen3", gguf_llama_layers, gguf_plain_layer, gguf_llama_outside},
    {"qwen3moe", gguf_llama_layers, gguf_plain_layer, gguf_llama_outside},
    {"gemma", gguf_llama_layers, gguf_plain_layer, gguf_llama_outside},
    {"gemma2", gguf_llama_layers, gguf_plain_layer, gguf_llama_outside},
    {"gemma3",
     {"model.layers.", "language_model.model.layers.", "model.language_model.layers."},
     gguf_plain_layer,
     {{{"model.embed_tokens", "token_embd"},
       {"language_model.model.embed_tokens", "token_embd"},
       {"model.language_model.embed_tokens", "token_embd"},
       {"lm_head", "output"}}}},
    {"phi2",
     gguf_llama_layers,
     {{{"self_attn.q_proj", "attn_q"},
       {"self_attn.k_proj", "attn_k"},
       {"self_attn.v_proj", "attn_v"},
       {"self_attn.dense", "attn_output"},
       {"mlp.fc1", "ffn_up"},
       {"mlp.fc2", "ffn_down"}}},
     gguf_llama_outside},
    {"phi3",
     gguf_llama_layers,
     {{{"self_attn.qkv_proj", "attn_qkv"},
       {"self_attn.o_proj", "attn_output"},
       {"mlp.gate_up_proj", "ffn_up"},
       {"mlp.down_proj", "ffn_down"}}},
     gguf_llama_outside},
    {"gpt2",  // the converter transposes its weights to out×in, which is what B·A is anyway
     {"transformer.h.", "h."},
     {{{"attn.c_attn", "attn_qkv"},
       {"attn.c_proj", "attn_output"},
       {"mlp.c_fc", "ffn_up"},
       {"mlp.c_proj", "ffn_down"}}},
     {{{"transformer.wte", "token_embd"}, {"wte", "token_embd"}, {"lm_head", "output"}}}},
    {"gptneox",
     {"gpt_neox.layers.", "layers."},
     {{{"attention.query_key_value", "attn_qkv", GgufRows::grouped_qkv},
       {"attention.dense", "attn_output"},
       {"mlp.dense_h_to_4h", "ffn_up"},
       {"mlp.dense_4h_to_h", "ffn_down"}}},
     {{{"gpt_neox.embed_in", "token_embd"}, {"embed_in", "token_embd"}, {"embed_out", "output"}}}},
    {"falcon",
     {"transformer.h.", "h."},
     gguf_fused_layer,
     {{{"transformer.word_embeddings", "token_embd"}, {"word_embeddings", "token_embd"}, {"lm_head", "output"}}}},
    {"bloom",
     {"transformer.h.", "h."},
     gguf_fused_layer,
     {{{"transformer.word_embeddings", "token_embd"}, {"word_embeddings", "token_embd"}, {"lm_head", "output"}}}},
    {"bert",
     {"bert.encoder.layer.", "encoder.layer.", "roberta.encoder.layer."},
     {{{"attention.self.query", "attn_q"},
       {"attention.self.key", "attn_k"},
       {"attention.self.value", "attn_v"},
       {"attention.output.dense", "attn_output"},
       {"intermediate.dense", "ffn_up"},
       {"output.dense", "ffn_down"}}},
     {{{"bert.embeddings.word_embeddings", "token_embd"},
       {"embeddings.word_embeddings", "token_embd"},
       {"roberta.embeddings.word_embeddings", "token_embd"}}}},
};

/// "llama, qwen2, ...".
inline std::string gguf_architecture_names() {
  std::string names;
  for (const GgufArchitecture& a : gguf_architectures) names += (names.empty() ? "" : ", ") + std::string(a.name);
  return names;
}

inline const GgufArchitecture* find_gguf_architecture(std::string_view name) {
  for (const GgufArchitecture& a : gguf_architectures)
    if (a.name == name) return &a;
  return nullptr;
}

/// A weight's name on the other side, and what becomes of its rows; an empty name where there is no counterpart.
struct GgufCounterpart {
  std::string name;
  GgufRows rows = GgufRows::as_is;
};

/// "model.layers.3.self_attn.q_proj" ↔ "blk.3.attn_q".
inline GgufCounterpart gguf_counterpart(const GgufArchitecture& a, std::string_view name, bool to_gguf) {
  const auto look_up = [&](std::span<const GgufName> names, std::string_view part) -> const GgufName* {
    for (const GgufName& n : names)
      if (!part.empty() && (to_gguf ? n.hf : n.gguf) == part) return &n;
    return nullptr;
  };
  if (const GgufName* n = look_up(a.outside, name)) return {std::string(to_gguf ? n->gguf : n->hf), n->rows};
  const auto in_layer = [&](std::string_view prefix) -> GgufCounterpart {
    if (prefix.empty() || !name.starts_with(prefix)) return {};
    const std::string_view rest = name.substr(prefix.size());
    const auto dot = rest.find('.');
    const std::string_view number = rest.substr(0, std::min(dot, rest.size()));
    if (dot == std::string_view::npos || number.empty() || number.size() > 8 ||
        number.find_first_not_of("0123456789") != std::string_view::npos)
      return {};
    const GgufName* n = look_up(a.in_layer, rest.substr(dot + 1));
    if (n == nullptr) return {};
    return {std::string(to_gguf ? "blk." : a.layers.front()) + std::string(number) + "." +
                std::string(to_gguf ? n->gguf : n->hf),
            n->rows};
  };
  if (!to_gguf) return in_layer("blk.");
  for (const std::string_view prefix : a.layers)
    if (GgufCounterpart c = in_layer(prefix); !c.name.empty()) return c;
  return {};
}

/// Row i of GGUF's matrix of `rows` rows is row `gguf_source_row(...)` of Hugging Face's.
inline Index gguf_source_row(GgufRows rule, Index i, Index rows, Index heads, Index kv_heads) {
  if (rule == GgufRows::as_is) return i;
  if (rule == GgufRows::grouped_qkv) {
    const Index queries = heads / kv_heads, size = rows / (heads + 2 * kv_heads);
    const Index head = i / size, j = i % size;
    const Index group = head < heads ? head / queries : (head - heads) % kv_heads;
    const Index place = head < heads ? head % queries : queries + (head - heads) / kv_heads;
    return (group * (queries + 2) + place) * size + j;
  }
  const Index size = rows / (rule == GgufRows::key_pairs ? kv_heads : heads), head = i / size, j = i % size;
  return head * size + (j % 2) * (size / 2) + j / 2;
}

/// What keeps the rows from being arranged; empty when nothing does.
inline std::string gguf_rows_problem(GgufRows rule, Index rows, Index heads, Index kv_heads) {
  if (rule == GgufRows::as_is) return {};
  const bool no_heads = heads <= 0 && rule != GgufRows::key_pairs;
  if (no_heads || (kv_heads <= 0 && rule != GgufRows::query_pairs))
    return lowrank::detail::text("has rows that llama.cpp orders by heads, and ",
                                 no_heads ? "num_attention_heads" : "num_key_value_heads",
                                 " is missing; give the base's config.json or the number of heads");
  const Index n = rule == GgufRows::grouped_qkv ? heads + 2 * kv_heads
                  : rule == GgufRows::key_pairs ? 2 * kv_heads
                                                : 2 * heads;
  if (rows % n == 0 && (rule != GgufRows::grouped_qkv || heads % kv_heads == 0)) return {};
  if (rule == GgufRows::grouped_qkv)
    return lowrank::detail::text("has ", rows, " rows, which ", heads, " heads and ", kv_heads,
                                 " key-value heads do not divide into queries, keys and values");
  return lowrank::detail::text("has ", rows, " rows, which ", n / 2, " heads do not divide into pairs");
}

/// B with its rows in GGUF's order, or back.
inline Matrix<float> arranged_rows(const Matrix<float>& B, GgufRows rule, Index heads, Index kv_heads, bool to_gguf) {
  Matrix<float> out;
  out.resize(B.rows(), B.cols());
  for (Index i = 0; i < B.rows(); ++i) {
    const Index source = gguf_source_row(rule, i, B.rows(), heads, kv_heads);
    const float* from = &B(to_gguf ? source : i, 0);
    std::copy_n(from, B.cols(), &out(to_gguf ? i : source, 0));
  }
  return out;
}

}  // namespace lowrank::io::detail

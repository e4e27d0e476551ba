// SPDX-License-Identifier: Apache-2.0
// What a checkpoint's config.json says by its model_type: which weights lie in×out, which are embeddings, routers,
// heads.
#pragma once

#include <array>
#include <span>
#include <string_view>

#include "lowrank/model/targets.hpp"

namespace lowrank {

/// Ends of module names: a module is meant when its name equals one or ends with "." + one. Empty entries mean nothing.
using FamilyNames = std::array<std::string_view, 6>;

/// A family of models, as `model_type` of config.json names it.
struct ModelFamily {
  std::string_view model_type;
  /// What the names of the body's modules begin with in the classes that have a head; empty: it varies, or there is
  /// nothing. Checkpoints of the bare body lack it, some of classes with a head too (GPT-2's own).
  std::string_view body = {};
  /// Tables of which rows are looked up, whatever their last name component is; stored entries×dim.
  FamilyNames embeddings = {};
  /// Weights stored in×out, where other linear layers lie out×in (transformers' Conv1D).
  FamilyNames in_by_out = {};
  /// Layers that choose an expert: experts×hidden, a rank above the number of experts says nothing.
  FamilyNames routers = {};
  /// Layers behind the model's body: vocabulary, classes.
  FamilyNames heads = {};
  /// PEFT's task_type of the model with its usual head; empty: PEFT has none for it.
  std::string_view task_type = {};
  /// general.architecture of its GGUF files; empty: there are no rules here for its adapters in GGUF.
  std::string_view gguf_architecture = {};
  /// What tie_word_embeddings is where config.json does not say.
  bool tied_head = false;
};

namespace detail {

inline constexpr ModelFamily families[] = {
    {.model_type = "llama",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "llama"},
    {.model_type = "mistral",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "llama"},
    {.model_type = "mixtral",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .routers = {"block_sparse_moe.gate", "mlp.gate"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "llama"},
    {.model_type = "qwen2",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "qwen2"},
    {.model_type = "qwen2_moe",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .routers = {"mlp.gate", "mlp.shared_expert_gate"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "qwen2moe"},
    {.model_type = "qwen3",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "qwen3"},
    {.model_type = "qwen3_moe",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .routers = {"mlp.gate"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "qwen3moe"},
    {.model_type = "gemma",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "gemma",
     .tied_head = true},
    {.model_type = "gemma2",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "gemma2",
     .tied_head = true},
    {.model_type = "gemma3",  // with its vision tower
     .embeddings = {"embed_tokens", "position_embedding"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "gemma3",
     .tied_head = true},
    {.model_type = "gemma3_text",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "gemma3",
     .tied_head = true},
    {.model_type = "phi",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "phi2"},
    {.model_type = "phi3",
     .body = "model",
     .embeddings = {"embed_tokens"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "phi3"},
    {.model_type = "gpt2",
     .body = "transformer",
     .embeddings = {"wte", "wpe"},
     .in_by_out = {"c_attn", "c_proj", "c_fc", "q_attn"},
     .heads = {"lm_head", "score", "multiple_choice_head.summary"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "gpt2",
     .tied_head = true},
    {.model_type = "gpt_neox",
     .body = "gpt_neox",
     .embeddings = {"embed_in"},
     .heads = {"embed_out", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "gptneox"},
    {.model_type = "opt",
     .body = "model",
     .embeddings = {"embed_tokens", "embed_positions"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .tied_head = true},
    {.model_type = "falcon",
     .body = "transformer",
     .embeddings = {"word_embeddings"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "falcon",
     .tied_head = true},
    {.model_type = "bloom",
     .body = "transformer",
     .embeddings = {"word_embeddings"},
     .heads = {"lm_head", "score"},
     .task_type = "CAUSAL_LM",
     .gguf_architecture = "bloom",
     .tied_head = true},
    {.model_type = "t5",
     .embeddings = {"shared", "embed_tokens", "relative_attention_bias"},
     .heads = {"lm_head", "classification_head.dense", "classification_head.out_proj"},
     .task_type = "SEQ_2_SEQ_LM",
     .tied_head = true},
    {.model_type = "mt5",
     .embeddings = {"shared", "embed_tokens", "relative_attention_bias"},
     .heads = {"lm_head", "classification_head.dense", "classification_head.out_proj"},
     .task_type = "SEQ_2_SEQ_LM"},
    {.model_type = "bert",
     .body = "bert",
     .embeddings = {"word_embeddings", "position_embeddings", "token_type_embeddings"},
     .heads = {"cls.predictions.decoder", "cls.seq_relationship", "classifier", "qa_outputs"},
     .task_type = "FEATURE_EXTRACTION",
     .gguf_architecture = "bert",
     .tied_head = true},
    {.model_type = "roberta",
     .body = "roberta",
     .embeddings = {"word_embeddings", "position_embeddings", "token_type_embeddings"},
     .heads = {"lm_head.decoder", "classifier", "classifier.dense", "classifier.out_proj", "qa_outputs"},
     .task_type = "FEATURE_EXTRACTION",
     .gguf_architecture = "bert",
     .tied_head = true},
    {.model_type = "xlm-roberta",
     .body = "roberta",
     .embeddings = {"word_embeddings", "position_embeddings", "token_type_embeddings"},
     .heads = {"lm_head.decoder", "classifier", "classifier.dense", "classifier.out_proj", "qa_outputs"},
     .task_type = "FEATURE_EXTRACTION",
     .gguf_architecture = "bert",
     .tied_head = true},
    {.model_type = "clip",
     .embeddings = {"token_embedding", "position_embedding"},
     .task_type = "FEATURE_EXTRACTION",
     .tied_head = true},
    {.model_type = "vit", .body = "vit", .heads = {"classifier"}},
};

/// What the class a checkpoint was saved from, `architectures` of config.json, says of the task. Tried in order.
struct TaskOfClass {
  std::string_view ends_with, task_type;
};
inline constexpr TaskOfClass tasks_of_classes[] = {
    {"ForSequenceClassification", "SEQ_CLS"},
    {"ForTokenClassification", "TOKEN_CLS"},
    {"ForQuestionAnswering", "QUESTION_ANS"},
    {"ForCausalLM", "CAUSAL_LM"},
    {"LMHeadModel", "CAUSAL_LM"},
    {"ForMaskedLM", ""},
    {"ForImageClassification", ""},
    {"Model", "FEATURE_EXTRACTION"},
};

inline bool means(const FamilyNames& names, std::string_view module) {
  for (const std::string_view n : names)
    if (!n.empty() && ends_with_component(module, n)) return true;
  return false;
}
}  // namespace detail

/// The families that are known here: data, for a program to look at or to print.
inline std::span<const ModelFamily> model_families() { return detail::families; }

/// The family of a `model_type`; null when it is not known here.
inline const ModelFamily* find_model_family(std::string_view model_type) {
  for (const ModelFamily& f : model_families())
    if (f.model_type == model_type) return &f;
  return nullptr;
}

/// PEFT's task_type for a model saved from the class `architecture` ("LlamaForSequenceClassification"); of an empty or
/// unknown one, the family's. Empty: PEFT has none.
inline std::string_view peft_task_type(const ModelFamily& family, std::string_view architecture) {
  for (const detail::TaskOfClass& t : detail::tasks_of_classes)
    if (architecture.ends_with(t.ends_with)) return t.task_type;
  return family.task_type;
}

/// Fills in what the family knows of a module and its name alone does not say: whether a matrix is an embedding, lies
/// in×out, chooses experts, or is an output head. `m.kind` must say what its shape says: linear for every matrix.
inline void apply_family(const ModelFamily& family, ModuleInfo& m) {
  if (m.kind != ModuleKind::linear && m.kind != ModuleKind::embedding) return;
  const std::string_view name = m.name;
  m.kind = detail::means(family.embeddings, name) ? ModuleKind::embedding : ModuleKind::linear;
  m.in_by_out = m.kind == ModuleKind::linear && detail::means(family.in_by_out, name);
  m.role = detail::means(family.routers, name) ? ModuleRole::router
           : detail::means(family.heads, name) ? ModuleRole::head
                                               : ModuleRole::body;
}

}  // namespace lowrank

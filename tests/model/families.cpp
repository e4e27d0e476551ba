// SPDX-License-Identifier: Apache-2.0
// The table of families: every entry names what the models it stands for are made of.
#include "lowrank/model/families.hpp"

#include <doctest/doctest.h>

#include <set>
#include <string>

using namespace lowrank;

namespace {

ModuleInfo described(const char* model_type, const char* name, Index rows = 8, Index cols = 8) {
  const ModelFamily* f = find_model_family(model_type);
  REQUIRE(f != nullptr);
  ModuleInfo m{.name = name, .rows = rows, .cols = cols};
  apply_family(*f, m);
  return m;
}

}  // namespace

TEST_CASE("families: the table has every family once, its names are ends of module names") {
  std::set<std::string_view> seen;
  for (const ModelFamily& f : model_families()) {
    CHECK(seen.insert(f.model_type).second);
    for (const FamilyNames* names : {&f.embeddings, &f.in_by_out, &f.routers, &f.heads})
      for (const std::string_view n : *names) CHECK((n.empty() || (n.front() != '.' && n.back() != '.')));
  }
  for (const char* type :
       {"llama", "mistral",  "mixtral", "qwen2",  "qwen3", "qwen3_moe", "gemma", "gemma2",  "gemma3", "phi", "phi3",
        "gpt2",  "gpt_neox", "opt",     "falcon", "bloom", "t5",        "bert",  "roberta", "clip",   "vit"})
    CHECK_MESSAGE(find_model_family(type) != nullptr, type);
  CHECK(find_model_family("mamba") == nullptr);
  CHECK(find_model_family("") == nullptr);
}

TEST_CASE("families: embeddings, Conv1D, routers and heads are what they are in transformers") {
  using K = ModuleKind;
  using R = ModuleRole;
  struct Case {
    const char *type, *name;
    K kind;
    R role;
    bool in_by_out = false;
  };
  for (const Case& c : std::vector<Case>{
           {"llama", "model.embed_tokens", K::embedding, R::body},
           {"llama", "model.layers.0.self_attn.q_proj", K::linear, R::body},
           {"llama", "lm_head", K::linear, R::head},
           {"gpt2", "transformer.wte", K::embedding, R::body},
           {"gpt2", "wpe", K::embedding, R::body},
           {"gpt2", "h.0.attn.c_attn", K::linear, R::body, true},
           {"gpt2", "transformer.h.3.mlp.c_proj", K::linear, R::body, true},
           {"gpt2", "lm_head", K::linear, R::head, false},
           {"gpt2", "score", K::linear, R::head, false},
           {"gpt_neox", "gpt_neox.embed_in", K::embedding, R::body},
           {"gpt_neox", "embed_out", K::linear, R::head},
           {"opt", "model.decoder.embed_positions", K::embedding, R::body},
           {"opt", "model.decoder.project_in", K::linear, R::body},
           {"t5", "shared", K::embedding, R::body},
           {"t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", K::embedding, R::body},
           {"t5", "decoder.block.0.layer.2.DenseReluDense.wo", K::linear, R::body},
           {"clip", "text_model.embeddings.token_embedding", K::embedding, R::body},
           {"clip", "vision_model.embeddings.position_embedding", K::embedding, R::body},
           {"clip", "visual_projection", K::linear, R::body},
           {"bert", "bert.embeddings.token_type_embeddings", K::embedding, R::body},
           {"bert", "cls.predictions.decoder", K::linear, R::head},
           {"bert", "bert.encoder.layer.0.output.dense", K::linear, R::body},
           {"roberta", "classifier.out_proj", K::linear, R::head},
           {"vit", "classifier", K::linear, R::head},
           {"mixtral", "model.layers.0.block_sparse_moe.gate", K::linear, R::router},
           {"mixtral", "model.layers.0.block_sparse_moe.experts.3.w1", K::linear, R::body},
           {"qwen3_moe", "model.layers.0.mlp.gate", K::linear, R::router},
           {"qwen3_moe", "model.layers.0.mlp.experts.3.gate_proj", K::linear, R::body},
           {"llama", "model.layers.0.mlp.gate_proj", K::linear, R::body},
       }) {
    INFO(c.type, " ", c.name);
    const ModuleInfo m = described(c.type, c.name);
    CHECK(m.kind == c.kind);
    CHECK(m.role == c.role);
    CHECK(m.in_by_out == c.in_by_out);
  }
  // What is no matrix stays what it was.
  ModuleInfo conv{.name = "embed_tokens", .kind = ModuleKind::conv};
  apply_family(*find_model_family("llama"), conv);
  CHECK(conv.kind == ModuleKind::conv);
}

TEST_CASE("families: routers are chosen by name alone, heads by the family and not by what they are called") {
  std::vector<ModuleInfo> modules;
  for (const char* name : {"model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate",
                           "model.layers.0.mlp.experts.0.up_proj", "lm_head"})
    modules.push_back(described("qwen3_moe", name));
  const auto selected = [&](const char* targets) { return select_targets(modules, {.targets = targets}).selected; };
  using V = std::vector<std::size_t>;
  CHECK(selected("all-linear") == V{1, 3});
  CHECK(selected("all") == V{0, 1, 3, 4});
  CHECK(selected("gate") == V{2});
  // "output" is a head by name where no family says otherwise.
  std::vector<ModuleInfo> plain{{.name = "body.q_proj"}, {.name = "output"}};
  CHECK(select_targets(plain, {}).selected == V{0});
  for (ModuleInfo& m : plain) apply_family(*find_model_family("t5"), m);
  CHECK(select_targets(plain, {}).selected == V{0, 1});
}

TEST_CASE("families: PEFT's task is that of the class, else of the family") {
  const auto task = [](const char* type, const char* architecture) {
    return std::string(peft_task_type(*find_model_family(type), architecture));
  };
  CHECK(task("llama", "LlamaForCausalLM") == "CAUSAL_LM");
  CHECK(task("llama", "LlamaForSequenceClassification") == "SEQ_CLS");
  CHECK(task("llama", "LlamaModel") == "FEATURE_EXTRACTION");
  CHECK(task("gpt2", "GPT2LMHeadModel") == "CAUSAL_LM");
  CHECK(task("gpt2", "") == "CAUSAL_LM");
  CHECK(task("t5", "T5ForConditionalGeneration") == "SEQ_2_SEQ_LM");
  CHECK(task("gemma3", "Gemma3ForConditionalGeneration") == "CAUSAL_LM");
  CHECK(task("bert", "BertForMaskedLM").empty());
  CHECK(task("bert", "BertForTokenClassification") == "TOKEN_CLS");
  CHECK(task("roberta", "RobertaForQuestionAnswering") == "QUESTION_ANS");
  CHECK(task("vit", "ViTForImageClassification").empty());
  CHECK(task("vit", "").empty());
}

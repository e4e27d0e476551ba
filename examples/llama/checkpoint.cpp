// SPDX-License-Identifier: Apache-2.0
#include "checkpoint.hpp"

#include <filesystem>

#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/llama_config.hpp"
#include "lowrank/io/peft.hpp"
#include "lowrank/io/safetensors_writer.hpp"

namespace llama {
namespace io = lowrank::io;

namespace {

io::Shape shape_of(const std::string& module, Index rows, Index cols) {
  if (module.find("norm") != std::string::npos) return {std::uint64_t(cols)};
  return {std::uint64_t(rows), std::uint64_t(cols)};
}

void create(const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw lowrank::IoError(directory, "cannot be created: " + error.message());
}

}  // namespace

Base load_checkpoint(const std::string& directory) {
  const io::LlamaConfig c = io::read_llama_config(directory);
  const auto refuse = [&](bool condition, const char* key) {
    if (condition) throw lowrank::IoError(directory + "/config.json", key, "is not supported by this example");
  };
  refuse(!c.rope_scaling.empty(), "rope_scaling");
  refuse(c.attention_bias, "attention_bias");
  refuse(c.mlp_bias, "mlp_bias");
  Base base;
  base.config = {.vocab_size = c.vocab_size,
                 .hidden_size = c.hidden_size,
                 .intermediate_size = c.intermediate_size,
                 .num_hidden_layers = c.num_hidden_layers,
                 .num_attention_heads = c.num_attention_heads,
                 .num_key_value_heads = c.num_key_value_heads,
                 .head_dim = c.head_dim,
                 .rope_theta = c.rope_theta,
                 .rms_norm_eps = c.rms_norm_eps,
                 .tie_word_embeddings = c.tie_word_embeddings};
  const io::Checkpoint file(directory);
  for_each_weight(base.config, [&](const std::string& module, Index rows, Index cols) {
    const io::TensorView tensor = file[module + ".weight"];
    const io::Shape want = shape_of(module, rows, cols);
    if (tensor.shape() != want)
      throw lowrank::IoError(directory, tensor.name(),
                             "must have shape " + io::shape_text(want) + ", got " + io::shape_text(tensor.shape()));
    base.weights.emplace(module, tensor.to_matrix<float>());
  });
  return base;
}

void save_checkpoint(const std::string& directory, const ModelConfig& config, const Weights<float>& weights) {
  create(directory);
  io::LlamaConfig c;
  c.vocab_size = config.vocab_size;
  c.hidden_size = config.hidden_size;
  c.intermediate_size = config.intermediate_size;
  c.num_hidden_layers = config.num_hidden_layers;
  c.num_attention_heads = config.num_attention_heads;
  c.num_key_value_heads = config.num_key_value_heads;
  c.head_dim = config.head_dim;
  c.rope_theta = config.rope_theta;
  c.rms_norm_eps = config.rms_norm_eps;
  c.tie_word_embeddings = weights.count("lm_head") == 0;
  std::vector<io::TensorSpec> specs;
  for (const auto& [module, W] : weights)
    specs.push_back({module + ".weight", io::Dtype::F32, shape_of(module, W.rows(), W.cols())});
  io::SafeTensorsWriter out(directory + "/model.safetensors", specs, {{"format", "pt"}});
  for (const auto& [module, W] : weights) out.write_matrix(module + ".weight", W.view());
  out.commit();
  io::write_text(directory + "/config.json", io::llama_config_text(c));
}

void save_adapter(const std::string& directory, const Adaptation& adaptation, Model<float>& model,
                  const std::string& base_name) {
  if (adaptation.method() == "full")
    throw lowrank::ArgumentError("save_adapter: full fine-tuning has no adapter; save a checkpoint");
  if (adaptation.quantises())
    throw lowrank::ArgumentError("save_adapter: the adapter of '" + adaptation.method() +
                                 "' fits its own quantised base only");
  io::PeftAdapter adapter;
  adapter.config.base_model_name_or_path = base_name;
  adapter.config.task_type = "CAUSAL_LM";
  adapter.config.lora_dropout = adaptation.options().dropout;
  for (auto& [module, factors] : adaptation.factors(model))
    adapter.modules.push_back({.name = module, .factors = factors});
  if (auto* embedding = std::get_if<lowrank::LoraEmbedding<float>>(&model.embedding()))
    adapter.modules.push_back(
        {.name = "model.embed_tokens", .kind = lowrank::ModuleKind::embedding, .factors = embedding->factors()});
  std::sort(adapter.modules.begin(), adapter.modules.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  // Rank-stabilised or not, s is α/r in the file: the scale is what counts, and describe_modules states it exactly.
  io::describe_modules(adapter);
  adapter.config.target_modules = io::module_suffixes(adapter);
  const Weights<float> now = model.weights();
  for (const auto& kind : adaptation.options().train_fully) adapter.config.modules_to_save.push_back(kind);
  for (const auto& [module, W] : now)
    for (const auto& kind : adaptation.options().train_fully)
      if (kind_of(module) == kind) {
        const auto bytes = std::as_bytes(std::span(W.data(), std::size_t(W.size())));
        adapter.saved.push_back(
            {{module + ".weight", io::Dtype::F32, shape_of(module, W.rows(), W.cols())}, {bytes.begin(), bytes.end()}});
      }
  io::write_peft(directory, adapter);
}

}  // namespace llama

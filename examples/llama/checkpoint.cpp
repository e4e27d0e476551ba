// SPDX-License-Identifier: Apache-2.0
#include "checkpoint.hpp"

#include <array>
#include <filesystem>

#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/llama_config.hpp"
#include "lowrank/io/peft.hpp"
#include "lowrank/io/safetensors_writer.hpp"

namespace llama {
namespace io = lowrank::io;
namespace fs = std::filesystem;

struct Source {
  explicit Source(const std::string& path)
      : directory(path), config(io::read_json_object(path + "/config.json")), tensors(path) {}
  std::string directory;
  io::Json config;  // as it stands in the file: a key nobody here knows goes back unchanged
  io::Checkpoint tensors;
};

namespace {

const std::string tensor_suffix = ".weight";

io::Shape shape_of(const std::string& module, Index rows, Index cols) {
  if (module.find("norm") != std::string::npos) return {std::uint64_t(cols)};
  return {std::uint64_t(rows), std::uint64_t(cols)};
}

void create(const std::string& directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw lowrank::IoError(directory, "cannot be created: " + error.message());
}

// ---- the numbers of config.json
// --------------------------------------------------------------------------------------

RopeScaling scaling_of(const io::LlamaConfig& c) {
  RopeScaling s;
  if (c.rope_scaling.empty()) return s;
  s.factor = c.rope_factor;
  s.rule = RopeScaling::Rule::linear;
  if (c.rope_scaling == "linear") return s;
  s.rule = RopeScaling::Rule::llama3;
  s.low_freq_factor = c.llama3.low_freq_factor;
  s.high_freq_factor = c.llama3.high_freq_factor;
  s.original_max_position_embeddings = c.llama3.original_max_position_embeddings;
  return s;
}

ModelConfig model_config(const io::LlamaConfig& c) {
  return {.vocab_size = c.vocab_size,
          .hidden_size = c.hidden_size,
          .intermediate_size = c.intermediate_size,
          .num_hidden_layers = c.num_hidden_layers,
          .num_attention_heads = c.num_attention_heads,
          .num_key_value_heads = c.num_key_value_heads,
          .head_dim = c.head_dim,
          .rope_theta = c.rope_theta,
          .rope_scaling = scaling_of(c),
          .rms_norm_eps = c.rms_norm_eps,
          .tie_word_embeddings = c.tie_word_embeddings};
}

io::LlamaConfig file_config(const ModelConfig& config) {
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
  c.tie_word_embeddings = config.tie_word_embeddings;
  const RopeScaling& s = config.rope_scaling;
  if (s.rule == RopeScaling::Rule::none) return c;
  c.rope_scaling = s.rule == RopeScaling::Rule::linear ? "linear" : "llama3";
  c.rope_factor = s.factor;
  c.llama3 = {s.factor, s.low_freq_factor, s.high_freq_factor, s.original_max_position_embeddings};
  return c;
}

// ---- writing weights
// -------------------------------------------------------------------------------------------------

struct NamedType {
  const char *name, *torch;
  io::Dtype dtype;
};
constexpr std::array<NamedType, 3> types{
    {{"f32", "float32", io::Dtype::F32}, {"bf16", "bfloat16", io::Dtype::BF16}, {"f16", "float16", io::Dtype::F16}}};

/// The type asked for; nothing for "auto".
const NamedType* type_of(const std::string& name) {
  for (const NamedType& t : types)
    if (name == t.name) return &t;
  if (name != "auto") throw lowrank::ArgumentError("dtype: expected auto, f32, bf16 or f16, got '" + name + "'");
  return nullptr;
}

io::TensorSpec spec_of(const std::string& module, const lowrank::Matrix<float>& W, io::Dtype dtype) {
  return {module + tensor_suffix, dtype, shape_of(module, W.rows(), W.cols())};
}

void write_new(const std::string& directory, const Weights<float>& weights, io::Dtype dtype) {
  std::vector<io::TensorSpec> specs;
  for (const auto& [module, W] : weights) specs.push_back(spec_of(module, W, dtype));
  io::SafeTensorsWriter out(directory + "/model.safetensors", specs, {{"format", "pt"}});
  for (const auto& [module, W] : weights) out.write_matrix(module + tensor_suffix, W.view());
  out.commit();
}

/// The source's shards with the model's weights in them. A head the source has not goes behind the embedding; one that
/// is tied goes.
void write_like(const Source& source, const std::string& directory, const Weights<float>& weights,
                const NamedType* type) {
  const bool new_head = weights.count("lm_head") > 0 && !source.tensors.find("lm_head.weight");
  io::rewrite_checkpoint(
      source.tensors, directory,
      [&](const io::TensorView& tensor) -> std::optional<io::TensorRewrite> {
        if (!tensor.name().ends_with(tensor_suffix)) return std::nullopt;
        const std::string module = tensor.name().substr(0, tensor.name().size() - tensor_suffix.size());
        const bool half = tensor.dtype() == io::Dtype::BF16 || tensor.dtype() == io::Dtype::F16;
        const io::Dtype dtype = type != nullptr ? type->dtype : half ? tensor.dtype() : io::Dtype::F32;
        std::vector<std::string> modules;
        if (weights.count(module) > 0) modules.push_back(module);
        if (new_head && module == "model.embed_tokens") modules.push_back("lm_head");
        if (modules.empty() && module != "lm_head") return std::nullopt;
        io::TensorRewrite rewrite;
        for (const auto& m : modules) rewrite.become.push_back(spec_of(m, weights.at(m), dtype));
        rewrite.write = [modules, &weights](io::SafeTensorsWriter& out) {
          for (const auto& m : modules) out.write_matrix(m + tensor_suffix, weights.at(m).view());
        };
        return rewrite;
      },
      [](const io::TensorView&) {});
}

/// Whether a file of a model's directory is neither weights nor about them: a tokenizer, a licence, a chat template.
bool goes_along(const std::string& name) {
  if (name == "config.json" || name == "adapter_config.json" || name.ends_with(".index.json")) return false;
  if (name.starts_with(".")) return false;
  for (const char* end : {".json", ".model", ".txt", ".jinja"})
    if (name.ends_with(end)) return true;
  return name.starts_with("LICENSE") || name.starts_with("NOTICE");
}

void copy_other_files(const std::string& from, const std::string& to) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(from, error)) {
    const std::string name = entry.path().filename().string();
    if (goes_along(name) && entry.is_regular_file(error)) io::write_text(to + "/" + name, io::read_text(entry.path()));
  }
  if (error) throw lowrank::IoError(from, "cannot be listed: " + error.message());
}

std::string config_like(const Source& source, bool tied, const NamedType* type) {
  io::Json config = source.config;
  if (const char* key = "tie_word_embeddings"; !tied && config.contains(key) && config[key] == true)
    config[key] = false;
  if (type != nullptr && config.contains("dtype")) config["dtype"] = type->torch;
  if (type != nullptr && (config.contains("torch_dtype") || !config.contains("dtype")))
    config["torch_dtype"] = type->torch;
  return config.dump(2) + "\n";
}

}  // namespace

Base load_checkpoint(const std::string& directory) {
  const io::LlamaConfig c = io::read_llama_config(directory);
  const auto refuse = [&](bool condition, const char* key) {
    if (condition) throw lowrank::IoError(directory + "/config.json", key, "is not supported by this example");
  };
  refuse(c.attention_bias, "attention_bias");
  refuse(c.mlp_bias, "mlp_bias");
  Base base;
  base.config = model_config(c);
  const auto source = std::make_shared<const Source>(directory);
  for_each_weight(base.config, [&](const std::string& module, Index rows, Index cols) {
    const io::TensorView tensor = source->tensors[module + tensor_suffix];
    const io::Shape want = shape_of(module, rows, cols);
    if (tensor.shape() != want)
      throw lowrank::IoError(directory, tensor.name(),
                             "must have shape " + io::shape_text(want) + ", got " + io::shape_text(tensor.shape()));
    base.weights.emplace(module, tensor.to_matrix<float>());
    tensor.drop();
  });
  base.source = source;
  return base;
}

void save_checkpoint(const std::string& directory, const ModelConfig& config, const Weights<float>& weights,
                     const SaveOptions& options) {
  const NamedType* const type = type_of(options.dtype);
  const bool tied = weights.count("lm_head") == 0;
  create(directory);
  if (options.source) {
    write_like(*options.source, directory, weights, type);
    copy_other_files(options.source->directory, directory);
    io::write_text(directory + "/config.json", config_like(*options.source, tied, type));
    return;
  }
  io::LlamaConfig c = file_config(config);
  c.tie_word_embeddings = tied;
  if (type != nullptr) c.torch_dtype = type->torch;
  write_new(directory, weights, type != nullptr ? type->dtype : io::Dtype::F32);
  io::write_text(directory + "/config.json", io::llama_config_text(c));
}

void check_apart(const std::string& option, const std::string& path, const std::string& base) {
  std::error_code ignored;
  const auto refuse = [&](const std::string& why) {
    throw lowrank::ArgumentError(option + ": expected a place outside the base's folder '" + base + "', got '" + path +
                                 "'" + why);
  };
  // By identity, folder by folder upwards: links and other spellings lead to the same place.
  fs::path above = fs::weakly_canonical(fs::absolute(path, ignored), ignored);
  for (; !above.empty(); above = above.parent_path()) {
    if (fs::equivalent(above, base, ignored)) refuse("");
    if (above == above.parent_path()) break;
  }
  for (const auto& entry : fs::directory_iterator(path, ignored))
    if (entry.is_symlink(ignored) && fs::equivalent(fs::canonical(entry.path(), ignored).parent_path(), base, ignored))
      refuse(", where '" + entry.path().filename().string() + "' is a link into it");
}

void check_layout(const std::string& folder, const std::shared_ptr<const Source>& source) {
  std::error_code ignored;
  const bool sharded = source && !source->tensors.index().empty();
  if (sharded && fs::exists(folder + "/model.safetensors", ignored))
    throw lowrank::IoError(folder + "/model.safetensors",
                           "would be read in place of the shards to be saved beside it; remove it, or save elsewhere");
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
        adapter.saved.push_back({spec_of(module, W, io::Dtype::F32), {bytes.begin(), bytes.end()}});
      }
  io::write_peft(directory, adapter);
}

}  // namespace llama

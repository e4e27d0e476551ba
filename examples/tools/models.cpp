// SPDX-License-Identifier: Apache-2.0
// Modules, targets and adapters of checkpoints.
#include "models.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include "lowrank/io/bitsandbytes.hpp"

namespace lowrank::tool {
namespace fs = std::filesystem;

Modules::Modules(const io::Checkpoint& checkpoint, bool packed) {
  static constexpr std::array<std::string_view, 8> embeddings{
      "embed_tokens",         "wte", "wpe", "word_embeddings", "embed_in", "tok_embeddings", "position_embeddings",
      "token_type_embeddings"};
  config = io::find_model_config(model_directory(checkpoint.path()));
  if (config) family = config->family();
  checkpoint.for_each([&](const io::TensorView& t) {
    constexpr std::string_view suffix = ".weight";
    if (!t.name().ends_with(suffix) || t.name().size() == suffix.size()) return;
    ModuleInfo info;
    info.name = t.name().substr(0, t.name().size() - suffix.size());
    const auto& shape = t.shape();
    info.kind = ModuleKind::other;
    if (io::is_convertible_float(t.dtype()) && shape.size() == 2)
      info.kind =
          common::is_one_of(common::last_component(info.name), embeddings) ? ModuleKind::embedding : ModuleKind::linear;
    else if (io::is_convertible_float(t.dtype()) && shape.size() == 4)
      info.kind = ModuleKind::conv;
    if (packed && t.dtype() == io::Dtype::U8 && !io::bitsandbytes_type(checkpoint, t.name()).empty()) {
      const io::BitsandbytesState state = io::read_bitsandbytes_state(checkpoint, t.name());
      info.kind = ModuleKind::linear;
      info.rows = state.rows;
      info.cols = state.cols;
    } else if (shape.size() == 2) {
      info.rows = t.rows();
      info.cols = t.cols();
    }
    if (family != nullptr) apply_family(*family, info);
    infos.push_back(std::move(info));
    weights.push_back(t);
  });
}

std::optional<std::size_t> Modules::find(std::string_view name) const {
  for (std::size_t i = 0; i < infos.size(); ++i)
    if (infos[i].name == name) return i;
  return std::nullopt;
}

void Modules::settle_orientation(bool fan_in_fan_out) {
  if (family == nullptr) {
    for (ModuleInfo& m : infos) m.in_by_out = fan_in_fan_out && m.kind == ModuleKind::linear;
    return;
  }
  if (fan_in_fan_out && family->in_by_out == FamilyNames{})
    throw IoError(
        config->path, "model_type",
        "is \"" + config->model_type + "\", whose weights are stored out x in: --fan-in-fan-out contradicts it");
}

bool Modules::in_by_out(std::size_t i, bool fan_in_fan_out) const {
  return family != nullptr ? infos[i].in_by_out : fan_in_fan_out && infos[i].kind == ModuleKind::linear;
}

bool Modules::need_fan_in_fan_out(const std::vector<std::size_t>& selected) const {
  return std::any_of(selected.begin(), selected.end(), [&](std::size_t i) { return infos[i].in_by_out; });
}

std::string Modules::task_type() const {
  return family == nullptr ? "CAUSAL_LM" : std::string(peft_task_type(*family, config->architecture));
}

std::string Modules::family_note(const std::vector<std::size_t>& selected) const {
  if (family != nullptr) {
    const std::string prefix = std::string(family->body) + ".", &model = config->architecture;
    if (family->body.empty() || model.empty() || peft_task_type(*family, model) == "FEATURE_EXTRACTION") return {};
    for (const std::size_t i : selected)
      if (infos[i].role == ModuleRole::body && infos[i].name.starts_with(prefix)) return {};
    for (const std::size_t i : selected)
      if (infos[i].role == ModuleRole::body)
        return "the checkpoint's names lack the \"" + prefix + "\" that " + model + " has (" + infos[i].name +
               "): PEFT will not find the adapter's modules there unless the model is saved again by transformers";
    return {};
  }
  constexpr const char* taken =
      "; weights are taken to be out x in unless --fan-in-fan-out is given, and embeddings and "
      "heads to be what their names say";
  if (!config) return std::string("there is no config.json beside the checkpoint to tell its family") + taken;
  return config->path + ": " +
         (config->model_type.empty() ? "no model_type" : "the model_type \"" + config->model_type + "\" is not known") +
         taken;
}

const ModelFamily* family_of(const io::Checkpoint& checkpoint) {
  const auto config = io::find_model_config(model_directory(checkpoint.path()));
  return config ? config->family() : nullptr;
}

bool stored_in_by_out(const ModelFamily* family, const std::string& module, bool fan_in_fan_out) {
  if (family == nullptr) return fan_in_fan_out;
  ModuleInfo m{.name = module};
  apply_family(*family, m);
  return m.in_by_out;
}

void expect_finite_weight(const io::TensorView& t) {
  const auto look = [&](const auto& W) {
    for (Index i = 0; i < W.rows(); ++i)
      for (Index j = 0; j < W.cols(); ++j)
        if (!std::isfinite(W(i, j)))
          t.fail(common::text("must be finite, got ", double(W(i, j)), " at element [", i, ", ", j, "]"));
  };
  t.dtype() == io::Dtype::F64 ? look(t.folded<double>()) : look(t.folded<float>());
}

bool same_bytes(const io::TensorView& a, const io::TensorView& b) {
  if (a.dtype() != b.dtype() || a.shape() != b.shape()) return false;
  std::vector<std::byte> piece;
  std::size_t at = 0;
  bool same = true;
  a.read([&](io::Bytes x) {
    if (same) {
      piece.resize(x.size());
      b.file().read(b.bytes().subspan(at, x.size()), piece.data());
      same = std::memcmp(x.data(), piece.data(), x.size()) == 0;
    }
    at += x.size();
  });
  return same;
}

void TargetArguments::add_to(CLI::App* sub) {
  sub->add_option(
         "--targets", targets,
         "attention, mlp, all-linear, all; or names separated by commas; or one regular expression over whole names")
      ->capture_default_str();
  sub->add_option("--exclude", exclude, "Names or one expression to leave out");
  sub->add_option("--layers", layers, "Only these layers")->delimiter(',');
}

TargetSelection TargetArguments::select(const Modules& modules) const {
  return select_targets(modules.infos, {.targets = targets, .exclude = exclude, .layers_to_transform = layers});
}

std::vector<std::string> target_list(const Modules& modules, const std::vector<std::size_t>& selected) {
  std::set<std::string> suffixes, names;
  for (const std::size_t i : selected) {
    suffixes.emplace(common::last_component(modules.infos[i].name));
    names.insert(modules.infos[i].name);
  }
  bool exact = true;
  for (const ModuleInfo& m : modules.infos)
    if (!names.contains(m.name) && suffixes.contains(std::string(common::last_component(m.name)))) exact = false;
  const auto& chosen = exact ? suffixes : names;
  return {chosen.begin(), chosen.end()};
}

LoraFactors<float> to_float(LoraFactors<double>&& f) {
  LoraFactors<float> out;
  out.A = Matrix<float>(f.A.view());
  out.B = Matrix<float>(f.B.view());
  out.scale = float(f.scale);
  return out;
}

io::Dtype factor_dtype(const std::string& name) {
  return name == "bf16" ? io::Dtype::BF16 : name == "f16" ? io::Dtype::F16 : io::Dtype::F32;
}

void round_factors(LoraFactors<float>& f, io::Dtype dtype) {
  for (Matrix<float>* m : {&f.A, &f.B})
    for (Index i = 0; i < m->size(); ++i) {
      float& x = m->data()[i];
      x = dtype == io::Dtype::BF16 ? float(bf16(x)) : dtype == io::Dtype::F16 ? float(f16(x)) : x;
    }
}

std::vector<std::size_t> match_adapter(const std::string& path, const io::PeftAdapter& adapter, const Modules& modules,
                                       std::string& summary) {
  std::vector<std::size_t> where;
  std::vector<std::string> lost;
  for (const io::AdapterModule& m : adapter.modules) {
    const auto at = modules.find(m.name);
    if (!at) {
      lost.push_back(m.name + " (no such weight)");
      continue;
    }
    const ModuleInfo& info = modules.infos[*at];
    Index out = m.factors.out_features(), in = m.factors.in_features();
    if (lies_transposed(m.kind, modules.in_by_out(*at, adapter.config.fan_in_fan_out))) std::swap(out, in);
    if (m.kind != ModuleKind::conv && (info.rows != out || info.cols != in)) {
      lost.push_back(m.name + " (weight is " + common::shape_text(info.rows, info.cols) + ", adapter " +
                     common::shape_text(out, in) + ")");
      continue;
    }
    where.push_back(*at);
  }
  summary = common::text(where.size(), " of ", adapter.modules.size(), " adapter modules match the base");
  if (!lost.empty()) {
    std::string list;
    for (std::size_t i = 0; i < std::min<std::size_t>(lost.size(), 8); ++i) list += (i > 0 ? ", " : "") + lost[i];
    if (lost.size() > 8) list += common::text(", and ", lost.size() - 8, " more");
    throw IoError(path, common::text("does not fit the base: ", summary, "; unmatched: ", list));
  }
  return where;
}

void expect_different(const std::string& input, const std::string& output) {
  std::error_code failed;
  if (fs::equivalent(input, output, failed) && !failed) throw IoError(output, "is both input and output");
  // A file to be written must not be one of those an input directory is made of.
  if (!fs::is_directory(input, failed) || !fs::is_regular_file(output, failed)) return;
  for (const auto& entry : fs::directory_iterator(input, failed))
    if (std::error_code ignored; fs::equivalent(entry.path(), output, ignored) && !ignored)
      throw IoError(output, "is a file of the input " + input + " and would be overwritten");
}

void expect_finite_factors(const std::string& path, const io::PeftAdapter& adapter) {
  for (const io::AdapterModule& m : adapter.modules)
    for (const Matrix<float>* factor : {&m.factors.A, &m.factors.B})
      if (!std::all_of(factor->data(), factor->data() + factor->size(), [](float x) { return std::isfinite(x); }))
        throw IoError(path, m.name, "its factors must be finite, got NaN or infinity");
}

void note_dora(const Common& common, const std::string& path, const io::PeftAdapter& adapter) {
  const auto count = std::count_if(adapter.modules.begin(), adapter.modules.end(),
                                   [](const io::AdapterModule& m) { return !m.magnitude.empty(); });
  if (count > 0)
    note(common, common::text(path, ": ", count, " modules are DoRA's; what follows is about s*B*A, before the ",
                              "magnitudes"));
}

io::PeftAdapter read_adapter(const std::string& path) {
  io::PeftAdapter adapter = io::read_peft(path);
  expect_finite_factors(path, adapter);
  return adapter;
}

const std::string& checkpoint_path(const std::string& path) {
  std::error_code ignored;
  const auto has = [&](const char* name) { return fs::exists(fs::path(path) / name, ignored); };
  if (has("adapter_config.json") && !has("model.safetensors") && !has("model.safetensors.index.json"))
    throw IoError(path, "is an adapter, expected a checkpoint");
  return path;
}

std::string absolute_path(const std::string& path) {
  std::string text = fs::absolute(path).lexically_normal().string();
  while (text.size() > 1 && text.back() == '/') text.pop_back();
  return text;
}

std::string model_directory(const std::string& checkpoint) {
  std::error_code ignored;
  return fs::is_directory(checkpoint, ignored) ? checkpoint : fs::absolute(checkpoint).parent_path().string();
}

std::string changed_base_phrase(const io::ChangedBase& base, const std::string& it) {
  return "a base that was changed with " + it + " (" + (base.method.empty() ? "" : base.method + ", ") + base.kind +
         ")";
}

namespace {

constexpr std::uint64_t small_file = std::uint64_t(256) << 20;  // tokenizers have tens of megabytes

/// Not the weights of any framework, nor what would make the output pass for an adapter or carry the input's mark.
bool belongs_to_model(const fs::path& name) {
  static constexpr std::array<std::string_view, 13> weights{".safetensors", ".bin",  ".pt",    ".pth", ".ckpt",
                                                            ".gguf",        ".ggml", ".h5",    ".npz", ".npy",
                                                            ".msgpack",     ".onnx", ".tflite"};
  const std::string text = name.string(), extension = name.extension().string();
  return text[0] != '.' && !common::is_one_of(extension, weights) && !text.ends_with(".index.json") &&
         text.find(".partial-") == std::string::npos && text != "adapter_config.json" && text != io::changed_base_file;
}

/// The names that such files have beside a checkpoint that is one file among who knows what.
bool has_usual_name(const fs::path& name) {
  static constexpr std::array<std::string_view, 6> names{"config.json",       "generation_config.json",
                                                         "added_tokens.json", "special_tokens_map.json",
                                                         "vocab.json",        "merges.txt"};
  const std::string text = name.string();
  return common::is_one_of(text, names) ||
         (belongs_to_model(name) && (text.starts_with("tokenizer") || text.starts_with("chat_template")));
}

}  // namespace

bool stage_model_files(const std::string& checkpoint, const std::string& directory, io::StagedFiles& files,
                       const std::function<std::string(const std::string& path, std::string text)>& change) {
  std::error_code ignored;
  const bool whole = fs::is_directory(checkpoint, ignored);
  const fs::path from = model_directory(checkpoint);
  std::set<fs::path> names;
  for (const fs::directory_entry& e : fs::directory_iterator(from, ignored)) {
    const fs::path name = e.path().filename();
    if (!(whole ? belongs_to_model(name) : has_usual_name(name)) || !e.is_regular_file(ignored)) continue;
    if (e.file_size(ignored) <= small_file) names.insert(name);
  }
  const bool configured = names.contains("config.json");
  if (!whole && !configured) return false;
  for (const fs::path& name : names) {
    std::string text = io::read_text((from / name).string());
    const bool config = name == "config.json";  // without it a directory is no model
    if (config && change) text = change((from / name).string(), std::move(text));
    files.add_text((fs::path(directory) / name).string(), text, config);
  }
  return configured;
}

std::string number(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.4g", x);
  return buffer;
}

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// A PEFT adapter directory, read into plain factors and written from them.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <set>

#include "lowrank/io/changed_base.hpp"
#include "lowrank/io/detail/peft_targets.hpp"
#include "lowrank/io/peft_config.hpp"
#include "lowrank/io/safetensors.hpp"
#include "lowrank/io/safetensors_writer.hpp"
#include "lowrank/model/targets.hpp"

namespace lowrank::io {

/// One adapted module.
///
/// **Shapes** linear: A r×in, B out×r. Embedding: A r×vocab, B dim×r, ΔW = s·B·A is dim×vocab, the transpose of the
/// stored table. Convolution: A r×(Cin·kh·kw), B Cout×(r/groups), with the files' four-dimensional shapes beside them.
struct AdapterModule {
  std::string name;  ///< "model.layers.0.self_attn.q_proj"
  ModuleKind kind = ModuleKind::linear;
  LoraFactors<float> factors;
  Shape a_shape = {}, b_shape = {};   ///< as stored; filled in for conv, otherwise derived
  std::vector<float> magnitude = {};  ///< DoRA: row norms, length out; empty without
  std::vector<float> bias = {};       ///< of B, length out; empty without
  Dtype dtype = Dtype::F32;           ///< what the factors are stored as

  [[nodiscard]] Index parameters() const {
    return factors.A.size() + factors.B.size() + Index(magnitude.size()) + Index(bias.size());
  }
};

/// A tensor that travels with the adapter as it is: modules_to_save, trained biases.
struct SavedTensor {
  TensorSpec spec;  ///< its name without "base_model.model."
  std::vector<std::byte> bytes;
};

/// What an adapter directory holds.
struct PeftAdapter {
  PeftConfig config;
  std::vector<AdapterModule> modules;  ///< sorted by name
  std::vector<SavedTensor> saved;
  std::map<std::string, std::string> metadata;  ///< of adapter_model.safetensors, without what changed_base holds
  std::optional<ChangedBase> changed_base;      ///< set: the adapter is not one of the original weights

  [[nodiscard]] Index parameters() const {
    Index n = 0;
    for (const AdapterModule& m : modules) n += m.parameters();
    return n;
  }
  [[nodiscard]] const AdapterModule* find(std::string_view name) const {
    for (const AdapterModule& m : modules)
      if (m.name == name) return &m;
    return nullptr;
  }
};

/// The keys by which the metadata of adapter_model.safetensors holds ChangedBase; others ignore them.
inline constexpr const char *base_metadata_key = "lowrank_base", *original_metadata_key = "lowrank_original_base",
                            *weights_metadata_key = "lowrank_base_weights", *method_metadata_key = "lowrank_method";

namespace detail {

inline constexpr std::string_view peft_prefix = "base_model.model.";

/// The parts of a module, before they are put together.
struct PeftParts {
  std::optional<TensorView> a, b, magnitude, bias;
  bool embedding = false;
};

/// What a module and the settings of its configuration say against each other; empty when nothing. Reader and writer
/// ask this, so that what is written can be read.
inline std::string contradiction(const AdapterModule& m, const PeftConfig& c) {
  if (c.use_dora != !m.magnitude.empty())
    return c.use_dora ? "lacks lora_magnitude_vector, but use_dora is set"
                      : "has lora_magnitude_vector, but use_dora is not set";
  if (!m.bias.empty() && !c.lora_bias) return "has lora_B.bias, but lora_bias is not set";
  if (!m.bias.empty() && m.kind == ModuleKind::embedding)
    return "is an embedding with lora_B.bias, which PEFT does not have";
  const auto out = std::size_t(m.factors.B.rows());
  if (!m.magnitude.empty() && m.magnitude.size() != out)
    return lowrank::detail::text("has lora_magnitude_vector of ", m.magnitude.size(), " elements, expected ", out);
  if (!m.bias.empty() && m.bias.size() != out)
    return lowrank::detail::text("has lora_B.bias of ", m.bias.size(), " elements, expected ", out);
  return {};
}

inline AdapterModule assemble_module(const std::string& path, const std::string& name, const PeftParts& p,
                                     PeftScaling& scaling, const PeftConfig& config) {
  const auto fail = [&](const std::string& what) { throw IoError(path, name, what); };
  if (!p.a || !p.b)
    fail(p.a ? "has lora_A but no lora_B" : p.b ? "has lora_B but no lora_A" : "has neither lora_A nor lora_B");
  AdapterModule m;
  m.name = name;
  const std::size_t dims = p.a->shape().size();
  m.kind = p.embedding ? ModuleKind::embedding : dims == 4 ? ModuleKind::conv : ModuleKind::linear;
  if (p.b->shape().size() != dims || (dims != 2 && (dims != 4 || p.embedding)))
    fail(lowrank::detail::text("is of a kind that is not supported: lora_A ", io::shape_text(p.a->shape()), ", lora_B ",
                               io::shape_text(p.b->shape()), "; linear, embedding and 2-d convolution are"));
  for (const auto* t : {&*p.a, &*p.b})
    for (const auto extent : t->shape())
      if (extent == 0) fail("has an empty factor");
  if (m.kind == ModuleKind::conv) {
    m.a_shape = p.a->shape();
    m.b_shape = p.b->shape();
    if (m.b_shape[2] != 1 || m.b_shape[3] != 1)
      fail("convolution's lora_B must be 1x1, got " + io::shape_text(m.b_shape));
  }
  m.factors.A = p.a->folded<float>();
  m.factors.B = p.b->folded<float>();
  m.dtype = p.a->dtype() == Dtype::BF16 || p.a->dtype() == Dtype::F16 ? p.a->dtype() : Dtype::F32;
  if (p.b->dtype() != p.a->dtype()) m.dtype = Dtype::F32;
  const Index r = m.factors.A.rows(), width = m.factors.B.cols();
  const bool grouped = m.kind == ModuleKind::conv && width > 0 && r % width == 0;
  if (width != r && !grouped) fail(lowrank::detail::text("lora_A has rank ", r, ", lora_B has rank ", width));
  if (const Index want = scaling.rank(name); r != want)
    fail(lowrank::detail::text("has rank ", r, ", the configuration says ", want));
  m.factors.scale = float(scaling.scale(name));
  const auto finite = [&](const std::vector<float>& v, const char* what) {
    if (!std::all_of(v.begin(), v.end(), [](float x) { return std::isfinite(x); }))
      fail(lowrank::detail::text(what, " is not finite"));
  };
  if (p.magnitude) {
    if (p.magnitude->size() != m.factors.B.rows())
      fail(lowrank::detail::text("lora_magnitude_vector has ", p.magnitude->size(), " elements, expected ",
                                 m.factors.B.rows()));
    m.magnitude = p.magnitude->to_vector<float>();
    finite(m.magnitude, "lora_magnitude_vector");
  }
  if (p.bias) {
    if (p.bias->size() != m.factors.B.rows())
      fail(lowrank::detail::text("lora_B.bias has ", p.bias->size(), " elements, expected ", m.factors.B.rows()));
    m.bias = p.bias->to_vector<float>();
    finite(m.bias, "lora_B.bias");
  }
  if (const std::string wrong = contradiction(m, config); !wrong.empty()) fail(wrong);
  return m;
}

/// Whether a tensor that is no LoRA factor may accompany the adapter.
inline bool may_be_saved(const std::string& name, const PeftConfig& c) {
  const auto dot = name.rfind('.');
  if (dot == std::string::npos) return false;
  const std::string_view module = std::string_view(name).substr(0, dot), leaf = std::string_view(name).substr(dot + 1);
  // As PEFT does, by the end of the name alone: "norm" takes post_attention_layernorm too. What lies below counts.
  for (const std::string& saved : c.modules_to_save)
    for (auto end = module.find('.');; end = module.find('.', end + 1)) {
      if (module.substr(0, end).ends_with(saved)) return true;
      if (end == std::string_view::npos) break;
    }
  if (leaf == "bias" && c.bias != "none") return true;
  const auto last = lowrank::last_component(module);
  // PEFT saves a resized embedding and head beside the adapter; base_layer is what it calls a wrapped weight.
  return leaf == "weight" && (last == "embed_tokens" || last == "lm_head" || last == "base_layer");
}

/// Whether PEFT's initialiser of that name leaves the base as it is. Names that are not known may not.
inline bool keeps_base(const std::string& init_lora_weights) {
  for (const char* name : {"true", "false", "gaussian", "eva", "orthogonal", "mica"})
    if (init_lora_weights == name) return true;
  return false;
}

/// The mark of an adapter, wherever there is one; see read_peft().
inline std::optional<ChangedBase> find_changed_base(const std::string& directory, const std::string& path,
                                                    PeftAdapter& adapter) {
  std::optional<ChangedBase> stored;
  auto& metadata = adapter.metadata;
  if (const auto kind = metadata.find(base_metadata_key); kind != metadata.end()) {
    stored.emplace();
    stored->kind = kind->second;
    expect_kind(path, stored->kind);
    const auto value = [&](const char* key) { return metadata.contains(key) ? metadata.at(key) : std::string(); };
    stored->method = value(method_metadata_key);
    stored->original = value(original_metadata_key);
    if (const std::string text = value(weights_metadata_key); !text.empty()) {
      const Json json = parse_json(path, text);
      stored->weights = parse_fingerprints(JsonReader(path, json), json);
    }
    for (const char* key : {base_metadata_key, original_metadata_key, weights_metadata_key}) metadata.erase(key);
  }
  if (auto beside = read_changed_base(directory)) return beside;
  if (stored) return stored;
  if (auto of_base = read_changed_base(adapter.config.base_model_name_or_path)) return of_base;
  if (const std::string& method = adapter.config.init_lora_weights; !keeps_base(method))
    return ChangedBase{.kind = method == "loftq" ? "quantized" : "residual", .method = method};
  return std::nullopt;
}
}  // namespace detail

/// Reads a PEFT adapter directory.
///
/// `changed_base` is set when the adapter does not belong to the original weights. Looked for, in this order:
/// lowrank.json in the directory; the metadata of adapter_model.safetensors; lowrank.json in the directory that
/// base_model_name_or_path names (all that is left when PEFT saved a trained adapter elsewhere); an init_lora_weights
/// that makes PEFT change the base, in which case nothing is known of the changed weights.
/// `metadata` and `config` keep what is there otherwise.
///
/// **Throws** IoError naming file and tensor: no adapter there (adapter_model.bin is a pickle and not read); a tensor
/// whose name or layer kind is not known; a factor without its partner; ranks that differ between A, B and the
/// configuration; use_dora without magnitudes and the reverse; a bias without lora_bias; a module that target_modules,
/// exclude_modules or layers_to_transform leave out; integer factors; magnitudes or biases that are not finite; a mark
/// of a changed base that cannot be read.
/// **Cost** one pass over the file. **Numerics** factors are widened to float exactly (F64 rounds).
inline PeftAdapter read_peft(const std::string& directory) {
  namespace fs = std::filesystem;
  const auto in = [&](const char* name) { return (fs::path(directory) / name).string(); };
  std::error_code ignored;
  if (!fs::is_directory(directory, ignored)) throw IoError(directory, "is not an adapter directory");
  const std::string config_path = in("adapter_config.json"), path = in("adapter_model.safetensors");
  if (!fs::exists(path, ignored) && fs::exists(in("adapter_model.bin"), ignored))
    throw IoError(directory, "holds adapter_model.bin, a pickle, which is not read; save the adapter as safetensors");
  PeftAdapter adapter;
  adapter.config = parse_peft_config(config_path, read_text(config_path));
  const SafeTensors file(path);
  adapter.metadata = file.metadata();
  adapter.changed_base = detail::find_changed_base(directory, path, adapter);
  std::map<std::string, detail::PeftParts> parts;
  std::vector<std::string> unknown;
  for (const TensorInfo& t : file.tensors()) {
    const TensorView view = file.view(t);
    const std::string_view full = t.name;
    const bool prefixed = full.starts_with(detail::peft_prefix);
    const std::string name(prefixed ? full.substr(detail::peft_prefix.size()) : full);
    const auto take = [&](std::string_view suffix, auto member, bool embedding = false) {
      if (!prefixed || !name.ends_with(suffix) || name.size() == suffix.size()) return false;
      auto& p = parts[name.substr(0, name.size() - suffix.size())];
      if ((p.*member).has_value()) throw IoError(path, t.name, "names the same factor as another tensor");
      (p.*member).emplace(view);
      p.embedding = p.embedding || embedding;
      return true;
    };
    using P = detail::PeftParts;
    if (take(".lora_A.weight", &P::a) || take(".lora_B.weight", &P::b) || take(".lora_B.bias", &P::bias) ||
        take(".lora_embedding_A", &P::a, true) || take(".lora_embedding_B", &P::b, true) ||
        take(".lora_magnitude_vector", &P::magnitude) || take(".lora_magnitude_vector.weight", &P::magnitude))
      continue;
    if (prefixed && name.find("lora_") == std::string::npos && detail::may_be_saved(name, adapter.config)) {
      adapter.saved.push_back({{name, t.dtype, t.shape}, view.copied_bytes()});
      continue;
    }
    unknown.push_back(t.name);
  }
  if (!unknown.empty()) {
    std::string list;
    for (std::size_t i = 0; i < std::min<std::size_t>(unknown.size(), 5); ++i) list += (i > 0 ? ", " : "") + unknown[i];
    if (unknown.size() > 5) list += ", ...";
    throw IoError(path, lowrank::detail::text(unknown.size(), " of ", file.tensors().size(),
                                              " tensors are not known parts of a LoRA adapter: ", list));
  }
  if (parts.empty()) throw IoError(path, "holds no LoRA factors");
  try {
    PeftScaling scaling(adapter.config);
    const detail::PeftTargets targets(adapter.config);
    for (const auto& [name, p] : parts) {
      adapter.modules.push_back(detail::assemble_module(path, name, p, scaling, adapter.config));
      if (const std::string wrong = targets.contradiction(name, adapter.modules.back().kind); !wrong.empty())
        throw IoError(path, name, "has factors, but " + wrong);
    }
  } catch (const ArgumentError& e) {
    throw IoError(config_path, e.what());
  }
  return adapter;
}

/// Sets r, lora_alpha and the two patterns of `adapter.config` so that they describe the modules' ranks and scales.
///
/// The most common rank and alpha become the defaults; other modules are listed by name. use_rslora is kept.
/// **Numerics** alpha = s·r (or s·√r), snapped to an integer within 1e-6 so that a float scale gives back the alpha it
/// came from.
inline void describe_modules(PeftAdapter& adapter) {
  std::map<Index, int> ranks;
  std::map<double, int> alphas;
  std::vector<double> alpha_of;
  for (const AdapterModule& m : adapter.modules) {
    const auto r = double(m.factors.rank());
    double alpha = double(m.factors.scale) * (adapter.config.use_rslora ? std::sqrt(r) : r);
    if (const double nearest = std::round(alpha); std::abs(alpha - nearest) <= 1e-6 * std::abs(alpha)) alpha = nearest;
    alpha_of.push_back(alpha);
    ++ranks[m.factors.rank()];
    ++alphas[alpha];
  }
  if (alpha_of.empty()) return;
  const auto most = [](const auto& counts) {
    return std::max_element(counts.begin(), counts.end(),
                            [](const auto& a, const auto& b) { return a.second < b.second; })
        ->first;
  };
  const auto key = [](const std::string& name) {  // a pattern is an expression; dots may stay, they match themselves
    std::string s;
    for (const char ch : name) {
      if (std::string_view("\\^$*+?()[]{}|").find(ch) != std::string_view::npos) s += '\\';
      s += ch;
    }
    return s;
  };
  PeftConfig& c = adapter.config;
  c.r = most(ranks);
  c.lora_alpha = most(alphas);
  c.rank_pattern.clear();
  c.alpha_pattern.clear();
  for (std::size_t i = 0; i < adapter.modules.size(); ++i) {
    const AdapterModule& m = adapter.modules[i];
    if (m.factors.rank() != c.r) c.rank_pattern.emplace_back(key(m.name), m.factors.rank());
    if (alpha_of[i] != c.lora_alpha) c.alpha_pattern.emplace_back(key(m.name), alpha_of[i]);
  }
}

/// The last components of the modules' names, sorted: what `target_modules` lists when nothing else was given.
inline std::vector<std::string> module_suffixes(const PeftAdapter& adapter) {
  std::set<std::string> s;
  for (const AdapterModule& m : adapter.modules) s.emplace(lowrank::last_component(m.name));
  return {s.begin(), s.end()};
}

/// Writes the files of an adapter directory that PEFT loads, to be put in place by StagedFiles::commit():
/// adapter_model.safetensors, lowrank.json where changed_base is set (an old one goes otherwise), adapter_config.json.
///
/// Without adapter_config.json nobody takes the directory for an adapter: it is the key file of the set. The
/// configuration must describe the modules (describe_modules() makes it so). init_lora_weights is written as true
/// whatever `config` says: with the factors stored, any other value only makes PEFT change the base once more. Without
/// target_modules, module_suffixes() are written.
/// What is written, read_peft() reads, and it says the same.
/// **Throws** IoError as OutputFile; ArgumentError naming module and setting when the two contradict each other: a rank
/// or a scale that is not what the configuration says, magnitudes without use_dora or the reverse, a bias without
/// lora_bias, a module that target_modules, exclude_modules or layers_to_transform leave out; no modules, two of the
/// same name, a saved tensor that the configuration does not explain, shapes that do not go together, values that are
/// not finite.
/// **Numerics** factors are rounded to each module's dtype, to nearest even.
[[nodiscard]] inline StagedFiles stage_peft(const std::string& directory, const PeftAdapter& adapter) {
  namespace fs = std::filesystem;
  PeftConfig config = adapter.config;
  config.init_lora_weights = "true";
  if (config.target_modules.empty() && config.target_expression.empty())
    config.target_modules = module_suffixes(adapter);
  if (adapter.modules.empty()) throw ArgumentError("write_peft: the adapter has no modules");
  PeftScaling scaling(config);
  const detail::PeftTargets targets(config);
  std::set<std::string> names;
  std::vector<TensorSpec> specs;
  const auto full = [](const std::string& name, const char* suffix) {
    return std::string(detail::peft_prefix) + name + suffix;
  };
  const auto suffixes = [](ModuleKind k) {
    return k == ModuleKind::embedding ? std::pair(".lora_embedding_A", ".lora_embedding_B")
                                      : std::pair(".lora_A.weight", ".lora_B.weight");
  };
  for (const AdapterModule& m : adapter.modules) {
    const auto& f = m.factors;
    const auto fail = [&](const std::string& what) {
      throw ArgumentError("write_peft: module '" + m.name + "' " + what);
    };
    if (m.name.empty() || !names.insert(m.name).second) fail(m.name.empty() ? "has no name" : "is there twice");
    if (m.kind == ModuleKind::other) fail("is of no kind that PEFT adapts");
    const bool grouped = m.kind == ModuleKind::conv && f.B.cols() > 0 && f.A.rows() % f.B.cols() == 0;
    if (f.A.size() == 0 || f.B.size() == 0 || (f.A.rows() != f.B.cols() && !grouped))
      fail(lowrank::detail::text("has factors that do not go together: A ",
                                 lowrank::detail::shape_text(f.A.rows(), f.A.cols()), ", B ",
                                 lowrank::detail::shape_text(f.B.rows(), f.B.cols())));
    const auto expect_stored_as = [&](const char* what, const Matrix<float>& x, const Shape& shape) {
      const auto [rows, cols] = folded_extents(shape);
      if (m.kind == ModuleKind::conv ? shape.size() != 4 || rows != x.rows() || cols != x.cols() : !shape.empty())
        fail(lowrank::detail::text("has ", what, " ", io::shape_text(shape), ", which is not how a ",
                                   lowrank::detail::shape_text(x.rows(), x.cols()), " factor of ",
                                   m.kind == ModuleKind::conv ? "a convolution" : "a matrix", " is stored"));
    };
    expect_stored_as("a_shape", f.A, m.a_shape);
    expect_stored_as("b_shape", f.B, m.b_shape);
    if (m.kind == ModuleKind::conv && (m.b_shape[2] != 1 || m.b_shape[3] != 1))
      fail("is a convolution, whose b_shape must end in 1x1");
    if (std::string wrong = detail::contradiction(m, config); !wrong.empty()) fail(wrong);
    if (std::string wrong = targets.contradiction(m.name, m.kind); !wrong.empty()) fail(wrong);
    if (f.rank() != scaling.rank(m.name))
      fail(lowrank::detail::text("has rank ", f.rank(), ", the configuration says ", scaling.rank(m.name)));
    const double s = scaling.scale(m.name);
    if (!(std::abs(double(f.scale) - s) <= 1e-6 * std::abs(s)))
      fail(lowrank::detail::text("has scale ", double(f.scale), ", the configuration says ", s));
    for (const auto* x : {&f.A, &f.B})
      for (Index i = 0; i < x->size(); ++i)
        if (!std::isfinite(x->data()[i])) fail("has a factor that is not finite");
    for (const auto* v : {&m.magnitude, &m.bias})
      for (const float x : *v)
        if (!std::isfinite(x)) fail("has a magnitude or a bias that is not finite");
    const auto shape = [](const Matrix<float>& x, const Shape& stored) {
      return stored.empty() ? Shape{std::uint64_t(x.rows()), std::uint64_t(x.cols())} : stored;
    };
    const auto [a, b] = suffixes(m.kind);
    specs.push_back({full(m.name, a), m.dtype, shape(f.A, m.a_shape)});
    specs.push_back({full(m.name, b), m.dtype, shape(f.B, m.b_shape)});
    if (!m.magnitude.empty()) specs.push_back({full(m.name, ".lora_magnitude_vector"), m.dtype, {m.magnitude.size()}});
    if (!m.bias.empty()) specs.push_back({full(m.name, ".lora_B.bias"), m.dtype, {m.bias.size()}});
  }
  for (const SavedTensor& t : adapter.saved) {
    if (t.spec.name.find("lora_") != std::string::npos || !detail::may_be_saved(t.spec.name, config))
      throw ArgumentError("write_peft: the saved tensor '" + t.spec.name +
                          "' is neither of modules_to_save nor a bias that the setting bias means");
    specs.push_back({full(t.spec.name, ""), t.spec.dtype, t.spec.shape});
  }
  for (const AdapterModule& m : adapter.modules)
    if (m.dtype == Dtype::F16) {
      const auto row = [](const std::vector<float>& v) { return Matrix<float>(view_of(v.data(), 1, Index(v.size()))); };
      expect_f16_range(directory, m.name, m.factors.A);
      expect_f16_range(directory, m.name, m.factors.B);
      expect_f16_range(directory, m.name, row(m.magnitude));
      expect_f16_range(directory, m.name, row(m.bias));
    }
  std::error_code failed;
  fs::create_directories(directory, failed);
  if (failed) throw IoError(directory, "cannot create the directory: " + failed.message());
  auto metadata = adapter.metadata;
  metadata["format"] = "pt";  // PEFT's loader asks for it
  if (const auto& changed = adapter.changed_base) {
    metadata[base_metadata_key] = changed->kind;
    for (const auto& [key, value] :
         {std::pair(method_metadata_key, changed->method), std::pair(original_metadata_key, changed->original),
          std::pair(weights_metadata_key, changed->weights.empty() ? "" : Json(changed->weights).dump())})
      if (!value.empty()) metadata[key] = value;
  }
  SafeTensorsWriter out((fs::path(directory) / "adapter_model.safetensors").string(), std::move(specs), metadata);
  for (const AdapterModule& m : adapter.modules) {
    const auto [a, b] = suffixes(m.kind);
    const auto vector = [&](const char* suffix, const std::vector<float>& v) {
      if (!v.empty()) out.write_matrix(full(m.name, suffix), view_of(v.data(), 1, Index(v.size())));
    };
    out.write_matrix(full(m.name, a), m.factors.A.view());
    out.write_matrix(full(m.name, b), m.factors.B.view());
    vector(".lora_magnitude_vector", m.magnitude);
    vector(".lora_B.bias", m.bias);
  }
  for (const SavedTensor& t : adapter.saved) out.write(full(t.spec.name, ""), t.bytes);
  StagedFiles files;
  files.add(std::move(out).finish());
  const std::string mark = (fs::path(directory) / changed_base_file).string();
  if (adapter.changed_base)
    files.add_text(mark, changed_base_text(*adapter.changed_base));
  else
    files.remove(mark);
  files.add_text((fs::path(directory) / "adapter_config.json").string(), peft_config_text(config), true);
  return files;
}

/// stage_peft(), and the files put in place. **Throws** as stage_peft() and StagedFiles.
inline void write_peft(const std::string& directory, const PeftAdapter& adapter) {
  stage_peft(directory, adapter).commit();
}

}  // namespace lowrank::io

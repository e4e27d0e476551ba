// SPDX-License-Identifier: Apache-2.0
// lowrank inspect: what a checkpoint, an adapter or an array file holds.
#include <algorithm>
#include <filesystem>

#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/gguf.hpp"
#include "lowrank/io/npz.hpp"
#include "lowrank/io/peft.hpp"
#include "tool.hpp"

namespace lowrank::tool::inspect_command {
namespace {

struct Options {
  Common common;
  std::string path;
};

struct Report {
  Json json = Json::object();
  std::string text;
  Json tensors = Json::array();
  std::uint64_t bytes = 0, elements = 0;

  void add(const std::string& name, std::string_view type, std::span<const std::uint64_t> shape, std::uint64_t size) {
    std::uint64_t n = 1;
    for (const auto extent : shape) n *= extent;  // checked against the file when it was parsed
    bytes += size;
    elements += n;
    tensors.push_back({{"name", name}, {"dtype", type}, {"shape", shape}, {"bytes", size}});
    text += name + "  " + std::string(type) + " " + io::shape_text(shape) + "  " + size_text(size) + "\n";
  }
};

void finish(const Common& common, Report& r, const std::string& kind) {
  r.json["format"] = kind;
  r.json["parameters"] = r.elements;
  r.json["bytes"] = r.bytes;
  r.text += std::to_string(r.tensors.size()) + " tensors, " + std::to_string(r.elements) + " elements, " +
            size_text(r.bytes) + "\n";
  r.json["tensors"] = std::move(r.tensors);
  print(common, r.json, r.text);
}

void inspect_adapter(const Options& o) {
  const io::PeftAdapter a = io::read_peft(o.path);
  Json modules = Json::array();
  std::string text;
  for (const io::AdapterModule& m : a.modules) {
    const auto& f = m.factors;
    static constexpr const char* kinds[] = {"linear", "embedding", "conv", "other"};
    const char* kind = kinds[std::size_t(m.kind)];
    modules.push_back({{"name", m.name},
                       {"kind", kind},
                       {"rank", f.rank()},
                       {"scale", f.scale},
                       {"out", f.out_features()},
                       {"in", f.in_features()},
                       {"parameters", m.parameters()},
                       {"dora", !m.magnitude.empty()},
                       {"dtype", io::dtype_name(m.dtype)}});
    char scale[32];
    std::snprintf(scale, sizeof scale, "%.6g", double(f.scale));
    text += m.name + "  " + kind + " " + std::to_string(f.out_features()) + "x" + std::to_string(f.in_features()) +
            "  rank " + std::to_string(f.rank()) + "  scale " + scale + "\n";
  }
  const std::string base = a.changed_base ? a.changed_base->kind : "original";
  Json report = {{"format", "peft"},
                 {"rank", a.config.r},
                 {"alpha", a.config.lora_alpha},
                 {"rslora", a.config.use_rslora},
                 {"dora", a.config.use_dora},
                 {"target_modules", a.config.target_expression.empty() ? Json(a.config.target_modules)
                                                                       : Json(a.config.target_expression)},
                 {"base_model", a.config.base_model_name_or_path},
                 {"base", base},
                 {"init_method", a.changed_base ? Json(a.changed_base->method) : Json(nullptr)},
                 {"base_fingerprints", a.changed_base ? a.changed_base->weights.size() : 0},
                 {"parameters", a.parameters()},
                 {"saved_tensors", a.saved.size()},
                 {"unknown_config_keys", a.config.unknown_keys},
                 {"modules", std::move(modules)}};
  text += std::to_string(a.modules.size()) + " modules, " + std::to_string(a.parameters()) + " parameters, rank " +
          std::to_string(a.config.r) + (a.config.use_rslora ? ", rank-stabilised scale" : "") +
          (a.config.use_dora ? ", DoRA" : "") + (a.changed_base ? ", base: " + base : "") + "\n";
  for (const std::string& key : a.config.unknown_keys)
    note(o.common, "adapter_config.json: unknown key '" + key + "' ignored");
  print(o.common, report, text);
}

void run(const Options& o) {
  namespace fs = std::filesystem;
  Report r;
  std::error_code ignored;
  if (fs::is_directory(o.path, ignored) && fs::exists(fs::path(o.path) / "adapter_config.json", ignored))
    return inspect_adapter(o);
  if (o.path.ends_with(".npy")) {
    const io::NpyFile f(o.path);
    r.json["fortran_order"] = f->fortran_order();
    r.add(fs::path(o.path).stem().string(), io::dtype_name(f->dtype()), f->shape(), f->bytes().size());
    return finish(o.common, r, "npy");
  }
  if (o.path.ends_with(".npz")) {
    const io::NpzFile f(o.path);
    for (const auto& [name, array] : f.arrays())
      r.add(name, io::dtype_name(array.dtype()), array.shape(), array.bytes().size());
    return finish(o.common, r, "npz");
  }
  if (o.path.ends_with(".gguf")) {
    const io::MappedFile file(o.path);
    const io::GgufHeader h = io::parse_gguf(o.path, file.bytes());
    Json values = Json::object();
    for (const auto& [key, value] : h.values) {
      values[key] = io::gguf_value_text(value);
      r.text += key + " = " + io::gguf_value_text(value) + "\n";
    }
    r.json["values"] = std::move(values);
    for (const io::GgufTensor& t : h.tensors) {
      const std::vector<std::uint64_t> shape(t.ne.rbegin(), t.ne.rend());  // slowest first, as the others are shown
      r.add(t.name, io::gguf_type_name(t.type), shape, t.bytes);
    }
    return finish(o.common, r, "gguf");
  }
  const io::Checkpoint c(o.path);
  c.for_each([&](const io::TensorView& t) { r.add(t.name(), io::dtype_name(t.dtype()), t.shape(), t.bytes().size()); });
  r.json["shards"] = c.shard_count();
  Json metadata = Json::object();
  for (std::size_t i = 0; i < c.shard_count(); ++i)
    for (const auto& [key, value] : c.shard(i).metadata()) metadata[key] = value;
  r.json["metadata"] = std::move(metadata);
  finish(o.common, r, "safetensors");
}

void add_inspect(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = add_command(
      app, "inspect", "Names, shapes, types and sizes of a checkpoint, adapter, .gguf, .npy or .npz", o->common);
  sub->add_option("path", o->path, "File or directory")->required();
  sub->callback([o] { run(*o); });
}

const Registration registration{10, "inspect", add_inspect};

}  // namespace
}  // namespace lowrank::tool::inspect_command

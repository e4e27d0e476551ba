// SPDX-License-Identifier: Apache-2.0
// lowrank convert: an adapter between PEFT, llama.cpp's GGUF, and numpy's .npz.
#include <algorithm>
#include <filesystem>

#include "lowrank/io/gguf_adapter.hpp"
#include "lowrank/io/npz.hpp"
#include "models.hpp"
#include "outputs.hpp"

namespace lowrank::tool::convert_command {
namespace {
namespace fs = std::filesystem;

struct Options {
  Common common;
  std::string adapter, to, output, base, dtype = "f32";
  Index heads = 0, kv_heads = 0;
  bool changed_base = false, dry_run = false;
};

/// Architecture and head counts from the base's config.json: --base, else the directory the adapter names; --heads and
/// --kv-heads override it. Without one, the architecture is what a file to be read says, else Llama's.
io::GgufAdapterOptions gguf_settings(const Options& o, const std::string& named_base, bool reading) {
  io::GgufAdapterOptions g;
  if (reading) g.architecture.clear();
  if (!o.base.empty())
    g = io::gguf_options(io::read_model_config(o.base));
  else if (const auto config = io::find_model_config(named_base))
    g = io::gguf_options(*config);
  g.dtype = factor_dtype(o.dtype);
  if (o.heads > 0) {
    g.heads = o.heads;
    g.kv_heads = o.kv_heads > 0 ? o.kv_heads : o.heads;
  }
  return g;
}

void write_npz(const std::string& path, const io::PeftAdapter& adapter, const std::string& dtype) {
  io::NpzWriter out(path);
  const auto add = [&](const std::string& name, const Matrix<float>& factor) {
    if (dtype == "f32") return out.add(name, factor);
    io::expect_f16_range(path, name, factor);
    Matrix<f16> narrow(factor.rows(), factor.cols());
    std::transform(factor.data(), factor.data() + factor.size(), narrow.data(), [](float x) { return f16(x); });
    out.add(name, narrow);
  };
  for (const io::AdapterModule& m : adapter.modules) {
    add(m.name + ".lora_A", m.factors.A);
    add(m.name + ".lora_B", m.factors.B);
    out.add(m.name + ".scale", std::span<const float>(&m.factors.scale, 1));
    if (!m.magnitude.empty()) out.add(m.name + ".magnitude", std::span<const float>(m.magnitude));
    if (!m.bias.empty()) out.add(m.name + ".bias", std::span<const float>(m.bias));
  }
  out.commit();
}

void run(const Options& o) {
  if (o.to == "npz" && o.dtype == "bf16")
    throw UsageError("convert: --dtype bf16: numpy has no such type; --to npz takes f32 or f16");
  expect_different(o.adapter, o.output);
  if (o.to == "peft")
    expect_no_changed_base(o.output);
  else
    expect_writable(o.output);
  if (!o.base.empty()) expect_different(o.base, o.output);
  io::PeftAdapter adapter;
  if (o.adapter.ends_with(".gguf"))
    adapter = io::read_gguf_adapter(o.adapter, gguf_settings(o, {}, true));
  else
    adapter = io::read_peft(o.adapter);
  const std::optional<io::ChangedBase> mark = adapter.changed_base;
  if (mark && o.to == "gguf") {
    if (!o.changed_base)
      throw IoError(o.adapter, "stands on " + changed_base_phrase(*mark) + "; " +
                                   (mark->kind == "residual" ? "`undo` it first, or " : "") + "say " +
                                   changed_base_flag + " if llama.cpp gets that base too");
    adapter.changed_base.reset();
  }
  expect_finite_factors(o.adapter, adapter);
  std::optional<io::GgufWriter> gguf;
  if (o.to == "gguf") gguf = io::gguf_adapter(adapter, gguf_settings(o, adapter.config.base_model_name_or_path, false));
  if (o.to == "npz" && !adapter.saved.empty())
    throw IoError(o.adapter, adapter.saved[0].spec.name,
                  "is a whole tensor saved with the adapter, which the .npz form does not hold");
  throw_if_interrupted();
  if (!o.dry_run) {
    remove_leftovers(o.common, {o.output});
    std::optional<NewDirectories> made;
    if (o.to == "peft") made.emplace(o.output);
    const Finishing finishing;
    if (gguf) {
      gguf->write(o.output);
    } else if (o.to == "npz") {
      write_npz(o.output, adapter, o.dtype);
    } else {
      for (io::AdapterModule& m : adapter.modules) {
        if (o.dtype != "f32") m.dtype = factor_dtype(o.dtype);
        round_factors(m.factors, m.dtype);
      }
      if (!o.base.empty()) adapter.config.base_model_name_or_path = base_name(o.base);
      io::write_peft(o.output, adapter);
    }
  }
  if (mark && o.to == "npz")
    note(o.common, "the adapter stands on " + changed_base_phrase(*mark) + ", which the .npz does not say");
  const Json report = {{"command", "convert"},
                       {"to", o.to},
                       {"modules", adapter.modules.size()},
                       {"parameters", adapter.parameters()},
                       {"output", o.output},
                       {"dry_run", o.dry_run}};
  print(o.common, report,
        std::to_string(adapter.modules.size()) + " modules; " + (o.dry_run ? "would write " : "wrote ") + o.output +
            "\n");
}

void add_convert(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = add_command(app, "convert", "An adapter as PEFT directory, GGUF for llama.cpp, or .npz", o->common);
  sub->add_option("adapter", o->adapter, "PEFT directory, or .gguf")->required();
  sub->add_option("--to", o->to, "peft, gguf or npz")->required()->check(CLI::IsMember({"peft", "gguf", "npz"}));
  sub->add_option("-o,--output", o->output, "Directory (peft) or file to write")->required();
  sub->add_option(
      "--base", o->base,
      "gguf: directory with the base's config.json, for the head counts; peft: the base to name in the result");
  sub->add_option("--heads", o->heads, "Attention heads, instead of what config.json says")->check(count());
  sub->add_option("--kv-heads", o->kv_heads, "Key-value heads; default: as --heads")->check(count());
  sub->add_option("--dtype", o->dtype, "Type of the written factors")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "f16", "bf16"}));
  sub->add_flag(changed_base_flag, o->changed_base,
                "gguf: llama.cpp's base is made from the one that was changed with the adapter (PiSSA, LoftQ, ...)");
  sub->add_flag("--dry-run", o->dry_run, "Check everything, write nothing");
  sub->callback([o, sub] {
    // Rows of q_proj and k_proj are permuted in a GGUF: whoever reads or writes one has to know the heads.
    const bool gguf = o->to == "gguf", heads = gguf || o->adapter.ends_with(".gguf");
    const std::string to = "with --to " + o->to, for_heads = "it gives the head counts that a .gguf is permuted by";
    expect_used(sub,
                {{"--heads", heads, to, for_heads},
                 {"--kv-heads", heads, to, for_heads},
                 {"--kv-heads", o->heads > 0, "without --heads", "the two come together"},
                 {"--base", heads || o->to == "peft", to, "it is for peft, and for the names and heads of a .gguf"},
                 {changed_base_flag, gguf, to, "it says which base llama.cpp gets"}});
    run(*o);
  });
}

const Registration registration{57, "convert", add_convert};

}  // namespace
}  // namespace lowrank::tool::convert_command

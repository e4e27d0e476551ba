// SPDX-License-Identifier: Apache-2.0
// A LoRA adapter as llama.cpp loads it: names, the q/k permutation, and one alpha for all, translated both ways.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "lowrank/io/detail/gguf_names.hpp"
#include "lowrank/io/gguf.hpp"
#include "lowrank/io/llama_config.hpp"
#include "lowrank/io/model_config.hpp"
#include "lowrank/io/peft.hpp"

namespace lowrank::io {

/// What the base of a GGUF adapter is. llama.cpp orders the rows of some weights by head, so that their adapters must
/// be too: of q_proj and k_proj of its Llama architecture (Mistral's too) in interleaved pairs, of the fused weights of
/// GPT-NeoX, BLOOM and Falcon queries, keys, values. Other architectures keep the rows as they are.
struct GgufAdapterOptions {
  std::string architecture = "llama";  ///< general.architecture; one of gguf_adapter_architectures()
  Index heads = 0, kv_heads = 0;       ///< needed when such rows are adapted
  Dtype dtype = Dtype::F32;            ///< of the tensors: F32, F16 or BF16
  bool tied_head = false;              ///< the base has no output head of its own
};

/// The architectures whose adapters are translated: "llama, qwen2, ...".
inline std::string gguf_adapter_architectures() { return detail::gguf_architecture_names(); }

/// The options a Llama config implies.
inline GgufAdapterOptions gguf_options(const LlamaConfig& c, Dtype dtype = Dtype::F32) {
  return {"llama", c.num_attention_heads, c.num_key_value_heads, dtype, c.tie_word_embeddings};
}

/// The options a config.json of any family implies.
///
/// **Throws** IoError naming the file: a model_type that is missing or not known, or one that llama.cpp has no adapters
/// for.
inline GgufAdapterOptions gguf_options(const ModelConfig& c, Dtype dtype = Dtype::F32) {
  const ModelFamily* family = c.family();
  if (family == nullptr || family->gguf_architecture.empty()) {
    std::string known;
    for (const ModelFamily& f : model_families())
      if (!f.gguf_architecture.empty()) known += (known.empty() ? "" : ", ") + std::string(f.model_type);
    throw IoError(c.path, "model_type",
                  (c.model_type.empty() ? "is missing" : "is \"" + c.model_type + "\"") +
                      ", of which no adapter in GGUF is known; known are " + known);
  }
  return {std::string(family->gguf_architecture), c.heads, c.kv_heads, dtype, c.tied_head};
}

namespace detail {

inline Matrix<float> transposed(const Matrix<float>& m) { return Matrix<float>(m.view().transposed()); }

inline const GgufArchitecture& gguf_architecture(const std::string& name) {
  const GgufArchitecture* a = find_gguf_architecture(name);
  if (a == nullptr)
    throw ArgumentError("GGUF adapter: the architecture \"" + name + "\" is not known; known are " +
                        gguf_architecture_names());
  return *a;
}

inline std::uint32_t gguf_type_of(Dtype d) {
  switch (d) {
    case Dtype::F32:
      return gguf_type::f32;
    case Dtype::F16:
      return gguf_type::f16;
    case Dtype::BF16:
      return gguf_type::bf16;
    default:
      throw ArgumentError(lowrank::detail::text("GGUF adapter: tensors must be F32, F16 or BF16, got ", dtype_name(d)));
  }
}

/// The values of a GGUF tensor as floats. **Throws** IoError for block types other than Q8_0.
inline std::vector<float> gguf_floats(const std::string& path, const GgufTensor& t, const std::byte* data) {
  const auto* info = find_gguf_type(t.type);
  std::vector<float> out(static_cast<std::size_t>(t.bytes / info->bytes * info->elements));
  const auto n = Index(out.size());
  if (t.type == gguf_type::f32)
    convert_from(Dtype::F32, data, n, out.data());
  else if (t.type == gguf_type::f16)
    convert_from(Dtype::F16, data, n, out.data());
  else if (t.type == gguf_type::bf16)
    convert_from(Dtype::BF16, data, n, out.data());
  else if (t.type == gguf_type::q8_0)
    for (std::size_t b = 0; b < out.size() / 32; ++b) {
      const std::byte* block = data + b * 34;
      const float d = load_unaligned<f16>(block);
      for (std::size_t i = 0; i < 32; ++i) out[b * 32 + i] = d * float(load_unaligned<std::int8_t>(block + 2 + i));
    }
  else
    throw IoError(path, t.name,
                  lowrank::detail::text("is stored as ", info->name, ", expected F32, F16, BF16 or Q8_0"));
  return out;
}
}  // namespace detail

/// Builds the GGUF file of an adapter.
///
/// llama.cpp scales a pair by alpha/r with one alpha for the whole file and r that tensor's rank: alpha is taken from
/// the configuration (times √r under rank-stabilised scaling), and what other modules' scales differ by is folded into
/// their B. Embedding adapters store Aᵀ as the loader asks.
/// **Throws** ArgumentError: a module without a counterpart in llama.cpp, convolutions, DoRA magnitudes, biases and
/// saved tensors (llama.cpp would ignore them), an adapted head where the base's is tied to the embedding, rows ordered
/// by heads without matching head counts, an architecture that is not known, an adapter that stands on a changed base
/// (convert it with undo_residual first) or on a quantised one.
inline GgufWriter gguf_adapter(const PeftAdapter& adapter, const GgufAdapterOptions& o) {
  const auto fail = [](const std::string& module, const std::string& what) {
    throw ArgumentError("gguf_adapter: " + (module.empty() ? "the adapter" : "module '" + module + "'") + " " + what);
  };
  const detail::GgufArchitecture& architecture = detail::gguf_architecture(o.architecture);
  if (adapter.changed_base)
    fail("", "stands on a base that was changed with it (" + adapter.changed_base->kind +
                 "); undo that first, llama.cpp has the original");
  if (!adapter.saved.empty())
    fail("", "brings whole tensors ('" + adapter.saved[0].spec.name + "'), which llama.cpp does not load");
  if (adapter.modules.empty()) fail("", "has no modules");
  const auto r = double(adapter.config.r);
  const double alpha = adapter.config.use_rslora ? adapter.config.lora_alpha * std::sqrt(r) : adapter.config.lora_alpha;
  if (!(alpha > 0)) fail("", "has alpha 0, which llama.cpp takes for \"unscaled\"");
  GgufWriter out;
  out.set("general.type", std::string("adapter"));
  out.set("general.architecture", o.architecture);
  out.set("adapter.type", std::string("lora"));
  out.set("adapter.lora.alpha", float(alpha));
  const std::uint32_t type = detail::gguf_type_of(o.dtype);
  const auto pack = [&](const Matrix<float>& m) {
    std::string bytes(std::size_t(m.size()) * dtype_bits(o.dtype) / 8, '\0');
    convert_to(o.dtype, m.data(), m.size(), reinterpret_cast<std::byte*>(bytes.data()));
    return bytes;
  };
  const auto add = [&](const std::string& name, const Matrix<float>& m) {
    if (o.dtype == Dtype::F16) expect_f16_range("GGUF adapter", name, m);
    out.add(name, type, {std::uint64_t(m.cols()), std::uint64_t(m.rows())}, pack(m));
  };
  for (const AdapterModule& m : adapter.modules) {
    const auto [name, rows] = detail::gguf_counterpart(architecture, m.name, true);
    if (name.empty()) fail(m.name, "has no counterpart in llama.cpp's architecture \"" + o.architecture + "\"");
    if (m.kind == ModuleKind::conv || m.kind == ModuleKind::other) fail(m.name, "is a convolution, llama.cpp has none");
    if (name == "output" && o.tied_head)
      fail(m.name, "is the embedding in the base (tie_word_embeddings), so that llama.cpp has no weight to add it to");
    if ((m.kind == ModuleKind::embedding) != (name == "token_embd")) fail(m.name, "is of the wrong kind for its name");
    if (!m.magnitude.empty()) fail(m.name, "uses DoRA, which llama.cpp does not; merge it instead");
    if (!m.bias.empty()) fail(m.name, "has a bias on lora_B, which llama.cpp does not load");
    const auto& f = m.factors;
    Matrix<float> B = f.B;
    const double applied = alpha / double(f.rank()), fold = double(f.scale) / applied;
    if (std::abs(fold - 1) > 1e-6)
      for (Index i = 0; i < B.size(); ++i) B.data()[i] = float(double(B.data()[i]) * fold);
    if (const std::string wrong = detail::gguf_rows_problem(rows, B.rows(), o.heads, o.kv_heads); !wrong.empty())
      fail(m.name, wrong);
    if (rows != detail::GgufRows::as_is) B = detail::arranged_rows(B, rows, o.heads, o.kv_heads, true);
    const std::string tensor = name + ".weight";
    if (tensor.size() + 7 >= 64) fail(m.name, "has a name too long for GGUF");
    add(tensor + ".lora_a", m.kind == ModuleKind::embedding ? detail::transposed(f.A) : f.A);
    add(tensor + ".lora_b", B);
  }
  return out;
}

/// Reads a GGUF adapter back into plain factors, with Hugging Face's names.
///
/// An empty `o.architecture` means whatever the file says.
/// **Throws** IoError as parse_gguf, and: not a LoRA adapter, another architecture than `o.architecture` or one that is
/// not known, a tensor that is neither `.lora_a` nor `.lora_b` of a known weight, a factor without its partner, shapes
/// that do not multiply, missing head counts where rows are ordered by heads.
inline PeftAdapter parse_gguf_adapter(const std::string& path, Bytes file, const GgufAdapterOptions& o) {
  const GgufHeader h = parse_gguf(path, file);
  const auto expect = [&](const char* key, const std::string& value) {
    const GgufValue* v = h.find(key);
    const auto* s = v == nullptr ? nullptr : std::get_if<std::string>(v);
    if (s == nullptr || *s != value)
      throw IoError(path, key, "must be \"" + value + "\", got " + (v == nullptr ? "nothing" : gguf_value_text(*v)));
  };
  expect("general.type", "adapter");
  expect("adapter.type", "lora");
  if (!o.architecture.empty()) expect("general.architecture", o.architecture);
  const GgufValue* said = h.find("general.architecture");
  const auto* name_said = said == nullptr ? nullptr : std::get_if<std::string>(said);
  const detail::GgufArchitecture* architecture =
      name_said == nullptr ? nullptr : detail::find_gguf_architecture(*name_said);
  if (architecture == nullptr)
    throw IoError(path, "general.architecture",
                  "is " + (said == nullptr ? "missing" : gguf_value_text(*said)) + ", known are " +
                      detail::gguf_architecture_names());
  double alpha = 0;
  if (const GgufValue* v = h.find("adapter.lora.alpha")) {
    const auto* f = std::get_if<float>(v);
    if (f == nullptr || !std::isfinite(*f)) throw IoError(path, "adapter.lora.alpha", "must be a finite f32");
    alpha = double(*f);
  }
  std::map<std::string, std::pair<const GgufTensor*, const GgufTensor*>> pairs;
  for (const GgufTensor& t : h.tensors) {
    const bool a = t.name.ends_with(".weight.lora_a"), b = t.name.ends_with(".weight.lora_b");
    if ((!a && !b) || t.ne.size() != 2) throw IoError(path, t.name, "is not a two-dimensional lora_a or lora_b");
    auto& pair = pairs[t.name.substr(0, t.name.size() - std::string_view(".weight.lora_a").size())];
    (a ? pair.first : pair.second) = &t;
  }
  if (pairs.empty()) throw IoError(path, "holds no LoRA factors");
  PeftAdapter adapter;
  for (const auto& [name, pair] : pairs) {
    if (pair.first == nullptr || pair.second == nullptr) throw IoError(path, name, "has only one of lora_a and lora_b");
    AdapterModule m;
    const auto [hf_name, rows] = detail::gguf_counterpart(*architecture, name, false);
    m.name = hf_name;
    if (m.name.empty())
      throw IoError(path, name, "is not a weight of the architecture \"" + std::string(architecture->name) + "\"");
    m.kind = name == "token_embd" ? ModuleKind::embedding : ModuleKind::linear;
    const auto matrix = [&](const GgufTensor& t) {
      for (const auto n : t.ne)
        if (n == 0) throw IoError(path, t.name, "is empty");
      Matrix<float> x;
      const auto values = detail::gguf_floats(path, t, file.data() + h.data_offset + t.offset);
      x.resize(Index(t.ne[1]), Index(t.ne[0]));
      std::copy(values.begin(), values.end(), x.data());
      return x;
    };
    auto& f = m.factors;
    f.A = matrix(*pair.first);
    f.B = matrix(*pair.second);
    if (m.kind == ModuleKind::embedding) f.A = detail::transposed(f.A);
    if (f.A.rows() != f.B.cols())
      throw IoError(path, name,
                    lowrank::detail::text("lora_a has rank ", f.A.rows(), ", lora_b has rank ", f.B.cols()));
    if (const std::string wrong = detail::gguf_rows_problem(rows, f.B.rows(), o.heads, o.kv_heads); !wrong.empty())
      throw IoError(path, name, wrong);
    if (rows != detail::GgufRows::as_is) f.B = detail::arranged_rows(f.B, rows, o.heads, o.kv_heads, false);
    f.scale = alpha == 0 ? 1.0F : float(alpha / double(f.rank()));
    m.dtype = pair.first->type == gguf_type::f16    ? Dtype::F16
              : pair.first->type == gguf_type::bf16 ? Dtype::BF16
                                                    : Dtype::F32;
    adapter.modules.push_back(std::move(m));
  }
  std::sort(adapter.modules.begin(), adapter.modules.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  adapter.config.target_modules = module_suffixes(adapter);
  describe_modules(adapter);
  return adapter;
}

/// A GGUF adapter file. **Throws** as parse_gguf_adapter.
inline PeftAdapter read_gguf_adapter(const std::string& path, const GgufAdapterOptions& o) {
  const MappedFile file(path);
  std::vector<std::byte> bytes(file.bytes().size());  // read, not touched where it is mapped: see MappedFile
  file.read(file.bytes(), bytes.data());
  return parse_gguf_adapter(path, bytes, o);
}

}  // namespace lowrank::io

// SPDX-License-Identifier: Apache-2.0
// A LoRA adapter as llama.cpp loads it: names, the q/k permutation, and one alpha for all, translated both ways.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "lowrank/io/gguf.hpp"
#include "lowrank/io/llama_config.hpp"
#include "lowrank/io/peft.hpp"

namespace lowrank::io {

/// What the base of a GGUF adapter is. llama.cpp lays the rows of q_proj and k_proj of Llama-architecture models out in
/// interleaved pairs, so that their adapters must be permuted by head.
struct GgufAdapterOptions {
  std::string architecture = "llama";
  Index heads = 0, kv_heads = 0;  ///< needed when q_proj or k_proj is adapted
  Dtype dtype = Dtype::F32;       ///< of the tensors: F32, F16 or BF16
  bool tied_head = false;         ///< the base has no output head of its own
};

/// The options a Llama config implies.
inline GgufAdapterOptions gguf_options(const LlamaConfig& c, Dtype dtype = Dtype::F32) {
  return {"llama", c.num_attention_heads, c.num_key_value_heads, dtype, c.tie_word_embeddings};
}

namespace detail {

struct GgufNamePair {
  std::string_view hf, gguf;
};
inline constexpr GgufNamePair gguf_layer_names[] = {{"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"},
                                                    {"self_attn.v_proj", "attn_v"}, {"self_attn.o_proj", "attn_output"},
                                                    {"mlp.gate_proj", "ffn_gate"},  {"mlp.up_proj", "ffn_up"},
                                                    {"mlp.down_proj", "ffn_down"}};
inline constexpr GgufNamePair gguf_model_names[] = {{"model.embed_tokens", "token_embd"}, {"lm_head", "output"}};

inline bool is_number(std::string_view s) {
  return !s.empty() && s.size() < 9 && s.find_first_not_of("0123456789") == std::string_view::npos;
}

/// "model.layers.3.self_attn.q_proj" ↔ "blk.3.attn_q"; empty when there is no counterpart.
inline std::string translate_name(std::string_view name, bool to_gguf) {
  const auto from = [&](const GgufNamePair& p) { return to_gguf ? p.hf : p.gguf; };
  const auto to = [&](const GgufNamePair& p) { return std::string(to_gguf ? p.gguf : p.hf); };
  for (const GgufNamePair& p : gguf_model_names)
    if (name == from(p)) return to(p);
  const std::string_view prefix = to_gguf ? "model.layers." : "blk.";
  if (!name.starts_with(prefix)) return {};
  const std::string_view rest = name.substr(prefix.size());
  const auto dot = rest.find('.');
  if (dot == std::string_view::npos || !is_number(rest.substr(0, dot))) return {};
  for (const GgufNamePair& p : gguf_layer_names)
    if (rest.substr(dot + 1) == from(p))
      return std::string(to_gguf ? "blk." : "model.layers.") + std::string(rest.substr(0, dot)) + "." + to(p);
  return {};
}

/// Row i of the permuted matrix is row `permuted_row(i)` of the original: within each head of 2h rows, the halves (two
/// blocks of h, as Hugging Face rotates) become pairs (as llama.cpp rotates).
inline Index permuted_row(Index i, Index rows, Index heads, bool to_gguf) {
  const Index per_head = rows / heads, half = per_head / 2, head = i / per_head, j = i % per_head;
  return head * per_head + (to_gguf ? (j % 2) * half + j / 2 : (j % half) * 2 + j / half);
}

inline Matrix<float> permute_rows(const Matrix<float>& B, Index heads, bool to_gguf) {
  Matrix<float> out;
  out.resize(B.rows(), B.cols());
  for (Index i = 0; i < B.rows(); ++i) {
    const Index from = permuted_row(i, B.rows(), heads, to_gguf);
    std::copy_n(&B(from, 0), B.cols(), &out(i, 0));
  }
  return out;
}

inline Matrix<float> transposed(const Matrix<float>& m) { return Matrix<float>(m.view().transposed()); }

inline Index heads_of(const std::string& gguf_name, const GgufAdapterOptions& o) {
  if (o.architecture != "llama") return 0;
  if (gguf_name.ends_with(".attn_q")) return o.heads;
  if (gguf_name.ends_with(".attn_k")) return o.kv_heads;
  return -1;  // no permutation
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
/// saved tensors (llama.cpp would ignore them), an adapted head where the base's is tied to the embedding, q_proj or
/// k_proj without matching head counts, an adapter that stands
/// on a changed base (convert it with undo_residual first) or on a quantised one.
inline GgufWriter gguf_adapter(const PeftAdapter& adapter, const GgufAdapterOptions& o) {
  const auto fail = [](const std::string& module, const std::string& what) {
    throw ArgumentError("gguf_adapter: " + (module.empty() ? "the adapter" : "module '" + module + "'") + " " + what);
  };
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
    if (o.dtype == Dtype::F16) detail::expect_f16_range("GGUF adapter", name, m);
    out.add(name, type, {std::uint64_t(m.cols()), std::uint64_t(m.rows())}, pack(m));
  };
  for (const AdapterModule& m : adapter.modules) {
    const std::string name = detail::translate_name(m.name, true);
    if (name.empty()) fail(m.name, "has no counterpart in llama.cpp's Llama models");
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
    if (const Index heads = detail::heads_of(name, o); heads >= 0) {
      if (heads == 0 || B.rows() % (2 * heads) != 0)
        fail(m.name, lowrank::detail::text("has ", B.rows(), " rows, which ", heads,
                                           " heads do not divide into pairs; give the base's config.json"));
      B = detail::permute_rows(B, heads, true);
    }
    const std::string tensor = name + ".weight";
    if (tensor.size() + 7 >= 64) fail(m.name, "has a name too long for GGUF");
    add(tensor + ".lora_a", m.kind == ModuleKind::embedding ? detail::transposed(f.A) : f.A);
    add(tensor + ".lora_b", B);
  }
  return out;
}

/// Reads a GGUF adapter back into plain factors, with Hugging Face's names.
///
/// **Throws** IoError as parse_gguf, and: not a LoRA adapter, another architecture than `o.architecture`, a tensor that
/// is neither `.lora_a` nor `.lora_b` of a known weight, a factor without its partner, shapes that do not multiply,
/// missing head counts for q_proj or k_proj.
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
  expect("general.architecture", o.architecture);
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
    m.name = detail::translate_name(name, false);
    if (m.name.empty()) throw IoError(path, name, "is not a weight of a Llama model");
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
    if (const Index heads = detail::heads_of(name, o); heads >= 0) {
      if (heads == 0 || f.B.rows() % (2 * heads) != 0)
        throw IoError(path, name,
                      lowrank::detail::text("has ", f.B.rows(), " rows, which ", heads,
                                            " heads do not divide into pairs; give the base's "
                                            "config.json or the number of heads"));
      f.B = detail::permute_rows(f.B, heads, false);
    }
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
  return parse_gguf_adapter(path, file.bytes(), o);
}

}  // namespace lowrank::io

// SPDX-License-Identifier: Apache-2.0
// GGUF: every value type round-trips, every length is checked; adapters keep their meaning through names and
// permutations.
#include "lowrank/io/gguf.hpp"

#include "lowrank/io/gguf_adapter.hpp"
#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;

namespace {
GgufHeader parsed_gguf(const std::string& s) { return parse_gguf("a.gguf", bytes_of(s)); }

template <class T>
std::string le(T x) {
  return {reinterpret_cast<const char*>(&x), sizeof x};
}
std::string str(const std::string& s) { return le<std::uint64_t>(s.size()) + s; }
std::string front(std::uint64_t tensors, std::uint64_t values, std::uint32_t version = 3) {
  return "GGUF" + le(version) + le(tensors) + le(values);
}
std::string info(const std::string& name, std::vector<std::uint64_t> ne, std::uint32_t type, std::uint64_t offset) {
  std::string s = str(name) + le<std::uint32_t>(std::uint32_t(ne.size()));
  for (const auto n : ne) s += le(n);
  return s + le(type) + le(offset);
}
/// Header, padded to 32, then data.
std::string file(const std::string& header, const std::string& data) {
  return header + std::string((32 - header.size() % 32) % 32, '\0') + data;
}

AdapterModule module(const std::string& name, Index out, Index in, Index r, double alpha, bool rslora,
                     std::uint64_t seed) {
  AdapterModule m;
  m.name = name;
  m.factors.A = random_matrix(r, in, seed);
  m.factors.B = random_matrix(out, r, seed + 1);
  m.factors.scale = float(rslora ? rslora_scale(alpha, r) : lora_scale(alpha, r));
  return m;
}

/// s·B·A in double.
Matrix<double> delta(const LoraFactors<float>& f) {
  Matrix<double> d(f.out_features(), f.in_features());
  for (Index i = 0; i < d.rows(); ++i)
    for (Index j = 0; j < d.cols(); ++j) {
      double x = 0;
      for (Index k = 0; k < f.rank(); ++k) x += double(f.B(i, k)) * double(f.A(k, j));
      d(i, j) = double(f.scale) * x;
    }
  return d;
}
}  // namespace

TEST_CASE("every kind of value and tensor survives") {
  GgufWriter w;
  const std::vector<std::pair<std::string, GgufValue>> values{{"u8", std::uint8_t(200)},
                                                              {"i8", std::int8_t(-3)},
                                                              {"u16", std::uint16_t(60000)},
                                                              {"i16", std::int16_t(-300)},
                                                              {"u32", 4000000000U},
                                                              {"i32", -5},
                                                              {"u64", std::uint64_t(1) << 63},
                                                              {"i64", std::int64_t(-1) << 40},
                                                              {"f32", 1.5F},
                                                              {"f64", 2.25},
                                                              {"b", true},
                                                              {"s", std::string("\xc3\xa9\n")},
                                                              {"ss", std::vector<std::string>{"", "x"}},
                                                              {"a", GgufArray{GgufKind::i32, le(-1) + le(7)}},
                                                              {"empty", GgufArray{GgufKind::f64, ""}}};
  for (const auto& [key, value] : values) w.set(key, value);
  w.add("t.f32", gguf_type::f32, {3, 2}, std::string(24, '\1'));
  w.add("t.q8", gguf_type::q8_0, {64}, std::string(68, '\2'));
  w.add("t.f16", gguf_type::f16, {1}, "ab");
  const std::string bytes = w.bytes();
  const GgufHeader h = parsed_gguf(bytes);
  CHECK(h.values == values);
  REQUIRE(h.tensors.size() == 3);
  CHECK(h.tensors[1].offset == 32);
  CHECK(h.tensors[2].offset == 128);
  CHECK(h.data_offset % 32 == 0);
  CHECK(bytes.substr(h.data_offset + h.tensors[2].offset, 2) == "ab");
  check_error<ArgumentError>([&] { w.set("u8", 1U); }, {"u8", "twice"});
  check_error<ArgumentError>([&] { w.add("t.f32", gguf_type::f32, {1}, "abcd"); }, {"twice"});
  check_error<ArgumentError>([&] { w.add("x", gguf_type::f32, {1}, "abc"); }, {"3 bytes"});
  check_error<ArgumentError>([&] { w.add(std::string(64, 'x'), gguf_type::f32, {1}, "abcd"); }, {"64 bytes"});
}

TEST_CASE("lengths and counts that lie are refused before anything is allocated") {
  const auto refuses = [](const std::string& s, std::initializer_list<const char*> parts) {
    check_error([&] { parsed_gguf(s); }, parts);
  };
  const std::uint64_t huge = ~std::uint64_t(0);
  CHECK(parsed_gguf(front(0, 0)).tensors.empty());
  refuses("", {"not a GGUF"});
  refuses("GGML", {"not a GGUF"});
  refuses("GGUF", {"version"});
  refuses(front(0, 0, 2), {"version 2"});
  refuses(front(0, 0, 0x03000000), {"version"});
  refuses(front(0, huge), {"values"});
  refuses(front(huge, 0), {"tensors"});
  refuses(front(0, 1) + le(huge) + std::string(20, 'x'), {"bytes"});
  refuses(front(0, 1) + str("k") + le<std::uint32_t>(8) + le(huge), {"'k'"});
  refuses(front(0, 1) + str("k") + le<std::uint32_t>(13) + std::string(8, 'x'), {"'k'", "type 13"});
  refuses(
      front(0, 1) + str("k") + le<std::uint32_t>(9) + le<std::uint32_t>(9) + le<std::uint64_t>(1) + std::string(8, 'x'),
      {"'k'", "element type 9"});
  refuses(front(0, 1) + str("k") + le<std::uint32_t>(9) + le<std::uint32_t>(12) + le(huge / 4),
          {"'k'", "longer"});  // n·8 wraps
  refuses(front(0, 1) + str("k") + le<std::uint32_t>(9) + le<std::uint32_t>(8) + le(huge / 8), {"'k'", "longer"});
  refuses(front(0, 1) + str("k") + le<std::uint32_t>(7) + "\2", {"'k'", "boolean"});
  const std::string key = str("k") + le<std::uint32_t>(4) + le<std::uint32_t>(1);
  refuses(front(0, 2) + key + key, {"'k'", "twice"});
  const auto alignment = [&](std::uint32_t a) {
    return front(0, 1) + str("general.alignment") + le<std::uint32_t>(4) + le(a);
  };
  CHECK(parsed_gguf(alignment(64)).alignment == 64);
  refuses(alignment(0), {"alignment"});
  refuses(alignment(48), {"alignment"});
  const std::string d(32, 'd');
  CHECK(parsed_gguf(file(front(1, 0) + info("t", {8}, 0, 0), d)).tensors[0].bytes == 32);
  refuses(file(front(1, 0) + info("t", {9}, 0, 0), d), {"'t'", "36 bytes"});
  refuses(file(front(1, 0) + info("t", {8}, 0, 32), d), {"'t'", "expected 0"});
  refuses(file(front(1, 0) + info("t", {}, 0, 0), d), {"'t'", "0 dimensions"});
  refuses(file(front(1, 0) + info("t", {1, 1, 1, 1, 1}, 0, 0), d), {"'t'", "5 dimensions"});
  refuses(file(front(1, 0) + info("t", {huge}, 0, 0), d), {"'t'", "negative"});
  refuses(file(front(1, 0) + info("t", {1ULL << 32, 1ULL << 32}, 0, 0), d), {"'t'", "impossible"});
  refuses(file(front(1, 0) + info("t", {8}, 99, 0), d), {"'t'", "type 99"});
  refuses(file(front(1, 0) + info("t", {33}, 8, 0), d), {"'t'", "impossible"});  // Q8_0 needs rows of 32
  refuses(file(front(1, 0) + info(std::string(64, 't'), {8}, 0, 0), d), {"64 bytes"});
  refuses(file(front(2, 0) + info("t", {8}, 0, 0) + info("t", {8}, 0, 32), d + d), {"'t'", "twice"});
  refuses(file(front(2, 0) + info("t", {8}, 0, 0) + info("u", {8}, 0, 16), d + d), {"'u'", "expected 32"});
  // Every prefix of a valid file is an error, never a read beyond its end.
  const std::string whole = file(front(1, 1) + key + info("t", {8}, 0, 0), d);
  for (std::size_t n = 0; n < whole.size(); ++n) check_error([&] { parsed_gguf(whole.substr(0, n)); }, {"a.gguf"});
}

TEST_CASE("the q/k permutation maps Hugging Face's halves to llama.cpp's pairs") {
  // Two heads of four rows: [0 1 | 2 3], rotating (0,2) and (1,3) → pairs (0,2,1,3).
  Matrix<float> B(8, 1);
  for (Index i = 0; i < 8; ++i) B(i, 0) = float(i);
  using io::detail::arranged_rows, io::detail::GgufRows;
  const Matrix<float> p = arranged_rows(B, GgufRows::query_pairs, 2, 1, true);
  const float want[] = {0, 2, 1, 3, 4, 6, 5, 7};
  for (Index i = 0; i < 8; ++i) CHECK(p(i, 0) == want[i]);
  for (const auto& [rows, heads] : {std::pair<Index, Index>{8, 2}, {64, 4}, {6, 1}, {96, 8}}) {
    const Matrix<float> x = random_matrix(rows, 3, 9);
    const Matrix<float> there = arranged_rows(x, GgufRows::key_pairs, 7, heads, true);
    CHECK(same_bits(arranged_rows(there, GgufRows::key_pairs, 7, heads, false), x));
  }
}

TEST_CASE("adapters keep their meaning: names, permutation, one alpha, folded scales, both rules of scaling") {
  for (const bool rslora : {false, true}) {
    TempDir dir;
    PeftAdapter a;
    a.config.use_rslora = rslora;
    const std::string L = "model.layers.11.";
    a.modules.push_back(module("lm_head", 10, 8, 2, 6, rslora, 1));
    a.modules.push_back(module("model.embed_tokens", 8, 10, 2, 6, rslora, 3));
    a.modules.back().kind = ModuleKind::embedding;
    a.modules.push_back(module(L + "mlp.down_proj", 8, 12, 2, 6, rslora, 5));
    a.modules.push_back(module(L + "mlp.gate_proj", 12, 8, 2, 6, rslora, 7));
    a.modules.push_back(module(L + "mlp.up_proj", 12, 8, 4, 6, rslora, 9));  // another rank
    a.modules.push_back(module(L + "self_attn.k_proj", 4, 8, 2, 6, rslora, 11));
    a.modules.push_back(module(L + "self_attn.o_proj", 8, 8, 2, 2.5, rslora, 13));  // another alpha
    a.modules.push_back(module(L + "self_attn.q_proj", 8, 8, 2, 6, rslora, 15));
    a.modules.push_back(module(L + "self_attn.v_proj", 4, 8, 2, 6, rslora, 17));
    describe_modules(a);
    const GgufAdapterOptions o{.heads = 2, .kv_heads = 1};
    gguf_adapter(a, o).write(dir / "a.gguf");
    const MappedFile f(dir / "a.gguf");
    const GgufHeader h = parse_gguf("a", f.bytes());
    CHECK(std::get<std::string>(*h.find("general.type")) == "adapter");
    CHECK(std::get<std::string>(*h.find("adapter.type")) == "lora");
    const double alpha = double(std::get<float>(*h.find("adapter.lora.alpha")));
    CHECK(alpha == doctest::Approx(rslora ? 6 * std::sqrt(2.0) : 6).epsilon(1e-6));
    CHECK(h.tensor("token_embd.weight.lora_a")->ne == std::vector<std::uint64_t>{2, 10});
    CHECK(h.tensor("token_embd.weight.lora_b")->ne == std::vector<std::uint64_t>{2, 8});
    CHECK(h.tensor("blk.11.attn_q.weight.lora_a")->ne == std::vector<std::uint64_t>{8, 2});
    CHECK(h.tensor("blk.11.ffn_up.weight.lora_b")->ne == std::vector<std::uint64_t>{4, 12});

    const PeftAdapter b = read_gguf_adapter(dir / "a.gguf", o);
    REQUIRE(b.modules.size() == a.modules.size());
    for (std::size_t i = 0; i < a.modules.size(); ++i) {
      CHECK(b.modules[i].name == a.modules[i].name);
      CHECK(b.modules[i].kind == a.modules[i].kind);
      const Matrix<double> x = delta(a.modules[i].factors), y = delta(b.modules[i].factors);
      for (Index k = 0; k < x.size(); ++k)  // a few roundings of float: of the fold, of alpha, of the scale
        CHECK(std::abs(x.data()[k] - y.data()[k]) <= 8 * 0x1p-24 * 20 * double(a.modules[i].factors.scale));
    }
    // A second trip changes nothing at all.
    gguf_adapter(b, o).write(dir / "b.gguf");
    const PeftAdapter c = read_gguf_adapter(dir / "b.gguf", o);
    for (std::size_t i = 0; i < b.modules.size(); ++i) CHECK(same_bits(c.modules[i].factors.A, b.modules[i].factors.A));
  }
}

TEST_CASE("each architecture has its names, and its rows in the order its converter gives them") {
  struct Case {
    const char *model_type, *architecture, *hf, *gguf;
    Index rows;
    std::vector<Index> order;  // row of the file -> row of lora_B; empty: as it is
  };
  // Llama: [heads, 2, size/2] with the middle axes swapped. NeoX, BLOOM: view(heads, 3, size), then q, k, v. Falcon:
  // view(kv_heads, heads/kv_heads + 2, size): all but the last two, the last but one, the last.
  const std::vector<Index> pairs4{0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  std::vector<Index> fused;
  for (const Index part : {0, 1, 2})
    for (Index head = 0; head < 4; ++head)
      for (Index j = 0; j < 2; ++j) fused.push_back((head * 3 + part) * 2 + j);
  const std::vector<Index> falcon{0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
  const std::vector<Case> cases{
      {"llama", "llama", "model.layers.7.self_attn.q_proj", "blk.7.attn_q", 16, pairs4},
      {"mistral", "llama", "model.layers.7.self_attn.q_proj", "blk.7.attn_q", 16, pairs4},
      {"mixtral", "llama", "model.layers.7.self_attn.k_proj", "blk.7.attn_k", 8, {0, 2, 1, 3, 4, 6, 5, 7}},
      {"llama", "llama", "model.layers.7.self_attn.v_proj", "blk.7.attn_v", 8, {}},
      {"qwen2", "qwen2", "model.layers.7.self_attn.q_proj", "blk.7.attn_q", 16, {}},
      {"qwen3", "qwen3", "model.layers.7.self_attn.k_proj", "blk.7.attn_k", 8, {}},
      {"qwen3_moe", "qwen3moe", "model.layers.7.mlp.gate", "blk.7.ffn_gate_inp", 8, {}},
      {"gemma", "gemma", "model.layers.7.self_attn.q_proj", "blk.7.attn_q", 16, {}},
      {"gemma2", "gemma2", "model.layers.7.mlp.up_proj", "blk.7.ffn_up", 16, {}},
      {"gemma3_text", "gemma3", "model.layers.7.self_attn.k_proj", "blk.7.attn_k", 8, {}},
      {"phi", "phi2", "model.layers.7.self_attn.dense", "blk.7.attn_output", 8, {}},
      {"phi3", "phi3", "model.layers.7.mlp.gate_up_proj", "blk.7.ffn_up", 16, {}},
      {"gpt2", "gpt2", "transformer.h.7.attn.c_attn", "blk.7.attn_qkv", 24, {}},
      {"gpt_neox", "gptneox", "gpt_neox.layers.7.attention.query_key_value", "blk.7.attn_qkv", 24, fused},
      {"bloom", "bloom", "transformer.h.7.self_attention.query_key_value", "blk.7.attn_qkv", 24, fused},
      {"falcon", "falcon", "transformer.h.7.self_attention.query_key_value", "blk.7.attn_qkv", 16, falcon},
      {"bert", "bert", "bert.encoder.layer.7.output.dense", "blk.7.ffn_down", 8, {}},
  };
  for (const Case& c : cases) {
    INFO(c.model_type, " ", c.hf);
    const bool one_each = std::string_view(c.model_type) == "gpt_neox" || std::string_view(c.model_type) == "bloom";
    const std::string kv = one_each ? "" : R"(,"num_key_value_heads":2)";
    const ModelConfig config = parse_model_config(
        "config.json", std::string(R"({"model_type":")") + c.model_type + R"(","num_attention_heads":4)" + kv + "}");
    const GgufAdapterOptions o = gguf_options(config);
    CHECK(o.architecture == c.architecture);
    PeftAdapter a;
    a.modules.push_back(module(c.hf, c.rows, 6, 2, 4, false, 1));
    describe_modules(a);
    TempDir dir;
    gguf_adapter(a, o).write(dir / "a.gguf");
    const MappedFile file(dir / "a.gguf");
    const GgufHeader h = parse_gguf("a", file.bytes());
    CHECK(std::get<std::string>(*h.find("general.architecture")) == c.architecture);
    const GgufTensor* t = h.tensor(std::string(c.gguf) + ".weight.lora_b");
    REQUIRE(t != nullptr);
    const auto values = io::detail::gguf_floats("a", *t, file.bytes().data() + h.data_offset + t->offset);
    const Matrix<float>& B = a.modules[0].factors.B;
    for (Index i = 0; i < c.rows; ++i)
      for (Index j = 0; j < 2; ++j)
        CHECK(values[std::size_t(2 * i + j)] == B(c.order.empty() ? i : c.order[std::size_t(i)], j));
    // Back, the architecture taken from the file.
    const PeftAdapter b =
        read_gguf_adapter(dir / "a.gguf", {.architecture = "", .heads = o.heads, .kv_heads = o.kv_heads});
    CHECK(b.modules[0].name == c.hf);
    CHECK(same_bits(b.modules[0].factors.B, B));
    if (c.order.empty()) {
      CHECK_NOTHROW((void)gguf_adapter(a, {.architecture = c.architecture}));  // needs no heads
    } else {
      check_error<ArgumentError>(
          [&] { (void)gguf_adapter(a, {.architecture = c.architecture}); },
          {c.hf, c.rows == 8 ? "num_key_value_heads is missing" : "num_attention_heads is missing"});
      check_error<ArgumentError>(
          [&] { (void)gguf_adapter(a, {.architecture = c.architecture, .heads = 5, .kv_heads = 5}); },
          {c.hf, "do not divide"});
    }
  }
}

TEST_CASE("architectures and families that are not known are refused with the known ones named") {
  PeftAdapter a;
  a.modules.push_back(module("model.layers.0.self_attn.q_proj", 8, 8, 2, 4, false, 1));
  describe_modules(a);
  check_error<ArgumentError>([&] { (void)gguf_adapter(a, {.architecture = "mamba"}); }, {"mamba", "llama", "gptneox"});
  for (const char* text : {R"({"model_type":"mamba"})", R"({"model_type":"opt"})", R"({"model_type":"vit"})"})
    check_error([&] { (void)gguf_options(parse_model_config("d/config.json", text)); },
                {"d/config.json", "model_type", "qwen2", "gpt_neox"});
  check_error([&] { (void)gguf_options(parse_model_config("d/config.json", "{}")); }, {"model_type", "missing"});
  TempDir dir;
  GgufWriter w;
  w.set("general.type", std::string("adapter"));
  w.set("general.architecture", std::string("mamba"));
  w.set("adapter.type", std::string("lora"));
  w.write(dir / "m.gguf");
  check_error([&] { (void)read_gguf_adapter(dir / "m.gguf", {.architecture = ""}); },
              {"general.architecture", "mamba", "llama"});
}

TEST_CASE("config.json of any family: heads under their several names, ties, nested texts, bad types") {
  const auto parse = [](const std::string& text) { return parse_model_config("config.json", text); };
  ModelConfig c = parse(R"({"model_type":"gpt2","n_head":12,"architectures":["GPT2LMHeadModel"]})");
  CHECK(c.heads == 12);
  CHECK(c.kv_heads == 12);
  CHECK(c.tied_head);
  CHECK(c.architecture == "GPT2LMHeadModel");
  REQUIRE(c.family() != nullptr);
  CHECK(peft_task_type(*c.family(), c.architecture) == "CAUSAL_LM");
  c = parse(R"({"model_type":"llama","num_attention_heads":32,"num_key_value_heads":8})");
  CHECK(c.kv_heads == 8);
  CHECK_FALSE(c.tied_head);
  c = parse(R"({"model_type":"falcon","num_attention_heads":71,"num_kv_heads":71,"multi_query":true})");
  CHECK(c.kv_heads == 1);
  c = parse(
      R"({"model_type":"falcon","num_attention_heads":128,"num_kv_heads":8,"multi_query":true,"new_decoder_architecture":true})");
  CHECK(c.kv_heads == 8);
  c = parse(R"({"model_type":"gemma3","text_config":{"num_attention_heads":8,"num_key_value_heads":4}})");
  CHECK(c.heads == 8);
  CHECK(c.kv_heads == 4);
  c = parse(R"({"model_type":"qwen3_moe","num_experts":128})");
  CHECK(c.experts == 128);
  CHECK(parse(R"({"model_type":"mamba"})").family() == nullptr);
  check_error([&] { (void)parse(R"({"num_attention_heads":"x"})"); }, {"num_attention_heads", "integer"});
  check_error([&] { (void)parse(R"({"model_type":3})"); }, {"model_type", "string"});
  check_error([&] { (void)parse("[]"); }, {"object"});
}

TEST_CASE("what llama.cpp would ignore or misread is refused") {
  const auto refuses = [](const PeftAdapter& a, std::initializer_list<const char*> parts,
                          GgufAdapterOptions o = {.heads = 2, .kv_heads = 2}) {
    check_error<ArgumentError>([&] { (void)gguf_adapter(a, o); }, parts);
  };
  PeftAdapter good;
  good.modules.push_back(module("model.layers.0.self_attn.q_proj", 8, 8, 2, 4, false, 1));
  describe_modules(good);
  CHECK_NOTHROW((void)gguf_adapter(good, {.heads = 2, .kv_heads = 2}));
  refuses(good, {"q_proj", "heads"}, {});
  refuses(good, {"q_proj", "3 heads"}, {.heads = 3});
  PeftAdapter a = good;
  a.changed_base = ChangedBase{};
  refuses(a, {"changed", "residual"});
  a = good;
  a.modules[0].name = "lm_head";
  CHECK_NOTHROW((void)gguf_adapter(a, {}));
  refuses(a, {"lm_head", "tie_word_embeddings"}, {.tied_head = true});
  a = good;
  a.modules[0].name = "transformer.h.0.attn.c_attn";
  refuses(a, {"c_attn", "counterpart", "\"llama\""});
  a = good;
  a.modules[0].name = "model.layers.x.self_attn.q_proj";
  refuses(a, {"counterpart"});
  a = good;
  a.modules[0].magnitude.assign(8, 1);
  refuses(a, {"DoRA"});
  a = good;
  a.modules[0].bias.assign(8, 1);
  refuses(a, {"bias"});
  a = good;
  a.saved.push_back({});
  refuses(a, {"whole tensors"});
  a = good;
  a.config.lora_alpha = 0;
  refuses(a, {"alpha 0"});
  refuses({}, {"no modules"});
}

TEST_CASE("foreign adapter files: alpha absent means unscaled, Q8_0 is read, partners and kinds are checked") {
  TempDir dir;
  const auto base = [](GgufWriter& w) {
    w.set("general.type", std::string("adapter"));
    w.set("general.architecture", std::string("llama"));
    w.set("adapter.type", std::string("lora"));
  };
  const GgufAdapterOptions o{.heads = 2, .kv_heads = 2};
  GgufWriter w;
  base(w);
  std::string q8(34, '\0');
  const f16 d(0.5F);
  std::memcpy(q8.data(), &d, 2);
  for (int i = 0; i < 32; ++i) q8[std::size_t(2 + i)] = char(i - 16);
  w.add("blk.0.attn_v.weight.lora_a", gguf_type::q8_0, {32, 1}, q8);
  w.add("blk.0.attn_v.weight.lora_b", gguf_type::f32, {1, 2}, le(1.0F) + le(2.0F));
  w.write(dir / "q8.gguf");
  const PeftAdapter a = read_gguf_adapter(dir / "q8.gguf", o);
  CHECK(a.modules[0].name == "model.layers.0.self_attn.v_proj");
  CHECK(a.modules[0].factors.scale == 1);
  CHECK(a.modules[0].factors.A(0, 0) == -8);
  CHECK(a.modules[0].factors.A(0, 31) == 7.5F);

  const auto refuses = [&](auto&& fill, std::initializer_list<const char*> parts) {
    GgufWriter x;
    fill(x);
    x.write(dir / "x.gguf");
    check_error([&] { (void)read_gguf_adapter(dir / "x.gguf", o); }, parts);
  };
  refuses([&](GgufWriter& x) { base(x); }, {"no LoRA factors"});
  refuses([&](GgufWriter&) {}, {"general.type", "nothing"});
  refuses([&](GgufWriter& x) { x.set("general.type", 3U); }, {"general.type", "got 3"});
  refuses(
      [&](GgufWriter& x) {
        base(x);
        x.add("blk.0.attn_v.weight.lora_a", 0, {1, 1}, "abcd");
      },
      {"only one"});
  refuses(
      [&](GgufWriter& x) {
        base(x);
        x.add("blk.0.attn_v.weight", 0, {1, 1}, "abcd");
      },
      {"lora_a or lora_b"});
  refuses(
      [&](GgufWriter& x) {
        base(x);
        x.add("blk.0.attn_v.weight.lora_a", 0, {1, 2}, "abcdabcd");
        x.add("blk.0.attn_v.weight.lora_b", 0, {1, 1}, "abcd");
      },
      {"rank 2", "rank 1"});
  refuses(
      [&](GgufWriter& x) {
        base(x);
        x.add("blk.0.ssm_in.weight.lora_a", 0, {1, 1}, "abcd");
        x.add("blk.0.ssm_in.weight.lora_b", 0, {1, 1}, "abcd");
      },
      {"ssm_in", "not a weight"});
}

TEST_CASE("config.json of Llama: defaults, both places of rope, and what would compute something else") {
  const std::string sizes =
      R"("vocab_size":10,"hidden_size":8,"intermediate_size":12,"num_hidden_layers":2,"num_attention_heads":4)";
  const auto config = [&](const std::string& more) {
    return parse_llama_config("config.json", "{" + sizes + more + "}");
  };
  LlamaConfig c = config("");
  CHECK(c.num_key_value_heads == 4);
  CHECK(c.head_dim == 2);
  CHECK(c.rms_norm_eps == 1e-6);
  CHECK_FALSE(c.tie_word_embeddings);
  c = config(
      R"(,"rope_scaling":{"rope_type":"llama3","factor":32,"low_freq_factor":1,"high_freq_factor":4,"original_max_position_embeddings":8192},"eos_token_id":[7,9])");
  CHECK(c.rope_scaling == "llama3");
  CHECK(c.llama3.factor == 32);
  CHECK(c.eos_token_id == 7);
  c = config(
      R"(,"rope_parameters":{"rope_type":"default","rope_theta":500000},"num_key_value_heads":2,"head_dim":16,"tie_word_embeddings":true)");
  CHECK(c.rope_theta == 500000);
  CHECK(c.rope_scaling.empty());
  CHECK(c.head_dim == 16);
  for (const std::string more :
       {"", R"(,"rope_scaling":{"type":"linear","factor":2.5})", R"(,"head_dim":6,"bos_token_id":1)"})
    CHECK(parse_llama_config("c", llama_config_text(config(more))) == config(more));
  const auto refuses = [&](const std::string& more, std::initializer_list<const char*> parts) {
    INFO(more);
    check_error([&] { (void)config(more); }, parts);
  };
  refuses(R"(,"model_type":"gemma")", {"model_type", "gemma"});
  refuses(R"(,"model_type":"mistral","sliding_window":4096)", {"sliding_window"});
  refuses(R"(,"hidden_act":"gelu")", {"hidden_act"});
  refuses(R"(,"num_key_value_heads":3)", {"num_key_value_heads"});
  refuses(R"(,"head_dim":3)", {"head_dim", "even"});
  refuses(R"(,"rope_scaling":{"rope_type":"yarn"})", {"yarn"});
  refuses(R"(,"rms_norm_eps":-1)", {"rms_norm_eps"});
  check_error([&] { (void)parse_llama_config("c", R"({"hidden_size":8})"); }, {"vocab_size", "missing"});
}

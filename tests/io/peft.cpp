// SPDX-License-Identifier: Apache-2.0
// PEFT directories: what PEFT writes is understood, what is written says the same again, what is unknown is named.
#include "lowrank/io/peft.hpp"

#include "lowrank/io/checkpoint.hpp"

#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;

namespace {

AdapterModule module(const std::string& name, Index out, Index in, Index r, float scale, std::uint64_t seed) {
  AdapterModule m;
  m.name = name;
  m.factors.A = random_matrix(r, in, seed);
  m.factors.B = random_matrix(out, r, seed + 1);
  m.factors.scale = scale;
  return m;
}

PeftAdapter small_adapter() {
  PeftAdapter a;
  a.config.target_modules = {"q_proj", "up_proj"};
  a.modules.push_back(module("model.layers.0.mlp.up_proj", 12, 6, 2, 4.0F, 3));      // α = 8
  a.modules.push_back(module("model.layers.0.self_attn.q_proj", 6, 6, 2, 4.0F, 1));  // α = 8
  a.modules.push_back(module("model.layers.1.self_attn.q_proj", 6, 6, 3, 0.5F, 5));  // α = 1.5, rank 3
  describe_modules(a);
  return a;
}

/// A directory with one linear module of rank 2, its configuration given.
void put_adapter(const std::string& directory, const std::string& config, std::vector<TensorSpec> specs) {
  std::filesystem::create_directories(directory);
  put(directory + "/adapter_config.json", config);
  SafeTensorsWriter w(directory + "/adapter_model.safetensors", specs, {{"format", "pt"}});
  for (const auto& t : specs) {
    const std::vector<std::byte> ones(std::size_t(*byte_size(t.dtype, t.shape)));
    w.write(t.name, ones);
  }
  w.commit();
}
const std::string P = "base_model.model.";
std::vector<TensorSpec> pair(const std::string& m, std::uint64_t r = 2) {
  return {{P + m + ".lora_A.weight", Dtype::F32, {r, 4}}, {P + m + ".lora_B.weight", Dtype::F32, {5, r}}};
}
std::vector<TensorSpec> with(std::vector<TensorSpec> v, TensorSpec more) {
  v.push_back(std::move(more));
  return v;
}
const std::string plain = R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q"]})";

}  // namespace

TEST_CASE("what is written is read back: factors bit for bit, ranks and scales, patterns") {
  TempDir dir;
  const PeftAdapter a = small_adapter();
  CHECK(a.config.r == 2);
  CHECK(a.config.lora_alpha == 8);
  CHECK(a.config.rank_pattern == std::vector<std::pair<std::string, Index>>{{"model.layers.1.self_attn.q_proj", 3}});
  CHECK(a.config.alpha_pattern ==
        std::vector<std::pair<std::string, double>>{{"model.layers.1.self_attn.q_proj", 1.5}});
  write_peft(dir / "a", a);
  const PeftAdapter b = read_peft(dir / "a");
  REQUIRE(b.modules.size() == 3);
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(b.modules[i].name == a.modules[i].name);
    CHECK(same_bits(b.modules[i].factors.A, a.modules[i].factors.A));
    CHECK(same_bits(b.modules[i].factors.B, a.modules[i].factors.B));
    CHECK(b.modules[i].factors.scale == a.modules[i].factors.scale);
  }
  CHECK(b.config == a.config);
  write_peft(dir / "b", b);
  for (const char* f : {"/adapter_model.safetensors", "/adapter_config.json"})
    CHECK(get(dir / (std::string("a") + f)) == get(dir / (std::string("b") + f)));
}

TEST_CASE("scales that are no binary fractions survive, with and without rank stabilisation") {
  for (const bool rslora : {false, true})
    for (const Index r : {1, 3, 7, 48})
      for (const double alpha : {1.0, 16.0, 12.5, 100.0}) {
        TempDir dir;
        PeftAdapter a;
        a.config.use_rslora = rslora;
        a.config.target_modules = {"q"};
        const float s = float(rslora ? rslora_scale(alpha, r) : lora_scale(alpha, r));
        a.modules.push_back(module("m.q", 50, 60, r, s, 1));
        describe_modules(a);
        write_peft(dir.path(), a);
        CHECK(read_peft(dir.path()).modules[0].factors.scale == s);
      }
}

TEST_CASE(
    "the text of a configuration is PEFT's: sorted keys, true for init_lora_weights, the prefix in tensor names") {
  TempDir dir;
  write_peft(dir.path(), small_adapter());
  const std::string text = get(dir / "adapter_config.json");
  CHECK(text.find("\"init_lora_weights\": true") != std::string::npos);
  CHECK(text.find("\"inference_mode\": true") != std::string::npos);
  CHECK(text.find("\"lora_alpha\": 8,") != std::string::npos);  // an integer stays one
  std::string previous;
  for (std::size_t at = text.find("\n  \""); at != std::string::npos; at = text.find("\n  \"", at + 1)) {
    const std::string key = text.substr(at + 4, text.find('"', at + 4) - at - 4);
    CHECK(previous < key);
    previous = key;
  }
  const SafeTensors f(dir / "adapter_model.safetensors");
  CHECK(f.find("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight") != nullptr);
  CHECK(f.metadata().at("format") == "pt");
}

TEST_CASE("embeddings, convolutions, DoRA, biases, saved modules, two-byte factors") {
  TempDir dir;
  PeftAdapter a;
  a.config.use_dora = true;
  a.config.lora_bias = true;
  a.config.target_modules = {"conv", "embed_tokens", "q"};
  a.config.modules_to_save = {"score"};
  AdapterModule conv = module("net.conv", 8, 3 * 3 * 3, 2, 2, 1),
                embedding = module("net.embed_tokens", 5, 11, 2, 2, 3), linear = module("net.q", 6, 4, 2, 2, 5);
  conv.kind = ModuleKind::conv;
  conv.a_shape = {2, 3, 3, 3};
  conv.b_shape = {8, 2, 1, 1};
  conv.magnitude.assign(8, 1.5F);
  embedding.kind = ModuleKind::embedding;
  embedding.magnitude.assign(5, 2.5F);
  linear.magnitude = {1, 2, 3, 4, 5, 6};
  linear.bias = {0.5F, 0, 0, 0, 0, 1};
  linear.dtype = Dtype::BF16;
  for (Matrix<float>* m : {&linear.factors.A, &linear.factors.B})
    for (Index i = 0; i < m->size(); ++i) m->data()[i] = float(bf16(m->data()[i]));
  a.modules = {conv, embedding, linear};
  a.saved.push_back({{"score.weight", Dtype::I64, {2}}, std::vector<std::byte>(16, std::byte(7))});
  describe_modules(a);
  write_peft(dir.path(), a);
  const SafeTensors f(dir / "adapter_model.safetensors");
  CHECK(f[P + "net.conv.lora_A.weight"].shape() == Shape{2, 3, 3, 3});
  CHECK(f[P + "net.conv.lora_B.weight"].shape() == Shape{8, 2, 1, 1});
  CHECK(f[P + "net.embed_tokens.lora_embedding_A"].shape() == Shape{2, 11});
  CHECK(f[P + "net.embed_tokens.lora_embedding_B"].shape() == Shape{5, 2});
  CHECK(f[P + "net.q.lora_magnitude_vector"].shape() == Shape{6});
  CHECK(f[P + "net.q.lora_A.weight"].dtype() == Dtype::BF16);
  const PeftAdapter b = read_peft(dir.path());
  REQUIRE(b.modules.size() == 3);
  CHECK(b.modules[0].kind == ModuleKind::conv);
  CHECK(b.modules[1].kind == ModuleKind::embedding);
  CHECK(b.modules[2].kind == ModuleKind::linear);
  CHECK(b.modules[2].bias == linear.bias);
  CHECK(b.modules[2].magnitude == linear.magnitude);
  CHECK(b.modules[2].dtype == Dtype::BF16);
  for (std::size_t i = 0; i < 3; ++i) CHECK(same_bits(b.modules[i].factors.A, a.modules[i].factors.A));
  REQUIRE(b.saved.size() == 1);
  CHECK(b.saved[0].spec == a.saved[0].spec);
  CHECK(b.saved[0].bytes == a.saved[0].bytes);
  write_peft(dir / "again", b);
  CHECK(get(dir / "again/adapter_model.safetensors") == get(dir / "adapter_model.safetensors"));
}

TEST_CASE("defaults and unknown keys are PEFT's, wrong types name their key") {
  const PeftConfig c =
      parse_peft_config("c", R"({"peft_type":"LORA","future_key":[1],"rank_pattern":null,"lora_alpha":7.5})");
  CHECK(c.r == 8);
  CHECK(c.lora_alpha == 7.5);
  CHECK(c.bias == "none");
  CHECK(c.init_lora_weights == "true");
  CHECK(c.unknown_keys == std::vector<std::string>{"future_key"});
  CHECK(parse_peft_config("c", R"({"peft_type":"LORA","target_modules":"all-linear"})").target_expression ==
        "all-linear");
  CHECK(parse_peft_config("c", R"({"peft_type":"LORA","layers_to_transform":3})").layers_to_transform ==
        std::vector<Index>{3});
  const auto refuses = [](const std::string& text, std::initializer_list<const char*> parts) {
    INFO(text);
    check_error([&] { (void)parse_peft_config("c.json", text); }, parts);
  };
  refuses("[]", {"c.json", "object"});
  refuses("{", {"JSON"});
  refuses(R"({"r":8})", {"peft_type", "missing"});
  refuses(R"({"peft_type":"IA3"})", {"peft_type", "IA3"});
  refuses(R"({"peft_type":"LORA","r":8,"r":9})", {"'r'", "twice"});
  refuses(R"({"peft_type":"LORA","r":0})", {"'r'", "[1,"});
  refuses(R"({"peft_type":"LORA","r":8.0})", {"'r'", "integer"});
  refuses(R"({"peft_type":"LORA","r":"8"})", {"'r'", "integer"});
  refuses(R"({"peft_type":"LORA","r":99999999999999999999})", {"'r'", "integer"});
  refuses(R"({"peft_type":"LORA","r":18446744073709551615})", {"'r'", "integer"});
  refuses(R"({"peft_type":"LORA","lora_alpha":"x"})", {"lora_alpha", "number"});
  refuses(R"({"peft_type":"LORA","use_rslora":1})", {"use_rslora", "true or false"});
  refuses(R"({"peft_type":"LORA","bias":"some"})", {"bias"});
  refuses(R"({"peft_type":"LORA","rank_pattern":{"q":0}})", {"rank_pattern.q"});
  refuses(R"({"peft_type":"LORA","target_modules":[1]})", {"target_modules", "strings"});
  refuses(R"({"peft_type":"LORA","target_parameters":["experts"]})", {"target_parameters", "not supported"});
  refuses(R"({"peft_type":"LORA","layer_replication":[[0,4]]})", {"layer_replication"});
  CHECK_NOTHROW(parse_peft_config("c", R"({"peft_type":"LORA","target_parameters":[],"layer_replication":null})"));
}

TEST_CASE("patterns: the first key of the file that matches counts") {
  PeftConfig c = parse_peft_config("c", R"({"peft_type":"LORA","r":4,"lora_alpha":4,
    "rank_pattern":{"layers\\.1\\..*q_proj":7,"q_proj":2},"alpha_pattern":{"q_proj":6}})");
  PeftScaling s(c);
  CHECK(s.rank("model.layers.1.self_attn.q_proj") == 7);
  CHECK(s.rank("model.layers.2.self_attn.q_proj") == 2);
  CHECK(s.rank("model.layers.2.self_attn.xq_proj") == 4);
  CHECK(s.scale("model.layers.2.self_attn.q_proj") == 3);
  CHECK(s.scale("model.layers.2.self_attn.k_proj") == 1);
}

TEST_CASE("directories that are not a LoRA adapter of ours are refused by name") {
  TempDir dir;
  const auto refuses = [&](const std::string& config, std::vector<TensorSpec> specs,
                           std::initializer_list<const char*> parts) {
    put_adapter(dir / "a", config, std::move(specs));
    check_error([&] { (void)read_peft(dir / "a"); }, parts);
  };
  put_adapter(dir / "a", plain, pair("x.q"));
  CHECK(read_peft(dir / "a").modules.size() == 1);
  CHECK(read_peft(dir / "a").modules[0].factors.scale == 2);
  refuses(plain, {}, {"no LoRA factors"});
  refuses(plain, {pair("x.q")[0]}, {"'x.q'", "no lora_B"});
  refuses(plain, {pair("x.q")[1]}, {"'x.q'", "no lora_A"});
  refuses(plain, pair("x.q", 3), {"'x.q'", "rank 3", "configuration says 2"});
  refuses(plain, {{P + "x.q.lora_A.weight", Dtype::F32, {2, 4}}, {P + "x.q.lora_B.weight", Dtype::F32, {5, 3}}},
          {"'x.q'", "rank 2", "rank 3"});
  refuses(plain, {{P + "x.q.lora_A.weight", Dtype::I32, {2, 4}}, {P + "x.q.lora_B.weight", Dtype::I32, {5, 2}}},
          {"lora_A", "I32"});
  refuses(plain, {{P + "x.q.lora_A.weight", Dtype::F32, {2, 4, 3}}, {P + "x.q.lora_B.weight", Dtype::F32, {5, 2, 1}}},
          {"'x.q'", "not supported"});
  refuses(plain, {{P + "x.q.lora_A.weight", Dtype::F32, {2, 0}}, {P + "x.q.lora_B.weight", Dtype::F32, {5, 2}}},
          {"'x.q'", "empty"});
  refuses(plain, with(pair("x.q"), {P + "x.q.vera_lambda_b", Dtype::F32, {5}}), {"1 of 3", "vera_lambda_b"});
  refuses(plain, with(pair("x.q"), {"x.q.lora_C.weight", Dtype::F32, {5}}), {"1 of 3", "lora_C"});
  refuses(plain, with(pair("x.q"), {P + "x.q.lora_A.default.weight", Dtype::F32, {5}}), {"lora_A.default.weight"});
  refuses(plain, with(pair("x.q"), {P + "score.weight", Dtype::F32, {5}}), {"score.weight"});
  refuses(plain, with(pair("x.q"), {P + "x.q.lora_magnitude_vector", Dtype::F32, {5}}), {"'x.q'", "use_dora"});
  refuses(R"({"peft_type":"LORA","r":2,"lora_alpha":4,"use_dora":true})", pair("x.q"),
          {"'x.q'", "lacks lora_magnitude_vector"});
  refuses(R"({"peft_type":"LORA","r":2,"rank_pattern":{"(":3}})", pair("x.q"),
          {"adapter_config.json", "rank_pattern", "regular expression"});
  std::filesystem::remove(dir / "a/adapter_model.safetensors");
  put(dir / "a/adapter_model.bin", "pickle");
  check_error([&] { (void)read_peft(dir / "a"); }, {"adapter_model.bin", "pickle"});
  check_error([&] { (void)read_peft(dir / "none"); }, {"none"});
}

TEST_CASE("a configuration that would lie about the factors is not written") {
  TempDir dir;
  PeftAdapter a = small_adapter();
  a.config.rank_pattern.clear();
  check_error<ArgumentError>([&] { write_peft(dir / "a", a); }, {"layers.1.self_attn.q_proj", "rank 3"});
  a = small_adapter();
  a.config.lora_alpha = 9;
  check_error<ArgumentError>([&] { write_peft(dir / "a", a); }, {"scale"});
  a = small_adapter();
  a.modules[0].factors.B(0, 0) = std::numeric_limits<float>::infinity();
  check_error<ArgumentError>([&] { write_peft(dir / "a", a); }, {"not finite"});
  CHECK_FALSE(std::filesystem::exists(dir / "a/adapter_config.json"));
}

TEST_CASE("the mark of a changed base survives: beside the adapter, in its metadata, in the base's directory") {
  TempDir dir;
  PeftAdapter a = small_adapter();
  a.metadata["lowrank_method"] = "pissa";
  a.changed_base = ChangedBase{.method = "pissa",
                               .original = "/models/base",
                               .weights = {{"model.layers.0.mlp.up_proj.weight", "0123456789abcdef"}}};
  write_peft(dir / "a", a);
  CHECK(parse_changed_base("f", changed_base_text(*a.changed_base)) == *a.changed_base);
  PeftAdapter b = read_peft(dir / "a");
  CHECK(b.changed_base == a.changed_base);
  CHECK(!b.metadata.contains(base_metadata_key));
  write_peft(dir / "b", b);
  for (const char* f : {"adapter_model.safetensors", "adapter_config.json", "lowrank.json"})
    CHECK(get(dir / (std::string("a/") + f)) == get(dir / (std::string("b/") + f)));
  std::filesystem::remove(dir / "a/lowrank.json");
  CHECK(read_peft(dir / "a").changed_base == a.changed_base);
  // Without either, the base it names.
  PeftAdapter c = small_adapter();
  c.config.base_model_name_or_path = dir / "base";
  write_peft(dir / "c", c);
  CHECK(!read_peft(dir / "c").changed_base);
  put(dir / "base/lowrank.json", changed_base_text(*a.changed_base));
  CHECK(read_peft(dir / "c").changed_base == a.changed_base);
  // An adapter of the original takes an old mark away; one of an unknown base carries no fingerprints.
  c.config.base_model_name_or_path.clear();
  write_peft(dir / "b", c);
  CHECK(!read_peft(dir / "b").changed_base);
  a.changed_base = ChangedBase{.kind = "quantized"};
  write_peft(dir / "b", a);
  std::filesystem::remove(dir / "b/lowrank.json");
  CHECK(read_peft(dir / "b").changed_base->kind == "quantized");
  CHECK(read_peft(dir / "b").changed_base->weights.empty());
  for (const char* text : {"{", "[]", "{}", R"({"base":"other"})", R"({"base":"residual","weights":[]})",
                           R"({"base":"residual","weights":{"w":1}})", R"({"base":"residual","method":1})"})
    check_error([&] { (void)parse_changed_base("mark.json", text); }, {"mark.json"});
}

TEST_CASE("initialisers by which PEFT changes the base mark the adapter, and are written as true") {
  TempDir dir;
  const auto read = [&](const std::string& init) {
    put_adapter(dir / "a",
                R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q"],"init_lora_weights":)" + init + "}",
                pair("q"));
    return read_peft(dir / "a");
  };
  for (const char* init : {"true", "false", "null", "\"gaussian\"", "\"eva\"", "\"orthogonal\""})
    CHECK(!read(init).changed_base);
  for (const char* init : {"pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq", "unheard_of"}) {
    const PeftAdapter a = read(std::string("\"") + init + "\"");
    REQUIRE(a.changed_base);
    CHECK(a.changed_base->method == init);
    CHECK(a.changed_base->kind == (std::string(init) == "loftq" ? "quantized" : "residual"));
    write_peft(dir / "b", a);
    CHECK(get(dir / "b/adapter_config.json").find("\"init_lora_weights\": true") != std::string::npos);
    CHECK(read_peft(dir / "b").changed_base == a.changed_base);
  }
}

TEST_CASE("magnitudes and biases that are not finite are neither read nor written") {
  TempDir dir;
  for (const float bad : {1.0F, NAN, INFINITY, -INFINITY})
    for (const bool dora : {true, false}) {
      PeftAdapter a;
      a.config.target_modules = {"q"};
      a.config.use_dora = dora;
      a.config.lora_bias = !dora;
      a.modules.push_back(module("q", 5, 4, 2, 1, 1));
      auto& v = dora ? a.modules[0].magnitude : a.modules[0].bias;
      v.assign(5, 1);
      describe_modules(a);
      write_peft(dir / "a", a);
      v[3] = bad;
      std::vector<TensorSpec> specs;
      const Checkpoint good(dir / "a/adapter_model.safetensors");
      good.for_each([&](const TensorView& t) { specs.push_back({t.name(), t.dtype(), t.shape()}); });
      SafeTensorsWriter w(dir / "b.safetensors", specs);
      good.for_each([&](const TensorView& t) {
        if (t.shape().size() == 1)
          w.write(t.name(), std::as_bytes(std::span(v)));
        else
          w.copy(t.name(), t);
      });
      w.commit();
      std::filesystem::rename(dir / "b.safetensors", dir / "a/adapter_model.safetensors");
      if (bad == 1) {
        CHECK_NOTHROW((void)read_peft(dir / "a"));
        continue;
      }
      check_error([&] { (void)read_peft(dir / "a"); },
                  {"q", dora ? "lora_magnitude_vector" : "lora_B.bias", "not finite"});
      check_error<ArgumentError>([&] { write_peft(dir / "c", a); }, {"'q'", "not finite"});
    }
}

TEST_CASE("what contradicts its configuration is neither written nor read: module and setting are named") {
  TempDir dir;
  const auto refuses = [&](const PeftAdapter& a, std::initializer_list<const char*> parts) {
    check_error<ArgumentError>([&] { write_peft(dir / "a", a); }, parts);
    CHECK_FALSE(std::filesystem::exists(dir / "a"));
  };
  const char* first = "'model.layers.0.mlp.up_proj'";
  const PeftAdapter good = small_adapter();
  PeftAdapter a = good;
  a.modules[0].magnitude.assign(12, 1);
  refuses(a, {first, "lora_magnitude_vector", "use_dora is not set"});
  a = good;
  a.config.use_dora = true;
  refuses(a, {first, "lacks lora_magnitude_vector", "use_dora"});
  for (auto& m : a.modules) m.magnitude.assign(5, 1);
  refuses(a, {first, "5 elements", "12"});
  a = good;
  a.modules[0].bias.assign(12, 1);
  refuses(a, {first, "lora_B.bias", "lora_bias is not set"});
  a.config.lora_bias = true;
  a.modules[0].bias.pop_back();
  refuses(a, {first, "11 elements", "12"});
  a = good;
  a.config.target_modules = {"q_proj"};
  refuses(a, {first, "target_modules [q_proj]"});
  a.config.target_modules = {"proj"};  // the end of a component is not a component
  refuses(a, {first, "target_modules [proj]"});
  a.config.target_modules.clear();
  a.config.target_expression = R"(.*\.(q|k)_proj)";
  refuses(a, {first, "target_modules", "(q|k)_proj"});
  a.config.target_expression = "all-linear";
  write_peft(dir / "all", a);
  CHECK(read_peft(dir / "all").modules.size() == 3);
  a.modules[0].kind = ModuleKind::embedding;
  refuses(a, {first, "all-linear"});
  a = good;
  a.config.exclude_modules = {"up_proj"};
  refuses(a, {first, "exclude_modules"});
  a = good;
  a.config.layers_to_transform = {0};
  refuses(a, {"'model.layers.1.self_attn.q_proj'", "layers_to_transform"});
  a = good;
  a.saved.push_back({{"score.weight", Dtype::F32, {1}}, std::vector<std::byte>(4)});
  refuses(a, {"score.weight", "modules_to_save"});
  a = good;
  a.modules[1].name = a.modules[0].name;
  refuses(a, {first, "twice"});
  a = good;
  a.modules.clear();
  refuses(a, {"no modules"});
  a = good;
  a.modules[0].factors.B = random_matrix(12, 3, 1);
  refuses(a, {first, "do not go together"});
  a = good;
  a.modules[0].a_shape = {2, 6};
  refuses(a, {first, "a_shape [2, 6]"});
  // Nothing said is what the modules say.
  a = good;
  a.config.target_modules.clear();
  write_peft(dir / "empty", a);
  CHECK(read_peft(dir / "empty").config.target_modules == std::vector<std::string>{"q_proj", "up_proj"});

  // A directory that somebody else wrote so.
  put_adapter(dir / "b", R"({"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["k","v"]})", pair("x.q"));
  check_error([&] { (void)read_peft(dir / "b"); }, {"'x.q'", "target_modules [k, v]"});
  put_adapter(dir / "b", R"({"peft_type":"LORA","r":2,"target_modules":".*k"})", pair("x.q"));
  check_error([&] { (void)read_peft(dir / "b"); }, {"'x.q'", "target_modules"});
  put_adapter(dir / "b", R"({"peft_type":"LORA","r":2,"target_modules":"(?i).*K"})", pair("x.q"));
  CHECK_NOTHROW((void)read_peft(dir / "b"));  // Python's grammar
  put_adapter(dir / "b", plain, with(pair("x.q"), {P + "x.q.lora_B.bias", Dtype::F32, {5}}));
  check_error([&] { (void)read_peft(dir / "b"); }, {"'x.q'", "lora_bias is not set"});
}

TEST_CASE("numbers that nothing holds are named, not the parser's words for them") {
  check_error([] { (void)parse_peft_config("c.json", R"({"peft_type":"LORA","lora_alpha":1e400})"); },
              {"c.json", "beyond the range", "1e400"});
  check_error([] { (void)parse_peft_config("c.json", R"({"peft_type":"LORA","r":99999999999999999999})"); },
              {"'r'", "integer in [1, 1073741824]"});
}

TEST_CASE("a factor beyond the range of F16 is refused, not written as infinity") {
  const TempDir dir;
  PeftAdapter a;
  a.modules.push_back({.name = "m.q_proj",
                       .factors = {test::random_matrix<float>(2, 5, 1), test::random_matrix<float>(6, 2, 2), 0.5F},
                       .dtype = Dtype::F16});
  a.modules[0].factors.A(1, 3) = 1e6F;
  describe_modules(a);
  a.config.target_modules = module_suffixes(a);
  CHECK_THROWS_WITH_AS(write_peft(dir / "a", a), doctest::Contains("must be within the range of F16, got 1000000"),
                       IoError);
  CHECK_FALSE(std::filesystem::exists(dir / "a/adapter_config.json"));
  a.modules[0].factors.A(1, 3) = 6e4F;
  write_peft(dir / "a", a);
  CHECK(read_peft(dir / "a").modules[0].factors.A(1, 3) == float(lowrank::f16(6e4F)));
}

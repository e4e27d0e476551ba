// SPDX-License-Identifier: Apache-2.0
// Hugging Face checkpoints and PEFT adapters: what is written is what is read, and what cannot be read is named.
#include "checkpoint.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/llama_config.hpp"
#include "lowrank/io/peft.hpp"
#include "support/temp_dir.hpp"
#include "tiny.hpp"

using namespace llama;
namespace fs = std::filesystem;
namespace io = lowrank::io;

namespace {

bool same(const lowrank::Matrix<float>& a, const lowrank::Matrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() && std::equal(a.data(), a.data() + a.size(), b.data());
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  REQUIRE(text.find(from) != std::string::npos);
  return text.replace(text.find(from), from.size(), to);
}

std::string error_of(const std::string& folder) {
  try {
    load_checkpoint(folder);
  } catch (const lowrank::IoError& e) {
    return e.what();
  }
  return "no error";
}

const std::string fixtures = LLAMA_FIXTURES;

/// A copy of a checkpoint somebody else wrote, with what else such a directory holds.
void copy_foreign(const std::string& name, const test::TempDir& to) {
  fs::copy(fixtures + "/" + name, to / "base", fs::copy_options::recursive);
  fs::remove(to / "base/logits.csv");
  to.write("base/tokenizer.json", "{\"a\": [1, 2]}");
  to.write("base/tokenizer.model", std::string("\0\1binary", 8));
  to.write("base/generation_config.json", "{}");
  to.write("base/LICENSE", "theirs");
  to.write("base/pytorch_model.bin", "other weights");
}

/// Tokens and the logits that numpy found for them, a line each.
struct Expected {
  Batch batch{2, 10, {}, {}};
  std::vector<std::vector<double>> logits;
  double largest = 0;

  explicit Expected(const std::string& file) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
      std::istringstream fields(line);
      std::string field;
      std::getline(fields, field, ',');
      batch.inputs.push_back(Token(std::stoi(field)));
      logits.emplace_back();
      while (std::getline(fields, field, ',')) logits.back().push_back(std::stod(field));
      for (const double x : logits.back()) largest = std::max(largest, std::abs(x));
    }
    REQUIRE(batch.inputs.size() == 20);
  }
  [[nodiscard]] double error(const Base& base) const {
    Model<float> model(base.config, base.weights, tiny::recipe<float>([](auto&) { return tiny::Choice::frozen; }));
    const Mat<float> got = model.forward(batch);
    REQUIRE(got.cols() == Index(logits[0].size()));
    double worst = 0;
    for (Index i = 0; i < got.rows(); ++i)
      for (Index j = 0; j < got.cols(); ++j)
        worst = std::max(worst, std::abs(double(got(i, j)) - logits[std::size_t(i)][std::size_t(j)]));
    return worst;
  }
};

}  // namespace

TEST_CASE("a checkpoint comes back bit for bit, tied and untied") {
  for (const bool tied : {false, true}) {
    const test::TempDir f;
    const auto c = tiny::config(tied);
    const auto w = tiny::weights<float>(c);
    save_checkpoint(f.path(), c, w);
    const Base back = load_checkpoint(f.path());
    CHECK(back.config.tie_word_embeddings == tied);
    CHECK(back.config.head_dim == c.head_dim);
    CHECK(back.config.rope_theta == c.rope_theta);
    CHECK(back.config.num_key_value_heads == c.num_key_value_heads);
    REQUIRE(back.weights.size() == w.size());
    for (const auto& [module, W] : w) CHECK(same(back.weights.at(module), W));
    for (const auto& entry : fs::directory_iterator(f.path()))
      CHECK(entry.path().string().find("partial") == std::string::npos);
  }
}

TEST_CASE("what is missing, of another shape, or not supported is refused by name") {
  const test::TempDir f;
  CHECK(error_of(f.path()).find("config.json") != std::string::npos);
  const auto c = tiny::config();
  save_checkpoint(f.path(), c, tiny::weights<float>(c));
  const std::string path = f / "config.json", text = io::read_text(path);
  const auto with = [&](const std::string& from, const std::string& to) {
    io::write_text(path, replaced(text, from, to));
    return error_of(f.path());
  };
  CHECK(with("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3").find("model.layers.2.") != std::string::npos);
  CHECK(with("\"intermediate_size\": 6", "\"intermediate_size\": 8").find("must have shape [8, 5], got [6, 5]") !=
        std::string::npos);
  CHECK(with("\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"yarn\", \"factor\": 2}").find("yarn") !=
        std::string::npos);
  CHECK(with("\"attention_bias\": false", "\"attention_bias\": true").find("attention_bias") != std::string::npos);
  CHECK(with("\"model_type\": \"llama\"", "\"model_type\": \"gpt2\"").find("gpt2") != std::string::npos);
  CHECK(with("\"silu\"", "\"gelu\"").find("hidden_act") != std::string::npos);
}

TEST_CASE("an adapter is written as PEFT reads it, for the base's own weights whatever the method stored") {
  auto c = tiny::config();
  c.hidden_size = 8;
  const auto w = tiny::weights<float>(c);
  for (const std::string method : {"lora", "pissa"}) {
    CAPTURE(method);
    const test::TempDir f;
    Adaptation adaptation(c, w, method,
                          {.rank = 2, .alpha = 3, .targets = "q_proj,down_proj", .train_fully = {"lm_head"}});
    Model<float> model(c, w, adaptation.recipe());
    lowrank::CounterRng rng(4);
    for (std::size_t i = 0; i < model.parameters().values().size(); ++i)
      model.parameters().values()[i] += float(0.05 * rng.normal(i));
    save_adapter(f.path(), adaptation, model, "the/base");
    const io::PeftAdapter back = io::read_peft(f.path());
    CHECK(back.config.base_model_name_or_path == "the/base");
    CHECK(back.modules.size() == 4);
    CHECK(back.saved.size() == 1);
    const Weights<float> now = model.weights();
    for (const auto& m : back.modules) {
      CHECK(m.factors.rank() == (method == "lora" ? 2 : 4));
      const auto merged = lowrank::merged_weight<float>(w.at(m.name), m.factors);
      for (Index i = 0; i < merged.size(); ++i) CHECK(std::abs(merged.data()[i] - now.at(m.name).data()[i]) < 2e-6F);
    }
  }
  const test::TempDir f;
  for (const std::string method : {"full", "qlora4"}) {
    Adaptation adaptation(c, w, method, {.rank = 2});
    Model<float> model(c, w, adaptation.recipe());
    CHECK_THROWS_AS(save_adapter(f.path(), adaptation, model, "b"), lowrank::ArgumentError);
  }
  CHECK(fs::is_empty(f.path()));
}

TEST_CASE("checkpoints others wrote, in bf16 shards and in f16 with a tied head, give the logits numpy finds") {
  for (const std::string name : {"foreign_bf16", "foreign_f16"}) {
    CAPTURE(name);
    const Expected expected(fixtures + "/" + name + "/logits.csv");
    Base base = load_checkpoint(fixtures + "/" + name);
    // Two layers are a chain of some 20 sums of up to 48 products, each within 48 eps of its terms at worst and a few
    // at most in practice; the stored weights themselves are exact in float.
    const double allowed = 128 * double(std::numeric_limits<float>::epsilon()) * expected.largest;
    CHECK(expected.largest > 1);
    CHECK(expected.error(base) < allowed);
    // The comparison sees positions and single weights.
    base.config.rope_scaling = {};
    CHECK(expected.error(base) > 100 * allowed);
    base = load_checkpoint(fixtures + "/" + name);
    for (auto& [module, W] : base.weights)
      if (kind_of(module) == "k_proj") std::swap(W(0, 0), W(W.rows() - 1, 0));
    CHECK(expected.error(base) > 100 * allowed);
  }
}

TEST_CASE("a changed model is saved as the checkpoint it came from: shards, types, every key, the other files") {
  const test::TempDir f;
  copy_foreign("foreign_bf16", f);
  Base base = load_checkpoint(f / "base");
  save_checkpoint(f / "same", base.config, base.weights, {.source = base.source});
  for (const char* name :
       {"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"}) {
    const io::SafeTensors was(f / "base/" + name), is(f / "same/" + name);
    CHECK(is.tensors() == was.tensors());  // names, types, shapes, places
    for (const auto& t : was.tensors())
      CHECK(std::ranges::equal(is[t.name].bytes(), was[t.name].bytes()));  // a weight nobody touched keeps its bits
  }
  using io::read_json_object;
  CHECK(read_json_object(f / "same/config.json") == read_json_object(f / "base/config.json"));
  CHECK(read_json_object(f / "same/model.safetensors.index.json") ==
        read_json_object(f / "base/model.safetensors.index.json"));
  for (const char* name : {"tokenizer.json", "tokenizer.model", "generation_config.json", "LICENSE"})
    CHECK(io::read_text(f / "same/" + name) == io::read_text(f / "base/" + name));
  CHECK(!fs::exists(f / "same/pytorch_model.bin"));

  base.weights.at("model.layers.1.mlp.up_proj")(3, 2) = 1.5F;
  save_checkpoint(f / "changed", base.config, base.weights, {.source = base.source});
  const Base back = load_checkpoint(f / "changed");
  for (const auto& [module, W] : base.weights) CHECK(same(back.weights.at(module), W));
  CHECK(back.config.rope_scaling == base.config.rope_scaling);

  base.weights.at("model.layers.1.mlp.up_proj")(3, 2) = 0.1F;  // no bf16
  save_checkpoint(f / "wide", base.config, base.weights, {.source = base.source, .dtype = "f32"});
  CHECK(load_checkpoint(f / "wide").weights.at("model.layers.1.mlp.up_proj")(3, 2) == 0.1F);
  auto config = read_json_object(f / "wide/config.json");
  CHECK(config["torch_dtype"] == "float32");
  config["torch_dtype"] = "bfloat16";
  CHECK(config == read_json_object(f / "base/config.json"));
  CHECK_THROWS_AS(save_checkpoint(f / "w", base.config, base.weights, {.dtype = "fp8"}), lowrank::ArgumentError);
}

TEST_CASE("a tied checkpoint whose head left the table is saved untied; one that is mistral stays so") {
  const test::TempDir f;
  copy_foreign("foreign_f16", f);
  const std::string path = f / "base/config.json";
  io::write_text(path, replaced(io::read_text(path), "\"llama\"", "\"mistral\""));
  Base base = load_checkpoint(f / "base");
  save_checkpoint(f / "tied", base.config, base.weights, {.source = base.source});
  CHECK(load_checkpoint(f / "tied").config.tie_word_embeddings);
  base.weights.emplace("lm_head", lowrank::Matrix<float>(base.weights.at("model.embed_tokens")));
  base.weights.at("lm_head")(2, 3) = 0.5F;
  save_checkpoint(f / "untied", base.config, base.weights, {.source = base.source});
  const Base back = load_checkpoint(f / "untied");
  CHECK(!back.config.tie_word_embeddings);
  CHECK(same(back.weights.at("lm_head"), base.weights.at("lm_head")));
  const io::LlamaConfig written = io::read_llama_config(f / "untied");
  CHECK(written.model_type == "mistral");
  CHECK(written.bos_token_id == 1);
  CHECK(written.max_position_embeddings == 64);
  CHECK(io::Checkpoint(f / "untied")["lm_head.weight"].dtype() == io::Dtype::F16);
}

TEST_CASE("nothing is saved over the base, by whatever name it is called") {
  const test::TempDir f;
  copy_foreign("foreign_bf16", f);
  const std::string base = f / "base";
  const auto error = [&](const std::string& path, const std::string& from) -> std::string {
    try {
      check_apart("--save", path, from);
    } catch (const lowrank::ArgumentError& e) {
      return e.what();
    }
    return "";
  };
  fs::create_directory_symlink(base, f / "link");
  for (const std::string& path :
       {base, base + "/", base + "/lora", base + "/a/b", f / "other/../base", f / "link", f / "link/lora"}) {
    CAPTURE(path);
    CHECK(error(path, base).find("--save: expected a place outside") != std::string::npos);
    CHECK(error(path, f / "link") != "");
  }
  CHECK(error(f / "based", base) == "");
  CHECK(error(f / "out/lora", base) == "");
  fs::create_directory(f / "out");
  fs::create_symlink(base + "/config.json", f / "out/config.json");
  CHECK(error(f / "out", base).find("'config.json' is a link into it") != std::string::npos);
}

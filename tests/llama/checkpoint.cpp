// SPDX-License-Identifier: Apache-2.0
// Hugging Face checkpoints and PEFT adapters: what is written is what is read, and what cannot be read is named.
#include "checkpoint.hpp"

#include <doctest/doctest.h>

#include <filesystem>

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

}  // namespace

TEST_CASE("a checkpoint comes back bit for bit, tied and untied") {
  for (const bool tied : {false, true}) {
    const lowrank::test::TempDir f;
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
  const lowrank::test::TempDir f;
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
  CHECK(with("\"rope_scaling\": null", "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 2}")
            .find("rope_scaling") != std::string::npos);
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
    const lowrank::test::TempDir f;
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
  const lowrank::test::TempDir f;
  for (const std::string method : {"full", "qlora4"}) {
    Adaptation adaptation(c, w, method, {.rank = 2});
    Model<float> model(c, w, adaptation.recipe());
    CHECK_THROWS_AS(save_adapter(f.path(), adaptation, model, "b"), lowrank::ArgumentError);
  }
  CHECK(fs::is_empty(f.path()));
}

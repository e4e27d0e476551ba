// SPDX-License-Identifier: Apache-2.0
// A training run that is stopped and resumed ends at the files an uninterrupted one writes, bit for bit.
#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>

#include "checkpoint.hpp"
#include "corpus.hpp"
#include "lowrank/io/file.hpp"
#include "support/temp_dir.hpp"
#include "tiny.hpp"
#include "trainer.hpp"

using namespace llama;
namespace fs = std::filesystem;

namespace {

const ModelConfig small{.hidden_size = 16,
                        .intermediate_size = 24,
                        .num_hidden_layers = 2,
                        .num_attention_heads = 4,
                        .num_key_value_heads = 2,
                        .head_dim = 4};

std::vector<Token> text() {
  std::vector<Token> tokens;
  const lowrank::CounterRng rng(11);
  for (std::uint64_t i = 0; i < 2000; ++i) tokens.push_back(Token('a' + rng.below(i, 7) * (i % 3)));
  return tokens;
}

struct Killed {};

/// One method on one base, with all that makes a step depend on its number: dropout, batches, rates, LoRA+.
struct Runner {
  Weights<float> base = tiny::weights<float>(small);
  std::vector<Token> tokens = text();
  std::string method = "lora";
  Index rank = 4;

  /// Trains and saves to `folder`; dies after step `die_after` if that is not 0.
  TrainResult run(const std::string& folder, StateOptions state, Index die_after = 0) const {
    Adaptation adaptation(small, base, method,
                          {.rank = rank, .alpha = 6, .dropout = method == "full" ? 0.0 : 0.2, .seed = 1});
    Model<float> model(small, base, adaptation.recipe());
    state.settings["rank"] = exact(double(rank));
    Index made = 0;
    const TrainResult result = train(model, tokens,
                                     {.label = method,
                                      .steps = 20,
                                      .batch = 3,
                                      .window = 16,
                                      .learning_rate = 1e-2,
                                      .weight_decay = 0.1,
                                      .lora_plus = 4,
                                      .seed = 3,
                                      .after_step =
                                          [&] {
                                            if (++made == die_after) throw Killed();
                                          },
                                      .state = state});
    if (method == "full")
      save_checkpoint(folder, small, model.weights());
    else
      save_adapter(folder, adaptation, model, "base");
    return result;
  }
};

std::string weights_file(const std::string& folder) {
  const std::string adapter = folder + "/adapter_model.safetensors";
  return lowrank::io::read_text(fs::exists(adapter) ? adapter : folder + "/model.safetensors");
}

}  // namespace

TEST_CASE("stopped and resumed, twice, a run writes the bytes of one that was not stopped") {
  for (const std::string method : {"lora", "pissa", "full"}) {
    CAPTURE(method);
    const test::TempDir f;
    Runner r;
    r.method = method;
    const StateOptions kept{.file = f / "states/s.safetensors", .every = 4},
        resumed{.file = kept.file, .every = 4, .resume = true};
    const TrainResult whole = r.run(f / "whole", {}, 0);
    CHECK_THROWS_AS(r.run(f / "dead", kept, 6), Killed);     // its last state is that of step 4
    CHECK_THROWS_AS(r.run(f / "dead", resumed, 7), Killed);  // step 11: state of step 8
    CHECK(!fs::exists(f / "dead"));
    const TrainResult last = r.run(f / "resumed", resumed, 0);
    CHECK(weights_file(f / "resumed") == weights_file(f / "whole"));
    CHECK(last.losses == whole.losses);
    // Finished, it only has to be loaded.
    CHECK(r.run(f / "again", resumed, 1).losses == whole.losses);
    CHECK(weights_file(f / "again") == weights_file(f / "whole"));
  }
}

TEST_CASE("keeping a state changes nothing, and without a file --resume begins") {
  const test::TempDir f;
  const Runner r;
  r.run(f / "plain", {});
  r.run(f / "kept", {.file = f / "s.safetensors", .every = 3, .resume = true});
  CHECK(weights_file(f / "kept") == weights_file(f / "plain"));
  for (const auto& entry : fs::directory_iterator(f.path()))
    CHECK(entry.path().string().find("partial") == std::string::npos);
}

TEST_CASE("a state of other settings, another base, other text, or no state is refused with what differs") {
  const test::TempDir f;
  Runner r;
  const StateOptions kept{.file = f / "s.safetensors", .every = 5, .settings = {{"base", fingerprint(r.base)}}};
  CHECK_THROWS_AS(r.run(f / "x", kept, 6), Killed);
  const std::string before = lowrank::io::read_text(kept.file);
  const auto error = [&](const Runner& other) -> std::string {
    try {
      other.run(f / "y", {.file = kept.file, .resume = true, .settings = {{"base", fingerprint(other.base)}}});
    } catch (const lowrank::Error& e) {
      return e.what();
    }
    return "no error";
  };
  Runner other = r;
  other.rank = 3;
  CHECK(error(other).find("rank: expected 4, got 3") != std::string::npos);
  other = r;
  other.base.at("lm_head")(1, 1) += 0.5F;
  CHECK(error(other).find("base: expected " + fingerprint(r.base) + ", got " + fingerprint(other.base)) !=
        std::string::npos);
  other = r;
  other.tokens[7] += 1;
  CHECK(error(other).find("training text: expected 2000 tokens, ") != std::string::npos);
  other = r;
  other.method = "full";  // nothing in the settings here says so: the tensors do
  CHECK(error(other).find("no such tensor") != std::string::npos);
  CHECK(lowrank::io::read_text(kept.file) == before);  // a refused state is left as it was
  f.write("s.safetensors", "not a state");
  CHECK(error(r).find("s.safetensors") != std::string::npos);
  CHECK_THROWS_AS(r.run(f / "z", {.file = f / "s.safetensors", .every = 0}), lowrank::ArgumentError);
}

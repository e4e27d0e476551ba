// SPDX-License-Identifier: Apache-2.0
#include "lowrank/model/targets.hpp"

#include <doctest/doctest.h>

#include <set>
#include <string>
#include <vector>

using namespace lowrank;

namespace {

/// The modules of a Llama with two layers, of a mixture with experts, and of other families, by their checkpoint names.
std::vector<ModuleInfo> llama(int layers = 2) {
  std::vector<ModuleInfo> m{{"model.embed_tokens", ModuleKind::embedding, 100, 8}};
  for (int l = 0; l < layers; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    for (const char* n : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                          "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
      m.push_back({p + n, ModuleKind::linear, 8, 8});
    m.push_back({p + "input_layernorm", ModuleKind::other, 8, 1});
  }
  m.push_back({"model.norm", ModuleKind::other, 8, 1});
  m.push_back({"lm_head", ModuleKind::linear, 100, 8});
  return m;
}

std::set<std::string> names(const std::vector<ModuleInfo>& m, const TargetSelection& s) {
  std::set<std::string> out;
  for (const std::size_t i : s.selected) out.insert(m[i].name);
  return out;
}

std::string message(const std::vector<ModuleInfo>& m, const TargetOptions& o) {
  try {
    (void)select_targets(m, o);
  } catch (const ArgumentError& e) {
    return e.what();
  }
  return "";
}

bool contains(const std::string& s, const std::string& part) { return s.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("presets choose what their names say") {
  const auto m = llama();
  CHECK(select_targets(m, {.targets = "attention"}).selected.size() == 8);
  CHECK(select_targets(m, {.targets = "mlp"}).selected.size() == 6);
  const auto all_linear = select_targets(m);
  CHECK(all_linear.selected.size() == 14);
  CHECK(names(m, all_linear).count("lm_head") == 0);
  CHECK(names(m, all_linear).count("model.embed_tokens") == 0);
  const auto all = select_targets(m, {.targets = "all"});
  CHECK(all.selected.size() == 16);
  CHECK(names(m, all).count("lm_head") == 1);
  CHECK(names(m, all).count("model.embed_tokens") == 1);
  CHECK(all.adaptable == 16);
  CHECK(all.summary() == "adapting 16 of 16 modules (0 excluded, 0 in other layers)");
}

TEST_CASE("presets know the names of other families") {
  const std::vector<ModuleInfo> gpt2{{"transformer.h.0.attn.c_attn"},
                                     {"transformer.h.0.attn.c_proj"},
                                     {"transformer.h.0.mlp.c_fc"},
                                     {"transformer.h.0.mlp.c_proj"},
                                     {"lm_head"}};
  CHECK(names(gpt2, select_targets(gpt2, {.targets = "attention"})) ==
        std::set<std::string>{"transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"});
  CHECK(names(gpt2, select_targets(gpt2, {.targets = "mlp"})) ==
        std::set<std::string>{"transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"});
  CHECK(select_targets(gpt2).selected.size() == 4);
  // "output" inside a numbered layer is a projection, at the top it is the head.
  const std::vector<ModuleInfo> bert{{"encoder.layer.0.attention.output"}, {"output"}};
  CHECK(names(bert, select_targets(bert)) == std::set<std::string>{"encoder.layer.0.attention.output"});
}

TEST_CASE("names match whole components at the end, expressions the whole name") {
  const auto m = llama();
  CHECK(select_targets(m, {.targets = "q_proj,v_proj"}).selected.size() == 4);
  CHECK(select_targets(m, {.targets = " q_proj , lm_head "}).selected.size() == 3);
  CHECK(select_targets(m, {.targets = "self_attn.q_proj"}).selected.size() == 2);
  CHECK(select_targets(m, {.targets = "model.layers.1.mlp.up_proj"}).selected.size() == 1);
  CHECK(contains(message(m, {.targets = "proj"}), "'proj' matches none of 16 modules"));  // not a whole component
  CHECK(contains(message(m, {.targets = "q_proj,qproj"}), "'qproj'"));
  CHECK(select_targets(m, {.targets = R"(.*\.(q|k)_proj)"}).selected.size() == 4);
  CHECK(contains(message(m, {.targets = R"((q|k)_proj)"}), "matches none"));  // whole name, as re.fullmatch
  CHECK(select_targets(m, {.targets = R"(model\.layers\.[01]\.mlp\..*)"}).selected.size() == 6);
  CHECK(contains(message(m, {.targets = "(q_proj"}), "not a regular expression"));
  CHECK(contains(message(m, {.targets = ""}), "empty name"));
  CHECK(contains(message(m, {.targets = "q_proj,,v_proj"}), "empty name"));
}

TEST_CASE("exclude and layers_to_transform narrow the choice and say by how much") {
  const auto m = llama(4);
  const auto s = select_targets(m, {.targets = "all-linear", .exclude = "down_proj", .layers_to_transform = {1, 3}});
  CHECK(s.matched == 28);
  CHECK(s.excluded == 4);
  CHECK(s.in_other_layers == 12);
  CHECK(s.selected.size() == 12);
  CHECK(select_targets(m, {.exclude = R"(.*\.[0-2]\..*)"}).selected.size() == 7);
  CHECK(contains(message(m, {.exclude = "dwn_proj"}), "exclude: 'dwn_proj'"));
  CHECK(contains(message(m, {.layers_to_transform = {1, 4}}), "layer 4"));
  CHECK(contains(message(m, {.targets = "q_proj", .exclude = "q_proj"}), "nothing is left"));
  CHECK(contains(message(m, {.layers_to_transform = {0}, .layers_pattern = "blocks"}), "layer 0"));
  CHECK(select_targets(m, {.layers_to_transform = {0, 0}}).selected.size() == 7);
}

TEST_CASE("the experts of a mixture are not layers") {
  std::vector<ModuleInfo> m;
  for (int l = 0; l < 2; ++l)
    for (int e = 0; e < 3; ++e)
      m.push_back({"model.layers." + std::to_string(l) + ".mlp.experts." + std::to_string(e) + ".w1"});
  CHECK(select_targets(m, {.targets = "w1", .layers_to_transform = {1}}).selected.size() == 3);
  CHECK(select_targets(m, {.targets = "w1", .layers_to_transform = {2}, .layers_pattern = "experts"}).selected.size() ==
        2);
}

TEST_CASE("a model without adaptable modules is an error") {
  CHECK(contains(message({}, {}), "no module"));
  CHECK(contains(message({{"norm", ModuleKind::other}}, {}), "no module"));
  CHECK(contains(message({{"weird", ModuleKind::linear}}, {.targets = "attention"}), "preset 'attention'"));
}

TEST_CASE("rank patterns: the first key matching the end of the name wins") {
  PatternMap<Index> ranks("rank_pattern", {{R"(layers\.0\.self_attn\.q_proj)", 4}, {"q_proj", 16}, {"mlp\\..*", 32}});
  CHECK(ranks.find("model.layers.0.self_attn.q_proj", 8) == 4);
  CHECK(ranks.find("model.layers.1.self_attn.q_proj", 8) == 16);
  CHECK(ranks.find("q_proj", 8) == 16);
  CHECK(ranks.find("model.layers.1.mlp.up_proj", 8) == 32);
  CHECK(ranks.find("model.layers.1.self_attn.k_proj", 8) == 8);
  CHECK(ranks.find("model.layers.1.self_attn.eq_proj", 8) == 8);  // "eq_proj" does not end with ".q_proj"
  CHECK_NOTHROW(ranks.expect_all_used());
}

TEST_CASE("rank patterns that do nothing are errors that name the key") {
  PatternMap<double> alphas("alpha_pattern", {{"q_proj", 4}, {"x_proj", 2}});
  CHECK(alphas.find("a.q_proj", 1) == 4);
  CHECK_THROWS_WITH_AS(
      alphas.expect_all_used(),
      "alpha_pattern: the key 'x_proj' matches no adapted module (or an earlier key matches all of them first)",
      ArgumentError);
  CHECK_THROWS_AS(PatternMap<int>("rank_pattern", {{"a", 1}, {"a", 2}}), ArgumentError);
  CHECK_THROWS_AS(PatternMap<int>("rank_pattern", {{"", 1}}), ArgumentError);
  CHECK_THROWS_AS(PatternMap<int>("rank_pattern", {{"a[", 1}}), ArgumentError);
}

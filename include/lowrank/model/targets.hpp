// SPDX-License-Identifier: Apache-2.0
// Which modules of a model get an adapter: presets, suffixes or one regular expression, with what to leave out.
#pragma once

#include <algorithm>
#include <array>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/model/rank_pattern.hpp"

namespace lowrank {

enum class ModuleKind { linear, embedding, conv, other };

/// What a linear layer is for, where that is known (apply_family() of model/families.hpp); by_name: its name decides.
enum class ModuleRole { by_name, body, head, router };

/// A module that could carry an adapter: its full dotted name, what it is, its weight's shape (out×in; vocab×dim for an
/// embedding as files store it; in×out where `in_by_out`).
struct ModuleInfo {
  std::string name;
  ModuleKind kind = ModuleKind::linear;
  Index rows = 0, cols = 0;
  ModuleRole role = ModuleRole::by_name;
  bool in_by_out = false;  ///< stored in×out: GPT-2's Conv1D
};

/// Which modules to adapt.
struct TargetOptions {
  /// One of
  /// - a preset: "attention", "mlp", "all-linear" (every linear layer but the output head), "all" (every linear layer,
  ///   the head, and the embedding); a router, where the family says that it is one, only a name or an expression
  ///   means;
  /// - names separated by commas, "q_proj,v_proj": a module is meant when its name equals one or ends with "." + name;
  /// - one regular expression matched against the whole name. Taken as one when it holds a character of \^$*+?()[]{}|.
  std::string targets = "all-linear";
  /// Modules to leave out: names or one regular expression, as above; empty: none.
  std::string exclude = {};
  /// Only these layers; empty: all. The layer of "model.layers.3.mlp.experts.7.w1" is 3, the first number in the name.
  std::vector<Index> layers_to_transform = {};
  /// The name the number follows when that is not simply the first number: "layers", "h", "blocks".
  std::string layers_pattern = {};
};

/// What a selection came to; print it, so that nobody trains nothing.
struct TargetSelection {
  /// Indices into the modules given, ascending.
  std::vector<std::size_t> selected;
  /// Modules given that could carry an adapter at all (not of kind other).
  std::size_t adaptable = 0;
  /// Matched by `targets`, then dropped by `exclude`, then by `layers_to_transform`.
  std::size_t matched = 0, excluded = 0, in_other_layers = 0;

  /// "adapting 224 of 226 modules (1 excluded, 0 in other layers)".
  [[nodiscard]] std::string summary() const {
    return detail::text("adapting ", selected.size(), " of ", adaptable, " modules (", excluded, " excluded, ",
                        in_other_layers, " in other layers)");
  }
};

/// What follows the last dot of a module's name, "q_proj" of "model.layers.0.self_attn.q_proj"; all of a name without.
inline std::string_view last_component(std::string_view name) {
  const auto dot = name.rfind('.');
  return dot == std::string_view::npos ? name : name.substr(dot + 1);
}

namespace detail {

/// name equals `suffix` or ends with "." + suffix.
inline bool ends_with_component(std::string_view name, std::string_view suffix) {
  return name.size() >= suffix.size() && name.substr(name.size() - suffix.size()) == suffix &&
         (name.size() == suffix.size() || name[name.size() - suffix.size() - 1] == '.');
}

template <std::size_t N>
bool is_one_of(std::string_view s, const std::array<std::string_view, N>& list) {
  return std::find(list.begin(), list.end(), s) != list.end();
}

// Last name components in the checkpoints people have: Llama/Mistral/Qwen, GPT-2, GPT-NeoX/Falcon, BERT, Phi, OPT, MPT.
inline constexpr std::array<std::string_view, 19> attention_names{
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "c_attn",          "query", "key",     "value",
    "wq",     "wk",     "wv",     "wo",     "Wqkv",     "W_pack",   "query_key_value", "qkv",   "q_a_proj"};
inline constexpr std::array<std::string_view, 15> mlp_names{
    "gate_proj", "up_proj", "down_proj", "gate_up_proj",  "fc1",           "fc2",    "c_fc", "w1",
    "w2",        "w3",      "fc_in",     "dense_h_to_4h", "dense_4h_to_h", "fc_out", "wi"};
inline constexpr std::array<std::string_view, 6> head_names{"lm_head",     "embed_out",  "output",
                                                            "output_head", "classifier", "score"};

/// Names that several families give to attention and MLP parts are told apart by the component before them.
inline bool within(std::string_view name, std::string_view a, std::string_view b = {}) {
  for (std::size_t begin = 0; begin < name.size();) {
    const auto end = std::min(name.find('.', begin), name.size());
    const auto part = name.substr(begin, end - begin);
    if (part == a || (!b.empty() && part == b)) return true;
    begin = end + 1;
  }
  return false;
}
inline bool is_attention(std::string_view name) {
  const auto last = last_component(name);
  if (is_one_of(last, attention_names)) return true;
  return (last == "c_proj" || last == "dense") &&
         (within(name, "attn", "attention") || within(name, "self_attention", "self_attn"));
}
inline bool is_mlp(std::string_view name) {
  const auto last = last_component(name);
  return is_one_of(last, mlp_names) || (last == "c_proj" && within(name, "mlp", "ffn"));
}
/// The output head: a known name outside every numbered layer, so that BERT's "layer.0.output" is not taken for one.
inline bool has_layer_number(std::string_view name);
inline bool is_head(std::string_view name) {
  return is_one_of(last_component(name), head_names) && !has_layer_number(name);
}

/// The number of the layer a module is in: the first all-digit component, or the first one after a component `pattern`.
inline std::optional<Index> layer_number(std::string_view name, std::string_view pattern = {}) {
  std::string_view previous;
  for (std::size_t begin = 0; begin < name.size();) {
    const auto end = std::min(name.find('.', begin), name.size());
    const auto part = name.substr(begin, end - begin);
    const bool digits = !part.empty() && part.size() <= 9 &&
                        std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (digits && !previous.empty() && (pattern.empty() || previous == pattern)) {
      Index n = 0;
      for (const char c : part) n = n * 10 + (c - '0');
      return n;
    }
    previous = part;
    begin = end + 1;
  }
  return std::nullopt;
}
inline bool has_layer_number(std::string_view name) { return layer_number(name).has_value(); }

/// Names or one expression, with a count of matches for each, so that one that matches nothing can be named.
class NameMatcher {
 public:
  NameMatcher(const char* what, const std::string& spec) : what_(what) {
    if (spec.find_first_of("\\^$*+?()[]{}|") != std::string::npos) {
      expression_ = compile_pattern(what, spec, spec);
      patterns_.push_back(spec);
    } else {
      for (std::size_t begin = 0; begin <= spec.size();) {
        const auto end = std::min(spec.find(',', begin), spec.size());
        std::string item = spec.substr(begin, end - begin);
        item.erase(0, item.find_first_not_of(" \t"));
        item.erase(item.find_last_not_of(" \t") + 1);
        if (item.empty()) throw ArgumentError(text(what, ": an empty name in '", spec, "'"));
        patterns_.push_back(std::move(item));
        begin = end + 1;
      }
    }
    counts_.resize(patterns_.size());
  }

  bool operator()(const std::string& name) {
    if (expression_) {
      const bool hit = std::regex_match(name, *expression_);
      counts_[0] += hit;
      return hit;
    }
    bool any = false;
    for (std::size_t i = 0; i < patterns_.size(); ++i) {
      const bool hit = ends_with_component(name, patterns_[i]);
      counts_[i] += hit;
      any = any || hit;
    }
    return any;
  }

  /// Throws naming the first pattern without a match.
  void expect_all_used(std::size_t modules, const std::string& example) const {
    for (std::size_t i = 0; i < patterns_.size(); ++i)
      if (counts_[i] == 0)
        throw ArgumentError(text(what_, ": '", patterns_[i], "' matches none of ", modules, " modules",
                                 example.empty() ? "" : " (names are like '" + example + "')"));
  }

 private:
  const char* what_;
  std::optional<std::regex> expression_;
  std::vector<std::string> patterns_;
  std::vector<std::size_t> counts_;
};

}  // namespace detail

/// The modules that `options` mean.
///
/// A module of kind `other` is never chosen; an embedding or a convolution only when a name, an expression or "all"
/// means it.
/// **Throws** ArgumentError: no modules; a preset, name or expression that matches nothing, or an `exclude` that
/// matches none of the modules; a layer number that no matched module has; nothing left in the end. Each names the
/// culprit.
/// **Cost** O(modules·patterns).
/// **Numerics** the rules for names and expressions are PEFT's `target_modules`; for `layers_to_transform` PEFT takes
/// the last number in a name, we the first, so that the experts of a mixture do not count as layers.
inline TargetSelection select_targets(std::span<const ModuleInfo> modules, const TargetOptions& options = {}) {
  constexpr const char* where = "select_targets";
  const std::string& t = options.targets;
  const bool preset = t == "attention" || t == "mlp" || t == "all-linear" || t == "all";
  TargetSelection result;
  std::string example;
  for (const ModuleInfo& m : modules)
    if (m.kind != ModuleKind::other) {
      ++result.adaptable;
      if (example.empty()) example = m.name;
    }
  if (result.adaptable == 0)
    throw ArgumentError(detail::text(where, ": the model has no module that could carry an adapter"));

  std::optional<detail::NameMatcher> wanted, unwanted;
  if (!preset) wanted.emplace("targets", t);
  if (!options.exclude.empty()) unwanted.emplace("exclude", options.exclude);
  const auto means = [&](const ModuleInfo& m) {
    if (!preset) return (*wanted)(m.name);
    if (m.kind == ModuleKind::embedding) return t == "all";
    if (m.kind != ModuleKind::linear || m.role == ModuleRole::router) return false;
    if (t == "attention") return detail::is_attention(m.name);
    if (t == "mlp") return detail::is_mlp(m.name);
    return t == "all" || !(m.role == ModuleRole::by_name ? detail::is_head(m.name) : m.role == ModuleRole::head);
  };

  std::vector<bool> layer_seen(options.layers_to_transform.size());
  for (std::size_t i = 0; i < modules.size(); ++i) {
    const ModuleInfo& m = modules[i];
    if (m.kind == ModuleKind::other) continue;
    // Asked for every module, so that an exclude that matches something outside the targets is not called a mistake.
    const bool out = unwanted && (*unwanted)(m.name);
    if (!means(m)) continue;
    ++result.matched;
    if (out) {
      ++result.excluded;
      continue;
    }
    if (!options.layers_to_transform.empty()) {
      const auto layer = detail::layer_number(m.name, options.layers_pattern);
      const auto& list = options.layers_to_transform;
      const auto at = layer ? std::find(list.begin(), list.end(), *layer) : list.end();
      if (at == list.end()) {
        ++result.in_other_layers;
        continue;
      }
      layer_seen[std::size_t(at - list.begin())] = true;
    }
    result.selected.push_back(i);
  }

  if (wanted) wanted->expect_all_used(result.adaptable, example);
  if (unwanted) unwanted->expect_all_used(result.adaptable, example);
  if (result.matched == 0)
    throw ArgumentError(detail::text(where, ": the preset '", t, "' matches none of ", result.adaptable,
                                     " modules (names are like '", example, "'); give names or an expression"));
  for (std::size_t l = 0; l < layer_seen.size(); ++l)
    if (!layer_seen[l] &&
        std::find(options.layers_to_transform.begin(), options.layers_to_transform.begin() + std::ptrdiff_t(l),
                  options.layers_to_transform[l]) == options.layers_to_transform.begin() + std::ptrdiff_t(l))
      throw ArgumentError(
          detail::text("layers_to_transform: no targeted module is in layer ", options.layers_to_transform[l]));
  if (result.selected.empty())
    throw ArgumentError(detail::text(where, ": nothing is left: '", t, "' matches ", result.matched,
                                     " modules, exclude '", options.exclude, "' drops all of them"));
  return result;
}

}  // namespace lowrank

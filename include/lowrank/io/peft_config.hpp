// SPDX-License-Identifier: Apache-2.0
// adapter_config.json: what PEFT needs to know of a LoRA adapter beside its tensors.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/io/json.hpp"
#include "lowrank/model/rank_pattern.hpp"

namespace lowrank::io {

/// The fields of a PEFT LoraConfig that have a meaning outside training code, with PEFT's defaults.
///
/// Scale: s = lora_alpha/r, or lora_alpha/√r with use_rslora; rank_pattern and alpha_pattern override r and lora_alpha
/// for the modules they match, first match wins.
struct PeftConfig {
  Index r = 8;
  double lora_alpha = 8, lora_dropout = 0;
  /// Suffixes of module names; or, when `target_expression` is not empty, one expression matched against whole names,
  /// or "all-linear".
  std::vector<std::string> target_modules = {};
  std::string target_expression = {};
  std::vector<std::string> exclude_modules = {};
  std::string exclude_expression = {};
  std::vector<std::pair<std::string, Index>> rank_pattern = {};
  std::vector<std::pair<std::string, double>> alpha_pattern = {};
  std::vector<std::string> modules_to_save = {};
  std::vector<Index> layers_to_transform = {};
  std::vector<std::string> layers_pattern = {};
  std::string base_model_name_or_path = {}, revision = {}, task_type = {};
  std::string bias = "none";  ///< "none", "all", "lora_only": which biases of the base are saved with the adapter
  bool use_rslora = false, use_dora = false, lora_bias = false;
  bool fan_in_fan_out = false;  ///< the base stores W as in×out (GPT-2's Conv1D); A and B are as ever
  /// "true", "false", or the name of an initialiser. Anything but true makes PEFT change the base again on load, so
  /// adapters whose base is already changed are written with "true".
  std::string init_lora_weights = "true";
  /// Keys of the file that are not known here; PEFT ignores such keys with a warning.
  std::vector<std::string> unknown_keys = {};

  friend bool operator==(const PeftConfig&, const PeftConfig&) = default;
};

namespace detail {

inline void read_names_or_expression(const JsonReader& in, const char* key, std::vector<std::string>& names,
                                     std::string& expression) {
  const Json* v = in.find(key);
  if (v == nullptr) return;
  if (v->is_string())
    expression = v->get<std::string>();
  else
    names = in.strings(key);
}

/// An integer where the value is one, so that 16 is written as 16 and not as 16.0.
inline Json integral_or_double(double x) {
  if (x == std::floor(x) && std::abs(x) < 1e15) return std::int64_t(x);
  return x;
}
}  // namespace detail

/// Reads the text of an adapter_config.json.
///
/// Absent and null keys get PEFT's defaults (r and lora_alpha must not be null); unknown keys are listed, not refused,
/// as PEFT does.
/// **Throws** IoError naming `path` and the key: not a LoRA adapter, a value of the wrong type or out of range, and
/// settings that change what the adapter computes and are not supported (target_parameters, layer_replication,
/// activated LoRA, trainable_token_indices, use_qalora, arrow_config).
inline PeftConfig parse_peft_config(const std::string& path, std::string_view text) {
  const Json json = parse_json(path, text);
  if (!json.is_object()) throw IoError(path, "must hold a JSON object");
  const detail::JsonReader in(path, json);
  const std::string type = in.string("peft_type");
  if (type != "LORA")
    throw IoError(path, "peft_type", type.empty() ? "is missing, expected LORA" : "is " + type + ", expected LORA");
  for (const char* unsupported : {"target_parameters", "layer_replication", "alora_invocation_tokens",
                                  "trainable_token_indices", "use_qalora", "arrow_config"}) {
    const Json* v = in.find(unsupported);
    if (v != nullptr && !(v->is_boolean() && !v->get<bool>()) && !(v->is_structured() && v->empty()))
      throw IoError(path, unsupported, "is not supported: the adapter would compute something else without it");
  }
  constexpr std::int64_t limit = 1 << 30;
  PeftConfig c;
  c.r = in.integer("r", c.r, 1, limit);
  for (const char* key : {"r", "lora_alpha"})  // where PEFT has no default for null
    if (json.contains(key) && json.at(key).is_null()) throw IoError(path, key, "must be a number, got null");
  c.lora_alpha = in.number("lora_alpha", c.lora_alpha);
  c.lora_dropout = in.number("lora_dropout", c.lora_dropout);
  if (!std::isfinite(c.lora_alpha)) throw IoError(path, "lora_alpha", "must be finite");
  if (!(c.lora_dropout >= 0 && c.lora_dropout < 1)) throw IoError(path, "lora_dropout", "must lie in [0, 1)");
  detail::read_names_or_expression(in, "target_modules", c.target_modules, c.target_expression);
  detail::read_names_or_expression(in, "exclude_modules", c.exclude_modules, c.exclude_expression);
  if (const Json* p = in.find("rank_pattern")) {
    if (!p->is_object()) in.fail("rank_pattern", "an object", *p);
    for (const auto& [key, value] : p->items())
      c.rank_pattern.emplace_back(key, in.as_integer("rank_pattern." + key, value, 1, limit));
  }
  if (const Json* p = in.find("alpha_pattern")) {
    if (!p->is_object()) in.fail("alpha_pattern", "an object", *p);
    for (const auto& [key, value] : p->items()) {
      if (!value.is_number() || !std::isfinite(value.get<double>())) in.fail("alpha_pattern." + key, "a number", value);
      c.alpha_pattern.emplace_back(key, value.get<double>());
    }
  }
  c.modules_to_save = in.strings("modules_to_save");
  if (const Json* l = in.find("layers_to_transform")) {
    if (l->is_array())
      for (const Json& e : *l) c.layers_to_transform.push_back(in.as_integer("layers_to_transform", e, 0, limit));
    else
      c.layers_to_transform.push_back(in.as_integer("layers_to_transform", *l, 0, limit));
  }
  if (const Json* l = in.find("layers_pattern"); l != nullptr && l->is_string())
    c.layers_pattern = {l->get<std::string>()};
  else
    c.layers_pattern = in.strings("layers_pattern");
  c.base_model_name_or_path = in.string("base_model_name_or_path");
  c.revision = in.string("revision");
  c.task_type = in.string("task_type");
  c.bias = in.string("bias", "none");
  if (c.bias != "none" && c.bias != "all" && c.bias != "lora_only")
    throw IoError(path, "bias", "must be none, all or lora_only, got " + c.bias);
  c.use_rslora = in.boolean("use_rslora");
  c.use_dora = in.boolean("use_dora");
  c.lora_bias = in.boolean("lora_bias");
  c.fan_in_fan_out = in.boolean("fan_in_fan_out");
  if (const Json* v = in.find("init_lora_weights")) {
    if (!v->is_boolean() && !v->is_string()) in.fail("init_lora_weights", "a boolean or a name", *v);
    c.init_lora_weights = v->is_boolean() ? (v->get<bool>() ? "true" : "false") : v->get<std::string>();
  }
  static constexpr std::string_view known[] = {
      "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern",
      "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern", "base_model_name_or_path",
      "revision", "task_type", "bias", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "init_lora_weights",
      "target_parameters", "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "use_qalora",
      "arrow_config",
      // without meaning for the values of the adapter
      "auto_mapping", "inference_mode", "peft_version", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
      "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying", "use_bdlora"};
  for (const auto& [key, value] : json.items())
    if (std::find(std::begin(known), std::end(known), key) == std::end(known)) c.unknown_keys.push_back(key);
  return c;
}

/// The text of an adapter_config.json that PEFT loads: sorted keys, two spaces of indent, as PEFT writes it.
inline std::string peft_config_text(const PeftConfig& c) {
  nlohmann::json j;  // sorts its keys
  const auto or_null = [](const std::string& s) { return s.empty() ? nlohmann::json(nullptr) : nlohmann::json(s); };
  const auto list_or_null = [](const auto& v) { return v.empty() ? nlohmann::json(nullptr) : nlohmann::json(v); };
  j["peft_type"] = "LORA";
  j["auto_mapping"] = nullptr;
  j["base_model_name_or_path"] = or_null(c.base_model_name_or_path);
  j["revision"] = or_null(c.revision);
  j["task_type"] = or_null(c.task_type);
  j["inference_mode"] = true;
  j["r"] = c.r;
  j["lora_alpha"] = nlohmann::json(detail::integral_or_double(c.lora_alpha));
  j["lora_dropout"] = c.lora_dropout;
  j["target_modules"] =
      c.target_expression.empty() ? nlohmann::json(c.target_modules) : nlohmann::json(c.target_expression);
  j["exclude_modules"] =
      c.exclude_expression.empty() ? list_or_null(c.exclude_modules) : nlohmann::json(c.exclude_expression);
  j["modules_to_save"] = list_or_null(c.modules_to_save);
  j["layers_to_transform"] = list_or_null(c.layers_to_transform);
  j["layers_pattern"] = list_or_null(c.layers_pattern);
  j["bias"] = c.bias;
  j["use_rslora"] = c.use_rslora;
  j["use_dora"] = c.use_dora;
  j["lora_bias"] = c.lora_bias;
  j["fan_in_fan_out"] = c.fan_in_fan_out;
  if (c.init_lora_weights == "true" || c.init_lora_weights == "false")
    j["init_lora_weights"] = c.init_lora_weights == "true";
  else
    j["init_lora_weights"] = c.init_lora_weights;
  // The patterns keep their order: the first key that matches counts.
  Json out = Json::object();
  Json ranks = Json::object(), alphas = Json::object();
  for (const auto& [key, value] : c.rank_pattern) ranks[key] = value;
  for (const auto& [key, value] : c.alpha_pattern) alphas[key] = detail::integral_or_double(value);
  j["rank_pattern"] = nullptr;
  j["alpha_pattern"] = nullptr;
  for (const auto& [key, value] : j.items())
    out[key] = key == "rank_pattern" ? ranks : key == "alpha_pattern" ? alphas : Json(value);
  return out.dump(2) + "\n";
}

/// Rank, alpha and scale of each module under a configuration.
class PeftScaling {
 public:
  explicit PeftScaling(const PeftConfig& c)
      : r_(c.r),
        alpha_(c.lora_alpha),
        rslora_(c.use_rslora),
        ranks_("rank_pattern", c.rank_pattern),
        alphas_("alpha_pattern", c.alpha_pattern) {}

  [[nodiscard]] Index rank(const std::string& module) { return ranks_.find(module, r_); }
  [[nodiscard]] double alpha(const std::string& module) { return alphas_.find(module, alpha_); }
  [[nodiscard]] double scale(const std::string& module) {
    const auto r = double(rank(module));
    return alpha(module) / (rslora_ ? std::sqrt(r) : r);
  }

 private:
  Index r_;
  double alpha_;
  bool rslora_;
  PatternMap<Index> ranks_;
  PatternMap<double> alphas_;
};

}  // namespace lowrank::io

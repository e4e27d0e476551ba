// SPDX-License-Identifier: Apache-2.0
// Which modules the settings of an adapter_config.json mean, by PEFT's rules.
#pragma once

#include <algorithm>
#include <optional>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

#include "lowrank/io/peft_config.hpp"
#include "lowrank/model/targets.hpp"

namespace lowrank::io::detail {

/// Which modules target_modules and exclude_modules mean, by PEFT's rules. An expression in Python's grammar that has
/// no meaning here is believed.
class PeftTargets {
 public:
  explicit PeftTargets(const PeftConfig& c) : config_(c) {
    all_linear_ = c.target_expression == "all-linear";
    if (!all_linear_) target_ = compiled(c.target_expression);
    exclude_ = compiled(c.exclude_expression);
  }
  /// What speaks against an adapter on the module; empty when nothing.
  [[nodiscard]] std::string contradiction(const std::string& name, ModuleKind kind) const {
    const PeftConfig& c = config_;
    if (all_linear_ && kind != ModuleKind::linear) return "is no linear layer, but target_modules is \"all-linear\"";
    if (target_ && !std::regex_match(name, *target_))
      return "is not meant by target_modules, the expression \"" + c.target_expression + "\"";
    if (c.target_expression.empty() && !c.target_modules.empty() && !listed(c.target_modules, name))
      return "is not meant by target_modules [" + shown(c.target_modules) + "]";
    if (exclude_ ? std::regex_match(name, *exclude_) : listed(c.exclude_modules, name))
      return "is left out by exclude_modules";
    if (!c.layers_to_transform.empty() && !in_layers(name)) return "is in none of the layers of layers_to_transform";
    return {};
  }

 private:
  static std::optional<std::regex> compiled(const std::string& expression) {
    if (expression.empty()) return std::nullopt;
    try {
      return std::regex(expression, std::regex::ECMAScript | std::regex::optimize);
    } catch (const std::regex_error&) {
      return std::nullopt;
    }
  }
  static bool listed(const std::vector<std::string>& names, const std::string& module) {
    return std::any_of(names.begin(), names.end(),
                       [&](const std::string& n) { return lowrank::detail::ends_with_component(module, n); });
  }
  static std::string shown(const std::vector<std::string>& names) {
    std::string list;
    for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 6); ++i) list += (i > 0 ? ", " : "") + names[i];
    return names.size() > 6 ? list + ", ..." : list;
  }
  /// PEFT takes the last number of a name, or the one behind a name of layers_pattern; any of them will do here.
  [[nodiscard]] bool in_layers(const std::string& module) const {
    for (std::size_t begin = 0; begin < module.size();) {
      const auto end = std::min(module.find('.', begin), module.size());
      for (const Index layer : config_.layers_to_transform)
        if (std::string_view(module).substr(begin, end - begin) == std::to_string(layer)) return true;
      begin = end + 1;
    }
    return false;
  }
  const PeftConfig& config_;
  bool all_linear_ = false;
  std::optional<std::regex> target_, exclude_;
};

}  // namespace lowrank::io::detail

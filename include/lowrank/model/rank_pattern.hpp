// SPDX-License-Identifier: Apache-2.0
// Per-module overrides of rank and alpha: the first pattern that matches the end of a module's name wins.
#pragma once

#include <regex>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/core/errors.hpp"

namespace lowrank {

namespace detail {

/// A regular expression in ECMAScript grammar; a bad one is an error that quotes it and says what the grammar lacks.
inline std::regex compile_pattern(const char* where, const std::string& full, const std::string& pattern) {
  if (pattern.empty()) throw ArgumentError(text(where, ": a pattern must not be empty"));
  try {
    return std::regex(full, std::regex::ECMAScript | std::regex::optimize);
  } catch (const std::regex_error& e) {
    throw ArgumentError(text(where, ": '", pattern, "' is not a regular expression (", e.what(),
                             "); ECMAScript grammar: no look-behind, no named groups, no inline flags"));
  }
}

}  // namespace detail

/// Values attached to module-name patterns, tried in the order given: `rank_pattern` and `alpha_pattern` of an adapter.
///
/// A key matches a name when the regular expression `(.*\.)?(key)` matches the whole name: "q_proj" matches
/// "model.layers.0.self_attn.q_proj", "layers\.0\..*" every module of layer 0 whatever stands before it.
/// **Throws** ArgumentError from the constructor: an empty key, a key twice, a key that is not a regular expression;
/// from `expect_all_used` for a key that no name ever matched. **Cost** O(patterns) regular expressions a name.
/// **Source** the rule PEFT applies to `rank_pattern` and `alpha_pattern`.
template <class Value>
class PatternMap {
 public:
  PatternMap() = default;
  /// `what` names the map in messages: "rank_pattern".
  PatternMap(std::string what, const std::vector<std::pair<std::string, Value>>& entries) : what_(std::move(what)) {
    for (const auto& [key, value] : entries) {
      for (const Entry& e : entries_)
        if (e.key == key) throw ArgumentError(detail::text(what_, ": the key '", key, "' is given twice"));
      entries_.push_back({key, detail::compile_pattern(what_.c_str(), "(.*\\.)?(" + key + ")", key), value, 0});
    }
  }

  /// The value of the first key that matches `name`, else `otherwise`.
  [[nodiscard]] Value find(const std::string& name, const Value& otherwise) {
    for (Entry& e : entries_)
      if (std::regex_match(name, e.expression)) {
        ++e.used;
        return e.value;
      }
    return otherwise;
  }
  [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }

  /// Call after every module has been looked up. A key hidden behind an earlier one counts as unused.
  void expect_all_used() const {
    for (const Entry& e : entries_)
      if (e.used == 0)
        throw ArgumentError(detail::text(what_, ": the key '", e.key,
                                         "' matches no adapted module (or an earlier key matches all of them first)"));
  }

 private:
  struct Entry {
    std::string key;
    std::regex expression;
    Value value;
    std::size_t used;
  };
  std::string what_;
  std::vector<Entry> entries_;
};

}  // namespace lowrank

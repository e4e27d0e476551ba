// SPDX-License-Identifier: Apache-2.0
// What pictures and tables take from a report's JSON, whichever command made it.
#pragma once

#include <cctype>
#include <cmath>
#include <filesystem>
#include <string>

#include "tool.hpp"

namespace lowrank::tool {

/// "model.layers.12.self_attn.q_proj.weight" → 12, "self_attn.q_proj"; layer −1 where a name has no number.
struct LayerName {
  int layer = -1;
  std::string module;
};
inline LayerName layer_name(std::string name) {
  if (name.ends_with(".weight")) name.resize(name.size() - 7);
  for (std::size_t at = 0; at < name.size();) {
    std::size_t end = name.find('.', at);
    if (end == std::string::npos) end = name.size();
    bool digits = end > at && end - at < 6;
    for (std::size_t i = at; i < end; ++i) digits = digits && std::isdigit(static_cast<unsigned char>(name[i])) != 0;
    if (digits && end < name.size()) return {std::stoi(name.substr(at, end - at)), name.substr(end + 1)};
    at = end + 1;
  }
  return {-1, name};
}

inline double number_at(const Json& j, const char* section, const char* key) {
  const auto s = j.find(section);
  if (s == j.end() || !s->is_object()) return NAN;
  const auto k = s->find(key);
  return k != s->end() && k->is_number() ? k->get<double>() : NAN;
}

/// The number a matrix is coloured and ranked by.
inline double heat_value(const Json& report, const Json& matrix) {
  const std::string command = report.value("command", "");
  if (command == "intruders") return matrix.contains("count") ? matrix["count"].get<double>() : NAN;
  if (command == "compare") return number_at(matrix, "left", "phi");
  return number_at(matrix, "ratio", "effective_rank");
}
inline std::string heat_caption(const Json& report) {
  const std::string command = report.value("command", "");
  if (command == "intruders") return "intruder dimensions";
  if (command == "compare") return "similarity of the leading left subspaces";
  return "effective rank relative to noise of the same shape";
}

/// Where a spectrum stops meaning something: the rounding edge of a difference, else the edge of the noise estimated.
inline double edge_of(const Json& matrix) {
  const double rounding = number_at(matrix, "rounding", "edge"), noise = number_at(matrix, "noise_level", "edge");
  return std::isfinite(rounding) ? rounding : std::isfinite(noise) ? noise : 0;
}

/// What a report is about, short.
inline std::string report_label(const Json& report) {
  for (const char* key : {"adapter", "checkpoint", "tuned", "a"})
    if (report.contains(key) && report[key].is_string()) {
      const std::filesystem::path p(report[key].get<std::string>());
      return p.filename().empty() ? p.parent_path().filename().string() : p.filename().string();
    }
  return "?";
}

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// What pictures and tables take from a report's JSON, whichever command made it.
#pragma once

#include <cctype>
#include <cmath>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

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

/// The ends between which a metric lies; not numbers where the report does not say.
inline std::pair<double, double> bounds_at(const Json& matrix, const char* metric) {
  const auto s = matrix.find("bounds");
  if (s == matrix.end() || !s->is_object()) return {NAN, NAN};
  const auto k = s->find(metric);
  if (k == s->end() || !k->is_array() || k->size() != 2) return {NAN, NAN};
  const auto end = [&](std::size_t i) { return k->at(i).is_number() ? k->at(i).get<double>() : NAN; };
  return {end(0), end(1)};
}

/// The number matrices are coloured and ranked by, one for all reports of a page. Of spectra it is the effective rank
/// beside that of noise; where not every singular value is known, the stable rank, which the largest and the norm give.
class Heat {
 public:
  explicit Heat(const std::vector<Json>& reports) : command_(reports.back().at("command").get<std::string>()) {
    for (const Json& r : reports)
      for (const Json& j : r.at("matrices"))
        if (!std::isfinite(number_at(j, "ratio", metric_))) metric_ = "stable_rank";
  }
  double operator()(const Json& matrix) const {
    if (command_ == "intruders") return matrix.at("count").get<double>();
    if (command_ == "compare") return number_at(matrix, "left", "phi");
    return number_at(matrix, "ratio", metric_);
  }
  [[nodiscard]] std::string caption() const {
    if (command_ == "intruders") return "intruder dimensions";
    if (command_ == "compare") return "similarity of the leading left subspaces";
    return std::string(metric_[0] == 'e' ? "effective" : "stable") + " rank relative to noise of the same shape";
  }
  /// The same for an axis.
  [[nodiscard]] std::string label() const {
    if (command_ == "intruders") return caption();
    if (command_ == "compare") return "similarity φ";
    return std::string(metric_[0] == 'e' ? "effective" : "stable") + " rank / that of noise";
  }
  /// Whether the largest numbers are the ones to look at.
  [[nodiscard]] bool high_first() const { return command_ != "compare"; }

 private:
  std::string command_;
  const char* metric_ = "effective_rank";
};

/// Where a spectrum stops meaning something: the rounding edge of a difference, else the edge of the noise estimated.
inline double edge_of(const Json& matrix) {
  const double rounding = number_at(matrix, "rounding", "edge"), noise = number_at(matrix, "noise_level", "edge");
  return std::isfinite(rounding) ? rounding : std::isfinite(noise) ? noise : 0;
}

/// What a report is about, short.
inline std::string report_label(const Json& report) {
  for (const char* key : {"adapter", "checkpoint", "tuned", "a"})
    if (report.contains(key) && report.at(key).is_string()) {
      const std::filesystem::path p(report.at(key).get<std::string>());
      return p.filename().empty() ? p.parent_path().filename().string() : p.filename().string();
    }
  return "?";
}

}  // namespace lowrank::tool

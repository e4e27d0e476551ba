// SPDX-License-Identifier: Apache-2.0
// CSV of a report's entries.
#include "report_csv.hpp"

#include <map>

namespace lowrank::tool {
namespace {

std::string quoted(std::string s) {
  if (s.find_first_of(",\"\n\r") == std::string::npos) return s;
  for (std::size_t at = 0; (at = s.find('"', at)) != std::string::npos; at += 2) s.insert(at, 1, '"');
  return "\"" + s + "\"";
}

std::string cell(const Json& value) {
  return value.is_null() ? std::string() : value.is_string() ? quoted(value.get<std::string>()) : value.dump();
}

using Row = std::vector<std::pair<std::string, std::string>>;  // column, cell

void flatten(const std::string& prefix, const Json& object, Row& row) {
  for (const auto& [key, value] : object.items()) {
    if (value.is_primitive()) {
      row.emplace_back(prefix + key, cell(value));
    } else if (value.is_object() && key == "bounds") {
      for (const auto& [metric, ends] : value.items())
        for (std::size_t end = 0; end < 2; ++end)
          row.emplace_back(prefix + metric + (end == 0 ? "_lo" : "_hi"), cell(ends.at(end)));
    } else if (value.is_object()) {
      flatten(key == "metrics" ? prefix : prefix + key + "_", value, row);
    } else if (key == "intruders" || key == "angles") {
      std::string list;
      for (const Json& x : value) list += (list.empty() ? "" : " ") + cell(x);
      row.emplace_back(prefix + key, list);
    }
  }
}

}  // namespace

std::string csv_text(const std::vector<Json>& matrices) {
  std::vector<std::string> columns;
  std::map<std::string, std::size_t> place;
  std::vector<std::vector<std::string>> rows;
  for (const Json& m : matrices) {
    Row row;
    flatten("", m, row);
    auto& cells = rows.emplace_back(columns.size());
    for (auto& [name, text] : row) {
      const auto [it, fresh] = place.try_emplace(name, columns.size());
      if (fresh) columns.push_back(name);
      if (it->second >= cells.size()) cells.resize(it->second + 1);
      cells[it->second] = std::move(text);
    }
  }
  std::string text;
  const auto line = [&](const std::vector<std::string>& cells) {
    for (std::size_t c = 0; c < columns.size(); ++c) {
      text += c > 0 ? "," : "";
      if (c < cells.size()) text += cells[c];
    }
    text += "\n";
  };
  line(columns);
  for (const auto& row : rows) line(row);
  return text;
}

}  // namespace lowrank::tool

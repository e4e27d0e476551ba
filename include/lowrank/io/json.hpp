// SPDX-License-Identifier: Apache-2.0
// Strict JSON: nlohmann's parser with duplicate keys, deep nesting and anything after the value refused.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "lowrank/io/file.hpp"

namespace lowrank::io {

/// A JSON value that remembers the order of its keys (PEFT's patterns are matched in file order).
using Json = nlohmann::ordered_json;

/// Parses a whole document. **Throws** IoError(`path`, …) on syntax errors, numbers no double holds, duplicate keys,
/// nesting deeper than 64, and objects of more than 20,000 keys (the ordered object looks keys up linearly).
inline Json parse_json(const std::string& path, std::string_view text) {
  std::vector<std::set<std::string>> keys;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > 64) throw IoError(path, "JSON is nested deeper than 64 levels");
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) throw IoError(path, key, "JSON key occurs twice");
      if (keys.back().size() > 20000) throw IoError(path, "a JSON object has more than 20000 keys");
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::out_of_range& e) {  // the library says which number, behind its own words
    const std::string_view said = e.what();
    const auto at = said.rfind('\'', said.size() - 2);
    throw IoError(path, lowrank::detail::text("holds a number beyond the range of a double",
                                              at == std::string_view::npos ? "" : ": ",
                                              at == std::string_view::npos ? "" : said.substr(at)));
  } catch (const nlohmann::json::exception& e) {
    throw IoError(path, lowrank::detail::text("not valid JSON: ", e.what()));
  }
}

/// A file that holds one JSON object, read whole. **Throws** IoError as read_text() and parse_json(), and when it holds
/// anything else.
inline Json read_json_object(const std::string& path) {
  Json j = parse_json(path, read_text(path));
  if (!j.is_object()) throw IoError(path, "must hold a JSON object");
  return j;
}

namespace detail {

/// A string as JSON writes it, quotes included. Bytes that are not UTF-8 are an error.
inline std::string quoted(const std::string& path, const std::string& s) {
  try {
    return nlohmann::json(s).dump();
  } catch (const nlohmann::json::exception&) {
    throw IoError(path, "a name is not valid UTF-8");
  }
}

/// Typed members of an object: absent or null gives the default, a value of another type is an error that names the
/// key.
class JsonReader {
 public:
  JsonReader(std::string path, const Json& object) : path_(std::move(path)), object_(object) {}

  [[nodiscard]] const Json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  [[nodiscard]] std::string string(const char* key, std::string otherwise = {}) const {
    const Json* v = find(key);
    if (v == nullptr) return otherwise;
    if (!v->is_string()) fail(key, "a string", *v);
    return v->get<std::string>();
  }
  [[nodiscard]] bool boolean(const char* key, bool otherwise = false) const {
    const Json* v = find(key);
    if (v == nullptr) return otherwise;
    if (!v->is_boolean()) fail(key, "true or false", *v);
    return v->get<bool>();
  }
  [[nodiscard]] double number(const char* key, double otherwise = 0) const {
    const Json* v = find(key);
    if (v == nullptr) return otherwise;
    if (!v->is_number()) fail(key, "a number", *v);
    return v->get<double>();
  }
  /// An integer in [low, high]; floats are refused, even 8.0.
  [[nodiscard]] std::int64_t integer(const char* key, std::int64_t otherwise, std::int64_t low,
                                     std::int64_t high) const {
    const Json* v = find(key);
    return v == nullptr ? otherwise : as_integer(key, *v, low, high);
  }
  [[nodiscard]] std::int64_t as_integer(const std::string& key, const Json& v, std::int64_t low,
                                        std::int64_t high) const {
    if (!v.is_number_integer()) fail(key, lowrank::detail::text("an integer in [", low, ", ", high, "]").c_str(), v);
    const bool too_big = v.is_number_unsigned() && v.get<std::uint64_t>() > std::uint64_t(high < 0 ? 0 : high);
    if (too_big || v.get<std::int64_t>() < low || v.get<std::int64_t>() > high)
      fail(key, lowrank::detail::text("an integer in [", low, ", ", high, "]").c_str(), v);
    return v.get<std::int64_t>();
  }
  [[nodiscard]] std::vector<std::string> strings(const char* key) const {
    std::vector<std::string> out;
    const Json* v = find(key);
    if (v == nullptr) return out;
    if (!v->is_array()) fail(key, "a list of strings", *v);
    for (const Json& e : *v) {
      if (!e.is_string()) fail(key, "a list of strings", *v);
      out.push_back(e.get<std::string>());
    }
    return out;
  }
  [[noreturn]] void fail(const std::string& key, const char* expected, const Json& got) const {
    std::string shown = got.dump(-1, ' ', true, Json::error_handler_t::replace);
    if (shown.size() > 40) shown = shown.substr(0, 37) + "...";
    throw IoError(path_, key, lowrank::detail::text("must be ", expected, ", got ", shown));
  }

 private:
  std::string path_;
  const Json& object_;
};

}  // namespace detail
}  // namespace lowrank::io

// SPDX-License-Identifier: Apache-2.0
// The mark of an adapter whose base weights were changed together with it (PiSSA, LoftQ, ...): on the original weights
// it computes something else, and nothing in its tensors says so.
#pragma once

#include <filesystem>
#include <map>
#include <optional>

#include "lowrank/io/hash.hpp"
#include "lowrank/io/json.hpp"
#include "lowrank/io/tensor.hpp"

namespace lowrank::io {

/// The file that holds the mark, beside adapter_config.json and in the changed base's own directory.
inline constexpr const char* changed_base_file = "lowrank.json";

/// The base an adapter stands on, where that is not the original one.
struct ChangedBase {
  std::string kind = "residual";  ///< "residual": W − s·B·A; "quantized"
  std::string method = {};        ///< the initialiser, "pissa"; may be empty
  std::string original = {};      ///< where the original checkpoint was; may be empty
  /// Name of each changed weight → fingerprint() of what it became. Empty: the base cannot be recognised.
  std::map<std::string, std::string> weights = {};

  friend bool operator==(const ChangedBase&, const ChangedBase&) = default;
};

namespace detail {
inline std::string hex_text(std::uint64_t h) {
  std::string text(16, '0');
  for (auto digit = text.rbegin(); digit != text.rend(); ++digit, h >>= 4) *digit = "0123456789abcdef"[h & 15];
  return text;
}
}  // namespace detail

/// Sixteen hexadecimal digits that two tensors share when type, shape and every bit agree (and by chance once in 2⁶⁴).
///
/// It depends on neither the name, nor the file, nor how a checkpoint is sharded. **Cost** one pass over the bytes.
inline std::string fingerprint(Dtype dtype, const Shape& shape, Bytes bytes) {
  return detail::hex_text(xxh64(bytes, xxh64(std::string(dtype_name(dtype)) + shape_text(shape))));
}
/// **Throws** IoError when the file cannot be read, or was truncated.
inline std::string fingerprint(const TensorView& t) {
  Xxh64 h(xxh64(std::string(dtype_name(t.dtype())) + shape_text(t.shape())));
  t.read([&](Bytes piece) { h.add(piece); });
  return detail::hex_text(h.value());
}

/// The text of a lowrank.json.
inline std::string changed_base_text(const ChangedBase& b) {
  const Json j = {{"base", b.kind}, {"method", b.method}, {"original_base", b.original}, {"weights", b.weights}};
  return j.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";  // a path may be any bytes
}

namespace detail {

inline std::map<std::string, std::string> parse_fingerprints(const JsonReader& in, const Json& weights) {
  if (!weights.is_object()) in.fail("weights", "an object", weights);
  std::map<std::string, std::string> out;
  for (const auto& [name, value] : weights.items()) {
    if (!value.is_string()) in.fail("weights", "names and fingerprints", value);
    out[name] = value.template get<std::string>();
  }
  return out;
}

inline void expect_kind(const std::string& path, const std::string& kind) {
  if (kind != "residual" && kind != "quantized")
    throw IoError(path, "base", "must be residual or quantized, got \"" + kind + "\"");
}
}  // namespace detail

/// Reads the text of a lowrank.json. **Throws** IoError naming `path` and the key.
inline ChangedBase parse_changed_base(const std::string& path, std::string_view text) {
  const Json json = parse_json(path, text);
  if (!json.is_object()) throw IoError(path, "must hold a JSON object");
  const detail::JsonReader in(path, json);
  ChangedBase b;
  b.kind = in.string("base");
  detail::expect_kind(path, b.kind);
  b.method = in.string("method");
  b.original = in.string("original_base");
  if (const Json* w = in.find("weights")) b.weights = detail::parse_fingerprints(in, *w);
  return b;
}

/// The mark in a directory, of an adapter or of a base; nothing where there is none. **Throws** as parse_changed_base.
inline std::optional<ChangedBase> read_changed_base(const std::string& directory) {
  std::error_code ignored;
  const std::string path = (std::filesystem::path(directory) / changed_base_file).string();
  if (directory.empty() || !std::filesystem::exists(path, ignored)) return std::nullopt;
  return parse_changed_base(path, read_text(path));
}

}  // namespace lowrank::io

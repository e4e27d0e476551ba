// SPDX-License-Identifier: Apache-2.0
// config.json of a checkpoint of any family: which family it is, and the few numbers that adapters depend on.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "lowrank/io/json.hpp"
#include "lowrank/model/families.hpp"

namespace lowrank::io {

/// What a config.json says of a model, whatever its family. Numbers that the file does not give are 0.
struct ModelConfig {
  std::string path;          ///< of the file
  std::string model_type;    ///< empty when the file has none
  std::string architecture;  ///< the first of `architectures`: "GPT2LMHeadModel"
  Index heads = 0, kv_heads = 0, experts = 0;
  bool tied_head = false;  ///< the output head is the embedding

  /// Null for a model_type that is not known here.
  [[nodiscard]] const ModelFamily* family() const { return find_model_family(model_type); }
};

/// Reads the text of a config.json. A model of several parts (`text_config`) is described by its text.
///
/// **Throws** IoError naming `path` and the key: JSON errors, values of another type or out of range.
inline ModelConfig parse_model_config(const std::string& path, std::string_view text) {
  const Json json = parse_json(path, text);
  if (!json.is_object()) throw IoError(path, "must hold a JSON object");
  const detail::JsonReader outer(path, json);
  ModelConfig c;
  c.path = path;
  c.model_type = outer.string("model_type");
  if (const Json* a = outer.find("architectures"); a != nullptr && a->is_array() && !a->empty())
    c.architecture = outer.strings("architectures").front();
  const Json* nested = outer.find("text_config");
  if (nested != nullptr && !nested->is_object()) outer.fail("text_config", "an object", *nested);
  const detail::JsonReader inner(path, nested == nullptr ? json : *nested);
  const auto number = [&](std::initializer_list<const char*> keys) -> Index {
    for (const detail::JsonReader* in : {&inner, &outer})
      for (const char* key : keys)
        if (in->find(key) != nullptr) return in->integer(key, 0, 0, std::int64_t(1) << 31);
    return 0;
  };
  c.heads = number({"num_attention_heads", "n_head", "num_heads"});
  c.kv_heads = number({"num_key_value_heads", "num_kv_heads", "n_head_kv"});
  // Falcon's older decoders share one key and one value among all heads, whatever num_kv_heads says.
  if (inner.find("multi_query") != nullptr && !inner.boolean("new_decoder_architecture"))
    c.kv_heads = inner.boolean("multi_query") ? 1 : c.heads;
  if (c.kv_heads == 0) c.kv_heads = c.heads;
  c.experts = number({"num_local_experts", "num_experts"});
  const ModelFamily* family = c.family();
  c.tied_head = outer.boolean("tie_word_embeddings",
                              inner.boolean("tie_word_embeddings", family != nullptr && family->tied_head));
  return c;
}

/// The config.json in a directory; nothing when there is none. **Throws** as parse_model_config.
inline std::optional<ModelConfig> find_model_config(const std::string& directory) {
  std::error_code ignored;
  const std::string path = (std::filesystem::path(directory) / "config.json").string();
  if (directory.empty() || !std::filesystem::exists(path, ignored)) return std::nullopt;
  return parse_model_config(path, read_text(path));
}

/// The same; **throws** IoError also when there is none.
inline ModelConfig read_model_config(const std::string& directory) {
  const std::string path = (std::filesystem::path(directory) / "config.json").string();
  return parse_model_config(path, read_text(path));
}

}  // namespace lowrank::io

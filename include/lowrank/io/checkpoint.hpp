// SPDX-License-Identifier: Apache-2.0
// A checkpoint as people have them: one .safetensors file, or a directory with one, or with shards and their index.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <set>

#include "lowrank/io/safetensors.hpp"
#include "lowrank/io/safetensors_writer.hpp"

namespace lowrank::io {

namespace detail {

/// Where each tensor of a sharded checkpoint lies; parsed by events because a weight map may hold very many names.
class IndexHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  IndexHandler(const std::string& path, std::map<std::string, std::string>& map) : path_(path), map_(map) {}
  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool string(string_t& s) override {
    if (in_map_ && depth_ == 2)
      map_[key_] = s;
    else
      value();
    return true;
  }
  bool key(string_t& s) override {
    if (depth_ == 1) {
      in_map_ = s == "weight_map";
      if (in_map_ && std::exchange(seen_, true)) throw IoError(path_, s, "JSON key occurs twice");
    }
    if (in_map_ && depth_ == 2 && map_.contains(s)) throw IoError(path_, s, "is mapped twice");
    key_ = s;
    return true;
  }
  bool start_object(std::size_t) override {
    if (in_map_ && depth_ == 2) throw IoError(path_, key_, "weight_map must map names to file names");
    return deeper();
  }
  bool end_object() override { return --depth_, true; }
  bool start_array(std::size_t) override {
    if (depth_ == 0) throw IoError(path_, "must hold a JSON object");
    if (in_map_ && depth_ <= 2) throw IoError(path_, key_, "weight_map must map names to file names");
    return deeper();
  }
  bool end_array() override { return --depth_, true; }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw IoError(path_, lowrank::detail::text("not valid JSON near byte ", position));
  }
  [[nodiscard]] bool complete() const { return seen_; }

 private:
  bool deeper() {
    if (++depth_ > 64) throw IoError(path_, "JSON is nested deeper than 64 levels");
    return true;
  }
  bool value() {
    if (depth_ == 0) throw IoError(path_, "must hold a JSON object");
    if (in_map_ && depth_ <= 2) throw IoError(path_, key_, "weight_map must map names to file names");
    return true;
  }
  const std::string& path_;
  std::map<std::string, std::string>& map_;
  std::string key_;
  int depth_ = 0;
  bool in_map_ = false, seen_ = false;
};

inline bool is_plain_file_name(const std::string& s) {
  return !s.empty() && s != "." && s != ".." && s.find('/') == std::string::npos && s.find('\0') == std::string::npos;
}
}  // namespace detail

/// Parses the text of a `*.safetensors.index.json`: tensor name → shard file name.
///
/// **Throws** IoError naming `path`: JSON errors, a missing or malformed weight_map, duplicate names, shard names that
/// are not plain file names (a path could lead anywhere).
inline std::map<std::string, std::string> parse_safetensors_index(const std::string& path, std::string_view text) {
  std::map<std::string, std::string> map;
  detail::IndexHandler handler(path, map);
  nlohmann::json::sax_parse(text.begin(), text.end(), &handler, nlohmann::json::input_format_t::json, true);
  if (!handler.complete()) throw IoError(path, "weight_map", "is missing");
  for (const auto& [name, shard] : map)
    if (!detail::is_plain_file_name(shard))
      throw IoError(path, name, lowrank::detail::text("shard \"", shard, "\" is not a plain file name"));
  return map;
}

/// All tensors of a checkpoint, wherever they lie.
///
/// The path is a .safetensors file, or a directory holding `model.safetensors`, or `model.safetensors.index.json` and
/// the shards it names (`adapter_model.safetensors` for an adapter).
/// **Throws** IoError: nothing of the kind there, a shard that is absent or invalid, a tensor that the index places in
/// a shard without it, a tensor in two shards, no tensor of the name asked for.
class Checkpoint {
 public:
  explicit Checkpoint(const std::string& path) : path_(path) {
    namespace fs = std::filesystem;
    std::error_code ignored;
    if (!fs::is_directory(path, ignored)) {
      open(path);
      return;
    }
    const auto in = [&](const char* name) { return (fs::path(path) / name).string(); };
    const std::string index = in("model.safetensors.index.json");
    const bool sharded = fs::exists(index, ignored);
    // An adapter may lie beside the shards it belongs to.
    const std::vector<const char*> singles =
        sharded ? std::vector{"model.safetensors"} : std::vector{"model.safetensors", "adapter_model.safetensors"};
    for (const char* single : singles)
      if (fs::exists(in(single), ignored)) {
        open(in(single));
        return;
      }
    if (!sharded) throw IoError(path, "holds neither model.safetensors nor model.safetensors.index.json");
    index_ = index;
    const auto map = parse_safetensors_index(index, read_text(index));
    std::map<std::string, std::size_t> shard_number;
    for (const auto& [name, shard] : map)
      if (shard_number.try_emplace(shard, 0).second && !fs::exists(in(shard.c_str()), ignored))
        throw IoError(index, name, lowrank::detail::text("shard ", shard, " does not exist"));
    for (auto& [shard, number] : shard_number) {
      number = shards_.size();
      open(in(shard.c_str()));
    }
    for (const auto& [name, shard] : map) {
      const auto it = by_name_.find(name);
      if (it == by_name_.end() || it->second.first != shard_number[shard])
        throw IoError(index, name, lowrank::detail::text("is not in ", shard, ", where the index places it"));
    }
  }

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  /// The index file of a sharded checkpoint, empty otherwise.
  [[nodiscard]] const std::string& index() const noexcept { return index_; }
  [[nodiscard]] std::size_t shard_count() const noexcept { return shards_.size(); }
  [[nodiscard]] const SafeTensors& shard(std::size_t i) const { return *shards_[i]; }
  [[nodiscard]] std::size_t size() const noexcept { return by_name_.size(); }

  [[nodiscard]] std::optional<TensorView> find(std::string_view name) const {
    const auto it = by_name_.find(name);
    if (it == by_name_.end()) return std::nullopt;
    return shards_[it->second.first]->view(*it->second.second);
  }
  [[nodiscard]] TensorView operator[](std::string_view name) const {
    auto t = find(name);
    if (!t) throw IoError(path_, std::string(name), "no such tensor");
    return *t;
  }
  /// Calls f(TensorView) for every tensor: shard by shard, in the order of the data.
  template <class F>
  void for_each(F&& f) const {
    for (const auto& shard : shards_)
      for (const TensorInfo& t : shard->tensors()) f(shard->view(t));
  }

 private:
  void open(const std::string& file) {
    auto shard = std::make_unique<SafeTensors>(file);
    for (const TensorInfo& t : shard->tensors())
      if (!by_name_.emplace(t.name, std::pair(shards_.size(), &t)).second)
        throw IoError(file, t.name, "is in two shards of the same checkpoint");
    shards_.push_back(std::move(shard));
  }
  std::string path_, index_;
  std::vector<std::unique_ptr<SafeTensors>> shards_;
  std::unordered_map<std::string_view, std::pair<std::size_t, const TensorInfo*>> by_name_;
};

/// The text of an index for tensors spread over shards. `shards` maps file name → its tensors.
inline std::string safetensors_index(const std::string& path,
                                     const std::map<std::string, std::vector<TensorInfo>>& shards) {
  std::uint64_t total = 0;
  std::map<std::string, std::string> where;
  for (const auto& [file, tensors] : shards)
    for (const TensorInfo& t : tensors) {
      total += t.bytes();
      where[t.name] = file;
    }
  std::string json =
      "{\n  \"metadata\": {\n    \"total_size\": " + std::to_string(total) + "\n  },\n  \"weight_map\": {";
  const char* separator = "\n    ";
  for (const auto& [name, file] : where) {
    json += separator + detail::quoted(path, name) + ": " + detail::quoted(path, file);
    separator = ",\n    ";
  }
  return json + "\n  }\n}\n";
}

/// What becomes of one tensor of a checkpoint that is rewritten: it is kept, or replaced by tensors that are declared
/// first and written when their turn comes.
struct TensorRewrite {
  std::vector<TensorSpec> become;
  std::function<void(SafeTensorsWriter&)> write;
};

namespace detail {

/// The weights files of a checkpoint in `directory` that `written` does not replace: left there, a reader would take
/// them, or they would be gigabytes that no index names.
inline void remove_other_weights(const Checkpoint& from, const std::string& directory,
                                 const std::set<std::string>& written, StagedFiles& files) {
  namespace fs = std::filesystem;
  constexpr const char *single = "model.safetensors", *index_name = "model.safetensors.index.json";
  std::set<std::string> others;
  const std::string index = (fs::path(directory) / index_name).string();
  std::error_code ignored;
  if (fs::is_regular_file(index, ignored)) try {
      for (const auto& [name, shard] : parse_safetensors_index(index, read_text(index))) others.insert(shard);
    } catch (const IoError&) {  // no index of anything: what lies beside it is not known to be weights
    }
  others.insert(written.contains(single) ? index_name : single);
  for (const std::string& name : others) {
    if (written.contains(name) || (name != index_name && !name.ends_with(".safetensors"))) continue;
    const std::string path = (fs::path(directory) / name).string();
    for (std::size_t s = 0; s < from.shard_count(); ++s)
      if (fs::equivalent(path, from.shard(s).path(), ignored))
        throw IoError(path, "is an input, and would have to be removed from the output");
    files.remove(path);
  }
}
}  // namespace detail

/// Copies a checkpoint to `directory` with the same shards, metadata and order of tensors, some tensors replaced; the
/// files are complete but not in place: StagedFiles::commit() does that, with others that belong to them.
///
/// `rewrite(tensor)` is asked once for every tensor before anything is written; `nothing` keeps its bytes. Replacements
/// are made one after the other while streaming, so peak memory is that of one tensor. `progress(tensor)` follows each.
/// A single file is written as `directory/model.safetensors`, or as `directory` itself when that ends in
/// ".safetensors". What throws, `rewrite` and `progress` too, leaves the files that were there. Other weights of a
/// checkpoint in `directory` (a model.safetensors beside the new shards, shards of an older index) are removed when the
/// new ones are put in place.
/// **Throws** IoError; refuses to write into the directory it reads from.
template <class Rewrite, class Progress>
[[nodiscard]] StagedFiles stage_checkpoint(const Checkpoint& from, const std::string& directory, Rewrite&& rewrite,
                                           Progress&& progress) {
  namespace fs = std::filesystem;
  const bool sharded = !from.index().empty(), named = directory.ends_with(".safetensors");
  if (sharded && named) throw IoError(directory, "must be a directory: the input has shards");
  std::error_code failed;
  if (!named) {
    fs::create_directories(directory, failed);
    if (failed) throw IoError(directory, "cannot create the directory: " + failed.message());
  }
  std::map<std::string, std::vector<TensorInfo>> written;
  StagedFiles files;
  const auto name_of = [&](std::size_t s) {
    return sharded ? fs::path(from.shard(s).path()).filename().string() : "model.safetensors";
  };
  if (!named) {
    std::set<std::string> names;
    for (std::size_t s = 0; s < from.shard_count(); ++s) names.insert(name_of(s));
    detail::remove_other_weights(from, directory, names, files);
  }
  for (std::size_t s = 0; s < from.shard_count(); ++s) {
    const SafeTensors& shard = from.shard(s);
    const std::string name = name_of(s);
    const std::string target = named ? directory : (fs::path(directory) / name).string();
    if (fs::equivalent(target, shard.path(), failed)) throw IoError(target, "is both input and output");
    std::vector<std::optional<TensorRewrite>> plan;
    std::vector<TensorSpec> specs;
    for (const TensorInfo& t : shard.tensors()) {
      plan.push_back(rewrite(shard.view(t)));
      if (plan.back())
        specs.insert(specs.end(), plan.back()->become.begin(), plan.back()->become.end());
      else
        specs.push_back(t);
    }
    SafeTensorsWriter out(target, std::move(specs), shard.metadata(), TensorOrder::as_given);
    for (std::size_t i = 0; i < plan.size(); ++i) {
      const TensorView t = shard.view(shard.tensors()[i]);
      if (i + 1 < plan.size()) shard.view(shard.tensors()[i + 1]).will_need();
      if (plan[i])
        plan[i]->write(out);
      else
        out.copy(t.name(), t);
      t.drop();
      progress(t);
    }
    written[name] = out.tensors();
    files.add(std::move(out).finish());
  }
  if (sharded) {
    const std::string index = (fs::path(directory) / "model.safetensors.index.json").string();
    files.add_text(index, safetensors_index(index, written), true);
  }
  return files;
}

/// stage_checkpoint(), and the files put in place.
template <class Rewrite, class Progress>
void rewrite_checkpoint(const Checkpoint& from, const std::string& directory, Rewrite&& rewrite, Progress&& progress) {
  stage_checkpoint(from, directory, rewrite, progress).commit();
}

}  // namespace lowrank::io

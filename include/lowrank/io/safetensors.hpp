// SPDX-License-Identifier: Apache-2.0
// Reading safetensors: the header is checked in full before any tensor is handed out, the data is mapped, not copied.
#pragma once

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <string_view>
#include <unordered_map>

#include "lowrank/io/tensor.hpp"

namespace lowrank::io {

/// What a safetensors header says: tensors in the order of their data, and the free strings of `__metadata__`.
struct SafeTensorsHeader {
  std::vector<TensorInfo> tensors;
  std::map<std::string, std::string> metadata;

  friend bool operator==(const SafeTensorsHeader&, const SafeTensorsHeader&) = default;
};

/// The largest header the format allows, in bytes.
inline constexpr std::uint64_t safetensors_header_limit = 100'000'000;

namespace detail {

/// Builds a SafeTensorsHeader from parser events, so that nothing but what the format allows is ever stored: a header
/// of a hundred million brackets costs the brackets' time and no memory.
class SafeTensorsHandler : public nlohmann::json_sax<nlohmann::json> {
 public:
  SafeTensorsHandler(const std::string& path, SafeTensorsHeader& out) : path_(path), out_(out) {}

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return unexpected("a number that is no 64-bit integer");
  }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool number_unsigned(number_unsigned_t n) override {
    if (at_ == At::shape) {
      if (current_.shape.size() == 64) fail("has more than 64 dimensions");
      current_.shape.push_back(n);
    } else if (at_ == At::offsets) {
      if (n_offsets_ == 2) fail("data_offsets must be two numbers");
      (n_offsets_++ == 0 ? current_.begin : current_.end) = n;
    } else {
      return unexpected("a number");
    }
    return true;
  }
  bool string(string_t& s) override {
    if (at_ == At::metadata) {
      out_.metadata[key_] = s;
    } else if (at_ == At::tensor && key_ == "dtype") {
      const auto d = parse_dtype(s);
      if (!d) fail(lowrank::detail::text("unknown dtype \"", s, "\""));
      current_.dtype = *d;
      have_dtype_ = true;
    } else {
      return unexpected("a string");
    }
    return true;
  }
  bool key(string_t& s) override {
    key_ = s;
    if (at_ == At::metadata) {
      if (!metadata_keys_.try_emplace(s, true).second) throw IoError(path_, s, "metadata key occurs twice");
    } else if (at_ == At::top) {
      if (!names_.try_emplace(s, true).second) throw IoError(path_, s, "tensor name occurs twice");
    } else {
      bool& seen = s == "dtype" ? seen_[0] : s == "shape" ? seen_[1] : s == "data_offsets" ? seen_[2] : unknown_;
      if (&seen == &unknown_) fail(lowrank::detail::text("unknown field \"", s, "\""));
      if (seen) fail(lowrank::detail::text("field \"", s, "\" occurs twice"));
      seen = true;
    }
    return true;
  }
  bool start_object(std::size_t) override {
    switch (at_) {
      case At::outside:
        at_ = At::top;
        return true;
      case At::top:
        if (key_ == "__metadata__") {
          at_ = At::metadata;
        } else {
          at_ = At::tensor;
          current_ = {};
          current_.name = key_;
          std::fill_n(seen_, 3, false);
          have_dtype_ = have_shape_ = have_offsets_ = false;
        }
        return true;
      default:
        return unexpected("an object");
    }
  }
  bool end_object() override {
    if (at_ == At::tensor) {
      if (!have_dtype_ || !have_shape_ || !have_offsets_) fail("needs dtype, shape and data_offsets");
      out_.tensors.push_back(std::move(current_));
    }
    at_ = at_ == At::top ? At::outside : At::top;
    return true;
  }
  bool start_array(std::size_t) override {
    if (at_ == At::tensor && key_ == "shape") {
      at_ = At::shape;
    } else if (at_ == At::tensor && key_ == "data_offsets") {
      at_ = At::offsets;
      n_offsets_ = 0;
    } else {
      return unexpected("an array");
    }
    return true;
  }
  bool end_array() override {
    if (at_ == At::offsets && n_offsets_ != 2) fail("data_offsets must be two numbers");
    (at_ == At::shape ? have_shape_ : have_offsets_) = true;
    at_ = At::tensor;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw IoError(path_, lowrank::detail::text("header is not valid JSON near byte ", position));
  }

 private:
  enum class At { outside, top, metadata, tensor, shape, offsets };

  bool unexpected(const char* what) {
    if (at_ == At::outside) throw IoError(path_, "header must be a JSON object");
    const std::string& name = at_ == At::top || at_ == At::metadata ? key_ : current_.name;
    const char* place = at_ == At::metadata  ? " in __metadata__, whose values are strings"
                        : at_ == At::shape   ? " in shape"
                        : at_ == At::offsets ? " in data_offsets"
                                             : " in the header";
    throw IoError(path_, name, lowrank::detail::text("unexpected ", what, place));
  }
  [[noreturn]] void fail(const std::string& what) const { throw IoError(path_, current_.name, what); }

  const std::string& path_;
  SafeTensorsHeader& out_;
  At at_ = At::outside;
  std::string key_;
  TensorInfo current_;
  bool seen_[3] = {}, unknown_ = false;
  bool have_dtype_ = false, have_shape_ = false, have_offsets_ = false;
  int n_offsets_ = 0;
  std::unordered_map<std::string, bool> names_, metadata_keys_;
};

/// Throws unless the tensors tile [0, data_size) exactly and each has the bytes its shape and type need. Sorts them.
inline void check_layout(const std::string& path, std::vector<TensorInfo>& tensors, std::uint64_t data_size) {
  for (const TensorInfo& t : tensors) {
    const auto need = byte_size(t.dtype, t.shape);
    if (!need) throw IoError(path, t.name, lowrank::detail::text("impossible shape ", shape_text(t.shape)));
    if (t.begin > t.end || t.end > data_size)
      throw IoError(path, t.name,
                    lowrank::detail::text("data_offsets [", t.begin, ", ", t.end, ") reach outside the ", data_size,
                                          " bytes of data"));
    if (t.bytes() != *need)
      throw IoError(path, t.name,
                    lowrank::detail::text(dtype_name(t.dtype), " ", shape_text(t.shape), " needs ", *need,
                                          " bytes, data_offsets give ", t.bytes()));
  }
  std::stable_sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });
  std::uint64_t at = 0;
  for (const TensorInfo& t : tensors) {
    if (t.begin != at)
      throw IoError(path, t.name,
                    lowrank::detail::text(t.begin < at ? "overlaps the tensor before it" : "leaves a hole before it",
                                          ": begins at byte ", t.begin, ", expected ", at));
    at = t.end;
  }
  if (at != data_size) throw IoError(path, lowrank::detail::text(data_size - at, " bytes of data belong to no tensor"));
}

}  // namespace detail

namespace detail {
/// parse_safetensors() of a file of which only the beginning, header included, is at hand.
inline SafeTensorsHeader parse_safetensors_head(const std::string& path, Bytes head, std::uint64_t file_size,
                                                std::uint64_t& data_offset) {
  refuse_lfs_pointer(path, {reinterpret_cast<const char*>(head.data()), std::min<std::size_t>(head.size(), 64)});
  if (file_size < 8) throw IoError(path, lowrank::detail::text("is too short for safetensors: ", file_size, " bytes"));
  const auto n = load_unaligned<std::uint64_t>(head.data());
  if (n > safetensors_header_limit)
    throw IoError(path, lowrank::detail::text("header length ", n, " exceeds the format's limit of ",
                                              safetensors_header_limit, " bytes; not a safetensors file?"));
  if (n > file_size - 8)
    throw IoError(path, lowrank::detail::text("header length ", n, " reaches beyond the end of the file (", file_size,
                                              " bytes): truncated, or not safetensors"));
  const auto* text = reinterpret_cast<const char*>(head.data() + 8);
  if (n == 0 || text[0] != '{') throw IoError(path, "header must begin with '{'");
  SafeTensorsHeader header;
  SafeTensorsHandler handler(path, header);
  nlohmann::json::sax_parse(text, text + n, &handler, nlohmann::json::input_format_t::json, true);
  data_offset = 8 + n;
  check_layout(path, header.tensors, file_size - data_offset);
  return header;
}
}  // namespace detail

/// Parses the bytes of a safetensors file: 8 bytes of header length, the header, the data.
///
/// Refuses, with IoError naming `path` and the tensor: lengths beyond the file or the limit, JSON that is not exactly
/// an object of the format, duplicate names, unknown types or fields, numbers that are not unsigned 64-bit integers,
/// shapes whose product overflows, and data that overlaps, leaves holes, or does not end with the file.
/// **Cost** O(header). `data_offset` receives where the data begins.
/// **Source** the safetensors format description, huggingface/safetensors README.
inline SafeTensorsHeader parse_safetensors(const std::string& path, Bytes file, std::uint64_t& data_offset) {
  return detail::parse_safetensors_head(path, file, file.size(), data_offset);
}

/// A safetensors file, open for reading.
///
/// **Throws** IoError as parse_safetensors, and naming the tensor asked for when there is none of that name.
/// **Cost** the header at construction; data is read from disk when touched.
class SafeTensors {
 public:
  explicit SafeTensors(const std::string& path) : file_(path) {
    // Read, not touched where it is mapped: a file truncated meanwhile is an error then.
    std::vector<std::byte> head(std::min<std::size_t>(file_.bytes().size(), 8));
    file_.read(file_.bytes().first(head.size()), head.data());
    if (head.size() == 8) {
      const auto n = load_unaligned<std::uint64_t>(head.data());
      if (n <= safetensors_header_limit) head.resize(std::size_t(std::min<std::uint64_t>(8 + n, file_.bytes().size())));
      file_.read(file_.bytes().first(head.size()), head.data());
    }
    header_ = detail::parse_safetensors_head(path, head, file_.bytes().size(), data_offset_);
    by_name_.reserve(header_.tensors.size());
    for (const TensorInfo& t : header_.tensors) by_name_.emplace(t.name, &t);
  }

  [[nodiscard]] const std::string& path() const noexcept { return file_.path(); }
  [[nodiscard]] const MappedFile& file() const noexcept { return file_; }
  /// In the order of the data.
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const noexcept { return header_.tensors; }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const noexcept { return header_.metadata; }
  [[nodiscard]] const TensorInfo* find(std::string_view name) const {
    const auto it = by_name_.find(name);
    return it == by_name_.end() ? nullptr : it->second;
  }
  [[nodiscard]] TensorView operator[](std::string_view name) const {
    const TensorInfo* t = find(name);
    if (t == nullptr) throw IoError(path(), std::string(name), "no such tensor");
    return view(*t);
  }
  /// The tensor that an element of tensors() describes.
  [[nodiscard]] TensorView view(const TensorInfo& t) const {
    return {file_, t, file_.bytes().subspan(std::size_t(data_offset_ + t.begin), std::size_t(t.bytes()))};
  }

 private:
  MappedFile file_;
  SafeTensorsHeader header_;
  std::uint64_t data_offset_ = 0;
  std::unordered_map<std::string_view, const TensorInfo*> by_name_;  // keys live in header_, whose vector never moves
};

}  // namespace lowrank::io

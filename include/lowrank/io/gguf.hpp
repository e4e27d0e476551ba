// SPDX-License-Identifier: Apache-2.0
// GGUF, version 3: key-value pairs, a table of tensors, aligned data. Read with every length checked; written in order.
#pragma once

#include <array>
#include <map>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "lowrank/io/tensor.hpp"

namespace lowrank::io {

/// Types of values; numbers as in the file.
enum class GgufKind : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };

struct GgufArray;
/// A value of a key. Integers keep their width.
using GgufValue =
    std::variant<std::uint8_t, std::int8_t, std::uint16_t, std::int16_t, std::uint32_t, std::int32_t, float, bool,
                 std::string, std::vector<std::string>, std::uint64_t, std::int64_t, double, GgufArray>;
/// An array of numbers: its element type and raw little-endian bytes. Arrays of strings are std::vector<std::string>.
struct GgufArray {
  GgufKind kind = GgufKind::u32;
  std::string bytes;
  friend bool operator==(const GgufArray&, const GgufArray&) = default;
};

/// A tensor of the table: extents fastest first, as the format writes them, and where its data lies.
struct GgufTensor {
  std::string name;
  std::uint32_t type = 0;  ///< GgufType::f32, …
  std::vector<std::uint64_t> ne;
  std::uint64_t offset = 0;  ///< from the start of the data section
  std::uint64_t bytes = 0;
  friend bool operator==(const GgufTensor&, const GgufTensor&) = default;
};

/// What a GGUF file says, without the data.
struct GgufHeader {
  std::vector<std::pair<std::string, GgufValue>> values;  ///< in file order
  std::vector<GgufTensor> tensors;
  std::uint64_t alignment = 32, data_offset = 0;

  [[nodiscard]] const GgufValue* find(std::string_view key) const {
    for (const auto& [k, v] : values)
      if (k == key) return &v;
    return nullptr;
  }
  [[nodiscard]] const GgufTensor* tensor(std::string_view name) const {
    for (const GgufTensor& t : tensors)
      if (t.name == name) return &t;
    return nullptr;
  }
  friend bool operator==(const GgufHeader&, const GgufHeader&) = default;
};

namespace gguf_type {
inline constexpr std::uint32_t f32 = 0, f16 = 1, q8_0 = 8, bf16 = 30;
}

namespace detail {

/// Elements and bytes of one block of a tensor type.
struct GgufTypeInfo {
  std::uint32_t id;
  std::string_view name;
  std::uint64_t elements, bytes;
};
inline constexpr GgufTypeInfo gguf_types[] = {
    {0, "F32", 1, 4},       {1, "F16", 1, 2},       {2, "Q4_0", 32, 18},    {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},    {7, "Q5_1", 32, 24},    {8, "Q8_0", 32, 34},    {9, "Q8_1", 32, 36},
    {10, "Q2_K", 256, 84},  {11, "Q3_K", 256, 110}, {12, "Q4_K", 256, 144}, {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210}, {15, "Q8_K", 256, 292}, {24, "I8", 1, 1},       {25, "I16", 1, 2},
    {26, "I32", 1, 4},      {27, "I64", 1, 8},      {28, "F64", 1, 8},      {30, "BF16", 1, 2}};

inline const GgufTypeInfo* find_gguf_type(std::uint32_t id) {
  for (const GgufTypeInfo& t : gguf_types)
    if (t.id == id) return &t;
  return nullptr;
}

/// Bytes of one element of a number type; 0 for strings, arrays and unknown ones.
constexpr std::uint64_t gguf_width(std::uint32_t kind) {
  constexpr std::array<std::uint64_t, 13> widths{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return kind < widths.size() ? widths[kind] : 0;
}

/// Reads forward through a file; every length is compared with what is left before anything is taken or allocated.
class GgufCursor {
 public:
  GgufCursor(const std::string& path, Bytes file) : path_(path), file_(file) {}
  template <class T>
  T number(const std::string& key) {
    need(sizeof(T), key);
    const T x = load_unaligned<T>(file_.data() + at_);
    at_ += sizeof(T);
    return x;
  }
  std::string string(const std::string& key) {
    const auto n = number<std::uint64_t>(key);
    return raw(n, key);
  }
  std::string raw(std::uint64_t n, const std::string& key) {
    need(n, key);
    std::string s(reinterpret_cast<const char*>(file_.data()) + at_, std::size_t(n));
    at_ += std::size_t(n);
    return s;
  }
  [[nodiscard]] std::uint64_t left() const { return file_.size() - at_; }
  [[nodiscard]] std::uint64_t position() const { return at_; }

 private:
  void need(std::uint64_t n, const std::string& key) const {
    if (n > left())
      throw IoError(path_, key, lowrank::detail::text("needs ", n, " bytes, ", left(), " are left in the file"));
  }
  const std::string& path_;
  Bytes file_;
  std::size_t at_ = 0;
};

inline GgufValue read_gguf_value(GgufCursor& in, const std::string& path, const std::string& key) {
  const auto kind = in.number<std::uint32_t>(key);
  const auto boolean = [&](std::uint8_t b) {
    if (b > 1) throw IoError(path, key, "is a boolean that is neither 0 nor 1");
    return b == 1;
  };
  switch (GgufKind(kind)) {
    case GgufKind::u8:
      return in.number<std::uint8_t>(key);
    case GgufKind::i8:
      return in.number<std::int8_t>(key);
    case GgufKind::u16:
      return in.number<std::uint16_t>(key);
    case GgufKind::i16:
      return in.number<std::int16_t>(key);
    case GgufKind::u32:
      return in.number<std::uint32_t>(key);
    case GgufKind::i32:
      return in.number<std::int32_t>(key);
    case GgufKind::f32:
      return in.number<float>(key);
    case GgufKind::boolean:
      return boolean(in.number<std::uint8_t>(key));
    case GgufKind::string:
      return in.string(key);
    case GgufKind::u64:
      return in.number<std::uint64_t>(key);
    case GgufKind::i64:
      return in.number<std::int64_t>(key);
    case GgufKind::f64:
      return in.number<double>(key);
    case GgufKind::array: {
      const auto element = in.number<std::uint32_t>(key);
      const auto n = in.number<std::uint64_t>(key);
      if (GgufKind(element) == GgufKind::string) {
        if (n > in.left() / 8) throw IoError(path, key, "array is longer than the file");
        std::vector<std::string> strings;
        for (std::uint64_t i = 0; i < n; ++i) strings.push_back(in.string(key));
        return strings;
      }
      const std::uint64_t width = gguf_width(element);
      if (width == 0) throw IoError(path, key, lowrank::detail::text("array of unsupported element type ", element));
      const auto bytes = checked_mul(n, width);
      if (!bytes || *bytes > in.left()) throw IoError(path, key, "array is longer than the file");
      GgufArray a{GgufKind(element), in.raw(*bytes, key)};
      if (a.kind == GgufKind::boolean)
        for (const char c : a.bytes) boolean(std::uint8_t(c));
      return a;
    }
  }
  throw IoError(path, key, lowrank::detail::text("unknown value type ", kind));
}

constexpr std::uint64_t round_up(std::uint64_t x, std::uint64_t to) { return (x + to - 1) / to * to; }

}  // namespace detail

/// "F32", "Q8_0", …; "?" for a type that is not known.
inline std::string_view gguf_type_name(std::uint32_t type) {
  const auto* t = detail::find_gguf_type(type);
  return t == nullptr ? "?" : t->name;
}

/// Bytes of a tensor of that type and shape; nothing when the type is unknown, a row is no whole number of blocks, or
/// the product overflows.
inline std::optional<std::uint64_t> gguf_byte_size(std::uint32_t type, std::span<const std::uint64_t> ne) {
  const auto* t = detail::find_gguf_type(type);
  if (t == nullptr || ne.empty() || ne[0] % t->elements != 0) return std::nullopt;
  std::uint64_t n = ne[0] / t->elements;
  for (std::size_t i = 1; i < ne.size(); ++i) {
    const auto next = detail::checked_mul(n, ne[i]);
    if (!next) return std::nullopt;
    n = *next;
  }
  return detail::checked_mul(n, t->bytes);
}

/// Parses the bytes of a GGUF file, version 3, little-endian.
///
/// Refuses, with IoError naming `path` and the key or tensor: other versions; strings, arrays and tensors longer than
/// the file; nested arrays; duplicate keys and tensor names; more than four dimensions; products that overflow; an
/// alignment that is no power of two; names of 64 bytes or more; tensors that are misaligned, out of order,
/// overlapping, or outside the file.
/// **Cost** O(header). **Source** the GGUF specification, ggml-org/ggml docs/gguf.md.
inline GgufHeader parse_gguf(const std::string& path, Bytes file) {
  detail::GgufCursor in(path, file);
  if (file.size() < 4 || std::memcmp(file.data(), "GGUF", 4) != 0) throw IoError(path, "is not a GGUF file");
  (void)in.raw(4, "magic");
  const auto version = in.number<std::uint32_t>("version");
  if (version != 3) throw IoError(path, lowrank::detail::text("GGUF version ", version, " is not supported (3 is)"));
  const auto n_tensors = in.number<std::uint64_t>("tensor count"), n_values = in.number<std::uint64_t>("value count");
  if (n_values > in.left() / 13)
    throw IoError(path, lowrank::detail::text("claims ", n_values, " values, more than fit"));
  GgufHeader h;
  std::set<std::string> keys, names;
  for (std::uint64_t i = 0; i < n_values; ++i) {
    std::string key = in.string("key");
    if (!keys.insert(key).second) throw IoError(path, key, "key occurs twice");
    GgufValue value = detail::read_gguf_value(in, path, key);
    h.values.emplace_back(std::move(key), std::move(value));
  }
  if (const GgufValue* a = h.find("general.alignment")) {
    const auto* n = std::get_if<std::uint32_t>(a);
    if (n == nullptr || *n == 0 || (*n & (*n - 1)) != 0)
      throw IoError(path, "general.alignment", "must be a power of two (u32)");
    h.alignment = *n;
  }
  if (n_tensors > in.left() / 32)
    throw IoError(path, lowrank::detail::text("claims ", n_tensors, " tensors, more than fit"));
  for (std::uint64_t i = 0; i < n_tensors; ++i) {
    GgufTensor t;
    t.name = in.string("tensor name");
    if (t.name.size() >= 64) throw IoError(path, t.name, "tensor name has 64 bytes or more");
    if (!names.insert(t.name).second) throw IoError(path, t.name, "tensor name occurs twice");
    const auto n_dims = in.number<std::uint32_t>(t.name);
    if (n_dims < 1 || n_dims > 4)
      throw IoError(path, t.name, lowrank::detail::text("has ", n_dims, " dimensions, 1 to 4 are allowed"));
    for (std::uint32_t d = 0; d < n_dims; ++d) {
      t.ne.push_back(in.number<std::uint64_t>(t.name));
      if (t.ne.back() > std::uint64_t(std::numeric_limits<std::int64_t>::max()))
        throw IoError(path, t.name, "has a negative extent");
    }
    t.type = in.number<std::uint32_t>(t.name);
    t.offset = in.number<std::uint64_t>(t.name);
    if (detail::find_gguf_type(t.type) == nullptr)
      throw IoError(path, t.name, lowrank::detail::text("has unknown type ", t.type));
    const auto size = gguf_byte_size(t.type, t.ne);
    if (!size) throw IoError(path, t.name, "has an impossible shape " + shape_text(t.ne));
    t.bytes = *size;
    h.tensors.push_back(std::move(t));
  }
  // Without tensors nothing follows, not even padding; with tensors the data section starts at the next aligned byte.
  h.data_offset = in.position();
  if (!h.tensors.empty()) {
    const std::uint64_t padding = (h.alignment - h.data_offset % h.alignment) % h.alignment;
    if (padding > in.left()) throw IoError(path, "ends before the data section");
    h.data_offset += padding;
  }
  const std::uint64_t data_size = file.size() - h.data_offset;
  std::uint64_t at = 0;
  for (const GgufTensor& t : h.tensors) {
    if (t.offset != at) throw IoError(path, t.name, lowrank::detail::text("begins at ", t.offset, ", expected ", at));
    if (t.offset > data_size || t.bytes > data_size - t.offset)
      throw IoError(
          path, t.name,
          lowrank::detail::text("needs ", t.bytes, " bytes at ", t.offset, ", the data section has ", data_size));
    at = detail::round_up(at + t.bytes, h.alignment);
  }
  return h;
}

/// A value for people: numbers and strings as they are, arrays with their length.
inline std::string gguf_value_text(const GgufValue& v) {
  return std::visit(
      [](const auto& x) -> std::string {
        using X = std::remove_cvref_t<decltype(x)>;
        if constexpr (std::is_same_v<X, GgufArray>)
          return lowrank::detail::text("[", x.bytes.size() / detail::gguf_width(std::uint32_t(x.kind)), " numbers]");
        else if constexpr (std::is_same_v<X, std::vector<std::string>>)
          return lowrank::detail::text("[", x.size(), " strings]");
        else if constexpr (std::is_floating_point_v<X>)
          return lowrank::detail::text(double(x));
        else
          return lowrank::detail::text(x);
      },
      v);
}

/// Builds a GGUF file: values, then tensors, all at once or not at all.
///
/// **Throws** ArgumentError on a duplicate key or name, a name of 64 bytes or more, more than four dimensions;
/// IoError as OutputFile. Data is held until commit(): adapters are small.
class GgufWriter {
 public:
  explicit GgufWriter(std::uint32_t alignment = 32) : alignment_(alignment) {}

  void set(const std::string& key, const GgufValue& value) {
    if (!keys_.insert(key).second) throw ArgumentError("GgufWriter: key '" + key + "' is set twice");
    put_string(values_, key);
    std::visit([&](const auto& x) { put_value(x); }, value);
  }
  /// A tensor of `type` with extents fastest first; `bytes` must be what the type and shape need.
  void add(const std::string& name, std::uint32_t type, std::vector<std::uint64_t> ne, std::string bytes) {
    const auto size = gguf_byte_size(type, ne);
    if (name.size() >= 64) throw ArgumentError("GgufWriter: tensor name '" + name + "' has 64 bytes or more");
    if (!names_.insert(name).second) throw ArgumentError("GgufWriter: tensor '" + name + "' is added twice");
    if (ne.empty() || ne.size() > 4 || !size || *size != bytes.size())
      throw ArgumentError("GgufWriter: tensor '" + name + "' has " + std::to_string(bytes.size()) +
                          " bytes, which do not fit its shape");
    tensors_.push_back({name, type, std::move(ne), offset_, bytes.size()});
    offset_ = detail::round_up(offset_ + bytes.size(), alignment_);
    data_.push_back(std::move(bytes));
  }
  /// The whole file.
  [[nodiscard]] std::string bytes() const {
    std::string out = "GGUF";
    put(out, std::uint32_t(3));
    put(out, std::uint64_t(tensors_.size()));
    put(out, std::uint64_t(keys_.size()));
    out += values_;
    for (const GgufTensor& t : tensors_) {
      put_string(out, t.name);
      put(out, std::uint32_t(t.ne.size()));
      for (const auto n : t.ne) put(out, n);
      put(out, t.type);
      put(out, t.offset);
    }
    for (const std::string& d : data_) {
      out.resize(detail::round_up(out.size(), alignment_), '\0');
      out += d;
    }
    if (!data_.empty()) out.resize(detail::round_up(out.size(), alignment_), '\0');  // readers expect whole blocks
    return out;
  }
  void write(const std::string& path) const { write_text(path, bytes()); }

 private:
  template <class T>
  static void put(std::string& out, T x) {
    out.append(reinterpret_cast<const char*>(&x), sizeof x);
  }
  static void put_string(std::string& out, const std::string& s) {
    put(out, std::uint64_t(s.size()));
    out += s;
  }
  template <class X>
  void put_value(const X& x) {
    if constexpr (std::is_same_v<X, GgufArray>) {
      put(values_, std::uint32_t(GgufKind::array));
      put(values_, std::uint32_t(x.kind));
      put(values_, std::uint64_t(x.bytes.size() / detail::gguf_width(std::uint32_t(x.kind))));
      values_ += x.bytes;
    } else if constexpr (std::is_same_v<X, std::vector<std::string>>) {
      put(values_, std::uint32_t(GgufKind::array));
      put(values_, std::uint32_t(GgufKind::string));
      put(values_, std::uint64_t(x.size()));
      for (const std::string& s : x) put_string(values_, s);
    } else if constexpr (std::is_same_v<X, std::string>) {
      put(values_, std::uint32_t(GgufKind::string));
      put_string(values_, x);
    } else if constexpr (std::is_same_v<X, bool>) {
      put(values_, std::uint32_t(GgufKind::boolean));
      put(values_, std::uint8_t(x ? 1 : 0));
    } else {
      constexpr GgufKind kind = std::is_same_v<X, std::uint8_t>    ? GgufKind::u8
                                : std::is_same_v<X, std::int8_t>   ? GgufKind::i8
                                : std::is_same_v<X, std::uint16_t> ? GgufKind::u16
                                : std::is_same_v<X, std::int16_t>  ? GgufKind::i16
                                : std::is_same_v<X, std::uint32_t> ? GgufKind::u32
                                : std::is_same_v<X, std::int32_t>  ? GgufKind::i32
                                : std::is_same_v<X, std::uint64_t> ? GgufKind::u64
                                : std::is_same_v<X, std::int64_t>  ? GgufKind::i64
                                : std::is_same_v<X, float>         ? GgufKind::f32
                                                                   : GgufKind::f64;
      put(values_, std::uint32_t(kind));
      put(values_, x);
    }
  }
  std::uint64_t alignment_, offset_ = 0;
  std::string values_;
  std::set<std::string> keys_, names_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::string> data_;
};

}  // namespace lowrank::io

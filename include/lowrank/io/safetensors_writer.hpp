// SPDX-License-Identifier: Apache-2.0
// Writing safetensors as a stream: declare the tensors, hand over their bytes in any order and in pieces, commit.
#pragma once

#include <map>
#include <numeric>
#include <unordered_map>

#include "lowrank/io/json.hpp"
#include "lowrank/io/safetensors.hpp"

namespace lowrank::io {

/// How a writer orders the data of its tensors.
enum class TensorOrder {
  canonical,  ///< widest type first, then by name: every tensor aligned for its type, as the reference writer does
  as_given,   ///< as declared: a copy of a file keeps its order
};

/// The header of a safetensors file (with the eight bytes of its length), padded so that the data starts 8-aligned.
///
/// `tensors` are laid out in the order given; their begin and end are assigned here.
/// **Throws** IoError naming `path` on duplicate or reserved names, shapes that overflow, names that are not UTF-8.
inline std::string safetensors_header(const std::string& path, std::vector<TensorInfo>& tensors,
                                      const std::map<std::string, std::string>& metadata) {
  std::string json = "{";
  if (!metadata.empty()) {
    json += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata)
      json += detail::quoted(path, key) + ":" + detail::quoted(path, value) + ",";
    json.back() = '}';
    json += ',';
  }
  std::unordered_map<std::string_view, bool> seen;
  std::uint64_t at = 0;
  for (TensorInfo& t : tensors) {
    if (!seen.emplace(t.name, true).second) throw IoError(path, t.name, "tensor is written twice");
    if (t.name == "__metadata__") throw IoError(path, t.name, "is reserved by the format");
    const auto size = byte_size(t.dtype, t.shape);
    if (!size || *size > std::numeric_limits<std::uint64_t>::max() / 2 - at)
      throw IoError(path, t.name, lowrank::detail::text("impossible shape ", shape_text(t.shape)));
    t.begin = at;
    t.end = at += *size;
    json += detail::quoted(path, t.name) + ":{\"dtype\":\"" + std::string(dtype_name(t.dtype)) + "\",\"shape\":[";
    for (std::size_t i = 0; i < t.shape.size(); ++i) {
      if (i > 0) json += ",";
      json += std::to_string(t.shape[i]);
    }
    json += "],\"data_offsets\":[" + std::to_string(t.begin) + "," + std::to_string(t.end) + "]},";
  }
  if (json.size() > 1)
    json.back() = '}';
  else
    json += '}';
  json.append((8 - json.size() % 8) % 8, ' ');
  if (json.size() > safetensors_header_limit) throw IoError(path, "header would exceed the format's limit");
  const auto n = std::uint64_t(json.size());
  std::string out(8, '\0');
  std::memcpy(out.data(), &n, 8);
  return out + json;
}

/// A safetensors file being written. Nothing appears at `path` before commit().
///
///     SafeTensorsWriter out("model.safetensors", {{"w", Dtype::F32, {2, 3}}}, {{"format", "pt"}});
///     out.write("w", bytes);                     // or piece by piece, or out.write_matrix("w", view)
///     out.commit();
///
/// **Throws** IoError: see OutputFile; also a name that was not declared, more bytes than declared, and commit() while
/// a tensor is incomplete. **Cost** bytes go straight to the file; memory is the header.
class SafeTensorsWriter {
 public:
  SafeTensorsWriter(std::string path, std::vector<TensorSpec> tensors,
                    const std::map<std::string, std::string>& metadata = {}, TensorOrder order = TensorOrder::canonical)
      : file_(std::move(path)) {
    if (order == TensorOrder::canonical)
      std::sort(tensors.begin(), tensors.end(), [](const TensorSpec& a, const TensorSpec& b) {
        return a.dtype != b.dtype ? canonical_rank(a.dtype) > canonical_rank(b.dtype) : a.name < b.name;
      });
    for (TensorSpec& t : tensors) tensors_.push_back({std::move(t), 0, 0});
    const std::string header = safetensors_header(file_.path(), tensors_, metadata);
    data_offset_ = header.size();
    done_.assign(tensors_.size(), 0);
    for (std::size_t i = 0; i < tensors_.size(); ++i) by_name_.emplace(tensors_[i].name, i);
    file_.reserve(data_offset_ + (tensors_.empty() ? 0 : tensors_.back().end));
    file_.write_at(0, std::as_bytes(std::span(header)));
  }
  SafeTensorsWriter(SafeTensorsWriter&&) = default;

  [[nodiscard]] const std::string& path() const noexcept { return file_.path(); }
  /// In the order of the data, with their offsets.
  [[nodiscard]] const std::vector<TensorInfo>& tensors() const noexcept { return tensors_; }

  /// Appends bytes to a tensor; call again for the next piece.
  void write(std::string_view name, Bytes bytes) {
    const std::size_t i = claim(name, bytes.size());
    file_.write_at(position(i), bytes);
    advance(i, bytes.size());
  }
  /// Copies a whole tensor from a file that has it with the same type and shape.
  void copy(std::string_view name, const TensorView& from) {
    const std::size_t i = claim(name, from.bytes().size());
    if (tensors_[i].dtype != from.dtype() || tensors_[i].shape != from.shape())
      throw IoError(path(), std::string(name), "copied tensor differs in type or shape from what was declared");
    file_.copy_at(position(i), from.file(), from.bytes());
    advance(i, from.bytes().size());
  }
  /// Appends the elements of a matrix, row by row, converted to the declared type (rounded to nearest even).
  ///
  /// **Throws** IoError when the declared type is not F32, F64, BF16 or F16.
  template <MatrixLike X>
  requires Real<scalar_of<X>>
  void write_matrix(std::string_view name, X&& x) {
    using T = scalar_of<X>;
    const MatrixView<const T> m = view_of(x);
    const std::size_t i = find(name);
    const Dtype d = tensors_[i].dtype;
    if (d == dtype_of<T>() && m.is_row_major() && m.is_contiguous())
      return write(name, std::as_bytes(std::span(m.data(), std::size_t(m.size()))));
    const Index width = Index(dtype_bits(d) / 8),
                rows_at_once = std::max<Index>(1, (Index(4) << 20) / std::max<Index>(1, m.cols()));
    for (Index r = 0; r < m.rows(); r += rows_at_once) {
      const auto piece = m.middle_rows(r, std::min(rows_at_once, m.rows() - r));
      staging_.resize(piece.size() * width);
      if (piece.is_row_major() && piece.is_contiguous()) {
        convert_to(d, piece.data(), piece.size(), staging_.data());
      } else {
        const Matrix<T> packed(piece);
        convert_to(d, packed.data(), packed.size(), staging_.data());
      }
      write(name, Bytes(staging_.data(), std::size_t(staging_.size())));
    }
  }
  /// Checks that every tensor is complete and puts the file in place.
  void commit() {
    expect_complete();
    file_.commit();
  }
  /// Checks that every tensor is complete and gives the file, to be put in place with others.
  [[nodiscard]] OutputFile finish() && {
    expect_complete();
    return std::move(file_);
  }

 private:
  void expect_complete() const {
    for (std::size_t i = 0; i < tensors_.size(); ++i)
      if (done_[i] != tensors_[i].bytes())
        throw IoError(path(), tensors_[i].name,
                      lowrank::detail::text("only ", done_[i], " of ", tensors_[i].bytes(), " bytes were written"));
  }
  /// The reference writer sorts by its enumeration of types, widest last; larger comes first in the file.
  static int canonical_rank(Dtype d) { return int(d); }

  std::size_t find(std::string_view name) const {
    const auto it = by_name_.find(name);
    if (it == by_name_.end()) throw IoError(path(), std::string(name), "tensor was not declared to the writer");
    return it->second;
  }
  std::size_t claim(std::string_view name, std::size_t n) const {
    const std::size_t i = find(name);
    if (n > tensors_[i].bytes() - done_[i])
      throw IoError(path(), tensors_[i].name,
                    lowrank::detail::text("more than its ", tensors_[i].bytes(), " bytes were written"));
    return i;
  }
  [[nodiscard]] std::uint64_t position(std::size_t i) const { return data_offset_ + tensors_[i].begin + done_[i]; }
  void advance(std::size_t i, std::size_t n) {
    done_[i] += n;
    if (n > 0) file_.start_writeback(position(i) - n, n);
  }

  OutputFile file_;
  std::vector<TensorInfo> tensors_;
  std::vector<std::uint64_t> done_;
  std::uint64_t data_offset_ = 0;
  std::unordered_map<std::string_view, std::size_t> by_name_;  // keys live in tensors_, whose vector never grows
  Buffer<std::byte> staging_;
};

}  // namespace lowrank::io

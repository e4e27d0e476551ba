// SPDX-License-Identifier: Apache-2.0
// numpy's .npy: a header that is a Python literal, then one array.
#pragma once

#include <algorithm>
#include <string_view>

#include "lowrank/io/tensor.hpp"

namespace lowrank::io {

/// What the header of a .npy array says.
struct NpyHeader {
  Dtype dtype = Dtype::F32;
  bool fortran_order = false;  ///< first index fastest
  Shape shape;
  std::uint64_t data_offset = 0;

  friend bool operator==(const NpyHeader&, const NpyHeader&) = default;
};

namespace detail {

/// Reads the dictionary numpy writes, `{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`, and nothing else
/// of Python: keys in any order, each exactly once.
class NpyDictionary {
 public:
  NpyDictionary(const std::string& path, std::string_view text) : path_(path), text_(text) {}

  void parse(NpyHeader& out) {
    bool have[3] = {};
    const auto once = [&](int i, const char* key) {
      if (std::exchange(have[i], true)) fail(lowrank::detail::text("key '", key, "' occurs twice"));
    };
    expect('{');
    while (!accept('}')) {
      const std::string_view key = quoted_string();
      expect(':');
      if (key == "descr") {
        once(0, "descr");
        out.dtype = descr(quoted_string());
      } else if (key == "fortran_order") {
        once(1, "fortran_order");
        if (accept_word("True"))
          out.fortran_order = true;
        else if (!accept_word("False"))
          fail("fortran_order must be True or False");
      } else if (key == "shape") {
        once(2, "shape");
        out.shape = tuple();
      } else {
        fail(lowrank::detail::text("unknown key '", key, "'"));
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (at_ != text_.size()) fail("has text after the dictionary");
    if (!have[0] || !have[1] || !have[2]) fail("needs descr, fortran_order and shape");
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw IoError(path_, "npy header " + what); }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t')) ++at_;
  }
  bool accept(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!accept(c)) fail(lowrank::detail::text("is malformed: expected '", std::string_view(&c, 1), "' at byte ", at_));
  }
  bool accept_word(std::string_view word) {
    skip_space();
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }
  std::string_view quoted_string() {
    skip_space();
    const char quote = at_ < text_.size() ? text_[at_] : '\0';
    if (quote != '\'' && quote != '"') fail(lowrank::detail::text("is malformed: expected a string at byte ", at_));
    const std::size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) fail("is malformed: a string does not end");
    const std::string_view s = text_.substr(at_ + 1, end - at_ - 1);
    at_ = end + 1;
    return s;
  }
  Shape tuple() {
    Shape shape;
    expect('(');
    bool comma = true;
    while (!accept(')')) {
      if (!comma) fail("is malformed: shape needs commas");
      skip_space();
      const std::size_t start = at_;
      std::uint64_t n = 0;
      for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
        const auto digit = std::uint64_t(text_[at_] - '0');
        const auto tenfold = checked_mul(n, 10);
        if (!tenfold || *tenfold > std::numeric_limits<std::uint64_t>::max() - digit)
          fail("has a shape beyond 64 bits");
        n = *tenfold + digit;
      }
      if (at_ == start) fail("is malformed: shape must hold non-negative integers");
      accept('L');  // Python 2 wrote long integers
      if (shape.size() == 64) fail("has more than 64 dimensions");
      shape.push_back(n);
      comma = accept(',');
    }
    if (shape.size() == 1 && !comma) fail("is malformed: shape is not a tuple");
    return shape;
  }
  [[nodiscard]] Dtype descr(std::string_view s) const {
    if (s.size() >= 2 && s[0] == '>')
      fail(lowrank::detail::text("describes big-endian data ('", s, "'); byteswap() it"));
    static constexpr std::pair<std::string_view, Dtype> known[] = {
        {"f4", Dtype::F32}, {"f8", Dtype::F64},  {"f2", Dtype::F16}, {"i8", Dtype::I64}, {"i4", Dtype::I32},
        {"i2", Dtype::I16}, {"i1", Dtype::I8},   {"u8", Dtype::U64}, {"u4", Dtype::U32}, {"u2", Dtype::U16},
        {"u1", Dtype::U8},  {"b1", Dtype::BOOL}, {"c8", Dtype::C64}};
    if (s.size() == 3 && (s[0] == '<' || s[0] == '|' || s[0] == '='))
      for (const auto& [name, dtype] : known)
        if (s.substr(1) == name) return dtype;
    fail(lowrank::detail::text("has the unsupported type '", s, "'"));
  }
  const std::string& path_;
  std::string_view text_;
  std::size_t at_ = 0;
};

/// numpy's name of a type, empty when it has none (bf16, fp8).
inline std::string npy_descr(Dtype d) {
  switch (d) {
    case Dtype::F32:
      return "<f4";
    case Dtype::F64:
      return "<f8";
    case Dtype::F16:
      return "<f2";
    case Dtype::I64:
      return "<i8";
    case Dtype::I32:
      return "<i4";
    case Dtype::I16:
      return "<i2";
    case Dtype::I8:
      return "|i1";
    case Dtype::U64:
      return "<u8";
    case Dtype::U32:
      return "<u4";
    case Dtype::U16:
      return "<u2";
    case Dtype::U8:
      return "|u1";
    case Dtype::BOOL:
      return "|b1";
    case Dtype::C64:
      return "<c8";
    default:
      return {};
  }
}
}  // namespace detail

/// Parses the bytes of a .npy file and checks that exactly the array follows the header.
///
/// Versions 1, 2 and 3; little-endian types that have a Dtype. **Throws** IoError naming `path`. **Cost** O(header).
/// **Source** NumPy Enhancement Proposal 1, "A simple file format for NumPy arrays".
inline NpyHeader parse_npy(const std::string& path, Bytes file) {
  const auto* p = reinterpret_cast<const unsigned char*>(file.data());
  if (file.size() < 10 || std::memcmp(p, "\x93NUMPY", 6) != 0) throw IoError(path, "is not a .npy file");
  const unsigned major = p[6];
  if (major < 1 || major > 3) throw IoError(path, lowrank::detail::text("npy version ", major, " is unknown"));
  const std::size_t prefix = major == 1 ? 10 : 12;
  if (file.size() < prefix) throw IoError(path, "npy header is truncated");
  const std::size_t n =
      major == 1 ? load_unaligned<std::uint16_t>(file.data() + 8) : load_unaligned<std::uint32_t>(file.data() + 8);
  if (n > file.size() - prefix) throw IoError(path, "npy header reaches beyond the end of the file");
  NpyHeader header;
  detail::NpyDictionary(path, {reinterpret_cast<const char*>(p) + prefix, n}).parse(header);
  header.data_offset = prefix + n;
  const auto need = byte_size(header.dtype, header.shape);
  if (!need) throw IoError(path, "npy header has an impossible shape " + shape_text(header.shape));
  if (*need != file.size() - header.data_offset)
    throw IoError(path, lowrank::detail::text("npy array of shape ", shape_text(header.shape), " needs ", *need,
                                              " bytes, the file has ", file.size() - header.data_offset));
  return header;
}

/// The header of a .npy file, version 1 (2 when it is long), padded so that the data is 64-aligned.
///
/// **Throws** ArgumentError for types numpy has no name for (bf16, fp8): convert to float first.
inline std::string npy_header(Dtype dtype, std::span<const std::uint64_t> shape, bool fortran_order = false) {
  const std::string descr = detail::npy_descr(dtype);
  if (descr.empty())
    throw ArgumentError(lowrank::detail::text("npy_header: numpy has no type for ", dtype_name(dtype)));
  std::string dict =
      "{'descr': '" + descr + "', 'fortran_order': " + (fortran_order ? "True" : "False") + ", 'shape': (";
  for (std::size_t i = 0; i < shape.size(); ++i)
    dict += std::to_string(shape[i]) + (i + 1 < shape.size() ? ", " : shape.size() == 1 ? "," : "");
  dict += "), }";
  const bool wide = dict.size() + 64 > 65535;
  const std::size_t prefix = wide ? 12 : 10;
  dict.append((64 - (prefix + dict.size() + 1) % 64) % 64, ' ');
  dict += '\n';
  std::string out = "\x93NUMPY";
  out += wide ? '\2' : '\1';
  out += '\0';
  const auto n = std::uint32_t(dict.size());
  out.append(reinterpret_cast<const char*>(&n), wide ? 4 : 2);
  return out + dict;
}

/// An array of a .npy file or .npz archive: where its bytes lie and how to read them.
class NpyArray {
 public:
  NpyArray(std::string path, NpyHeader header, Bytes file)
      : path_(std::move(path)), header_(std::move(header)), data_(file.subspan(std::size_t(header_.data_offset))) {}

  [[nodiscard]] Dtype dtype() const noexcept { return header_.dtype; }
  [[nodiscard]] const Shape& shape() const noexcept { return header_.shape; }
  [[nodiscard]] bool fortran_order() const noexcept { return header_.fortran_order; }
  [[nodiscard]] Bytes bytes() const noexcept { return data_; }
  [[nodiscard]] Index size() const noexcept { return Index(data_.size() * 8 / dtype_bits(dtype())); }

  /// The matrix in place, in the order the file has. **Throws** IoError: not two-dimensional, not of S, misaligned.
  template <class S>
  [[nodiscard]] MatrixView<const S> view() const {
    const auto [m, n] = matrix_shape(2);
    if (dtype() != dtype_of<S>())
      fail(lowrank::detail::text("holds ", dtype_name(dtype()), ", not ", dtype_name(dtype_of<S>())));
    if (reinterpret_cast<std::uintptr_t>(data_.data()) % alignof(S) != 0)
      fail("is not aligned; copy it with to_matrix()");
    return view_of(reinterpret_cast<const S*>(data_.data()), m, n,
                   fortran_order() ? Order::col_major : Order::row_major);
  }
  /// A copy as a matrix of T; a vector becomes one row. **Throws** IoError: more dimensions, or no real float type.
  template <Real T>
  [[nodiscard]] Matrix<T> to_matrix() const {
    const auto [m, n] = matrix_shape(1);
    if (!is_convertible_float(dtype())) fail(lowrank::detail::text("holds ", dtype_name(dtype()), ", expected floats"));
    Matrix<T> out;
    out.resize(m, n);
    if (!fortran_order() || m <= 1 || n <= 1) {
      convert_from(dtype(), data_.data(), size(), out.data());
      return out;
    }
    std::vector<T> column(static_cast<std::size_t>(m));
    const Index stride = m * Index(dtype_bits(dtype()) / 8);
    for (Index j = 0; j < n; ++j) {
      convert_from(dtype(), data_.data() + j * stride, m, column.data());
      for (Index i = 0; i < m; ++i) out(i, j) = column[std::size_t(i)];
    }
    return out;
  }
  /// All elements of an integer array (token ids) as 64-bit integers, in memory order.
  [[nodiscard]] std::vector<std::int64_t> to_integers() const {
    std::vector<std::int64_t> out(static_cast<std::size_t>(size()));
    const auto read = [&]<class S>(S) {
      for (std::size_t i = 0; i < out.size(); ++i) {
        const S x = load_unaligned<S>(data_.data() + i * sizeof(S));
        if constexpr (std::is_same_v<S, std::uint64_t>)
          if (x > std::uint64_t(std::numeric_limits<std::int64_t>::max())) fail("holds an integer beyond int64");
        out[i] = std::int64_t(x);
      }
    };
    switch (dtype()) {
      case Dtype::U8:
        read(std::uint8_t{});
        break;
      case Dtype::I8:
        read(std::int8_t{});
        break;
      case Dtype::U16:
        read(std::uint16_t{});
        break;
      case Dtype::I16:
        read(std::int16_t{});
        break;
      case Dtype::U32:
        read(std::uint32_t{});
        break;
      case Dtype::I32:
        read(std::int32_t{});
        break;
      case Dtype::U64:
        read(std::uint64_t{});
        break;
      case Dtype::I64:
        read(std::int64_t{});
        break;
      default:
        fail(lowrank::detail::text("holds ", dtype_name(dtype()), ", expected integers"));
    }
    return out;
  }

 private:
  [[nodiscard]] std::pair<Index, Index> matrix_shape(std::size_t least) const {
    const auto& s = shape();
    if (s.size() > 2 || s.size() < least) fail("has shape " + shape_text(s) + ", expected a matrix");
    for (const auto extent : s)
      if (extent > std::uint64_t(std::numeric_limits<Index>::max())) fail("has an extent that cannot be addressed");
    return s.size() == 2 ? std::pair(Index(s[0]), Index(s[1])) : std::pair(Index(1), Index(s[0]));
  }
  [[noreturn]] void fail(const std::string& what) const { throw IoError(path_, what); }

  std::string path_;
  NpyHeader header_;
  Bytes data_;
};

/// A .npy file, open for reading. **Throws** IoError as parse_npy.
class NpyFile {
 public:
  explicit NpyFile(const std::string& path)
      : file_(path), array_(path, parse_npy(path, file_.bytes()), file_.bytes()) {}
  [[nodiscard]] const NpyArray& array() const noexcept { return array_; }
  const NpyArray* operator->() const noexcept { return &array_; }

 private:
  MappedFile file_;
  NpyArray array_;
};

namespace detail {
/// The elements of a view without gaps and in row-major order unless the view is column-major: what npy calls C and F
/// order.
template <class T>
Bytes contiguous_bytes(const MatrixView<const T>& m, Matrix<T>& scratch) {
  if (m.is_contiguous()) return std::as_bytes(std::span(m.data(), std::size_t(m.size())));
  scratch.assign(m);
  return std::as_bytes(std::span(scratch.data(), std::size_t(scratch.size())));
}
}  // namespace detail

/// Writes a matrix as .npy, all at once or not at all; a contiguous column-major one as Fortran order.
/// **Throws** IoError as OutputFile.
template <MatrixLike X>
void write_npy(const std::string& path, X&& x) {
  using T = scalar_of<X>;
  const MatrixView<const T> m = view_of(x);
  Matrix<T> scratch;
  const Bytes data = detail::contiguous_bytes(m, scratch);
  const std::uint64_t shape[] = {std::uint64_t(m.rows()), std::uint64_t(m.cols())};
  const std::string header = npy_header(dtype_of<T>(), shape, m.is_contiguous() && !m.is_row_major());
  OutputFile out(path);
  out.reserve(header.size() + data.size());
  out.write_at(0, std::as_bytes(std::span(header)));
  out.write_at(header.size(), data);
  out.commit();
}

}  // namespace lowrank::io

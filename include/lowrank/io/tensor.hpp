// SPDX-License-Identifier: Apache-2.0
// What a tensor file says of a tensor, and a look at its bytes that becomes a matrix when asked.
#pragma once

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/io/dtype.hpp"
#include "lowrank/io/file.hpp"

namespace lowrank::io {

/// Extents, slowest first; data is row-major.
using Shape = std::vector<std::uint64_t>;

/// A tensor's name, type and shape: what a writer must know before any data.
struct TensorSpec {
  std::string name;
  Dtype dtype = Dtype::F32;
  Shape shape;

  friend bool operator==(const TensorSpec&, const TensorSpec&) = default;
};

/// A TensorSpec and where its bytes lie, [begin, end) counted from the start of the data section.
struct TensorInfo : TensorSpec {
  std::uint64_t begin = 0, end = 0;

  [[nodiscard]] std::uint64_t bytes() const noexcept { return end - begin; }
  friend bool operator==(const TensorInfo&, const TensorInfo&) = default;
};

/// "[32, 128]", the way messages write a shape of any order.
inline std::string shape_text(std::span<const std::uint64_t> shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) s += ", ";
    s += std::to_string(shape[i]);
  }
  return s + "]";
}

/// Throws IoError naming the file and the tensor when a finite value of `m` would be infinite in F16. Call it before
/// factors are written in that type.
inline void expect_f16_range(const std::string& path, const std::string& name, const Matrix<float>& m) {
  for (Index i = 0; i < m.size(); ++i)
    if (const float x = m.data()[i]; std::isfinite(x) && !std::isfinite(float(f16(x))))
      throw IoError(path, name, lowrank::detail::text("must be within the range of F16, got ", x, "; store it as F32"));
}

/// Rows and columns of a tensor of any order laid out as a matrix: the first extent, and the product of the others. A
/// convolution's weight [out, in/groups, kh, kw] becomes out×(in/groups·kh·kw), which is how adapter files fold theirs;
/// a vector becomes one column, a scalar 1×1.
inline std::pair<Index, Index> folded_extents(const Shape& shape) {
  std::pair<Index, Index> extents{1, 1};
  for (std::size_t i = 0; i < shape.size(); ++i)
    (i == 0 ? extents.first : extents.second) *= Index(std::min(shape[i], std::uint64_t(1) << 62));
  return extents;
}

/// A tensor in a file that stays open elsewhere (SafeTensors, Checkpoint, Npy): no bytes of its own.
///
/// Everything that copies reads the file, so that one truncated meanwhile is an IoError; only who touches what bytes()
/// and view() name gets the operating system's signal.
class TensorView {
 public:
  TensorView(const MappedFile& file, const TensorInfo& info, Bytes bytes) : file_(&file), info_(&info), bytes_(bytes) {}

  [[nodiscard]] const std::string& name() const noexcept { return info_->name; }
  [[nodiscard]] Dtype dtype() const noexcept { return info_->dtype; }
  [[nodiscard]] const Shape& shape() const noexcept { return info_->shape; }
  [[nodiscard]] Bytes bytes() const noexcept { return bytes_; }
  [[nodiscard]] const MappedFile& file() const noexcept { return *file_; }
  /// Number of elements.
  [[nodiscard]] Index size() const noexcept { return Index(bytes_.size() * 8 / dtype_bits(dtype())); }
  [[nodiscard]] Index rows() const { return matrix_extent(0); }
  [[nodiscard]] Index cols() const { return matrix_extent(1); }

  /// The matrix where it lies, no byte copied.
  ///
  /// **Throws** IoError naming the tensor when it is not two-dimensional, not stored as S, or not aligned for S (the
  /// format allows any offset; `to_matrix` copies instead).
  template <class S>
  [[nodiscard]] MatrixView<const S> view() const {
    const Index m = rows(), n = cols();
    if (dtype() != dtype_of<S>())
      fail(lowrank::detail::text("is stored as ", dtype_name(dtype()), ", not ", dtype_name(dtype_of<S>())));
    if (reinterpret_cast<std::uintptr_t>(bytes_.data()) % alignof(S) != 0)
      fail("is not aligned for a view in place; copy it with to_matrix()");
    return view_of(reinterpret_cast<const S*>(bytes_.data()), m, n);
  }

  /// A copy as a matrix of T, whatever floating-point type is stored; a vector becomes one row, a scalar 1×1.
  ///
  /// **Throws** IoError naming the tensor for types that are not real numbers, or more than two dimensions.
  /// **Cost** one pass at memory speed. **Numerics** exact but for F64 → float.
  template <Real T>
  [[nodiscard]] Matrix<T> to_matrix() const {
    Matrix<T> m;
    if (shape().size() == 2)
      m.resize(rows(), cols());
    else if (shape().size() < 2)
      m.resize(1, size());
    else
      fail(lowrank::detail::text("has shape ", shape_text(shape()), ", expected a matrix"));
    copy_to(m.data());
    return m;
  }
  /// A copy as the matrix of folded_extents(), of T or, where T is what is stored, of any such scalar.
  ///
  /// **Throws** IoError naming the tensor for types that are not real numbers.
  template <class T>
  [[nodiscard]] Matrix<T> folded() const {
    Matrix<T> m;
    const Index first = shape().empty() ? 1 : Index(std::min(shape()[0], std::uint64_t(size())));
    m.resize(first, first == 0 ? 0 : size() / first);
    if constexpr (Real<T>)
      copy_to(m.data());
    else if (dtype() != dtype_of<T>())
      fail(lowrank::detail::text("is stored as ", dtype_name(dtype()), ", not ", dtype_name(dtype_of<T>())));
    else
      copy_bytes(reinterpret_cast<std::byte*>(m.data()));
    return m;
  }
  /// All elements as T, in memory order; or `count` of them from element `first` on.
  template <Real T>
  void copy_to(T* out, Index first = 0, Index count = -1) const {
    if (!is_convertible_float(dtype()))
      fail(lowrank::detail::text("is stored as ", dtype_name(dtype()), ", expected a floating-point type"));
    const Index width = Index(dtype_bits(dtype()) / 8);
    const auto convert = [&](Bytes piece) {
      const Index n = Index(piece.size()) / width;
      convert_from(dtype(), piece.data(), n, out);
      out += n;
    };
    if (count < 0) return read(convert);
    read(bytes_.subspan(std::size_t(first * width), std::size_t(count * width)), convert);
  }
  /// The bytes as they are stored, copied. **Throws** IoError when the file cannot be read, or was truncated.
  void copy_bytes(std::byte* out) const {
    if (!bytes_.empty()) file_->read(bytes_, out);
  }
  [[nodiscard]] std::vector<std::byte> copied_bytes() const {
    std::vector<std::byte> bytes(bytes_.size());
    copy_bytes(bytes.data());
    return bytes;
  }
  template <Real T>
  [[nodiscard]] std::vector<T> to_vector() const {
    std::vector<T> v(static_cast<std::size_t>(size()));
    copy_to(v.data());
    return v;
  }

  /// One pass over the bytes: f(piece) for pieces in order, each read into a buffer that stays in cache. At the speed
  /// of `cat`, and without pages to give back; where the bytes are wanted more than once, map them (`view`).
  ///
  /// **Throws** IoError when the file cannot be read; what f throws.
  template <class F>
  void read(F&& f) const {
    read(bytes_, f);
  }

  /// Start reading; map at once; give the pages back. See MappedFile.
  void will_need() const noexcept { file_->will_need(bytes_); }
  void populate() const noexcept { file_->populate(bytes_); }
  void drop() const noexcept { file_->drop(bytes_); }

  [[noreturn]] void fail(const std::string& what) const { throw IoError(file_->path(), name(), what); }

 private:
  template <class F>
  void read(Bytes bytes, F&& f) const {
    constexpr std::size_t piece = std::size_t(256) << 10;  // a whole number of elements of every type
    if (bytes.empty()) return;
    Buffer<std::byte> buffer(Index(std::min(piece, bytes.size())));
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
      const Bytes range = bytes.subspan(at, std::min(piece, bytes.size() - at));
      file_->read(range, buffer.data());
      f(Bytes(buffer.data(), range.size()));
    }
  }
  [[nodiscard]] Index matrix_extent(std::size_t i) const {
    if (shape().size() != 2) fail(lowrank::detail::text("has shape ", shape_text(shape()), ", expected a matrix"));
    // An empty matrix may claim an extent beyond Index: the other one is zero, so nothing bounds it.
    if (shape()[i] > std::uint64_t(std::numeric_limits<Index>::max()))
      fail(lowrank::detail::text("has an extent beyond what can be addressed: ", shape_text(shape())));
    return Index(shape()[i]);
  }
  const MappedFile* file_;
  const TensorInfo* info_;
  Bytes bytes_;
};

}  // namespace lowrank::io

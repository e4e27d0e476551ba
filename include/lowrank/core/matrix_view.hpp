// SPDX-License-Identifier: Apache-2.0
// MatrixView: a pointer, a shape and two strides. Every algorithm of the library speaks this and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "lowrank/core/errors.hpp"

namespace lowrank {

/// Signed sizes and indices, as Eigen has them.
using Index = std::ptrdiff_t;

/// Where consecutive elements lie: along a row, or along a column.
enum class Order { row_major, col_major };

namespace detail {
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_no_unit_stride(Index row_stride, Index col_stride,
                                                                        const char* copy) {
  throw ShapeError(text("MatrixView: one stride must be 1 (rows or columns contiguous), got row stride ", row_stride,
                        " and column stride ", col_stride, "; copy the matrix into contiguous storage first", copy));
}
/// Throws ShapeError when neither stride is 1; a stride along an extent of at most 1 is never used and may be anything.
/// `copy` says how the caller's own containers are copied into contiguous storage, for the end of the message.
constexpr void expect_unit_stride(Index rows, Index cols, Index row_stride, Index col_stride, const char* copy = "") {
  if (rows > 1 && cols > 1 && row_stride != 1 && col_stride != 1) [[unlikely]]
    throw_no_unit_stride(row_stride, col_stride, copy);
}

// The other ways a view can be wrong; the shape of what is looked at is (rows, cols).
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_no_such_block(Index i, Index j, Index block_rows,
                                                                       Index block_cols, Index rows, Index cols) {
  throw ShapeError(text("MatrixView::block: block at (", i, ", ", j, ") of ", shape_text(block_rows, block_cols),
                        " does not fit in ", shape_text(rows, cols)));
}
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_no_view(Index rows, Index cols, Index leading_dimension,
                                                                 Index inner) {
  if (rows < 0 || cols < 0)
    throw ShapeError(text("MatrixView: sizes must not be negative, got ", shape_text(rows, cols)));
  if (leading_dimension < inner)
    throw ShapeError(text("MatrixView: leading dimension ", leading_dimension, " is shorter than the ", inner,
                          " elements it separates"));
  throw ShapeError(text("MatrixView: null pointer for a ", shape_text(rows, cols), " matrix"));
}
}  // namespace detail

/// A non-owning rectangle of scalars: element (i, j) is `data[i * row_stride + j * col_stride]`.
///
/// One of the two strides is always 1, so a view is row-major or column-major *at run time*, with a leading dimension
/// for the other direction. Algorithms are templates on the scalar alone; only products look at the order. A transpose
/// is a swap of strides. `MatrixView<const T>` is the read-only kind and converts implicitly from `MatrixView<T>`.
///
/// **Throws** ShapeError from the constructor: negative sizes, strides of which none is 1, strides so short that
/// elements would share memory, a null pointer with a non-empty shape.
/// **Cost** of any member: O(1), no allocation.
template <class T>
class MatrixView {
 public:
  using value_type = std::remove_const_t<T>;

  constexpr MatrixView() = default;

  constexpr MatrixView(T* data, Index rows, Index cols, Index row_stride, Index col_stride)
      : data_(data), rows_(rows), cols_(cols), row_stride_(row_stride), col_stride_(col_stride) {
    // A stride along an extent of 0 or 1 is never used; libraries leave 0, 1 or anything there. Give it the value that
    // makes the view regular, so that "one stride is 1" holds for every vector there is.
    if (rows_ <= 1 && cols_ <= 1) {
      row_stride_ = col_stride_ = 1;
    } else if (rows_ <= 1) {
      row_stride_ = col_stride_ == 1 ? cols_ : 1;
    } else if (cols_ <= 1) {
      col_stride_ = row_stride_ == 1 ? rows_ : 1;
    }
    check();
  }

  /// Read-only view of a writable one.
  template <class U>
  requires(std::is_same_v<const U, T> && !std::is_same_v<U, T>) constexpr MatrixView(
      const MatrixView<U>& other)  // NOLINT(google-explicit-constructor)
      : data_(other.data()),
        rows_(other.rows()),
        cols_(other.cols()),
        row_stride_(other.row_stride()),
        col_stride_(other.col_stride()) {}

  [[nodiscard]] constexpr T* data() const noexcept { return data_; }
  [[nodiscard]] constexpr Index rows() const noexcept { return rows_; }
  [[nodiscard]] constexpr Index cols() const noexcept { return cols_; }
  [[nodiscard]] constexpr Index size() const noexcept { return rows_ * cols_; }
  [[nodiscard]] constexpr bool empty() const noexcept { return rows_ == 0 || cols_ == 0; }
  [[nodiscard]] constexpr Index row_stride() const noexcept { return row_stride_; }
  [[nodiscard]] constexpr Index col_stride() const noexcept { return col_stride_; }
  [[nodiscard]] constexpr Order order() const noexcept {
    return col_stride_ == 1 ? Order::row_major : Order::col_major;
  }
  [[nodiscard]] constexpr bool is_row_major() const noexcept { return col_stride_ == 1; }
  /// Distance between consecutive rows (row-major) or columns (column-major).
  [[nodiscard]] constexpr Index leading_dimension() const noexcept {
    return is_row_major() ? row_stride_ : col_stride_;
  }
  /// No gaps: the elements are `size()` consecutive scalars.
  [[nodiscard]] constexpr bool is_contiguous() const noexcept {
    const Index inner = is_row_major() ? cols_ : rows_, outer = is_row_major() ? rows_ : cols_;
    return outer <= 1 || inner == 0 || leading_dimension() == inner;
  }

  constexpr T& operator()(Index i, Index j) const noexcept { return data_[i * row_stride_ + j * col_stride_]; }

  /// The same memory read as the transposed matrix.
  [[nodiscard]] constexpr MatrixView transposed() const noexcept {
    return {Unchecked{}, data_, cols_, rows_, col_stride_, row_stride_};
  }

  /// Rows [i, i+rows) × columns [j, j+cols) of this view. **Throws** ShapeError when that is not inside.
  [[nodiscard]] constexpr MatrixView block(Index i, Index j, Index rows, Index cols) const {
    if (i < 0 || j < 0 || rows < 0 || cols < 0 || i + rows > rows_ || j + cols > cols_) [[unlikely]]
      detail::throw_no_such_block(i, j, rows, cols, rows_, cols_);
    // An empty view may be of no memory at all, and null has no neighbours.
    const Index offset = rows > 0 && cols > 0 ? i * row_stride_ + j * col_stride_ : 0;
    return {Unchecked{}, data_ + offset, rows, cols, row_stride_, col_stride_};
  }
  [[nodiscard]] constexpr MatrixView middle_rows(Index i, Index n) const { return block(i, 0, n, cols_); }
  [[nodiscard]] constexpr MatrixView middle_cols(Index j, Index n) const { return block(0, j, rows_, n); }
  [[nodiscard]] constexpr MatrixView row(Index i) const { return block(i, 0, 1, cols_); }
  [[nodiscard]] constexpr MatrixView col(Index j) const { return block(0, j, rows_, 1); }

 private:
  struct Unchecked {};
  constexpr MatrixView(Unchecked, T* data, Index rows, Index cols, Index row_stride, Index col_stride) noexcept
      : data_(data), rows_(rows), cols_(cols), row_stride_(row_stride), col_stride_(col_stride) {}

  constexpr void check() const {
    if (rows_ < 0 || cols_ < 0) [[unlikely]]
      detail::throw_no_view(rows_, cols_, 0, 0);
    detail::expect_unit_stride(rows_, cols_, row_stride_, col_stride_);
    const Index inner = col_stride_ == 1 ? cols_ : rows_, outer = col_stride_ == 1 ? rows_ : cols_;
    if (outer > 1 && leading_dimension() < inner) [[unlikely]]
      detail::throw_no_view(rows_, cols_, leading_dimension(), inner);
    if (data_ == nullptr && rows_ > 0 && cols_ > 0) [[unlikely]]
      detail::throw_no_view(rows_, cols_, 0, 0);
  }

  T* data_ = nullptr;
  Index rows_ = 0, cols_ = 0, row_stride_ = 1, col_stride_ = 1;
};

/// Read-only view; what every input argument of the library is.
template <class T>
using ConstMatrixView = MatrixView<const T>;

namespace detail {

/// Whether two views share an element. Exact for views with equal strides, so that disjoint column blocks of one buffer
/// (q, k and v side by side) pass; otherwise conservative: whether the byte ranges from first to last element meet.
template <class T, class U>
bool overlap(const MatrixView<T>& a, const MatrixView<U>& b) {
  if (a.empty() || b.empty()) return false;
  const auto first = [](const auto& v) { return reinterpret_cast<std::uintptr_t>(v.data()); };
  const auto last = [](const auto& v) {
    return reinterpret_cast<std::uintptr_t>(&v(v.rows() - 1, v.cols() - 1)) + sizeof(*v.data());
  };
  if (first(a) >= last(b) || first(b) >= last(a)) return false;
  const auto bytes = static_cast<Index>(first(b) - first(a));
  constexpr Index size = sizeof(T);
  if (sizeof(T) != sizeof(U) || a.row_stride() != b.row_stride() || a.col_stride() != b.col_stride() ||
      bytes % size != 0)
    return true;
  // b starts `outer` lines and `inner` elements after a; lines that wrap past a's leading dimension start one line
  // later.
  const Index ld = a.leading_dimension(), distance = bytes / size;
  const Index outer = distance >= 0 ? distance / ld : -((ld - 1 - distance) / ld), inner = distance - outer * ld;
  const bool rows = a.is_row_major();
  const Index a_outer = rows ? a.rows() : a.cols(), a_inner = rows ? a.cols() : a.rows();
  const Index b_outer = rows ? b.rows() : b.cols(), b_inner = rows ? b.cols() : b.rows();
  const auto meet = [](Index at, Index n, Index m) { return at < n && at + m > 0; };
  return (meet(outer, a_outer, b_outer) && meet(inner, a_inner, b_inner)) ||
         (meet(outer + 1, a_outer, b_outer) && meet(inner - ld, a_inner, b_inner));
}

/// Throws ArgumentError when an output shares memory with something the same call reads.
/// `where` names the public function, `written` and `read` the arguments: "LoraLinear::forward", "Y", "X".
template <class T, class U>
void expect_apart(const char* where, const char* written, const MatrixView<T>& out, const char* read,
                  const MatrixView<U>& in) {
  if (overlap(out, in)) [[unlikely]]
    throw ArgumentError(text(where, ": ", written, " must not overlap ", read));
}

/// Calls f(pointer, length) for every contiguous run of a view, in memory order: rows of a row-major view, columns of
/// a column-major one, or everything at once. Elementwise loops go through here so that they never see an order.
template <class T, class F>
void for_each_run(const MatrixView<T>& v, F&& f) {
  if (v.empty()) return;
  if (v.is_contiguous()) return f(v.data(), v.size());
  const Index outer = v.is_row_major() ? v.rows() : v.cols(), inner = v.is_row_major() ? v.cols() : v.rows();
  for (Index o = 0; o < outer; ++o) f(v.data() + o * v.leading_dimension(), inner);
}

/// to = from element by element, converted; to = x. Out of line: loops over two strides that are known at run time
/// alone compile to more than what they stand in.
template <class S, class T>
[[gnu::noinline]] void copy_elements(MatrixView<S> from, MatrixView<T> to) {
  for (Index i = 0; i < to.rows(); ++i)
    for (Index j = 0; j < to.cols(); ++j) to(i, j) = static_cast<T>(from(i, j));
}
template <class T>
[[gnu::noinline]] void fill_elements(MatrixView<T> to, std::type_identity_t<T> x) {
  for (Index i = 0; i < to.rows(); ++i)
    for (Index j = 0; j < to.cols(); ++j) to(i, j) = x;
}

}  // namespace detail
}  // namespace lowrank

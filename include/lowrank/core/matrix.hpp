// SPDX-License-Identifier: Apache-2.0
// Matrix: the one owning container the library hands out and keeps as scratch; row-major, 64-byte aligned.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#include "lowrank/core/detail/huge_pages.hpp"
#include "lowrank/core/view_of.hpp"

namespace lowrank {

/// Contiguous, 64-byte aligned storage that grows and never shrinks: the scratch memory of a layer in steady state.
/// Elements are raw: resize leaves new ones uninitialised. T must be trivially copyable.
template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(Index n) { resize(n); }
  Buffer(const Buffer& other) : Buffer(other.size_) {
    if (size_ > 0) std::memcpy(data_, other.data_, std::size_t(size_) * sizeof(T));
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() { release(); }

  /// Makes room for n elements; allocates only when n exceeds everything asked for before. Old contents are lost then.
  void resize(Index n) {
    if (n > capacity_) {
      release();
      data_ = static_cast<T*>(::operator new (std::size_t(n) * sizeof(T), std::align_val_t{alignment}));
      capacity_ = n;
      detail::advise_huge_pages(data_, std::size_t(n) * sizeof(T));
    }
    size_ = n;
  }
  [[nodiscard]] T* data() noexcept { return data_; }
  [[nodiscard]] const T* data() const noexcept { return data_; }
  [[nodiscard]] Index size() const noexcept { return size_; }
  T& operator[](Index i) noexcept { return data_[i]; }
  const T& operator[](Index i) const noexcept { return data_[i]; }
  T* begin() noexcept { return data_; }
  T* end() noexcept { return data_ + size_; }
  const T* begin() const noexcept { return data_; }
  const T* end() const noexcept { return data_ + size_; }
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(capacity_, other.capacity_);
  }

  static constexpr std::size_t alignment = 64;

 private:
  void release() noexcept {
    if (data_ != nullptr) ::operator delete (data_, std::align_val_t{alignment});
    data_ = nullptr;
    size_ = capacity_ = 0;
  }
  T* data_ = nullptr;
  Index size_ = 0, capacity_ = 0;
};

namespace detail {
[[noreturn, gnu::cold, gnu::noinline]] inline void throw_no_matrix(Index rows, Index cols) {
  if (rows < 0 || cols < 0) throw ShapeError(text("Matrix: sizes must not be negative, got ", shape_text(rows, cols)));
  throw ShapeError(text("Matrix: ", shape_text(rows, cols), " elements do not fit in memory"));
}
}  // namespace detail

/// An owning row-major matrix without gaps. What functions of the library return; `view_of` it, read it with (i, j), or
/// include a front end for `as_eigen(m)` / `as_xtensor(m)`.
template <class T>
class Matrix {
 public:
  using value_type = T;

  Matrix() = default;
  /// rows × cols zeros. **Throws** ShapeError on a negative size.
  Matrix(Index rows, Index cols) {
    resize(rows, cols);
    set_zero();
  }
  /// A copy of any matrix-like thing of the same scalar, or of one that converts (float → double, bf16 → float).
  template <MatrixLike X>
  requires(!std::is_same_v<std::remove_cvref_t<X>, Matrix>) explicit Matrix(X&& other) { assign(view_of(other)); }
  Matrix(const Matrix&) = default;
  Matrix& operator=(const Matrix&) = default;
  /// What was moved from is 0×0: used again, it is refused by its shape.
  Matrix(Matrix&& other) noexcept
      : storage_(std::move(other.storage_)),
        rows_(std::exchange(other.rows_, 0)),
        cols_(std::exchange(other.cols_, 0)) {}
  Matrix& operator=(Matrix&& other) noexcept {
    storage_ = std::exchange(other.storage_, Buffer<T>());
    rows_ = std::exchange(other.rows_, 0);
    cols_ = std::exchange(other.cols_, 0);
    return *this;
  }
  ~Matrix() = default;

  /// New shape; contents are unspecified afterwards. Allocates only when it must grow. **Throws** ShapeError on a
  /// negative size or one no memory holds.
  void resize(Index rows, Index cols) {
    if (rows < 0 || cols < 0 || (cols > 0 && rows > PTRDIFF_MAX / Index(sizeof(T)) / cols)) [[unlikely]]
      detail::throw_no_matrix(rows, cols);
    storage_.resize(rows * cols);
    rows_ = rows;
    cols_ = cols;
  }
  template <class U>
  void assign(const MatrixView<U>& v) {
    resize(v.rows(), v.cols());
    detail::copy_elements(v, view());
  }
  void set_zero() { std::fill(storage_.begin(), storage_.end(), T{}); }

  [[nodiscard]] T* data() noexcept { return storage_.data(); }
  [[nodiscard]] const T* data() const noexcept { return storage_.data(); }
  [[nodiscard]] Index rows() const noexcept { return rows_; }
  [[nodiscard]] Index cols() const noexcept { return cols_; }
  [[nodiscard]] Index size() const noexcept { return rows_ * cols_; }
  [[nodiscard]] bool empty() const noexcept { return size() == 0; }
  T& operator()(Index i, Index j) noexcept { return storage_[i * cols_ + j]; }
  const T& operator()(Index i, Index j) const noexcept { return storage_[i * cols_ + j]; }

  [[nodiscard]] MatrixView<T> view() noexcept { return {data(), rows_, cols_, cols_ > 0 ? cols_ : 1, 1}; }
  [[nodiscard]] MatrixView<const T> view() const noexcept { return {data(), rows_, cols_, cols_ > 0 ? cols_ : 1, 1}; }

 private:
  Buffer<T> storage_;
  Index rows_ = 0, cols_ = 0;
};

template <class T>
struct ViewTraits<Matrix<T>> {
  static constexpr bool owning = true;
  static MatrixView<T> view(Matrix<T>& m) noexcept { return m.view(); }
  static MatrixView<const T> view(const Matrix<T>& m) noexcept { return m.view(); }
};

}  // namespace lowrank

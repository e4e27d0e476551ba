// SPDX-License-Identifier: Apache-2.0
// Row sources: what a streamed pass reads its matrix from, some rows at a time, in place or decoded into scratch.
#pragma once

#include <concepts>
#include <span>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

/// A matrix with contiguous rows. `read(i, count, scratch)` returns a pointer to rows [i, i + count), `ld()` scalars
/// apart: the matrix itself, or `scratch` (count × cols scalars of storage) after writing there when `decodes` is true.
template <class R>
concept RowSource = requires(const R& r, Index i, typename R::storage* scratch) {
  { r.rows() } -> std::convertible_to<Index>;
  { r.cols() } -> std::convertible_to<Index>;
  { R::decodes } -> std::convertible_to<bool>;
  { r.read(i, i, scratch) } -> std::same_as<const typename R::storage*>;
  { r.ld() } -> std::convertible_to<Index>;
};

/// Any row source of storage S behind one type; refers to the source, which must outlive it.
template <class S>
class AnyRows {
 public:
  template <class R>
  requires(RowSource<R>&& std::same_as<typename R::storage, S>) explicit AnyRows(const R& source)
      : source_(&source),
        rows_(source.rows()),
        cols_(source.cols()),
        ld_(source.ld()),
        decodes_(R::decodes),
        read_([](const void* from, Index i, Index count, S* scratch) {
          return static_cast<const R*>(from)->read(i, count, scratch);
        }) {}

  [[nodiscard]] Index rows() const { return rows_; }
  [[nodiscard]] Index cols() const { return cols_; }
  [[nodiscard]] Index ld() const { return ld_; }
  [[nodiscard]] bool decodes() const { return decodes_; }
  const S* read(Index i, Index count, S* scratch) const { return read_(source_, i, count, scratch); }

 private:
  const void* source_;
  Index rows_, cols_, ld_;
  bool decodes_;
  const S* (*read_)(const void*, Index, Index, S*);
};

/// The rows of a row-major matrix, in place, as stored.
template <class S>
struct DenseRows {
  using storage = S;
  static constexpr bool decodes = false;
  MatrixView<const S> m;

  [[nodiscard]] Index rows() const { return m.rows(); }
  [[nodiscard]] Index cols() const { return m.cols(); }
  [[nodiscard]] Index ld() const { return m.row_stride(); }
  const S* read(Index i, Index, S*) const { return m.data() + i * m.row_stride(); }
};

/// W₁ − W₀, each widened to T before the subtraction. W₁ is row-major; W₀ may be in any order (column-major is slow).
template <class T, class S1, class S0>
struct DifferenceRows {
  using storage = T;
  static constexpr bool decodes = true;
  MatrixView<const S1> tuned;
  MatrixView<const S0> base;

  [[nodiscard]] Index rows() const { return tuned.rows(); }
  [[nodiscard]] Index cols() const { return tuned.cols(); }
  [[nodiscard]] Index ld() const { return tuned.cols(); }
  const T* read(Index i0, Index count, T* scratch) const {
    constexpr int L = lanes<T>;
    const Index n = cols();
    for (Index i = 0; i < count; ++i) {
      const S1* a = tuned.data() + (i0 + i) * tuned.row_stride();
      const S0* b = base.data() + (i0 + i) * base.row_stride();
      T* out = scratch + i * n;
      Index j = 0;
      if (base.col_stride() == 1)
        for (; j + L <= n; j += L) store(out + j, load_as<T, L>(a + j) - load_as<T, L>(b + j));
      for (; j < n; ++j) out[j] = T(a[j]) - T(b[j * base.col_stride()]);
    }
    return scratch;
  }
};

/// diag(left)·M·diag(right) of another source, in T; an empty span scales nothing.
template <class T, RowSource Inner>
struct ScaledRows {
  using storage = T;
  static constexpr bool decodes = true;
  Inner inner;
  std::span<const T> left, right;

  [[nodiscard]] Index rows() const { return inner.rows(); }
  [[nodiscard]] Index cols() const { return inner.cols(); }
  [[nodiscard]] Index ld() const { return inner.cols(); }
  const T* read(Index i0, Index count, T* scratch) const {
    constexpr int L = lanes<T>;
    const Index n = cols();
    // A decoding inner source yields T, so its rows can be scaled where they are.
    const auto* const from = inner.read(i0, count, inner_scratch(scratch));
    for (Index i = 0; i < count; ++i) {
      const auto* row = from + i * inner.ld();
      T* out = scratch + i * n;
      const T d = left.empty() ? T(1) : left[std::size_t(i0 + i)];
      Index j = 0;
      if (right.empty()) {
        for (; j + L <= n; j += L) store(out + j, d * load_as<T, L>(row + j));
        for (; j < n; ++j) out[j] = d * T(row[j]);
      } else {
        const T* r = right.data();
        for (; j + L <= n; j += L) store(out + j, d * load_as<T, L>(row + j) * load<Vec<T>>(r + j));
        for (; j < n; ++j) out[j] = d * T(row[j]) * r[j];
      }
    }
    return scratch;
  }

 private:
  static auto inner_scratch(T* scratch) {
    if constexpr (Inner::decodes)
      return scratch;
    else
      return static_cast<typename Inner::storage*>(nullptr);
  }
};

/// A panel source of the packed product (quantised weights have one), read one row at a time.
template <class T, class Panels>
struct PanelRows {
  using storage = T;
  static constexpr bool decodes = true;
  Panels panels;

  [[nodiscard]] Index rows() const { return panels.rows(); }
  [[nodiscard]] Index cols() const { return panels.depth(); }
  [[nodiscard]] Index ld() const { return panels.depth(); }
  const T* read(Index i0, Index count, T* scratch) const {
    for (Index i = 0; i < count; ++i) panels.pack(1, i0 + i, 1, 0, cols(), scratch + i * cols());
    return scratch;
  }
};

}  // namespace lowrank::detail

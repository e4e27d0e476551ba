// SPDX-License-Identifier: Apache-2.0
// An array of any dimension read as a matrix whose columns are its last dimension: what the tensor front ends share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank::detail {

/// Row count and strides of an N-D array read as a matrix; meaningful when rows and columns are evenly spaced in
/// memory.
struct Collapsed {
  Index rows = 1, cols = 1, row_stride = 1, col_stride = 1;
  bool evenly_spaced = true;
};

/// Collapses the dimensions before `split` into rows and the others into columns, each in row-major order of its
/// indices. `shape` and `strides` have size() and [i]; 0 ≤ split < size().
template <class Shape, class Strides>
Collapsed try_collapse(const Shape& shape, const Strides& strides, std::size_t split) {
  const std::size_t n = shape.size();
  Collapsed c{.col_stride = Index(strides[n - 1])};
  const auto fold = [&](std::size_t begin, std::size_t end, Index& size, Index& first_stride) {
    bool first = true;
    Index next = 0;  // the stride that continues the indices seen so far
    for (std::size_t i = end; i-- > begin;) {
      const Index extent = Index(shape[i]), stride = Index(strides[i]);
      size *= extent;
      if (extent == 1) continue;  // its stride is never used; libraries leave 0 or anything there
      if (first) first_stride = stride;
      c.evenly_spaced = c.evenly_spaced && (first || stride == next);
      next = stride * extent;
      first = false;
    }
  };
  fold(0, split, c.rows, c.row_stride);
  fold(split, n, c.cols, c.col_stride);
  if (c.rows == 0 || c.cols == 0) return {.rows = c.rows, .cols = c.cols, .row_stride = std::max<Index>(c.cols, 1)};
  return c;
}

/// All dimensions but the last into rows.
template <class Shape, class Strides>
Collapsed try_collapse(const Shape& shape, const Strides& strides) {
  return try_collapse(shape, strides, shape.size() - 1);
}

/// "8, 3, 3, 3"
template <class List>
std::string list_text(const List& list) {
  std::string out;
  for (std::size_t i = 0; i < list.size(); ++i) out += (i > 0 ? ", " : "") + to_text(Index(list[i]));
  return out;
}

/// The same for a caller that has no other way; `where` and `copy` are what the message says.
/// **Throws** ShapeError for a scalar, or when the dimensions folded together are not evenly spaced in memory.
template <class Shape, class Strides>
Collapsed collapse(const char* where, const char* copy, const Shape& shape, const Strides& strides, std::size_t split) {
  if (shape.size() == 0) throw ShapeError(text(where, ": a zero-dimensional array is not a matrix"));
  const Collapsed c = try_collapse(shape, strides, split);
  if (!c.evenly_spaced) [[unlikely]]
    throw ShapeError(text(where, ": the ", split > 1 ? "leading" : "trailing", " dimensions of an array of shape (",
                          list_text(shape), ") with strides (", list_text(strides),
                          ") are not evenly spaced, so they do not read as the ", split > 1 ? "rows" : "columns",
                          " of a matrix; ", copy));
  return c;
}
template <class Shape, class Strides>
Collapsed collapse(const char* where, const char* copy, const Shape& shape, const Strides& strides) {
  return collapse(where, copy, shape, strides, shape.size() - (shape.size() > 0));
}

/// **Throws** ShapeError above three dimensions: one reading has tokens for rows, the other is a convolution's weight
/// as files fold it, and no view can know which is meant. `tokens` and `weight` say how each is asked for.
template <class Shape>
void expect_unambiguous(const char* where, const char* tokens, const char* weight, const Shape& shape) {
  if (shape.size() <= 3) return;
  Index rows = 1, inner = 1;
  for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= Index(shape[i]);
  for (std::size_t i = 1; i < shape.size(); ++i) inner *= Index(shape[i]);
  throw ShapeError(text(where, ": an array of shape (", list_text(shape), ") may be tokens, ",
                        shape_text(rows, Index(shape[shape.size() - 1])), ", or a convolution's weight, ",
                        shape_text(Index(shape[0]), inner), " as files fold it: say which, ", tokens, " or ", weight));
}

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// An array of any dimension read as a matrix whose columns are its last dimension: what the tensor front ends share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank::detail {

/// Row count and strides of an N-D array read as a matrix; meaningful when the rows are evenly spaced in memory.
struct Collapsed {
  Index rows = 1, cols = 1, row_stride = 1, col_stride = 1;
  bool evenly_spaced = true;
};

/// Collapses all dimensions but the last into rows, in row-major order of the leading indices. `shape` and `strides`
/// have size() and [i], at least one dimension each.
template <class Shape, class Strides>
Collapsed try_collapse(const Shape& shape, const Strides& strides) {
  const std::size_t n = shape.size();
  Collapsed c{.cols = Index(shape[n - 1]), .col_stride = Index(strides[n - 1])};
  bool first = true;
  Index next = 0;  // the stride that continues the rows seen so far
  for (std::size_t i = n - 1; i-- > 0;) {
    const Index extent = Index(shape[i]), stride = Index(strides[i]);
    c.rows *= extent;
    if (extent == 1) continue;  // its stride is never used; libraries leave 0 or anything there
    if (first) c.row_stride = stride;
    c.evenly_spaced = c.evenly_spaced && (first || stride == next);
    next = stride * extent;
    first = false;
  }
  if (c.rows == 0 || c.cols == 0) return {.rows = c.rows, .cols = c.cols, .row_stride = std::max<Index>(c.cols, 1)};
  return c;
}

/// The same for a caller that has no other way; `where` and `copy` are what the message says.
/// **Throws** ShapeError for a scalar, or when the leading dimensions are not evenly spaced in memory.
template <class Shape, class Strides>
Collapsed collapse(const char* where, const char* copy, const Shape& shape, const Strides& strides) {
  if (shape.size() == 0) throw ShapeError(text(where, ": a zero-dimensional array is not a matrix"));
  const Collapsed c = try_collapse(shape, strides);
  if (!c.evenly_spaced) [[unlikely]] {
    std::string got_shape, got_strides;
    for (std::size_t i = 0; i < shape.size(); ++i) {
      if (i > 0) got_shape += ", ", got_strides += ", ";
      got_shape += to_text(Index(shape[i]));
      got_strides += to_text(Index(strides[i]));
    }
    throw ShapeError(text(where, ": the leading dimensions of an array of shape (", got_shape, ") with strides (",
                          got_strides, ") are not evenly spaced, so they do not read as the rows of a matrix; ", copy));
  }
  return c;
}

}  // namespace lowrank::detail

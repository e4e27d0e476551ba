// SPDX-License-Identifier: Apache-2.0
// How a matrix is cut into blocks, and where the codes and the scale of an element lie.
#pragma once

#include <algorithm>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank {

/// How the elements of a matrix, taken row by row, are grouped into blocks that share a scale.
enum class Blocking {
  flat,          ///< blocks of block_size run on over row ends; only the last is short (bitsandbytes' 4-bit layout)
  restart_rows,  ///< blocks of block_size start anew with each row, whose last one may be short
  row            ///< one block a row; block_size is not looked at
};

/// What turns the codes of one block into values: (table[code] − zero)·scale, and 1/127 of it for int8.
struct BlockScale {
  float scale = 1;
  float zero = 0;  ///< affine codebooks only
};

/// Codes are one big-endian bit stream a segment: the first element has the highest bits of the first byte, so 4-bit
/// codes have the first element in the high nibble, 2-bit codes are four to the byte, 3-bit codes eight to three bytes.
/// A segment is the whole matrix (flat) or one row, and starts with a byte and a block of its own.
struct BlockLayout {
  Index rows = 0, cols = 0;
  Index block_size = 64;
  Blocking blocking = Blocking::flat;
  int bits = 4;

  /// **Throws** ShapeError on negative or unaddressable sizes, ArgumentError on a block size that is not a power of two
  /// in [32, 4096] or bits outside [1, 8].
  static BlockLayout of(const char* where, Index rows, Index cols, Index block_size, Blocking blocking, int bits) {
    if (rows < 0 || cols < 0)
      throw ShapeError(detail::text(where, ": sizes must not be negative, got ", detail::shape_text(rows, cols)));
    if (cols > 0 && rows > (Index(1) << 60) / cols)
      throw ShapeError(detail::text(where, ": ", detail::shape_text(rows, cols), " elements cannot be addressed"));
    if (bits < 1 || bits > 8) throw ArgumentError(detail::text(where, ": bits must lie in [1, 8], got ", bits));
    if (blocking != Blocking::flat && blocking != Blocking::restart_rows && blocking != Blocking::row)
      throw ArgumentError(detail::text(where, ": blocking has no value ", int(blocking)));
    if (blocking == Blocking::row) {
      block_size = std::max<Index>(cols, 1);
    } else if (block_size < 32 || block_size > 4096 || (block_size & (block_size - 1)) != 0) {
      throw ArgumentError(detail::text(where, ": block_size must be a power of two in [32, 4096], got ", block_size));
    }
    return {rows, cols, block_size, blocking, bits};
  }

  [[nodiscard]] Index segments() const { return blocking == Blocking::flat ? (rows * cols > 0 ? 1 : 0) : rows; }
  [[nodiscard]] Index segment_length() const { return blocking == Blocking::flat ? rows * cols : cols; }
  [[nodiscard]] Index blocks_per_segment() const { return (segment_length() + block_size - 1) / block_size; }
  [[nodiscard]] Index bytes_per_segment() const { return bytes(segment_length()); }
  [[nodiscard]] Index block_count() const { return segments() * blocks_per_segment(); }
  [[nodiscard]] Index code_bytes() const { return segments() * bytes_per_segment(); }
  /// Bytes that n codes take from a byte boundary on.
  [[nodiscard]] Index bytes(Index n) const { return (n / 8) * bits + (n % 8 * bits + 7) / 8; }

  /// A block: which elements, and the byte its codes start with (blocks of 32 and more elements start with a byte).
  struct Block {
    Index segment, first, length, byte;
  };
  [[nodiscard]] Block block(Index b) const {
    const Index per = blocks_per_segment(), segment = b / per, first = b % per * block_size;
    return {segment, first, std::min(block_size, segment_length() - first),
            segment * bytes_per_segment() + bytes(first)};
  }
  /// Row and column of element `first + i` of a segment.
  [[nodiscard]] Index row_of(Index segment, Index element) const {
    return blocking == Blocking::flat ? element / cols : segment;
  }
  [[nodiscard]] Index col_of(Index element) const { return blocking == Blocking::flat ? element % cols : element; }
  /// The block of element (row, col).
  [[nodiscard]] Index block_of(Index row, Index col) const {
    if (blocking == Blocking::flat) return (row * cols + col) / block_size;
    return row * blocks_per_segment() + col / block_size;
  }
  /// Whether every row starts with a block, hence with a byte.
  [[nodiscard]] bool rows_start_blocks() const { return blocking != Blocking::flat || cols % block_size == 0; }
};

}  // namespace lowrank

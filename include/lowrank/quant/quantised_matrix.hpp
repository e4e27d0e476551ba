// SPDX-License-Identifier: Apache-2.0
// QuantisedMatrix: a frozen weight kept as codes and scales, usable as the base of a layer without ever being widened.
#pragma once

#include <type_traits>

#include "lowrank/linalg/base.hpp"
#include "lowrank/quant/block_quantiser.hpp"
#include "lowrank/quant/quantised_products.hpp"

namespace lowrank {

/// A frozen weight W, out×in, of codes and scales (see QuantisedArrays), used in T. Satisfies PackableBase, and
/// RowReadable: it goes under LoraLinear, DoraLinear and LoraEmbedding.
///
/// **Shapes** W out×in; X tokens×in, Y and G tokens×out, dX tokens×in, in any order.
/// **Cost** products with up to four tokens decode in registers, larger ones decode one panel at a time into the packed
/// product.
/// **Numerics** values are formed in float and widened to T; products are those with the values dequantise() returns,
/// up to rounding in T; the same bits for any number of threads.
/// **Source** Dettmers et al., QLoRA, arXiv 2305.14314; layout of codes and scales as bitsandbytes documents it.
template <Real T>
class QuantisedMatrix : public QuantisedArrays {
 public:
  using scalar = T;

  QuantisedMatrix() = default;

  /// From arrays somebody else made. `options.double_quantise` is taken from the parts.
  /// **Throws** ShapeError when an array has the wrong length, before anything is allocated; ArgumentError for a bad
  /// block size, a negative scale, both or neither kind of scales; NonFiniteError for scales that are not finite. Any
  /// code bytes are well-defined.
  QuantisedMatrix(Index rows, Index cols, QuantiseOptions options, const QuantisedParts& parts)
      : QuantisedArrays("QuantisedMatrix", rows, cols, std::move(options), parts) {}

  /// Zeros of a shape, to be assigned to. **Throws** as the constructor from parts.
  [[nodiscard, gnu::cold]] static QuantisedMatrix zero(Index rows, Index cols, QuantiseOptions options = {}) {
    return QuantisedMatrix(QuantisedArrays::zero("QuantisedMatrix::zero", rows, cols, std::move(options)));
  }

  // ---- values
  // --------------------------------------------------------------------------------------------------------
  /// Element (i, j). **Throws** ShapeError outside the matrix.
  [[nodiscard]] T operator()(Index i, Index j) const {
    if (i < 0 || i >= rows() || j < 0 || j >= cols()) [[unlikely]]
      throw ShapeError(
          detail::text("QuantisedMatrix: no element (", i, ", ", j, ") in ", detail::shape_text(rows(), cols())));
    float value;
    decode_row(i, j, 1, &value);
    return T(value);
  }
  /// The whole matrix, widened. **Cost** memory speed.
  [[nodiscard]] Matrix<T> dequantise() const {
    Matrix<T> m;
    m.resize(rows(), cols());
    dequantise(m.view());
    return m;
  }
  /// The same into memory of the caller's, in any order. **Throws** ShapeError.
  void dequantise(MatrixView<T> out) const {
    detail::expect_shape("QuantisedMatrix::dequantise", "the output", out.rows(), out.cols(), rows(), cols());
    if (cols() == 0) return;
    const Index grain = std::max<Index>(1, 65536 / cols());
    parallel_ranges(rows(), grain, [&](Index i0, Index i1) {
      for (Index i = i0; i < i1; ++i) write_row(i, out.row(i));
    });
  }
  /// Row i of W: the embedding of token i. **Throws** ShapeError when i is no row or `out` not `cols()` long.
  void row(Index i, std::span<T> out) const {
    check_row(i);
    detail::expect_shape("QuantisedMatrix::row", "the output", Index(1), Index(out.size()), Index(1), cols());
    write_row(i, MatrixView<T>(out.data(), 1, cols(), std::max<Index>(1, cols()), 1));
  }
  /// Row i into cols() scalars at `out`, unchecked: how an embedding and DoRA read a base (RowReadable).
  void copy_row(Index i, T* out) const { decode_row(i, 0, cols(), out); }
  /// Rows ids[0], ids[1], … of W as the rows of `out`, ids.size()×cols. **Throws** ShapeError.
  void lookup(std::span<const Index> ids, MatrixView<T> out) const {
    detail::expect_shape("QuantisedMatrix::lookup", "the output", out.rows(), out.cols(), Index(ids.size()), cols());
    for (const Index i : ids) check_row(i);
    for (Index k = 0; k < Index(ids.size()); ++k) write_row(ids[std::size_t(k)], out.row(k));
  }

  // ---- products
  // ------------------------------------------------------------------------------------------------------
  /// Y = X·Wᵀ or Y += X·Wᵀ. **Throws** ShapeError; ArgumentError when Y overlaps X.
  void forward(MatrixView<const T> X, MatrixView<T> Y, Update update = Update::assign) const {
    detail::expect_shape("QuantisedMatrix::forward", "X", X.rows(), X.cols(), Y.rows(), cols());
    detail::expect_shape("QuantisedMatrix::forward", "Y", Y.rows(), Y.cols(), X.rows(), rows());
    if (detail::overlap(X, Y)) throw ArgumentError("QuantisedMatrix::forward: Y must not overlap X");
    detail::quantised_forward<T>(X, *this, Y, update);
  }
  /// dX = G·W or dX += G·W. **Throws** ShapeError; ArgumentError when dX overlaps G.
  void backward(MatrixView<const T> G, MatrixView<T> dX, Update update = Update::assign) const {
    detail::expect_shape("QuantisedMatrix::backward", "G", G.rows(), G.cols(), dX.rows(), rows());
    detail::expect_shape("QuantisedMatrix::backward", "dX", dX.rows(), dX.cols(), G.rows(), cols());
    if (detail::overlap(G, dX)) throw ArgumentError("QuantisedMatrix::backward: dX must not overlap G");
    detail::quantised_backward<T>(G, *this, dX, update);
  }
  /// W and Wᵀ for the packed product; see PackableBase.
  [[nodiscard]] auto panels() const { return detail::QuantisedSource<T, false>{this}; }
  [[nodiscard]] auto panels_transposed() const { return detail::QuantisedSource<T, true>{this}; }

  /// Replaces the contents by W quantised with the same options; W has the same shape. Reuses the memory there is.
  /// **Throws** ShapeError, NonFiniteError as quantise; the contents are unspecified after a throw.
  template <class S>
  void assign(MatrixView<S> W) {
    detail::expect_shape("QuantisedMatrix::assign", "W", W.rows(), W.cols(), rows(), cols());
    detail::BlockQuantiser<std::remove_const_t<S>>(*this, W).run();
  }

 private:
  explicit QuantisedMatrix(QuantisedArrays arrays) : QuantisedArrays(std::move(arrays)) {}

  [[gnu::noinline]] void write_row(Index i, MatrixView<T> out) const {
    if constexpr (std::same_as<T, float>)
      if (out.col_stride() == 1) return decode_row(i, 0, cols(), out.data());
    T values[512];
    for (Index j = 0; j < cols(); j += 512) {
      const Index m = std::min<Index>(512, cols() - j);
      decode_row(i, j, m, values);
      for (Index k = 0; k < m; ++k) out(0, j + k) = values[k];
    }
  }
  void check_row(Index i) const {
    if (i < 0 || i >= rows()) [[unlikely]]
      throw ShapeError(detail::text("QuantisedMatrix: no row ", i, " in ", detail::shape_text(rows(), cols())));
  }
};

}  // namespace lowrank

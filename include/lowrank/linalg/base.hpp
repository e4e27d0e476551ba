// SPDX-License-Identifier: Apache-2.0
// What a frozen weight must be able to do, and the plain case: a dense matrix in f32, f64, bf16 or f16.
#pragma once

#include <utility>

#include "lowrank/linalg/gemm.hpp"

namespace lowrank {

/// A frozen weight W, out×in, that a layer stands on. It has no gradient: it is frozen by type.
///
/// - `rows()` = out, `cols()` = in.
/// - `forward(X, Y, update)`: Y = X·Wᵀ, or Y += X·Wᵀ. X tokens×in, Y tokens×out.
/// - `backward(G, dX, update)`: dX = G·W, or dX += G·W. G tokens×out, dX tokens×in.
///
/// The layers check sizes and overlap before they call it, so that a base need not.
/// Dense storage (DenseBase), block-quantised storage (QuantisedMatrix) and a user's own kernel all fit.
template <class B, class T>
concept FrozenBase = Real<T> && requires(const B& b, MatrixView<const T> in, MatrixView<T> out, Update update) {
  { b.rows() } -> std::convertible_to<Index>;
  { b.cols() } -> std::convertible_to<Index>;
  b.forward(in, out, update);
  b.backward(in, out, update);
};

/// A frozen base whose elements our packed product can read panel by panel. A layer on it adds the low-rank term inside
/// the big product instead of passing over Y once more. `panels()` gives W (rows = out, depth = in),
/// `panels_transposed()` gives Wᵀ (rows = in, depth = out); both are detail::PanelSource.
template <class B, class T>
concept PackableBase = FrozenBase<B, T> && requires(const B& b) {
  { b.panels() } -> detail::PanelSource<T>;
  { b.panels_transposed() } -> detail::PanelSource<T>;
};

namespace detail {

/// What every product with a weight asks of its operands, before it writes: `in` tokens×depth, `out` tokens×width, and
/// the two apart. **Throws** ShapeError, ArgumentError.
template <class T>
void expect_operands(const char* where, const char* in_name, std::type_identity_t<MatrixView<const T>> in, Index depth,
                     const char* out_name, MatrixView<T> out, Index width) {
  expect_shape(where, in_name, in.rows(), in.cols(), in.rows(), depth);
  expect_shape(where, out_name, out.rows(), out.cols(), in.rows(), width);
  expect_apart(where, out_name, out, in_name, in);
}

/// Throws ArgumentError when an output lies in the memory of a dense base; what other bases hold is theirs to know.
template <class Base, class T>
void expect_apart_from_base(const char* where, const char* name, const MatrixView<T>& out, const Base& base) {
  if constexpr (requires { overlap(out, base.weight()); }) expect_apart(where, name, out, "W", base.weight());
}

}  // namespace detail

/// A dense frozen weight: a view of the caller's matrix, or a matrix it owns. Stored as S, used as T.
///
/// bf16 and f16 are widened in registers or in the packing of a product; W is never copied whole.
/// **Shapes** W out×in in any order. **Cost** forward and backward 2·tokens·out·in flops each.
template <Real T, class S = T>
requires StorageOf<S, T>
class DenseBase {
 public:
  using scalar = T;
  using storage = S;

  DenseBase() = default;
  /// Looks at the caller's matrix, which must outlive this object.
  explicit DenseBase(MatrixView<const S> w) : view_(w) {}
  /// Takes the matrix over.
  explicit DenseBase(Matrix<S>&& w) : owned_(std::move(w)), view_(owned_.view()) {}
  DenseBase(DenseBase&&) noexcept = default;
  DenseBase& operator=(DenseBase&&) noexcept = default;

  [[nodiscard]] Index rows() const noexcept { return view_.rows(); }
  [[nodiscard]] Index cols() const noexcept { return view_.cols(); }
  [[nodiscard]] MatrixView<const S> weight() const noexcept { return view_; }

  /// Y = X·Wᵀ or Y += X·Wᵀ. **Throws** ShapeError on sizes that disagree, ArgumentError when Y overlaps X or W; nothing
  /// is written then.
  void forward(MatrixView<const T> X, MatrixView<T> Y, Update update = Update::assign) const {
    detail::expect_operands<T>("DenseBase::forward", "X", X, cols(), "Y", Y, rows());
    detail::expect_apart("DenseBase::forward", "Y", Y, "W", view_);
    detail::product<T, T, S>(T(1), X, view_, update == Update::accumulate, Y);
  }
  /// dX = G·W or dX += G·W. **Throws** ShapeError on sizes that disagree, ArgumentError when dX overlaps G or W;
  /// nothing is written then.
  void backward(MatrixView<const T> G, MatrixView<T> dX, Update update = Update::assign) const {
    detail::expect_operands<T>("DenseBase::backward", "G", G, rows(), "dX", dX, cols());
    detail::expect_apart("DenseBase::backward", "dX", dX, "W", view_);
    detail::product<T, T, S>(T(1), G, view_.transposed(), update == Update::accumulate, dX);
  }
  /// Row i, widened, into cols() scalars at `out`: what an embedding reads.
  void copy_row(Index i, T* out) const {
    for (Index j = 0; j < cols(); ++j) out[j] = T(view_(i, j));
  }
  [[nodiscard]] auto panels() const { return detail::DenseSource<T, S>{view_}; }
  [[nodiscard]] auto panels_transposed() const { return detail::DenseSource<T, S>{view_.transposed()}; }

 private:
  Matrix<S> owned_;
  MatrixView<const S> view_;
};

}  // namespace lowrank

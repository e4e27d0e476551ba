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
/// Dense storage (DenseBase), block-quantised storage (QuantizedMatrix) and a user's own kernel all fit.
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

  void forward(MatrixView<const T> X, MatrixView<T> Y, Update update = Update::assign) const {
    detail::expect_shape("DenseBase::forward", "X", X.rows(), X.cols(), Y.rows(), cols());
    detail::expect_shape("DenseBase::forward", "Y", Y.rows(), Y.cols(), X.rows(), rows());
    detail::product<T, T, S>(T(1), X, view_, update == Update::accumulate, Y);
  }
  void backward(MatrixView<const T> G, MatrixView<T> dX, Update update = Update::assign) const {
    detail::expect_shape("DenseBase::backward", "G", G.rows(), G.cols(), dX.rows(), rows());
    detail::expect_shape("DenseBase::backward", "dX", dX.rows(), dX.cols(), G.rows(), cols());
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

// SPDX-License-Identifier: Apache-2.0
// Embedding tables, frozen with a low-rank update or trained in full: rows looked up by token id.
#pragma once

#include <cstdint>
#include <span>

#include "lowrank/adapter/factor_parameters.hpp"
#include "lowrank/adapter/layer.hpp"

namespace lowrank {

namespace detail {

inline void check_ids(const char* where, std::span<const std::int32_t> ids, Index vocab) {
  for (std::size_t t = 0; t < ids.size(); ++t)
    if (ids[t] < 0 || ids[t] >= vocab) [[unlikely]]
      throw ArgumentError(text(where, ": token id must lie in [0, ", vocab, "), got ", ids[t], " at position ", t));
}

}  // namespace detail

/// A frozen table whose rows can be read: `copy_row(i, out)` writes the cols() scalars of row i.
template <class B, class T>
concept RowReadable = requires(const B& b, Index i, T* out) {
  { b.rows() } -> std::convertible_to<Index>;
  { b.cols() } -> std::convertible_to<Index>;
  b.copy_row(i, out);
};

/// y_t = E[id_t] + s·B·A[:, id_t] with the table E (vocab×dim) frozen.
///
/// **Shapes** as PEFT stores them: "lora_embedding_A" r×vocab (zeros at the start), "lora_embedding_B" dim×r; Y
/// tokens×dim.
/// **Cost** 2·tokens·dim·r flops and a row copy a token; the gradient of A touches only the columns of tokens seen
/// (and is cleared first when assigned). **Source** PEFT's Embedding layer; Hu et al., arXiv 2106.09685.
template <Real T, class Base = DenseBase<T>>
requires RowReadable<Base, T>
class LoraEmbedding : public FactorParameters<T> {
 public:
  using typename FactorParameters<T>::scalar;
  using FactorParameters<T>::A, FactorParameters<T>::B, FactorParameters<T>::rank;

  /// `factors` of the *transposed* table: A r×vocab, B dim×r. **Throws** ShapeError, ArgumentError as LoraLinear.
  LoraEmbedding(Base table, const LoraFactors<T>& factors)
      : FactorParameters<T>("LoraEmbedding", factors, table.cols(), table.rows(), "lora_embedding_A",
                            "lora_embedding_B"),
        base_(std::move(table)) {}

  [[nodiscard]] Index vocabulary() const noexcept { return base_.rows(); }
  [[nodiscard]] Index dimension() const noexcept { return base_.cols(); }
  [[nodiscard]] const Base& base() const noexcept { return base_; }

  /// Rows for the ids. **Throws** ArgumentError for an id outside the vocabulary or when Y overlaps a dense table,
  /// ShapeError unless Y is tokens×dim; nothing is written then.
  template <MatrixOf<T> Y>
  void forward(std::span<const std::int32_t> ids, Y&& y, LoraWorkspace<T>& ws) const {
    const MatrixView<T> yv = view_of(y);
    const Index tokens = Index(ids.size());
    detail::expect_not_moved_from("LoraEmbedding::forward", parameters_);
    detail::expect_shape("LoraEmbedding::forward", "Y", yv.rows(), yv.cols(), tokens, dimension());
    detail::check_ids("LoraEmbedding::forward", ids, vocabulary());
    detail::expect_apart_from_base("LoraEmbedding::forward", "Y", yv, base_);
    ws.layer = parameters_.identity();
    ws.tokens = tokens;
    ws.masked = false;
    ws.reduced.resize(tokens, rank());
    ws.U.resize(1, dimension());
    const MatrixView<const T> a = A();
    for (Index t = 0; t < tokens; ++t) {
      const Index id = ids[std::size_t(t)];
      base_.copy_row(id, ws.U.data());
      for (Index j = 0; j < dimension(); ++j) yv(t, j) = ws.U(0, j);
      for (Index k = 0; k < rank(); ++k) ws.reduced(t, k) = scale_ * a(k, id);
    }
    detail::product<T, T, T>(T(1), MatrixView<const T>(ws.reduced.view()), B(), true, yv);
  }

  /// dB = Gᵀ·T and dA[:, id_t] += s·Bᵀ·g_t, for the forward pass kept in `ws`. **Throws** ShapeError unless G is
  /// tokens×dim, ArgumentError for an id outside the vocabulary or without a matching forward; nothing is written then.
  template <MatrixOf<const T> G>
  void backward(std::span<const std::int32_t> ids, G&& g, LoraWorkspace<T>& ws, Update gradients = Update::accumulate) {
    const MatrixView<const T> gv = view_of(g);
    const Index tokens = Index(ids.size());
    detail::expect_shape("LoraEmbedding::backward", "G", gv.rows(), gv.cols(), tokens, dimension());
    detail::check_ids("LoraEmbedding::backward", ids, vocabulary());
    detail::expect_own_pass("LoraEmbedding::backward", ws, parameters_, vocabulary(), dimension(), rank());
    if (ws.tokens != tokens || ws.reduced.cols() != rank())
      throw ArgumentError(detail::text("LoraEmbedding::backward: the workspace must hold the forward pass of these ",
                                       tokens, " tokens, it holds ",
                                       ws.tokens < 0 ? "none" : detail::to_text(ws.tokens)));
    const MatrixView<T> dA = parameters_.gradient(0), dB = parameters_.gradient(1);
    const MatrixView<const T> kept = ws.reduced.view();
    ws.U.resize(tokens, rank());
    detail::product<T, T, T>(scale_, gv, MatrixView<const T>(B()).transposed(), false, ws.U.view());
    detail::product<T, T, T>(T(1), gv.transposed(), kept.transposed(), gradients == Update::accumulate, dB);
    if (gradients == Update::assign) std::fill(dA.data(), dA.data() + dA.size(), T(0));
    for (Index t = 0; t < tokens; ++t)
      for (Index k = 0; k < rank(); ++k) dA(k, ids[std::size_t(t)]) += ws.U(t, k);
  }

 private:
  using FactorParameters<T>::parameters_, FactorParameters<T>::scale_;

  Base base_;
};

/// y_t = E[id_t] with the table trained ("weight", vocab×dim).
template <Real T>
class FullEmbedding {
 public:
  using scalar = T;

  /// Starts from the table, vocab×dim, copied.
  template <MatrixLike W>
  explicit FullEmbedding(W&& table) : parameters_({{"weight", view_of(table).rows(), view_of(table).cols()}}) {
    const auto source = view_of(table);
    for (Index i = 0; i < source.rows(); ++i)
      for (Index j = 0; j < source.cols(); ++j) weight()(i, j) = T(source(i, j));
  }

  [[nodiscard]] Index vocabulary() const noexcept { return weight().rows(); }
  [[nodiscard]] Index dimension() const noexcept { return weight().cols(); }
  [[nodiscard]] MatrixView<T> weight() noexcept { return parameters_.value(0); }
  [[nodiscard]] MatrixView<const T> weight() const noexcept { return parameters_.value(0); }
  [[nodiscard]] Parameters<T>& parameters() noexcept { return parameters_; }
  [[nodiscard]] const Parameters<T>& parameters() const noexcept { return parameters_; }

  /// Rows for the ids; the workspace is not used. **Throws** ArgumentError for an id outside the vocabulary or when Y
  /// overlaps the table, ShapeError unless Y is tokens×dim; nothing is written then.
  template <MatrixOf<T> Y>
  void forward(std::span<const std::int32_t> ids, Y&& y, LoraWorkspace<T>& /*ws*/) const {
    const MatrixView<T> yv = view_of(y);
    detail::expect_shape("FullEmbedding::forward", "Y", yv.rows(), yv.cols(), Index(ids.size()), dimension());
    detail::check_ids("FullEmbedding::forward", ids, vocabulary());
    detail::expect_apart("FullEmbedding::forward", "Y", yv, "the table", weight());
    for (Index t = 0; t < yv.rows(); ++t)
      for (Index j = 0; j < dimension(); ++j) yv(t, j) = weight()(ids[std::size_t(t)], j);
  }
  /// dE[id_t, :] += g_t (the gradient is cleared first when assigned). **Throws** ShapeError unless G is tokens×dim,
  /// ArgumentError for an id outside the vocabulary; nothing is written then.
  template <MatrixOf<const T> G>
  void backward(std::span<const std::int32_t> ids, G&& g, LoraWorkspace<T>& /*ws*/,
                Update gradients = Update::accumulate) {
    const MatrixView<const T> gv = view_of(g);
    detail::expect_shape("FullEmbedding::backward", "G", gv.rows(), gv.cols(), Index(ids.size()), dimension());
    detail::check_ids("FullEmbedding::backward", ids, vocabulary());
    const MatrixView<T> d = parameters_.gradient(0);
    if (gradients == Update::assign) std::fill(d.data(), d.data() + d.size(), T(0));
    for (Index t = 0; t < gv.rows(); ++t)
      for (Index j = 0; j < dimension(); ++j) d(ids[std::size_t(t)], j) += gv(t, j);
  }

 private:
  Parameters<T> parameters_;
};

}  // namespace lowrank

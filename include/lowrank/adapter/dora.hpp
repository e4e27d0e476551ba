// SPDX-License-Identifier: Apache-2.0
// DoRA: the weight's rows split into magnitude, trained directly, and direction, adapted by s·B·A.
//
// W out×in (frozen), A r×in, B out×r, m out. n_j = ‖(W + s·B·A)_j‖ (row norms).
//   Z = X·Wᵀ + s·(X̃·Aᵀ)·Bᵀ,  Y = Z·diag(m/n) (+ b)
//   dm_j = Σ_t G_tj·Z_tj / n_j,  and A, B, X get LoRA's gradients of G·diag(m/n); n is held constant, as in the paper.
#pragma once

#include <limits>

#include "lowrank/adapter/embedding.hpp"
#include "lowrank/adapter/lora.hpp"

namespace lowrank {

namespace detail {

/// ‖w_i‖² of every row of a frozen base, in double.
template <class T, RowReadable<T> Base>
std::vector<double> row_norms_squared(const Base& base) {
  std::vector<double> squares(std::size_t(base.rows()), 0.0);
  Buffer<T> row(base.cols());
  for (Index i = 0; i < base.rows(); ++i) {
    base.copy_row(i, row.data());
    for (const T w : row) squares[std::size_t(i)] += double(w) * double(w);
  }
  return squares;
}

}  // namespace detail

/// What DoraLinear keeps between forward and backward; see LoraWorkspace.
template <Real T>
struct DoraWorkspace {
  LoraWorkspace<T> lora;
  Matrix<T> Z;          ///< output before the magnitudes, tokens×out
  Matrix<T> scaled;     ///< G·diag(m/n), tokens×out
  Matrix<T> projected;  ///< A·Wᵀ, r×out, of the row norms
};

/// Y = (X·Wᵀ + s·(X·Aᵀ)·Bᵀ)·diag(m/‖W + s·B·A‖_row) (+ b), with A, B and the magnitudes m trained.
///
/// Parameters "lora_A" r×in, "lora_B" out×r, "lora_magnitude_vector" 1×out. m starts as the row norms of W + s·B·A, so
/// that the layer starts as LoraLinear would. Row norms come from ‖w_i‖² + 2s·(W·Aᵀ)_i·B_i + s²·B_i·(A·Aᵀ)·B_iᵀ: the
/// dense W + s·B·A is never formed.
/// **Cost** LoraLinear's plus 2·out·in·r flops for the norms and two passes over tokens×out. **Throws** as LoraLinear;
/// ArgumentError for `train_bias`, ShapeError for a magnitude of another length.
/// **Source** Liu et al., "DoRA", arXiv 2402.09353, eq. 5 and §4.3 (the norm as a constant).
template <Real T, class Base = DenseBase<T>>
requires FrozenBase<Base, T> && RowReadable<Base, T>
class DoraLinear : public FactorParameters<T> {
 public:
  using typename FactorParameters<T>::scalar;
  using FactorParameters<T>::A, FactorParameters<T>::B, FactorParameters<T>::rank;

  /// `magnitude`: m, of out elements; empty starts from the row norms of W + s·B·A.
  DoraLinear(Base base, const LoraFactors<T>& factors, const LoraLinearOptions& options = {},
             std::vector<T> magnitude = {}, std::vector<T> bias = {})
      : FactorParameters<T>("DoraLinear", factors, base.rows(), base.cols(), "lora_A", "lora_B",
                            {{"lora_magnitude_vector", 1, Index(base.rows())}}),
        base_(std::move(base)),
        options_(options),
        bias_(detail::checked_bias("DoraLinear", std::move(bias), base_.rows())),
        base_squares_(detail::row_norms_squared<T>(base_)),
        norms_(base_squares_.size()) {
    detail::checked_dropout("DoraLinear", options.dropout);
    if (options.train_bias) throw ArgumentError("DoraLinear: a trained bias is not supported, got train_bias = true");
    if (!magnitude.empty() && Index(magnitude.size()) != out_features())
      throw ShapeError(
          detail::text("DoraLinear: the magnitude must have ", out_features(), " elements, got ", magnitude.size()));
    Matrix<T> projected;
    update_norms(projected);
    for (Index j = 0; j < out_features(); ++j)
      this->magnitude()(0, j) = magnitude.empty() ? T(norms_[std::size_t(j)]) : magnitude[std::size_t(j)];
  }

  [[nodiscard]] Index in_features() const noexcept { return base_.cols(); }
  [[nodiscard]] Index out_features() const noexcept { return base_.rows(); }
  [[nodiscard]] const Base& base() const noexcept { return base_; }
  [[nodiscard]] MatrixView<T> magnitude() noexcept { return parameters_.value(2); }
  [[nodiscard]] MatrixView<const T> magnitude() const noexcept { return parameters_.value(2); }

  /// Y from X. In training the row norms follow A and B; in Phase::eval they are the last ones computed, so that
  /// decoding pays nothing for them (call it once in training phase, or update_norms, after changing A or B by hand).
  /// **Throws** ShapeError on sizes that disagree, ArgumentError when Y overlaps X or a dense W; nothing is written
  /// then.
  template <MatrixOf<const T> X, MatrixOf<T> Y>
  void forward(X&& x, Y&& y, DoraWorkspace<T>& ws, Phase phase = Phase::train) {
    const MatrixView<const T> xv = view_of(x);
    const MatrixView<T> yv = view_of(y);
    detail::expect_operands<T>("DoraLinear::forward", "X", xv, in_features(), "Y", yv, out_features());
    detail::expect_apart_from_base("DoraLinear::forward", "Y", yv, base_);
    const bool drops = phase == Phase::train && options_.dropout > 0;
    if (drops) detail::begin_dropping(ws.lora, workspaces_);
    if (phase == Phase::train) update_norms(ws.projected);
    ws.Z.resize(xv.rows(), out_features());
    lora_forward<T>(base_, A(), B(), scale_, xv, ws.Z.view(), ws.lora, mask(drops, ws));
    for (Index t = 0; t < yv.rows(); ++t)
      for (Index j = 0; j < yv.cols(); ++j)
        yv(t, j) = ws.Z(t, j) * ratio(j) + (bias_.empty() ? T(0) : bias_[std::size_t(j)]);
  }
  /// Gradients of A, B and m for the forward pass kept in `ws`, and dX, which may be X's own memory. **Throws**
  /// ShapeError on sizes that disagree, ArgumentError without a matching forward or when dX overlaps G or a dense W;
  /// nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<const T> G, MatrixOf<T> DX>
  void backward(X&& x, G&& g, DoraWorkspace<T>& ws, DX&& dx, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), ws, MatrixView<T>(view_of(dx)), options);
  }
  /// The same without dX, for the first layer of a model.
  template <MatrixOf<const T> X, MatrixOf<const T> G>
  void backward(X&& x, G&& g, DoraWorkspace<T>& ws, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), ws, std::nullopt, options);
  }

  /// n_j from the present A and B; `projected` is scratch for A·Wᵀ. **Cost** 2·r·out·in + out·r² multiply-adds.
  void update_norms(Matrix<T>& projected) {
    const Index r = rank();
    projected.resize(r, out_features());
    base_.forward(A(), projected.view(), Update::assign);
    gram_.resize(r, r);
    for (Index k = 0; k < r; ++k)
      for (Index l = 0; l <= k; ++l) {
        double sum = 0;
        for (Index i = 0; i < in_features(); ++i) sum += double(A()(k, i)) * double(A()(l, i));
        gram_(k, l) = gram_(l, k) = sum;
      }
    const double s = double(scale_);
    for (Index j = 0; j < out_features(); ++j) {
      double square = base_squares_[std::size_t(j)];
      for (Index k = 0; k < r; ++k) {
        double inner = 2 * s * double(projected(k, j));
        for (Index l = 0; l < r; ++l) inner += s * s * gram_(k, l) * double(B()(j, l));
        square += inner * double(B()(j, k));
      }
      // The terms cancel when W + s·B·A nearly vanishes; what is left below rounding is no direction to divide by.
      norms_[std::size_t(j)] = std::sqrt(std::max(square, std::numeric_limits<double>::min()));
    }
  }

 private:
  using FactorParameters<T>::parameters_, FactorParameters<T>::scale_;

  [[nodiscard]] T ratio(Index j) const { return T(double(magnitude()(0, j)) / norms_[std::size_t(j)]); }
  [[nodiscard]] std::optional<detail::DropoutMask> mask(bool drops, const DoraWorkspace<T>& ws) const {
    if (!drops) return std::nullopt;
    return detail::dropout_mask(options_, parameters_, ws.lora);
  }
  void backward_impl(MatrixView<const T> X, MatrixView<const T> G, DoraWorkspace<T>& ws,
                     std::optional<MatrixView<T>> dX, BackwardOptions options) {
    const std::optional<detail::DropoutMask> dropped = mask(ws.lora.masked, ws);
    detail::expect_lora_backward<T>("DoraLinear::backward", base_, rank(), X, G, ws.lora, dX, dropped.has_value());
    if (ws.Z.rows() != G.rows() || ws.Z.cols() != G.cols())
      throw ArgumentError(detail::text("DoraLinear::backward: the workspace must hold an output of ",
                                       detail::shape_text(G.rows(), G.cols()), ", it holds ",
                                       detail::shape_text(ws.Z.rows(), ws.Z.cols())));
    ws.scaled.resize(G.rows(), G.cols());
    const MatrixView<T> dm = parameters_.gradient(2);
    for (Index j = 0; j < G.cols(); ++j) {
      double sum = 0;
      for (Index t = 0; t < G.rows(); ++t) sum += double(G(t, j)) * double(ws.Z(t, j));
      sum /= norms_[std::size_t(j)];
      dm(0, j) = options.gradients == Update::accumulate ? T(double(dm(0, j)) + sum) : T(sum);
    }
    for (Index t = 0; t < G.rows(); ++t)
      for (Index j = 0; j < G.cols(); ++j) ws.scaled(t, j) = G(t, j) * ratio(j);
    lora_backward<T>(base_, A(), B(), scale_, X, ws.scaled.view(), ws.lora, parameters_.gradient(0),
                     parameters_.gradient(1), dX, options, dropped);
  }

  Base base_;
  LoraLinearOptions options_;
  std::vector<T> bias_;
  std::vector<double> base_squares_, norms_;
  Matrix<double> gram_;
  detail::Numbering workspaces_;
};

}  // namespace lowrank

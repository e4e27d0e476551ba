// SPDX-License-Identifier: Apache-2.0
// LoraLinear: a frozen weight with a trainable low-rank update, as a layer for any training loop.
#pragma once

#include <vector>

#include "lowrank/adapter/factor_parameters.hpp"
#include "lowrank/adapter/lora_functions.hpp"

namespace lowrank {

/// What a LoraLinear does besides the formula.
struct LoraLinearOptions {
  double dropout = 0;       ///< probability in [0, 1), resolved to 2⁻¹⁶, with which training drops an input of A
  std::uint64_t seed = 0;   ///< of the dropout masks, which also depend on the layer's name in a FlatParameters
  bool train_bias = false;  ///< whether the bias is a parameter too (PEFT's bias="lora_only")
};

namespace detail {

/// Begins a training forward that drops: the workspace gets its number, unless it has one, and counts the pass.
template <class T>
void begin_dropping(LoraWorkspace<T>& ws, Numbering& workspaces) noexcept {
  if (ws.stream < 0) ws.stream = workspaces.next();
  ++ws.call;
}

/// The mask of the workspace's present pass.
template <class T>
DropoutMask dropout_mask(const LoraLinearOptions& options, const Parameters<T>& parameters,
                         const LoraWorkspace<T>& ws) {
  return DropoutMask(options.dropout, dropout_seed(options.seed, parameters.name(), ws.stream), ws.call);
}

}  // namespace detail

/// Y = X·Wᵀ (+ b) + s·(X·Aᵀ)·Bᵀ with W frozen and A, B trainable.
///
/// Owns its parameters ("lora_A" r×in, "lora_B" out×r, and "bias" 1×out when trained) in one flat block; takes
/// activations and gradients in whatever the caller's loop has. One layer may be used by several forward passes at a
/// time, each with its own workspace.
///
///     LoraLinear<float> layer(DenseBase<float>(view_of(W)),
///                             kaiming<float>(out, in, {.rank = 16, .alpha = 32}).factors);
///     LoraWorkspace<float> ws;
///     layer.forward(X, Y, ws);            // Y tokens×out
///     layer.backward(X, G, ws, dX);       // adds to layer.parameters().gradients()
///
/// **Shapes** X tokens×in, Y and G tokens×out, dX tokens×in; a column-major in×tokens matrix passed as its transpose
/// has the same bytes. **Cost** forward 2·tokens·(out·in + r(out + in)), backward the same plus 2·tokens·r(out + in)
/// flops; no allocation once the workspace has seen the largest batch. **Source** Hu et al., arXiv 2106.09685.
template <Real T, class Base = DenseBase<T>>
requires FrozenBase<Base, T>
class LoraLinear : public FactorParameters<T>, public detail::EvaluateOrCastToMatrixOf<T> {
 public:
  using typename FactorParameters<T>::scalar;
  using FactorParameters<T>::A, FactorParameters<T>::B, FactorParameters<T>::rank;
  using detail::EvaluateOrCastToMatrixOf<T>::forward, detail::EvaluateOrCastToMatrixOf<T>::backward;

  /// **Throws** ShapeError when factors or bias do not fit the base; ArgumentError for rank 0 or above min(out, in), a
  /// scale that is not finite, dropout outside [0, 1) or rounding to none or all.
  LoraLinear(Base base, const LoraFactors<T>& factors, const LoraLinearOptions& options = {}, std::vector<T> bias = {})
      : FactorParameters<T>("LoraLinear", factors, base.rows(), base.cols(), "lora_A", "lora_B",
                            bias_entry(options.train_bias, base.rows())),
        base_(std::move(base)),
        options_(options),
        bias_(detail::checked_bias("LoraLinear", std::move(bias), base_.rows())) {
    detail::checked_dropout("LoraLinear", options.dropout);
    if (options.train_bias) {
      const MatrixView<T> b = parameters_.value(2);
      for (std::size_t j = 0; j < bias_.size(); ++j) b(0, Index(j)) = bias_[j];
    }
  }

  [[nodiscard]] Index in_features() const noexcept { return base_.cols(); }
  [[nodiscard]] Index out_features() const noexcept { return base_.rows(); }
  [[nodiscard]] const Base& base() const noexcept { return base_; }
  /// Bias as it is now, empty when the layer has none.
  [[nodiscard]] std::span<const T> bias() const noexcept {
    const MatrixView<const T> trained = parameters_.value(2);
    return options_.train_bias ? std::span<const T>(trained.data(), std::size_t(trained.cols()))
                               : std::span<const T>(bias_);
  }

  /// Y from X; keeps what backward needs in `ws`. In Phase::train a positive dropout acts on the low-rank path's input.
  /// **Throws** ShapeError on sizes that disagree, ArgumentError when Y overlaps X or a dense W; nothing is written
  /// then.
  template <MatrixOf<const T> X, MatrixOf<T> Y>
  void forward(X&& x, Y&& y, LoraWorkspace<T>& ws, Phase phase = Phase::train) const {
    const MatrixView<const T> xv = view_of(x);
    const MatrixView<T> yv = view_of(y);
    detail::expect_not_moved_from("LoraLinear::forward", parameters_);
    detail::expect_operands<T>("LoraLinear::forward", "X", xv, in_features(), "Y", yv, out_features());
    detail::expect_apart_from_base("LoraLinear::forward", "Y", yv, base_);
    const bool drops = phase == Phase::train && options_.dropout > 0;
    if (drops) detail::begin_dropping(ws, workspaces_);
    lora_forward<T>(base_, A(), B(), scale_, xv, yv, ws, mask(drops, ws));
    ws.layer = parameters_.identity();
    if (!bias().empty()) detail::add_bias<T>(bias(), yv);
  }

  /// Gradients of A, B (and a trained bias) into parameters().gradients(), and dX, for the forward pass kept in `ws`.
  /// dX may be X's own memory. **Throws** ShapeError on sizes that disagree, ArgumentError without a matching forward
  /// of this layer or when dX overlaps G or a dense W. Nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<const T> G, MatrixOf<T> DX>
  void backward(X&& x, G&& g, LoraWorkspace<T>& ws, DX&& dx, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), ws, MatrixView<T>(view_of(dx)), options);
  }
  /// The same without dX, for the first layer of a model.
  template <MatrixOf<const T> X, MatrixOf<const T> G>
  void backward(X&& x, G&& g, LoraWorkspace<T>& ws, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), ws, std::nullopt, options);
  }

 private:
  using FactorParameters<T>::parameters_, FactorParameters<T>::scale_;

  static std::vector<ParameterInfo> bias_entry(bool train_bias, Index out) {
    if (!train_bias) return {};
    return {{"bias", 1, out}};
  }
  [[nodiscard]] std::optional<DropoutMask> mask(bool drops, const LoraWorkspace<T>& ws) const {
    if (!drops) return std::nullopt;
    return detail::dropout_mask(options_, parameters_, ws);
  }
  void backward_impl(MatrixView<const T> X, MatrixView<const T> G, LoraWorkspace<T>& ws,
                     std::optional<MatrixView<T>> dX, BackwardOptions options) {
    detail::expect_own_pass("LoraLinear::backward", ws, parameters_, out_features(), in_features(), rank());
    const std::optional<DropoutMask> dropped = mask(ws.masked, ws);
    detail::expect_lora_backward<T>("LoraLinear::backward", base_, rank(), X, G, ws, dX, dropped.has_value());
    if (options_.train_bias)
      detail::bias_gradient<T>(G, options.gradients == Update::accumulate, parameters_.gradient(2));
    lora_backward<T>(base_, A(), B(), scale_, X, G, ws, parameters_.gradient(0), parameters_.gradient(1), dX, options,
                     dropped);
  }

  Base base_;
  LoraLinearOptions options_;
  std::vector<T> bias_;
  mutable detail::Numbering workspaces_;
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// The two ends a LoRA layer is compared with: the weight left alone, and the weight trained in full. Same interface.
#pragma once

#include "lowrank/adapter/layer.hpp"
#include "lowrank/adapter/parameters.hpp"

namespace lowrank {

/// Y = X·Wᵀ (+ b), nothing trainable; has LoraLinear's interface so that a model can hold any of them.
template <Real T, class Base = DenseBase<T>>
requires FrozenBase<Base, T>
class FrozenLinear : public detail::EvaluateOrCastToMatrixOf<T> {
 public:
  using scalar = T;
  using detail::EvaluateOrCastToMatrixOf<T>::forward, detail::EvaluateOrCastToMatrixOf<T>::backward;

  /// **Throws** ShapeError when the bias does not have out elements.
  explicit FrozenLinear(Base base, std::vector<T> bias = {})
      : base_(std::move(base)), bias_(detail::checked_bias("FrozenLinear", std::move(bias), base_.rows())) {}

  [[nodiscard]] Index in_features() const noexcept { return base_.cols(); }
  [[nodiscard]] Index out_features() const noexcept { return base_.rows(); }
  [[nodiscard]] const Base& base() const noexcept { return base_; }
  [[nodiscard]] std::span<const T> bias() const noexcept { return bias_; }
  [[nodiscard]] Parameters<T>& parameters() noexcept { return parameters_; }
  [[nodiscard]] const Parameters<T>& parameters() const noexcept { return parameters_; }

  /// Y = X·Wᵀ (+ b), whatever the phase; the workspace is not used. **Throws** ShapeError on sizes that disagree,
  /// ArgumentError when Y overlaps X or a dense W; nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<T> Y>
  void forward(X&& x, Y&& y, LoraWorkspace<T>& /*ws*/, Phase /*phase*/ = Phase::train) const {
    const MatrixView<const T> xv = view_of(x);
    const MatrixView<T> yv = view_of(y);
    detail::expect_operands<T>("FrozenLinear::forward", "X", xv, in_features(), "Y", yv, out_features());
    detail::expect_apart_from_base("FrozenLinear::forward", "Y", yv, base_);
    base_.forward(xv, yv, Update::assign);
    if (!bias_.empty()) detail::add_bias<T>(bias_, yv);
  }
  /// dX = G·W, or dX += G·W. X is looked at for its shape alone; dX may be its memory. **Throws** ShapeError on sizes
  /// that disagree, ArgumentError when dX overlaps G or a dense W; nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<const T> G, MatrixOf<T> DX>
  void backward(X&& x, G&& g, LoraWorkspace<T>& /*ws*/, DX&& dx, BackwardOptions options = {}) {
    const MatrixView<const T> gv = view_of(g);
    const MatrixView<T> dxv = view_of(dx);
    detail::expect_backward<T>("FrozenLinear::backward", view_of(x), gv, dxv, in_features(), out_features());
    detail::expect_apart_from_base("FrozenLinear::backward", "dX", dxv, base_);
    base_.backward(gv, dxv, options.dx);
  }
  /// Without dX nothing is left to do but to check the shapes. **Throws** ShapeError on sizes that disagree.
  template <MatrixOf<const T> X, MatrixOf<const T> G>
  void backward(X&& x, G&& g, LoraWorkspace<T>& /*ws*/, BackwardOptions /*options*/ = {}) {
    detail::expect_backward<T>("FrozenLinear::backward", view_of(x), view_of(g), std::nullopt, in_features(),
                               out_features());
  }

 private:
  Base base_;
  std::vector<T> bias_;
  Parameters<T> parameters_;
};

/// Y = X·Wᵀ (+ b) with W (and b) trained: full fine-tuning, the baseline of every comparison.
///
/// Parameters "weight" out×in, a copy of what it was made from, and "bias" 1×out when it has one.
/// **Cost** forward 2·tokens·out·in flops, backward twice that; dW = Gᵀ·X is formed into the gradient block.
template <Real T>
class FullLinear : public detail::EvaluateOrCastToMatrixOf<T> {
 public:
  using scalar = T;
  using detail::EvaluateOrCastToMatrixOf<T>::forward, detail::EvaluateOrCastToMatrixOf<T>::backward;

  /// Starts from W, out×in, copied. **Throws** ShapeError when the bias does not have out elements.
  template <MatrixLike W>
  explicit FullLinear(W&& w, const std::vector<T>& bias = {})
      : parameters_(table(view_of(w).rows(), view_of(w).cols(), !bias.empty())) {
    const auto source = view_of(w);
    const MatrixView<T> weight = parameters_.value(0);
    detail::checked_bias("FullLinear", bias, weight.rows());
    for (Index i = 0; i < weight.rows(); ++i)
      for (Index j = 0; j < weight.cols(); ++j) weight(i, j) = T(source(i, j));
    for (std::size_t j = 0; j < bias.size(); ++j) parameters_.value(1)(0, Index(j)) = bias[j];
  }

  [[nodiscard]] Index in_features() const noexcept { return weight().cols(); }
  [[nodiscard]] Index out_features() const noexcept { return weight().rows(); }
  [[nodiscard]] MatrixView<T> weight() noexcept { return parameters_.value(0); }
  [[nodiscard]] MatrixView<const T> weight() const noexcept { return parameters_.value(0); }
  [[nodiscard]] std::span<const T> bias() const noexcept {
    const MatrixView<const T> b = parameters_.value(1);  // an empty one without a bias
    return {b.data(), std::size_t(b.cols())};
  }
  [[nodiscard]] Parameters<T>& parameters() noexcept { return parameters_; }
  [[nodiscard]] const Parameters<T>& parameters() const noexcept { return parameters_; }

  /// Y = X·Wᵀ (+ b), whatever the phase; the workspace is not used. **Throws** ShapeError on sizes that disagree,
  /// ArgumentError when Y overlaps X or W; nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<T> Y>
  void forward(X&& x, Y&& y, LoraWorkspace<T>& /*ws*/, Phase /*phase*/ = Phase::train) const {
    const MatrixView<const T> xv = view_of(x);
    const MatrixView<T> yv = view_of(y);
    detail::expect_not_moved_from("FullLinear::forward", parameters_);
    detail::expect_operands<T>("FullLinear::forward", "X", xv, in_features(), "Y", yv, out_features());
    detail::expect_apart("FullLinear::forward", "Y", yv, "W", weight());
    detail::product<T, T, T>(T(1), xv, weight(), false, yv);
    if (has_bias()) detail::add_bias<T>(bias(), yv);
  }
  /// dW (+)= Gᵀ·X and db (+)= Σ_t g_t into parameters().gradients(), and dX = G·W, or dX += G·W.
  /// dX may be X's own memory. **Throws** ShapeError on sizes that disagree, ArgumentError when dX overlaps G or W;
  /// nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<const T> G, MatrixOf<T> DX>
  void backward(X&& x, G&& g, LoraWorkspace<T>& /*ws*/, DX&& dx, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), MatrixView<T>(view_of(dx)), options);
  }
  /// The same without dX, for the first layer of a model.
  template <MatrixOf<const T> X, MatrixOf<const T> G>
  void backward(X&& x, G&& g, LoraWorkspace<T>& /*ws*/, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), std::nullopt, options);
  }

 private:
  static std::vector<ParameterInfo> table(Index out, Index in, bool bias) {
    std::vector<ParameterInfo> t{{"weight", out, in}};
    if (bias) t.push_back({"bias", 1, out});
    return t;
  }
  [[nodiscard]] bool has_bias() const noexcept { return parameters_.table().size() > 1; }
  void backward_impl(MatrixView<const T> X, MatrixView<const T> G, std::optional<MatrixView<T>> dX,
                     BackwardOptions options) {
    detail::expect_not_moved_from("FullLinear::backward", parameters_);
    detail::expect_backward<T>("FullLinear::backward", X, G, dX, in_features(), out_features());
    const MatrixView<const T> W = weight();
    if (dX) detail::expect_apart("FullLinear::backward", "dX", *dX, "W", W);
    const bool add = options.gradients == Update::accumulate;
    detail::product<T, T, T>(T(1), G.transposed(), X.transposed(), add, parameters_.gradient(0));
    if (has_bias()) detail::bias_gradient<T>(G, add, parameters_.gradient(1));
    if (dX) detail::product<T, T, T>(T(1), G, W.transposed(), options.dx == Update::accumulate, *dX);
  }

  Parameters<T> parameters_;
};

}  // namespace lowrank

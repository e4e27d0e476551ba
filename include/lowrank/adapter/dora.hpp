// SPDX-License-Identifier: Apache-2.0
// DoRA: the weight's rows split into magnitude, trained directly, and direction, adapted by s·B·A.
//
// W out×in (frozen), A r×in, B out×r, m out. n_j = ‖(W + s·B·A)_j‖ (row norms).
//   Z = X·Wᵀ + s·(X̃·Aᵀ)·Bᵀ,  Y = Z·diag(m/n) (+ b)
//   dm_j = Σ_t G_tj·Z_tj / n_j,  and A, B, X get LoRA's gradients of G·diag(m/n); n is held constant, as in the paper.
#pragma once

#include <cstring>
#include <limits>

#include "lowrank/adapter/dora_merge.hpp"
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

/// The row norms of W + s·B·A and the factors they are of: they are computed anew when a bit of A, B or s has changed,
/// whoever changed it, and cost a comparison when none has.
template <Real T>
struct DoraNorms {
  std::vector<double> norms;  ///< n, of out elements
  Matrix<T> A, B;             ///< the factors that `norms` is of
  T scale = T(0);
  std::weak_ptr<const std::string> layer;  ///< and the layer, as in LoraWorkspace
  Matrix<T> projected;                     ///< A·Wᵀ, r×out
  Matrix<double> gram;                     ///< A·Aᵀ
};

/// What DoraLinear keeps between forward and backward; see LoraWorkspace.
template <Real T>
struct DoraWorkspace {
  LoraWorkspace<T> lora;
  DoraNorms<T> norms;
  Matrix<T> Z;       ///< output before the magnitudes, tokens×out
  Matrix<T> scaled;  ///< G·diag(m/n), tokens×out
};

/// Y = (X·Wᵀ + s·(X·Aᵀ)·Bᵀ)·diag(m/‖W + s·B·A‖_row) (+ b), with A, B and the magnitudes m trained.
///
/// Parameters "lora_A" r×in, "lora_B" out×r, "lora_magnitude_vector" 1×out. m starts as the row norms of W + s·B·A, so
/// that the layer starts as LoraLinear would. Row norms come from ‖w_i‖² + 2s·(W·Aᵀ)_i·B_i + s²·B_i·(A·Aᵀ)·B_iᵀ: the
/// dense W + s·B·A is never formed.
/// **Cost** LoraLinear's and two passes over tokens×out, plus 2·out·in·r flops for the norms where the factors are not
/// those of the workspace's last pass; the workspace holds a copy of the factors to tell. **Throws** as LoraLinear;
/// ArgumentError for `train_bias`, ShapeError for a magnitude of another length.
/// **Source** Liu et al., "DoRA", arXiv 2402.09353, eq. 5 and §4.3 (the norm as a constant).
template <Real T, class Base = DenseBase<T>>
requires FrozenBase<Base, T> && RowReadable<Base, T>
class DoraLinear : public FactorParameters<T>, public detail::EvaluateOrCastToMatrixOf<T> {
 public:
  using typename FactorParameters<T>::scalar;
  using FactorParameters<T>::A, FactorParameters<T>::B, FactorParameters<T>::rank;
  using detail::EvaluateOrCastToMatrixOf<T>::forward, detail::EvaluateOrCastToMatrixOf<T>::backward;

  /// `magnitude`: m, of out elements; empty starts from the row norms of W + s·B·A.
  DoraLinear(Base base, const LoraFactors<T>& factors, const LoraLinearOptions& options = {},
             std::vector<T> magnitude = {}, std::vector<T> bias = {})
      : FactorParameters<T>("DoraLinear", factors, base.rows(), base.cols(), "lora_A", "lora_B",
                            {{"lora_magnitude_vector", 1, Index(base.rows())}}),
        base_(std::move(base)),
        options_(options),
        bias_(detail::checked_bias("DoraLinear", std::move(bias), base_.rows())),
        base_squares_(detail::row_norms_squared<T>(base_)) {
    detail::checked_dropout("DoraLinear", options.dropout);
    if (options.train_bias) throw ArgumentError("DoraLinear: a trained bias is not supported, got train_bias = true");
    if (!magnitude.empty() && Index(magnitude.size()) != out_features())
      throw ShapeError(
          detail::text("DoraLinear: the magnitude must have ", out_features(), " elements, got ", magnitude.size()));
    const std::vector<double> norms = magnitude.empty() ? row_norms() : std::vector<double>();
    const MatrixView<T> m = this->magnitude();
    for (Index j = 0; j < out_features(); ++j)
      m(0, j) = magnitude.empty() ? T(norms[std::size_t(j)]) : magnitude[std::size_t(j)];
  }

  [[nodiscard]] Index in_features() const noexcept { return base_.cols(); }
  [[nodiscard]] Index out_features() const noexcept { return base_.rows(); }
  [[nodiscard]] const Base& base() const noexcept { return base_; }
  [[nodiscard]] MatrixView<T> magnitude() noexcept { return parameters_.value(2); }
  [[nodiscard]] MatrixView<const T> magnitude() const noexcept { return parameters_.value(2); }
  /// n_j = ‖(W + s·B·A)_j‖ of the present factors. **Cost** 2·r·out·in + out·r² multiply-adds.
  [[nodiscard]] std::vector<double> row_norms() const {
    DoraNorms<T> n;
    update(n);
    return std::move(n.norms);
  }

  /// A copy of the adapter as plain data, the magnitudes included.
  [[nodiscard]] DoraFactors<T> factors() const {
    const MatrixView<const T> m = magnitude();
    return {FactorParameters<T>::factors(), std::vector<T>(m.data(), m.data() + m.cols())};
  }
  /// Puts other values (and another scale) of the same shapes in. **Throws** ShapeError otherwise, ArgumentError for a
  /// scale that is not finite; nothing is written then.
  void set_factors(const DoraFactors<T>& f) {
    detail::expect_shape("DoraLinear::set_factors", "the magnitude", Index(1), Index(f.magnitude.size()), Index(1),
                         magnitude().cols());
    FactorParameters<T>::set_factors(f.lora);
    std::copy(f.magnitude.begin(), f.magnitude.end(), magnitude().data());
  }

  /// Y from X, with the row norms of A and B as they are, in either phase. **Throws** ShapeError on sizes that
  /// disagree, ArgumentError when Y overlaps X or a dense W; nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<T> Y>
  void forward(X&& x, Y&& y, DoraWorkspace<T>& ws, Phase phase = Phase::train) const {
    const MatrixView<const T> xv = view_of(x);
    const MatrixView<T> yv = view_of(y);
    detail::expect_not_moved_from("DoraLinear::forward", parameters_);
    detail::expect_operands<T>("DoraLinear::forward", "X", xv, in_features(), "Y", yv, out_features());
    detail::expect_apart_from_base("DoraLinear::forward", "Y", yv, base_);
    const bool drops = phase == Phase::train && options_.dropout > 0;
    if (drops) detail::begin_dropping(ws.lora, workspaces_);
    update(ws.norms);
    ws.Z.resize(xv.rows(), out_features());
    lora_forward<T>(base_, A(), B(), scale_, xv, ws.Z.view(), ws.lora, mask(drops, ws));
    ws.lora.layer = parameters_.identity();
    const MatrixView<const T> m = magnitude();
    for (Index t = 0; t < yv.rows(); ++t)
      for (Index j = 0; j < yv.cols(); ++j)
        yv(t, j) = ws.Z(t, j) * ratio(m, ws, j) + (bias_.empty() ? T(0) : bias_[std::size_t(j)]);
  }
  /// Gradients of A, B and m for the forward pass kept in `ws`, and dX, which may be X's own memory. **Throws**
  /// ShapeError on sizes that disagree, ArgumentError without a matching forward of this layer or when dX overlaps G or
  /// a dense W; nothing is written then.
  template <MatrixOf<const T> X, MatrixOf<const T> G, MatrixOf<T> DX>
  void backward(X&& x, G&& g, DoraWorkspace<T>& ws, DX&& dx, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), ws, MatrixView<T>(view_of(dx)), options);
  }
  /// The same without dX, for the first layer of a model.
  template <MatrixOf<const T> X, MatrixOf<const T> G>
  void backward(X&& x, G&& g, DoraWorkspace<T>& ws, BackwardOptions options = {}) {
    backward_impl(view_of(x), view_of(g), ws, std::nullopt, options);
  }

 private:
  using FactorParameters<T>::parameters_, FactorParameters<T>::scale_;

  /// Brings `n` to the present A, B and s, where it is not there already.
  void update(DoraNorms<T>& n) const {
    const MatrixView<const T> a = A(), b = B();                             // without gaps, as a block's entries are
    const auto same = [](const Matrix<T>& kept, MatrixView<const T> now) {  // bits, so that NaN equals itself
      return kept.rows() == now.rows() && kept.cols() == now.cols() &&
             std::memcmp(kept.data(), now.data(), std::size_t(now.size()) * sizeof(T)) == 0;
    };
    const std::shared_ptr<const std::string> self = parameters_.identity();
    if (detail::same_layer(n.layer, self) && n.scale == scale_ && same(n.A, a) && same(n.B, b)) return;
    n.layer.reset();
    n.A.assign(a);
    n.B.assign(b);
    n.scale = scale_;
    const Index r = a.rows();
    n.projected.resize(r, out_features());
    base_.forward(a, n.projected.view(), Update::assign);
    n.gram.resize(r, r);
    for (Index k = 0; k < r; ++k)
      for (Index l = 0; l <= k; ++l) {
        double sum = 0;
        for (Index i = 0; i < in_features(); ++i) sum += double(a(k, i)) * double(a(l, i));
        n.gram(k, l) = n.gram(l, k) = sum;
      }
    const double s = double(scale_);
    n.norms.resize(base_squares_.size());
    for (Index j = 0; j < out_features(); ++j) {
      double square = base_squares_[std::size_t(j)];
      for (Index k = 0; k < r; ++k) {
        double inner = 2 * s * double(n.projected(k, j));
        for (Index l = 0; l < r; ++l) inner += s * s * n.gram(k, l) * double(b(j, l));
        square += inner * double(b(j, k));
      }
      // The terms cancel when W + s·B·A nearly vanishes; what is left below rounding is no direction to divide by.
      n.norms[std::size_t(j)] = std::sqrt(std::max(square, std::numeric_limits<double>::min()));
    }
    n.layer = self;
  }

  static T ratio(const MatrixView<const T>& m, const DoraWorkspace<T>& ws, Index j) {
    return T(double(m(0, j)) / ws.norms.norms[std::size_t(j)]);
  }
  [[nodiscard]] std::optional<DropoutMask> mask(bool drops, const DoraWorkspace<T>& ws) const {
    if (!drops) return std::nullopt;
    return detail::dropout_mask(options_, parameters_, ws.lora);
  }
  void backward_impl(MatrixView<const T> X, MatrixView<const T> G, DoraWorkspace<T>& ws,
                     std::optional<MatrixView<T>> dX, BackwardOptions options) {
    detail::expect_own_pass("DoraLinear::backward", ws.lora, parameters_, out_features(), in_features(), rank());
    const std::optional<DropoutMask> dropped = mask(ws.lora.masked, ws);
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
      sum /= ws.norms.norms[std::size_t(j)];
      dm(0, j) = options.gradients == Update::accumulate ? T(double(dm(0, j)) + sum) : T(sum);
    }
    const MatrixView<const T> m = magnitude();
    for (Index t = 0; t < G.rows(); ++t)
      for (Index j = 0; j < G.cols(); ++j) ws.scaled(t, j) = G(t, j) * ratio(m, ws, j);
    lora_backward<T>(base_, A(), B(), scale_, X, ws.scaled.view(), ws.lora, parameters_.gradient(0),
                     parameters_.gradient(1), dX, options, dropped);
  }

  Base base_;
  LoraLinearOptions options_;
  std::vector<T> bias_;
  std::vector<double> base_squares_;
  mutable detail::Numbering workspaces_;
};

}  // namespace lowrank

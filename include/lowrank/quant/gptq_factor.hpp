// SPDX-License-Identifier: Apache-2.0
// What GPTQ needs to know of a layer's inputs: the triangular factors of their covariance, for any number of weights.
#pragma once

#include <numeric>

#include "lowrank/linalg/detail/covariance.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/quant/quantised_matrix.hpp"

namespace lowrank {

struct GptqOptions {
  /// How the weight is stored: codebook, blocks, double quantisation, scale search.
  QuantiseOptions quantise = {};
  /// λ = damping·mean(diag H) is added to the diagonal of H.
  double damping = 0.01;
  /// Scales from W as quantise finds them, instead of from what a block holds when the columns reach it. Double
  /// quantisation and blocks that run on over row ends need this. The error is about the same without a scale search,
  /// less at two bits, and some percent more with one.
  bool fixed_scales = false;
  /// Columns by decreasing diagonal of H ("act_order"), so that the busiest are rounded while all others can still make
  /// up for them. Needs fixed_scales, as a block's columns are no longer met together.
  bool by_activation = false;
  /// Measure quantise(W) too and return its row wherever that has the smaller error: one more triangular product.
  bool compare_plain = true;
};

/// What gptq needs of H, for layers that share their inputs (q, k and v; gate and up): (H + λI)⁻¹ = Uᵀ·U, U upper
/// triangular, and its inverse.
///
/// **Cost** n³ flops in double; 2·n² values of T are kept, n² doubles needed meanwhile.
template <Real T>
class GptqFactor {
 public:
  /// **Shapes** H n×n, of any scale. Of `options` damping and by_activation are looked at. **Throws** ShapeError unless
  /// H is square; NonFiniteError; ArgumentError unless H is symmetric and positive definite after damping.
  template <MatrixLike X>
  [[gnu::cold]] explicit GptqFactor(X&& H, const GptqOptions& options = {}) {
    using S = typename decltype(view_of(H))::value_type;
    const MatrixView<const S> view = view_of(H);
    const Index n = view.rows();
    // R upper triangular with R·Rᵀ = H is a Cholesky factor taken from the last column back, and U is its inverse.
    std::vector<Index> backward(static_cast<std::size_t>(n));
    order_.resize(std::size_t(n));
    std::iota(order_.begin(), order_.end(), Index(0));
    permuted_ = options.by_activation;
    bool sortable = permuted_ && view.cols() == n;  // what is not gets its message below
    for (Index j = 0; sortable && j < n; ++j) sortable = std::isfinite(double(view(j, j)));
    if (sortable) {
      std::vector<double> diagonal(static_cast<std::size_t>(n));
      for (Index j = 0; j < n; ++j) diagonal[std::size_t(j)] = double(view(j, j));
      order_ = detail::descending_order(diagonal);
    }
    std::copy(order_.rbegin(), order_.rend(), backward.begin());
    Matrix<double> L = detail::damped_covariance("gptq", "H", view, n, options.damping, backward, &damping_);
    if (const Index bad = detail::cholesky_pivots(L.view(), 0); bad < n)
      throw ArgumentError(detail::text("gptq: H must be positive definite after damping, got pivot ", L(bad, bad),
                                       " at column ", backward[std::size_t(bad)], "; raise damping (", options.damping,
                                       ")"));
    // Element (j, k) of an upper triangle read from the reversed lower one.
    const auto upper = [&](Index j, Index k) { return L(n - 1 - j, n - 1 - k); };
    d_.resize(std::size_t(n));
    spread_ = M_ = Matrix<T>(n, n);
    for (Index k = 0; k < n; ++k) d_[std::size_t(k)] = upper(k, k);
    for (Index j = 0; j < n; ++j)
      for (Index k = j; k < n; ++k) M_(j, k) = T(upper(j, k) / d_[std::size_t(k)]);
    detail::invert_lower(L.view());
    for (Index j = 0; j < n; ++j)
      for (Index k = j; k < n; ++k) spread_(j, k) = T(-upper(j, k) * d_[std::size_t(j)]);
  }

  [[nodiscard]] Index size() const noexcept { return M_.rows(); }
  /// λ.
  [[nodiscard]] double damping() const noexcept { return damping_; }
  /// The columns of H in the order they are coded, which is that of the triangles.
  [[nodiscard]] std::span<const Index> order() const noexcept { return order_; }
  [[nodiscard]] bool permuted() const noexcept { return permuted_; }
  /// What an error in column j adds to the columns k > j: −U_jk/U_jj.
  [[nodiscard]] MatrixView<const T> spread() const noexcept { return spread_.view(); }
  /// H + λI = R·Rᵀ with R = U⁻¹ = M·diag(d): the upper triangle M with ones on its diagonal, and d_k = 1/U_kk.
  [[nodiscard]] MatrixView<const T> M() const noexcept { return M_.view(); }
  [[nodiscard]] std::span<const double> d() const noexcept { return d_; }

 private:
  std::vector<Index> order_;
  std::vector<double> d_;
  Matrix<T> spread_, M_;
  double damping_ = 0;
  bool permuted_ = false;
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// GPTQ: codes chosen column by column, what each choice costs the layer's outputs made up for by the columns still
// free.
#pragma once

#include <chrono>

#include "lowrank/quant/detail/lane_coder.hpp"
#include "lowrank/quant/gptq_factor.hpp"
#include "lowrank/quant/quantise.hpp"

namespace lowrank {

/// What gptq did; errors are norms of E = W − Q, weighted ones √tr(E·(H + λI)·Eᵀ).
struct GptqReport {
  double weighted = 0, frobenius = 0;
  /// The same of quantise(W); the weighted one is NaN unless `compare_plain`.
  double plain_weighted = std::numeric_limits<double>::quiet_NaN(), plain_frobenius = 0;
  /// Rows of quantise(W) that were kept because they have the smaller weighted error.
  Index plain_rows = 0;
  /// λ, as added to the diagonal of H.
  double damping = 0;
  double seconds = 0;
};

template <Real T>
struct GptqResult {
  QuantisedMatrix<T> base;
  GptqReport report;
};

namespace detail {

/// One run of gptq. Rows do not know of each other; a tile of them goes through a batch of columns in L1, everything
/// between batches is products.
///
/// w̃_k is w_k corrected for the columns before it. Rounding it leaves d_k²·(w̃_k − q_k)² of the weighted error, whatever
/// comes later, as all columns after it can make up for the rest: the error is the sum of those.
template <class T, class S>
class Gptq {
 public:
  [[gnu::cold]] Gptq(MatrixView<const S> W, const GptqFactor<T>& F, const GptqOptions& o)
      : W_(W),
        F_(F),
        o_(o),
        fixed_(o.fixed_scales || o.quantise.blocking == Blocking::row),
        m_(W.rows()),
        n_(W.cols()),
        plain_(QuantisedMatrix<T>::zero(m_, n_, o.quantise)),
        L_(plain_.layout()) {
    if (F.size() != n_)
      throw ShapeError(text("gptq: H must be ", shape_text(n_, n_), " for W of ", shape_text(m_, n_), ", got ",
                            shape_text(F.size(), F.size())));
    const bool aligned = L_.rows_start_blocks() || m_ <= 1;
    if (!fixed_ && !aligned)
      throw ArgumentError(text("gptq: blocks of ", L_.block_size, " run on over the ends of rows of ", n_,
                               "; use Blocking::restart_rows or fixed_scales"));
    if (!fixed_ && o.quantise.double_quantise)
      throw ArgumentError(
          "gptq: double_quantise rounds scales when all are known, codes are chosen before; use "
          "fixed_scales");
    if (!fixed_ && F.permuted()) throw ArgumentError("gptq: by_activation needs fixed_scales");
    by_block_ = aligned && !F.permuted();
    plain_.assign(W);
    if (book().kind() == CodebookKind::table) zero_code_ = book().nearest(0.0F);
  }

  [[gnu::cold]] GptqResult<T> run() {
    E_.resize(m_, n_);
    codes_.resize(m_ * n_);
    loss_.assign(std::size_t(m_), 0);
    squares_.assign(std::size_t(m_), 0);
    if (!fixed_) scales_.resize(std::size_t(L_.block_count()));
    if (!fixed_ && book().kind() == CodebookKind::affine) zeros_.resize(scales_.size());
    const Index group = fixed_ ? batch : std::max(batch, L_.block_size);
    Matrix<T> V;
    for (Index g = 0; g < n_; g += group) {
      const Index width = std::min(group, n_ - g);
      V.resize(m_, width);
      columns(g, V.view());
      add_product(F_.spread(), 0, g, g, V.view());
      for (Index b = g; b < g + width; b += batch) {
        const Index w = std::min(batch, g + width - b);
        add_product(F_.spread(), g, b, b, V.view().middle_cols(b - g, w));
        parallel_ranges((m_ + lanes_ - 1) / lanes_, 1, [&](Index t0, Index t1) {
          Tile tile(*this);
          for (Index t = t0; t < t1; ++t) tile.run(t * lanes_, b, w, std::as_const(V).view(), b - g);
        });
      }
    }
    if (overflow_.load()) throw NonFiniteError("gptq: a weight left the range of float as errors were fed forward");
    return finish();
  }

 private:
  static constexpr Index batch = 128;
  static constexpr int lanes_ = 32;

  [[nodiscard]] const Codebook& book() const { return o_.quantise.codebook; }
  [[nodiscard]] Index column(Index k) const { return F_.order()[std::size_t(k)]; }
  [[nodiscard]] Index block_of(Index i, Index col) const {
    if (L_.blocking == Blocking::row) return i;
    if (L_.blocking == Blocking::flat) return (i * n_ + col) / L_.block_size;
    return i * L_.blocks_per_segment() + col / L_.block_size;
  }

  /// V = columns [g, g + cols) of W, in the order they are coded.
  void columns(Index g, MatrixView<T> V) const {
    parallel_ranges(m_, 64, [&](Index i0, Index i1) {
      for (Index i = i0; i < i1; ++i)
        for (Index k = 0; k < V.cols(); ++k) V(i, k) = T(W_(i, column(g + k)));
    });
  }
  /// V += E[:, from:to]·A[from:to, at:…].
  void add_product(MatrixView<const T> A, Index from, Index to, Index at, MatrixView<T> V) const {
    if (to > from && m_ > 0)
      gemm(T(1), E_.view().middle_cols(from, to - from), A.block(from, at, to - from, V.cols()), V, Update::accumulate);
  }

  /// A tile of rows, a batch of columns at a time, column by column with a lane a row.
  class Tile {
   public:
    explicit Tile(Gptq& g)
        : g_(g),
          coder_(g.encoder_, g.book(), g.zero_code_),
          choose_(g.encoder_, g.book(), g.o_.quantise.scale_search),
          staged_(std::max(batch, g.L_.block_size)),
          scratch_(staged_.size()) {}

    [[gnu::noinline]] void run(Index row, Index b, Index width, MatrixView<const T> V, Index at) {
      rows_ = int(std::min<Index>(lanes_, g_.m_ - row));
      load(row, b, width, V, at);
      double loss[lanes_] = {}, squares[lanes_] = {};
      for (Index j = 0; j < width; ++j) {
        set_scales(row, b, j, V, at);
        float x[lanes_], q[lanes_];
        std::uint8_t codes[lanes_];
        T e[lanes_];
        for (int l = 0; l < lanes_; ++l) x[l] = float(x_[j][l]);
        coder_(x, codes, q);
        const double d = g_.F_.d()[std::size_t(b + j)];
        for (int l = 0; l < lanes_; ++l) {
          e[l] = x_[j][l] - T(q[l]);
          const double weighted = d * double(e[l]), change = double(w_[j][l]) - double(q[l]);
          loss[l] += weighted * weighted;
          squares[l] += change * change;
        }
        const T* spread = &g_.F_.spread()(b + j, b);
        for (Index k = j + 1; k < width; ++k)
          for (int l = 0; l < lanes_; ++l) x_[k][l] += e[l] * spread[k];
        const Index col = g_.column(b + j);
        for (int l = 0; l < rows_; ++l) {
          g_.E_(row + l, b + j) = e[l];
          g_.codes_[(row + l) * g_.n_ + col] = codes[l];
        }
      }
      for (int l = 0; l < rows_; ++l) {
        g_.loss_[std::size_t(row + l)] += loss[l];
        g_.squares_[std::size_t(row + l)] += squares[l];
        if (!std::isfinite(loss[l])) g_.overflow_.store(true);
      }
    }

   private:
    [[gnu::noinline]] void load(Index row, Index b, Index width, MatrixView<const T> V, Index at) {
      for (Index j = 0; j < width; ++j)
        for (int l = rows_; l < lanes_; ++l) x_[j][l] = w_[j][l] = T(0);
      for (int l = 0; l < rows_; ++l)
        for (Index j = 0; j < width; ++j) {
          x_[j][l] = V(row + l, at + j);
          w_[j][l] = T(g_.W_(row + l, g_.column(b + j)));
        }
    }
    /// The scales of the blocks column b + j lies in, where they are not those of the column before.
    [[gnu::noinline]] void set_scales(Index row, Index b, Index j, MatrixView<const T> V, Index at) {
      const Index col = g_.column(b + j), size = g_.L_.block_size;
      const bool enters = col % size == 0;
      if (g_.by_block_ && !enters && j > 0) return;
      for (int l = 0; l < rows_; ++l) {
        const Index block = g_.block_of(row + l, col);
        if (g_.fixed_) {
          coder_.set(l, g_.plain_.block_scale(block));
          continue;
        }
        const auto k = std::size_t(block);
        if (enters) {
          const BlockScale s = choose(l, row, j, std::min(size, g_.n_ - col), V, at);
          g_.scales_[k] = s.scale;
          if (!g_.zeros_.empty()) g_.zeros_[k] = std::uint8_t(s.zero);
        }
        coder_.set(l, {g_.scales_[k], g_.zeros_.empty() ? 0.0F : float(g_.zeros_[k])});
      }
    }
    /// From the weights as the columns before have left them: those of this batch are up to date here in the tile, and
    /// a block longer than a batch starts with one, where all of V is.
    [[gnu::noinline]] BlockScale choose(int l, Index row, Index j, Index length, MatrixView<const T> V, Index at) {
      for (Index k = 0; k < length; ++k)
        staged_[k] = length <= batch - j ? float(x_[j + k][l]) : float(V(row + l, at + j + k));
      const std::uint32_t magnitude = largest_magnitude_bits(staged_.data(), length);
      if (magnitude >= 0x7f800000U) {
        g_.overflow_.store(true);
        return {0, 0};
      }
      return choose_(staged_.data(), length, std::bit_cast<float>(magnitude), scratch_.data());
    }

    Gptq& g_;
    LaneCoder<lanes_> coder_;
    ScaleChooser choose_;
    Buffer<float> staged_;
    Buffer<std::uint8_t> scratch_;
    int rows_ = 0;
    alignas(64) T x_[batch][lanes_];  ///< the weights to be coded
    alignas(64) T w_[batch][lanes_];  ///< those of W
  };

  /// sums[i] += Σ_k (weights[k]·X(i, k))², or Σ_k X(i, k)² without weights.
  [[gnu::noinline]] void add_squared_rows(MatrixView<const T> X, const double* weights,
                                          std::vector<double>& sums) const {
    parallel_ranges(m_, 1 + 16384 / std::max<Index>(1, X.cols()), [&](Index i0, Index i1) {
      for (Index i = i0; i < i1; ++i) {
        double sum = 0;
        const T* x = &X(i, 0);
        if (weights == nullptr)
          sum = sum_of_squares(X.cols(), x);
        else
          for (Index k = 0; k < X.cols(); ++k) sum += weights[k] * double(x[k]) * (weights[k] * double(x[k]));
        sums[std::size_t(i)] += sum;
      }
    });
  }
  /// Loss of every row of quantise(W); E becomes its error.
  [[gnu::cold]] std::vector<double> plain_losses() {
    parallel_ranges(m_, 1 + 16384 / std::max<Index>(1, n_), [&](Index i0, Index i1) {
      std::vector<T> q(static_cast<std::size_t>(n_));
      for (Index i = i0; i < i1; ++i) {
        plain_.row(i, q);
        for (Index k = 0; k < n_; ++k) E_(i, k) = T(W_(i, column(k))) - q[std::size_t(column(k))];
      }
    });
    std::vector<double> loss(static_cast<std::size_t>(m_));
    if (!o_.compare_plain) return loss;
    Matrix<T> V;
    constexpr Index width = 2 * batch;
    for (Index g = 0; g < n_; g += width) {
      const Index end = std::min(n_, g + width);
      V.resize(m_, end - g);
      V.set_zero();
      add_product(F_.M(), 0, end, g, V.view());
      add_squared_rows(std::as_const(V).view(), F_.d().data() + g, loss);
    }
    return loss;
  }

  [[gnu::cold]] GptqResult<T> finish() {
    GptqResult<T> result;
    GptqReport& report = result.report;
    if (m_ > 0 && n_ > 0) {
      std::vector<double> plain(static_cast<std::size_t>(m_));
      const std::vector<double> plain_loss = plain_losses();
      add_squared_rows(std::as_const(E_).view(), nullptr, plain);
      double weighted = 0, frobenius = 0, plain_weighted = 0, plain_frobenius = 0;
      for (Index i = 0; i < m_; ++i) {
        const auto r = std::size_t(i);
        plain_weighted += plain_loss[r];
        plain_frobenius += plain[r];
        const bool keep_plain = o_.compare_plain && plain_loss[r] < loss_[r];
        if (keep_plain) take_plain_row(i);
        report.plain_rows += keep_plain;
        weighted += keep_plain ? plain_loss[r] : loss_[r];
        frobenius += keep_plain ? plain[r] : squares_[r];
      }
      report.weighted = std::sqrt(weighted);
      report.frobenius = std::sqrt(frobenius);
      if (o_.compare_plain) report.plain_weighted = std::sqrt(plain_weighted);
      report.plain_frobenius = std::sqrt(plain_frobenius);
    } else if (o_.compare_plain) {
      report.plain_weighted = 0;
    }
    report.damping = F_.damping();
    result.base = packed();
    return result;
  }
  [[gnu::cold]] void take_plain_row(Index i) {
    for (Index j = 0; j < n_; ++j) codes_[i * n_ + j] = std::uint8_t(plain_.code(i, j));
    if (fixed_) return;
    for (Index j = 0; j < n_; j += L_.block_size) {
      const auto b = std::size_t(block_of(i, j));
      scales_[b] = plain_.absmax()[b];
      if (!zeros_.empty()) zeros_[b] = plain_.zeros()[b];
    }
  }
  [[gnu::cold]] QuantisedMatrix<T> packed() const {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(L_.code_bytes()));
    const Index length = L_.segment_length();
    parallel_ranges(L_.block_count(), 256, [&](Index b0, Index b1) {
      for (Index b = b0; b < b1; ++b) {
        const auto block = L_.block(b);
        pack_codes(L_.bits, codes_.data() + block.segment * length + block.first, block.length,
                   bytes.data() + block.byte);
      }
    });
    QuantisedParts parts{.codes = bytes, .absmax = fixed_ ? plain_.absmax() : std::span<const float>(scales_)};
    parts.zeros = fixed_ ? plain_.zeros() : std::span<const std::uint8_t>(zeros_);
    if (plain_.is_double_quantised()) {
      const NestedScales& s = plain_.nested();
      parts.nested_codes = s.codes;
      parts.nested_absmax = s.absmax;
      parts.nested_values = s.values;
      parts.nested_offset = s.offset;
      parts.nested_block_size = s.block_size;
    }
    return QuantisedMatrix<T>(m_, n_, o_.quantise, parts);
  }

  MatrixView<const S> W_;
  const GptqFactor<T>& F_;
  const GptqOptions& o_;
  bool fixed_, by_block_ = true;  ///< by_block_: all rows enter their blocks at the same column, first to last
  Index m_, n_;
  QuantisedMatrix<T> plain_;
  const BlockLayout& L_;
  Encoder<> encoder_{o_.quantise.codebook};
  unsigned zero_code_ = 0;
  Matrix<T> E_;                         ///< w̃ − q, columns in the order they are coded
  Buffer<std::uint8_t> codes_;          ///< row by row, a byte each
  std::vector<double> loss_, squares_;  ///< of each row: Σ_k d_k²·(w̃_k − q_k)², Σ_k (w_k − q_k)²
  std::vector<float> scales_;
  std::vector<std::uint8_t> zeros_;
  std::atomic<bool> overflow_{false};
};

}  // namespace detail

/// gptq with a factor of H made before; `damping` and `by_activation` are those the factor was made with.
/// **Throws**, **Cost**: as below, without those of the factor.
template <MatrixLike X>
GptqResult<factor_scalar<X>> gptq(X&& W, const GptqFactor<factor_scalar<X>>& factor, const GptqOptions& options = {}) {
  const auto start = std::chrono::steady_clock::now();
  using S = typename decltype(view_of(W))::value_type;
  detail::Gptq<factor_scalar<X>, S> run(view_of(W), factor, options);
  auto result = run.run();
  result.report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

/// W as codes and scales that change the layer's outputs little, rather than the weights.
///
/// Column k gets the code nearest to w_k as corrected for the errors of the columns before it, so that
/// tr((W − Q)·(H + λI)·(W − Q)ᵀ) stays small: with H = XᵀX that is ‖X·Wᵀ − X·Qᵀ‖_F². A block's scale is chosen from
/// the corrected weights when the columns reach it.
/// **Shapes** W out×in of float, double, bf16 or f16 in any order, H in×in. **Scale** of H: any; a mean serves as well
/// as a sum. The result is an ordinary QuantisedMatrix.
/// **Throws** ShapeError; NonFiniteError; ArgumentError unless H is symmetric and positive definite after damping, for
/// blocks that run on over row ends, double quantisation or by_activation without fixed_scales, and as quantise.
/// **Cost** out·in² flops in T (twice that with compare_plain), in³ flops in double for the factor; memory: out·in
/// values of T and as many bytes, 2·in² values of T, in² doubles while H is factored.
/// **Numerics** with H = I the codes are those of quantise; with compare_plain no row's weighted error exceeds that of
/// quantise. The same bits for any number of threads. The plain Frobenius error is larger than quantise's.
/// **Source** Frantar et al., arXiv 2210.17323, eq. 2–3 and algorithm 1; scales of groups as in §4.
template <MatrixLike X, MatrixLike Y>
GptqResult<factor_scalar<X>> gptq(X&& W, Y&& H, const GptqOptions& options = {}) {
  const auto start = std::chrono::steady_clock::now();
  const auto view = view_of(W);
  const auto h = view_of(H);
  detail::expect_shape("gptq", "H", h.rows(), h.cols(), view.cols(), view.cols());
  const GptqFactor<factor_scalar<X>> factor(h, options);
  auto result = gptq(view, factor, options);
  result.report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace lowrank

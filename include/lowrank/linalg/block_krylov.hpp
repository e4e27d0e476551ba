// SPDX-License-Identifier: Apache-2.0
// The engine under truncated_svd: block Lanczos on AᵀA with full orthogonalisation, Rayleigh–Ritz and thick restart.
//
// Letters: M is A, or Aᵀ when that side is the cheap one; V the basis (one vector a row), d its size; T = V·MᵀM·Vᵀ;
// θ, q the eigenpairs of T; b the block, k the rank. After every step MᵀM·Vᵀ = Vᵀ·T + Wᵀ·(0 … 0 L)ᵀ, W the next block.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "lowrank/linalg/sided_operator.hpp"
#include "lowrank/linalg/small_svd.hpp"
#include "lowrank/linalg/symmetric_eigen.hpp"
#include "lowrank/linalg/truncated_svd_result.hpp"
#include "lowrank/linalg/vector_block.hpp"

namespace lowrank::detail {

template <Real T, class Op>
class BlockKrylov {
 public:
  BlockKrylov(const Op& A, Index rank, const TruncatedSvdOptions& options)
      : A_(A), k_(rank), options_(options), M_(A, choose_side(A), "truncated_svd") {}

  TruncatedSvd<T> run(MatrixView<const T> start) {
    result_.total_energy = energy_of(A_);
    const Index shorter = std::min<Index>(A_.rows(), A_.cols());
    if (shorter <= std::max<Index>(48, 3 * k_)) return whole_space();
    prepare(start);
    if (first_norm_ == 0 && result_.total_energy == 0) return finish();
    iterate();
    return finish();
  }

 private:
  static GramSide choose_side(const Op& A) {
    if constexpr (HasGram<Op, T>) return A.gram_side();
    return A.cols() <= A.rows() ? GramSide::right : GramSide::left;
  }
  static double energy_of(const Op& A) {
    if constexpr (HasFrobeniusNorm<Op>) {
      const double sum = A.frobenius_norm_squared();
      if (!std::isfinite(sum) && std::same_as<T, float>)
        throw NonFiniteError("truncated_svd: the matrix holds NaN or infinity");
      return sum;
    } else {
      return std::numeric_limits<double>::quiet_NaN();
    }
  }

  /// Few singular values in all: the basis is the whole space of the shorter side, and the answer exact.
  TruncatedSvd<T> whole_space() {
    M_ = SidedOperator<T, Op>(A_, A_.cols() <= A_.rows() ? GramSide::right : GramSide::left, "truncated_svd");
    const Index n = M_.domain();
    block_ = n;
    basis_.emplace(n, n, CounterRng(options_.seed));
    const MatrixView<T> I = basis_->next(n);
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < n; ++j) I(i, j) = T(i == j);
    basis_->resize(n);
    Y_.resize(n, M_.range());
    M_.settle_scale(I, Y_.view());
    energy_met_ = residual_met_ = true;
    vectors_.resize(n, n);
    vectors_.set_zero();
    for (Index i = 0; i < n; ++i) vectors_(i, i) = 1;
    return finish();
  }

  void prepare(MatrixView<const T> start) {
    const Index n = M_.domain(), widest = std::min<Index>(n, M_.range());
    const bool warm = !start.empty();
    if (options_.block > 0)
      block_ = options_.block;
    else if (warm)
      block_ = start.cols() + (options_.oversampling > 0 ? options_.oversampling : 4);
    else
      block_ = k_ <= 32 ? 4 : k_ <= 80 ? 8 : 16;
    block_ = std::min(block_, std::max<Index>(1, widest / 4));
    // Beyond min(m, n) directions there are only zeros left to find, up to what the start had outside of the row space.
    const Index full = std::min(n, widest + block_);
    capacity_ = options_.max_basis > 0 ? std::max(options_.max_basis, k_ + 2 * block_) : 6 * k_ + 384 + 2 * block_;
    capacity_ = std::min(capacity_, full);
    basis_.emplace(std::min(capacity_ + block_, n), n, CounterRng(options_.seed, 1));
    const MatrixView<T> X = basis_->next(block_);
    CounterRng(options_.seed).fill_normal(X);
    if (warm) {
      const Index given = std::min(start.cols(), block_);
      if (M_.side() == GramSide::right) {
        for (Index i = 0; i < given; ++i)
          for (Index j = 0; j < n; ++j) X(i, j) = start(j, i);
      } else {
        // The basis lives on the other side: A·start spans what start's triplets span there.
        Matrix<T> V(given, start.rows());
        V.assign(start.middle_cols(0, given).transposed());
        M_.adjoint(V.view(), X.middle_rows(0, given));
      }
    }
    Matrix<double> C(block_, 0), L(block_, block_);
    basis_->accept(block_, C.view(), L.view());
    T_ = Matrix<double>(capacity_ + block_, capacity_ + block_);
    Y_.resize(block_, M_.range());
    first_norm_ = M_.settle_scale(basis_->rows(0, block_), Y_.view());
  }

  void iterate() {
    const Index most = options_.max_passes > 0 ? options_.max_passes : 1000;
    Index next_check = k_ + block_;
    while (true) {
      const bool full = step();
      const Index d = settled_;
      if (full || d >= next_check || d + block_ > capacity_ || M_.passes() + 4 > most) {
        if (d >= k_) {
          check(full);
          if (full || (energy_met_ && residual_met_) || M_.passes() + 4 > most) return;
        }
        next_check = d + std::max(block_, d / 8 / block_ * block_);
        if (d + block_ > capacity_) restart();
      }
    }
  }

  /// One block step: Z = MᵀM·(last block), its part of T, and the next block. True when the space is exhausted.
  bool step() {
    const Index d = basis_->count(), b = last_block();
    const Index room = M_.domain() - d;
    Z_.resize(b, M_.domain());
    M_.gram(basis_->rows(d - b, b), Y_.view().middle_rows(0, b), Z_.view());
    settled_ = d;
    if (room < b || d + b > M_.domain()) {
      // No room for another block: what is left of Z outside of the basis is rounding.
      Matrix<T> c(b, d);
      gemm(T(1), MatrixView<const T>(Z_.view()), basis_->view().transposed(), c.view());
      store_column(d - b, c.view());
      coupling_.resize(b, b);
      coupling_.set_zero();
      return true;
    }
    for (Index i = 0; i < b; ++i) std::copy_n(&Z_(i, 0), M_.domain(), &basis_->next(b)(i, 0));
    Matrix<double> C(b, d);
    coupling_.resize(b, b);
    coupling_.set_zero();
    basis_->accept(b, C.view(), coupling_.view());
    store_column(d - b, C.view());
    return false;
  }
  [[nodiscard]] Index last_block() const { return block_; }

  template <class C>
  void store_column(Index first, const C& c) {
    for (Index i = 0; i < c.rows(); ++i)
      for (Index j = 0; j < c.cols(); ++j) {
        const double x = double(c(i, j));
        // The part among the new vectors is computed twice; their mean is symmetric.
        if (j >= first)
          T_(first + i, j) = T_(j, first + i) = 0.5 * (x + double(c(j - first, first + i)));
        else
          T_(first + i, j) = T_(j, first + i) = x;
      }
  }

  /// Rayleigh–Ritz on the settled part of the basis: Ritz vectors, residual and energy estimates, verdict.
  void check(bool full) {
    const Index d = settled_;
    const SymmetricEigen eigen = symmetric_eigen(T_.view().block(0, 0, d, d));
    const double top = std::max(eigen.values[0], 0.0);
    double energy = 0, worst = 0, moved = 0;
    for (Index i = 0; i < k_; ++i) {
      const double theta = std::max(eigen.values[std::size_t(i)], 0.0);
      energy += theta;
      double square = 0;
      for (Index c = 0; c < block_; ++c) {
        double r = 0;
        for (Index l = c; l < block_; ++l) r += eigen.vectors(d - block_ + l, i) * coupling_(l, c);
        square += r * r;
      }
      // ‖MᵀM·v − θ·v‖ / √θ is the residual of the triplet.
      const double r = std::sqrt(square), floor = top * double(std::numeric_limits<T>::epsilon());
      moved += std::min(r, theta);
      worst = std::max(worst, r / std::sqrt(std::max({theta, floor, std::numeric_limits<double>::min()})));
    }
    const double sigma = std::sqrt(top);
    estimate_deficit(energy, energy > 0 ? moved / energy : 0);
    residual_met_ = full || options_.residual_tolerance == 0 || worst <= options_.residual_tolerance * sigma;
    energy_met_ = full || options_.energy_tolerance == 0 || deficit_ <= options_.energy_tolerance;
    if (full) deficit_ = 0;
    vectors_.resize(d, d);
    for (Index i = 0; i < d; ++i)
      for (Index j = 0; j < d; ++j) vectors_(i, j) = eigen.vectors(j, i);
    values_ = eigen.values;
  }

  /// The energy still missing, from how fast it grew: a geometric series with the ratio of the last two gains a step.
  void estimate_deficit(double energy, double bound) {
    deficit_ = bound;  // Weyl: a Ritz value is within its residual of an eigenvalue
    if (energies_ >= 1 && energy > 0) {
      const double steps = double(M_.passes() - pass_of_energy_);
      const double gain = std::max(0.0, (energy - energy_)) / energy / std::max(1.0, steps);
      double ratio = 0.9;
      if (energies_ >= 2 && gain_ > 0) ratio = std::clamp(std::pow(gain / gain_, 1 / std::max(1.0, steps)), 0.3, 0.97);
      if (energies_ >= 2) deficit_ = std::min(deficit_, gain * ratio / (1 - ratio) + 4 * double(eps));
      gain_ = gain;
    }
    energy_ = energy;
    pass_of_energy_ = M_.passes();
    ++energies_;
  }

  /// Keeps the best Ritz vectors and the next block, forgets the rest; T becomes an arrow.
  void restart() {
    const Index d = settled_, b = block_;
    const Index extra = options_.oversampling > 0 ? options_.oversampling : std::max<Index>(2 * b, k_ / 2);
    const Index keep = std::min(k_ + extra, d - b);
    Matrix<T> Q(keep + b, d + b);
    for (Index i = 0; i < keep; ++i)
      for (Index j = 0; j < d; ++j) Q(i, j) = T(vectors_(i, j));
    for (Index i = 0; i < b; ++i) Q(keep + i, d + i) = T(1);
    basis_->rotate(Q.view());
    Matrix<double> arrow(keep, b);
    for (Index i = 0; i < keep; ++i)
      for (Index c = 0; c < b; ++c) {
        double r = 0;
        for (Index l = c; l < b; ++l) r += vectors_(i, d - b + l) * coupling_(l, c);
        arrow(i, c) = r;
      }
    T_.set_zero();
    for (Index i = 0; i < keep; ++i) {
      T_(i, i) = values_[std::size_t(i)];
      for (Index c = 0; c < b; ++c) T_(i, keep + c) = T_(keep + c, i) = arrow(i, c);
    }
  }

  /// The triplets from the Ritz vectors: Y = M·V is decomposed anew, so that squares of singular values play no part in
  /// them.
  TruncatedSvd<T> finish() {
    const Index n = M_.domain(), m = M_.range();
    Matrix<T> V(k_, n), Y(k_, m), Z(k_, n);
    const bool whole = !vectors_.empty() && vectors_.rows() == n && basis_->count() == n && Y_.rows() == n;
    if (whole) return finish_whole();
    const Index d = vectors_.rows();
    if (d >= k_) {
      Matrix<T> Q(k_, d);
      for (Index i = 0; i < k_; ++i)
        for (Index j = 0; j < d; ++j) Q(i, j) = T(vectors_(i, j));
      basis_->resize(d);
      gemm(T(1), Q.view(), basis_->view(), V.view());
    } else {
      CounterRng(options_.seed, 2).fill_normal(V.view());
    }
    orthonormalize(V.view().transposed());
    M_.forward(V.view(), Y.view());
    return decompose(std::move(V), std::move(Y));
  }
  TruncatedSvd<T> finish_whole() {
    Matrix<T> V(basis_->view());
    return decompose(std::move(V), std::move(Y_));
  }

  /// SVD of Y = M·V (vectors in rows), truncated to k, with the residuals measured.
  TruncatedSvd<T> decompose(Matrix<T> V, Matrix<T> Y) {
    const Index w = V.rows(), n = V.cols(), m = Y.cols();
    Matrix<T> R(w, w);
    thin_qr_in_place(Y.view().transposed(), R.view());
    const Svd<double> inner = small_svd<double>(Matrix<double>(R.view()).view());
    Matrix<T> P(w, k_), Q(w, k_);
    for (Index i = 0; i < w; ++i)
      for (Index j = 0; j < k_; ++j) {
        P(i, j) = T(inner.U(i, j));
        Q(i, j) = T(inner.V(i, j));
      }
    Matrix<T> Ut(k_, m), Vt(k_, n), Z(k_, n);
    gemm(T(1), P.view().transposed(), Y.view(), Ut.view());
    gemm(T(1), Q.view().transposed(), V.view(), Vt.view());
    M_.adjoint(Ut.view(), Z.view());
    const double scale = M_.scale();
    result_.residuals.resize(std::size_t(k_));
    result_.S.resize(std::size_t(k_));
    double captured = 0, worst = 0;
    for (Index i = 0; i < k_; ++i) {
      const double sigma = inner.S[std::size_t(i)];
      double square = 0;
      for (Index j = 0; j < n; ++j) {
        const double r = double(Z(i, j)) - sigma * double(Vt(i, j));
        square += r * r;
      }
      worst = std::max(worst, std::sqrt(square));
      result_.residuals[std::size_t(i)] = std::sqrt(square) / scale;
      result_.S[std::size_t(i)] = T(sigma / scale);
      captured += (sigma / scale) * (sigma / scale);
    }
    if (options_.residual_tolerance > 0) residual_met_ = worst <= options_.residual_tolerance * inner.S[0];
    result_.captured_energy = captured;
    result_.energy_deficit = deficit_;
    result_.passes = M_.passes();
    result_.block = block_;
    result_.basis = vectors_.rows();
    result_.converged = energy_met_ && residual_met_;
    const bool right = M_.side() == GramSide::right;
    result_.U = Matrix<T>((right ? Ut : Vt).view().transposed());
    result_.V = Matrix<T>((right ? Vt : Ut).view().transposed());
    return std::move(result_);
  }

  static constexpr double eps = double(std::numeric_limits<T>::epsilon());

  const Op& A_;
  Index k_;
  TruncatedSvdOptions options_;
  SidedOperator<T, Op> M_;
  std::optional<OrthonormalRows<T>> basis_;
  Matrix<T> Y_, Z_;
  Matrix<double> T_, coupling_, vectors_;
  std::vector<double> values_;
  Index block_ = 0, capacity_ = 0, settled_ = 0, energies_ = 0, pass_of_energy_ = 0;
  double first_norm_ = 0, deficit_ = 1, energy_ = 0, gain_ = 0;
  bool energy_met_ = false, residual_met_ = false;
  TruncatedSvd<T> result_;
};

}  // namespace lowrank::detail

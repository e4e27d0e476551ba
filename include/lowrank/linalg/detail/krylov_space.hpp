// SPDX-License-Identifier: Apache-2.0
// The Krylov space of MᵀM: its orthonormal basis, the projection T of MᵀM on it, the next block, and thick restarts.
//
// After every step MᵀM·Vᵀ = Vᵀ·T + Wᵀ·(0 … 0 L)ᵀ: V the basis (one vector a row), W the next block, L the coupling.
#pragma once

#include <algorithm>

#include "lowrank/linalg/detail/sided_operator.hpp"
#include "lowrank/linalg/detail/vector_block.hpp"
#include "lowrank/linalg/symmetric_eigen.hpp"
#include "lowrank/linalg/truncated_svd_result.hpp"

namespace lowrank::detail {

/// How many vectors are multiplied at once, and how many a basis holds before it is restarted.
struct BasisPlan {
  Index block = 0, capacity = 0;

  /// For `rank` triplets of an operator with vectors of length `domain` and images of length `range`; `start`: vectors
  /// of a warm start, 0 for a random one.
  [[gnu::cold]] static BasisPlan of(const TruncatedSvdOptions& options, Index rank, Index domain, Index range,
                                    Index start) {
    constexpr Index fresh = 4;          // random vectors beside a warm start, which may lack a direction
    constexpr Index least_basis = 144;  // what a small eigenproblem costs is nothing beside a pass
    const Index widest = std::min(domain, range);
    BasisPlan plan;
    if (options.block > 0)
      plan.block = options.block;
    else if (start > 0)
      plan.block = start + (options.oversampling > 0 ? options.oversampling : fresh);
    else
      plan.block = rank <= 32 ? 4 : rank <= 80 ? 8 : 16;
    plan.block = std::min(plan.block, std::max<Index>(1, start > 0 ? widest / 2 : widest / 4));
    // Beyond min(m, n) directions there are only zeros left to find, up to what the start had outside of the row space.
    const Index full = std::min(domain, widest + plan.block);
    // A larger basis needs fewer passes, a smaller one cheaper eigenproblems; this is where they balance.
    plan.capacity = options.max_basis > 0 ? std::max(options.max_basis, rank + 2 * plan.block)
                                          : std::max<Index>(least_basis, 2 * rank + 12 * plan.block);
    plan.capacity = std::min(plan.capacity, full);
    return plan;
  }
};

template <Real T>
class KrylovSpace {
 public:
  KrylovSpace(SidedOperator<T>& M, const BasisPlan& plan, std::uint64_t seed)
      : M_(M),
        block_(plan.block),
        capacity_(plan.capacity),
        basis_(std::min(capacity_ + block_, M.domain()), M.domain(), CounterRng(seed, 1)),
        T_(capacity_ + block_, capacity_ + block_) {
    Y_.resize(block_, M.range());
  }

  /// The first block: random, but for the columns of `start`. Returns how many vectors are random.
  [[gnu::cold]] Index begin(MatrixView<const T> start, std::uint64_t seed) {
    const Index n = M_.domain();
    const MatrixView<T> X = basis_.next(block_);
    parallel_ranges(block_, 1, [&](Index i0, Index i1) {
      for (Index i = i0; i < i1; ++i) CounterRng(seed).fill_normal(X.middle_rows(i, 1), 0, 1, std::uint64_t(i * n));
    });
    const Index given = std::min(start.cols(), block_);
    if (!start.empty()) {
      if (M_.side() == GramSide::right) {
        copy_elements(start.middle_cols(0, given).transposed(), X.middle_rows(0, given));
      } else {
        // The basis lives on the other side: A·start spans what start's triplets span there.
        Matrix<T> V(given, start.rows());
        V.assign(start.middle_cols(0, given).transposed());
        M_.adjoint(V.view(), X.middle_rows(0, given));
      }
    }
    Matrix<double> C(block_, 0), L(block_, block_);
    basis_.accept(block_, C.view(), L.view());
    return start.empty() ? block_ : block_ - given;
  }
  /// Settles M's scale by what M does to the first block; see SidedOperator.
  double settle_scale() { return M_.settle_scale(basis_.rows(0, block_), Y_.view()); }

  [[nodiscard]] Index block() const noexcept { return block_; }
  [[nodiscard]] Index capacity() const noexcept { return capacity_; }
  /// Vectors whose part of T is known.
  [[nodiscard]] Index settled() const noexcept { return settled_; }
  /// Whether directions are left that no block will take.
  [[nodiscard]] bool incomplete() const noexcept { return incomplete_; }
  /// Whether another step needs a restart.
  [[nodiscard]] bool crowded() const noexcept { return settled_ + block_ > capacity_; }
  /// T's part for the settled vectors.
  [[nodiscard]] MatrixView<const double> projection() const { return T_.view().block(0, 0, settled_, settled_); }
  [[nodiscard]] MatrixView<const T> vectors() const { return basis_.view(); }

  /// One block step: Z = MᵀM·(last block), its part of T, and the next block. True when the space is exhausted.
  [[gnu::cold]] bool step() {
    const Index d = basis_.count(), b = block_;
    const Index room = M_.domain() - d;
    Z_.resize(b, M_.domain());
    M_.gram(basis_.rows(d - b, b), Y_.view().middle_rows(0, b), Z_.view());
    settled_ = d;
    coupling_.resize(b, b);
    coupling_.set_zero();
    if (room < b || d + b > M_.domain()) {
      // No room for another block. Without any, what is left of Z outside of the basis is rounding; with a little,
      // there are directions that no block will take, and the space is taken whole.
      incomplete_ = room > 0;
      Matrix<T> c(b, d);
      gemm(T(1), MatrixView<const T>(Z_.view()), basis_.view().transposed(), c.view());
      store_column(d - b, Matrix<double>(c.view()));
      return true;
    }
    for (Index i = 0; i < b; ++i) std::copy_n(&Z_(i, 0), M_.domain(), &basis_.next(b)(i, 0));
    Matrix<double> C(b, d);
    basis_.accept(b, C.view(), coupling_.view(), restarted_ ? 0 : std::max<Index>(0, d - 2 * b));
    restarted_ = false;
    store_column(d - b, C);
    return false;
  }

  /// Component of MᵀM·(Ritz vector i) along vector c of the next block.
  [[nodiscard]] double coupling_to_next(const SymmetricEigen& ritz, Index i, Index c) const {
    const Index last = ritz.vectors.rows() - block_;
    double r = 0;
    for (Index l = c; l < block_; ++l) r += ritz.vectors(last + l, i) * coupling_(l, c);
    return r;
  }

  /// The `count` leading Ritz vectors of the first `of` basis vectors, in rows.
  void ritz_vectors(const SymmetricEigen& ritz, Index count, Index of, MatrixView<T> out) const {
    Matrix<T> Q(count, of);
    copy_elements(ritz.vectors.view().block(0, 0, of, count).transposed(), Q.view());
    gemm(T(1), Q.view(), basis_.rows(0, of), out);
  }

  /// Keeps the best Ritz vectors and the next block, forgets the rest; T becomes an arrow.
  [[gnu::cold]] void restart(const SymmetricEigen& ritz, Index rank, Index oversampling) {
    const Index d = settled_, b = block_;
    const Index extra = oversampling > 0 ? oversampling : std::max<Index>(2 * b, rank / 2);
    const Index keep = std::min({rank + extra, d - b, std::max(rank, capacity_ - 3 * b)});
    Matrix<T> Q(keep + b, d + b);
    copy_elements(ritz.vectors.view().block(0, 0, d, keep).transposed(), Q.view().block(0, 0, keep, d));
    for (Index i = 0; i < b; ++i) Q(keep + i, d + i) = T(1);
    basis_.rotate(Q.view());
    T_.set_zero();
    for (Index i = 0; i < keep; ++i) {
      T_(i, i) = ritz.values[std::size_t(i)];
      for (Index c = 0; c < b; ++c) T_(i, keep + c) = T_(keep + c, i) = coupling_to_next(ritz, i, c);
    }
    settled_ = keep;
    restarted_ = true;
  }

 private:
  [[gnu::cold]] void store_column(Index first, const Matrix<double>& c) {
    for (Index i = 0; i < c.rows(); ++i)
      for (Index j = 0; j < c.cols(); ++j) {
        const double x = c(i, j);
        // The part among the new vectors comes twice; the mean is symmetric.
        if (j >= first)
          T_(first + i, j) = T_(j, first + i) = 0.5 * (x + c(j - first, first + i));
        else
          T_(first + i, j) = T_(j, first + i) = x;
      }
  }

  SidedOperator<T>& M_;
  Index block_, capacity_, settled_ = 0;
  OrthonormalRows<T> basis_;
  Matrix<double> T_, coupling_;
  Matrix<T> Y_, Z_;
  bool incomplete_ = false, restarted_ = false;
};

}  // namespace lowrank::detail

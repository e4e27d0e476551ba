// SPDX-License-Identifier: Apache-2.0
// The engine under truncated_svd: block Lanczos on AᵀA with full orthogonalisation, Rayleigh–Ritz and thick restart.
//
// Letters: M is A, or Aᵀ when that side is the cheap one; θ, q the eigenpairs of T, MᵀM projected on the basis; k the
// rank. KrylovSpace takes the steps, StoppingRule decides, MeasuredTriplets makes and measures what is returned.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "lowrank/linalg/detail/golub_kahan.hpp"
#include "lowrank/linalg/detail/krylov_space.hpp"
#include "lowrank/linalg/detail/measured_triplets.hpp"
#include "lowrank/linalg/detail/stopping_rule.hpp"

namespace lowrank::detail {

template <Real T>
class BlockKrylov {
 public:
  BlockKrylov(AnyOperator<T> A, Index rank, const TruncatedSvdOptions& options)
      : A_(A), k_(rank), options_(options), M_(A, choose_side(A), "truncated_svd"), triplets_(rank) {}

  [[gnu::cold]] TruncatedSvd<T> run(MatrixView<const T> start) {
    result_.total_energy = energy_of(A_);
    StoppingRule rule(options_, eps, !start.empty());
    // So few singular values that the space of the shorter side is taken whole: the answer is exact.
    const Index shorter = std::min<Index>(A_.rows(), A_.cols());
    if (shorter <= std::max<Index>(small_enough, 3 * k_)) return whole_space(rule);
    KrylovSpace<T> space(M_, BasisPlan::of(options_, k_, M_.domain(), M_.range(), start.cols()), options_.seed);
    random_ = space.begin(start, options_.seed);
    result_.block = space.block();
    // A known norm in the safe range settles the scale without a product.
    const double known = std::sqrt(result_.total_energy), norm = M_.safe_norm(known) ? known : space.settle_scale();
    if (norm > 0) {
      iterate(space, rule, !start.empty());
      if (space.incomplete()) return whole_space(rule);
    } else {  // A·X = 0 for random X: A is zero
      rule.take_exact();
    }
    finish(space, rule);
    return deliver(rule);
  }

  /// Whether values above the last one returned lie so close together, as many as random vectors were started from,
  /// that there may be more of them than the iteration can have seen: see with_hidden_copies.
  [[nodiscard]] bool may_hide_copies() const noexcept { return may_hide_copies_; }

 private:
  /// Singular values that are had at once for less than iterating would take.
  static constexpr Index small_enough = 48;
  /// Values this many eps·σ₁² apart in their squares may be copies of each other, whatever the residuals.
  static constexpr double copies_eps = 256;
  static constexpr double eps = double(std::numeric_limits<T>::epsilon());

  static GramSide choose_side(const AnyOperator<T>& A) {
    if (A.has_gram()) return A.gram_side();
    return A.cols() <= A.rows() ? GramSide::right : GramSide::left;
  }
  [[gnu::cold]] static double energy_of(const AnyOperator<T>& A) {
    if (!A.knows_energy()) return std::numeric_limits<double>::quiet_NaN();
    const double sum = A.frobenius_norm_squared();
    // Squares of finite doubles may overflow; those of floats do not.
    if (std::isnan(sum) || (std::isinf(sum) && std::same_as<T, float>))
      throw NonFiniteError("truncated_svd: the matrix holds NaN or infinity");
    return sum;
  }

  [[gnu::cold]] TruncatedSvd<T> whole_space(StoppingRule& rule) {
    const Index spent = M_.passes();
    M_ = SidedOperator<T>(A_, A_.cols() <= A_.rows() ? GramSide::right : GramSide::left, "truncated_svd");
    const Index n = M_.domain();
    result_.block = result_.basis = n;
    may_hide_copies_ = false;
    Matrix<T> I(n, n), Y(n, M_.range());
    for (Index i = 0; i < n; ++i) I(i, i) = T(1);
    M_.settle_scale(I.view(), Y.view());
    rule.take_exact();
    triplets_.decompose(M_, I, std::move(Y));
    result_.passes = spent;
    return deliver(rule);
  }

  [[gnu::cold]] void iterate(KrylovSpace<T>& space, StoppingRule& rule, bool warm) {
    const Index block = space.block();
    // A warm start may be good enough at once; a cold one is not before its basis has outgrown the rank.
    Index next_look = warm ? k_ : std::max(k_ + 4 * block, k_ + k_ / 2);
    while (true) {
      const bool full = space.step();
      if (space.incomplete()) return;
      const bool last = full || rule.last_step(M_.passes()), crowded = space.crowded();
      if (!last && !crowded && space.settled() < next_look) continue;
      if (space.settled() >= k_) {
        rule.look(look(space, full, crowded), M_.passes());
        if (last || rule.met()) return;
      } else if (last) {
        return;
      }
      if (crowded) space.restart(whole_ritz(), k_, options_.oversampling);
      next_look = space.settled() + rule.steps_to_go(space.settled(), block) * block;
      // A look shortly before the basis is full would be followed by the restart's.
      if (next_look + 2 * block > space.capacity()) next_look = space.capacity();
    }
  }

  /// Rayleigh–Ritz on the settled part of the basis: Ritz values, their residuals, and whether copies may hide.
  [[gnu::cold]] RitzLook look(const KrylovSpace<T>& space, bool full, bool crowded) {
    const Index d = space.settled(), block = space.block();
    // Residuals need the last elements of the Ritz vectors; a restart will want them whole.
    form_.emplace(space.projection(), "truncated_svd");
    ritz_ = crowded ? form_->whole() : form_->tail(std::min(d, block));
    constexpr double least = std::numeric_limits<double>::min();
    const double top = std::max(ritz_.values[0], 0.0), floor = top * eps;
    const double next = d > k_ ? std::max(ritz_.values[std::size_t(k_)], 0.0) : 0;
    RitzLook now{.full = full};
    double worst = 0;
    may_hide_copies_ = false;
    for (Index i = 0; i < k_; ++i) {
      const double theta = std::max(ritz_.values[std::size_t(i)], 0.0);
      double square = 0;
      for (Index c = 0; c < block; ++c) {
        const double r = space.coupling_to_next(ritz_, i, c);
        square += r * r;
      }
      // ‖MᵀM·v − θ·v‖; divided by √θ, the residual of the triplet.
      const double r = std::sqrt(square);
      now.energy += theta;
      // A Ritz value is within r of an eigenvalue (Weyl), and about r²/gap below its own (Kato–Temple).
      now.missing += std::min(r, square / std::max(theta - next, least));
      // A group no wider than the residuals, with all the copies that the start can have brought, and not the last.
      const double group = theta - std::max(r, copies_eps * floor);
      const Index reach = i + std::max<Index>(2, random_) - 1;
      if (!full && reach < d && ritz_.values[std::size_t(reach)] >= group && ritz_.values[std::size_t(k_ - 1)] < group)
        may_hide_copies_ = true;
      worst = std::max(worst, r / std::sqrt(std::max({theta, floor, least})));
    }
    now.worst_residual = top > 0 ? worst / std::sqrt(top) : 0;
    result_.basis = d;
    return now;
  }
  /// The Ritz vectors of the last look, whole.
  [[gnu::cold]] const SymmetricEigen& whole_ritz() {
    if (ritz_.vectors.rows() < ritz_.vectors.cols()) ritz_ = form_->whole();
    return ritz_;
  }

  /// The triplets from the Ritz vectors: Y = M·V is decomposed anew, so that squares of singular values play no part in
  /// them; where the squares kept small singular vectors from converging, those are refined.
  [[gnu::cold]] void finish(const KrylovSpace<T>& space, const StoppingRule& rule) {
    Matrix<T> V(k_, M_.domain());
    if (result_.basis >= k_) {
      space.ritz_vectors(whole_ritz(), k_, result_.basis, V.view());
    } else {  // stopped before there were k vectors: those there are, and random ones
      CounterRng(options_.seed, 2).fill_normal(V.view());
      const MatrixView<const T> have = space.vectors().middle_rows(0, std::min(k_, space.vectors().rows()));
      std::copy_n(have.data(), have.size(), V.data());
    }
    refresh_orthonormal(V.view());
    triplets_.take(M_, V);
    if (rule.refine(triplets_.sigma(), triplets_.residual(), M_.passes())) {
      GolubKahan<T>::refine(M_, V, options_.residual_tolerance, rule.most_passes(), options_.seed);
      refresh_orthonormal(V.view());
      triplets_.take(M_, V);
    }
  }

  [[gnu::cold]] TruncatedSvd<T> deliver(const StoppingRule& rule) {
    triplets_.deliver(M_, result_);
    result_.energy_deficit = rule.deficit();
    result_.passes += M_.passes();
    rule.settle(triplets_.sigma(), triplets_.residual(), M_.passes(), result_);
    return std::move(result_);
  }

  AnyOperator<T> A_;
  Index k_;
  TruncatedSvdOptions options_;
  SidedOperator<T> M_;
  MeasuredTriplets<T> triplets_;
  std::optional<TridiagonalForm> form_;  // of T's settled part, at the last look
  SymmetricEigen ritz_;
  Index random_ = 0;  // vectors of the first block that were random
  bool may_hide_copies_ = false;
  TruncatedSvd<T> result_;
};

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// The engine under truncated_svd: block Lanczos on AᵀA with full orthogonalisation, Rayleigh–Ritz and thick restart.
//
// Letters: M is A, or Aᵀ when that side is the cheap one; V the basis (one vector a row), d its size; T = V·MᵀM·Vᵀ;
// θ, q the eigenpairs of T; b the block, k the rank. After every step MᵀM·Vᵀ = Vᵀ·T + Wᵀ·(0 … 0 L)ᵀ, W the next block.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>

#include "lowrank/linalg/detail/golub_kahan.hpp"
#include "lowrank/linalg/detail/sided_operator.hpp"
#include "lowrank/linalg/detail/vector_block.hpp"
#include "lowrank/linalg/small_svd.hpp"
#include "lowrank/linalg/symmetric_eigen.hpp"
#include "lowrank/linalg/truncated_svd_result.hpp"

namespace lowrank::detail {

template <Real T>
class BlockKrylov {
 public:
  BlockKrylov(AnyOperator<T> A, Index rank, const TruncatedSvdOptions& options)
      : A_(A), k_(rank), options_(options), M_(A, choose_side(A), "truncated_svd") {}

  [[gnu::cold]] TruncatedSvd<T> run(MatrixView<const T> start) {
    result_.total_energy = energy_of(A_);
    // So few singular values that the space of the shorter side is taken whole: the answer is exact.
    const Index shorter = std::min<Index>(A_.rows(), A_.cols());
    if (shorter <= std::max<Index>(48, 3 * k_)) return whole_space();
    prepare(start);
    if (first_norm_ > 0) {
      iterate();
      if (incomplete_) return whole_space();
    } else {  // A·X = 0 for random X: A is zero
      deficit_ = 0;
      energy_met_ = residual_met_ = true;
    }
    return finish();
  }

  /// Whether values above the last one returned lie so close together, as many as random vectors were started from,
  /// that there may be more of them than the iteration can have seen: see with_hidden_copies.
  [[nodiscard]] bool may_hide_copies() const noexcept { return may_hide_copies_; }

 private:
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

  [[gnu::cold]] TruncatedSvd<T> whole_space() {
    spent_ = M_.passes();
    M_ = SidedOperator<T>(A_, A_.cols() <= A_.rows() ? GramSide::right : GramSide::left, "truncated_svd");
    const Index n = M_.domain();
    block_ = basis_size_ = n;
    may_hide_copies_ = false;
    Matrix<T> I(n, n), Y(n, M_.range());
    for (Index i = 0; i < n; ++i) I(i, i) = T(1);
    M_.settle_scale(I.view(), Y.view());
    deficit_ = 0;
    energy_met_ = residual_met_ = true;
    decompose(std::move(I), std::move(Y));
    return deliver();
  }

  [[gnu::cold]] void prepare(MatrixView<const T> start) {
    const Index n = M_.domain(), widest = std::min<Index>(n, M_.range());
    const bool warm = warm_ = !start.empty();
    if (options_.block > 0)
      block_ = options_.block;
    else if (warm)
      block_ = start.cols() + (options_.oversampling > 0 ? options_.oversampling : 4);
    else
      block_ = k_ <= 32 ? 4 : k_ <= 80 ? 8 : 16;
    block_ = std::min(block_, std::max<Index>(1, warm ? widest / 2 : widest / 4));
    // Beyond min(m, n) directions there are only zeros left to find, up to what the start had outside of the row space.
    const Index full = std::min(n, widest + block_);
    // A larger basis needs fewer passes, a smaller one cheaper eigenproblems; this is where they balance.
    capacity_ = options_.max_basis > 0 ? std::max(options_.max_basis, k_ + 2 * block_)
                                       : std::max<Index>(144, 2 * k_ + 12 * block_);
    capacity_ = std::min(capacity_, full);
    basis_.emplace(std::min(capacity_ + block_, n), n, CounterRng(options_.seed, 1));
    random_ = block_;
    const MatrixView<T> X = basis_->next(block_);
    parallel_ranges(block_, 1, [&](Index i0, Index i1) {
      for (Index i = i0; i < i1; ++i)
        CounterRng(options_.seed).fill_normal(X.middle_rows(i, 1), 0, 1, std::uint64_t(i * n));
    });
    if (warm) {
      const Index given = std::min(start.cols(), block_);
      random_ = block_ - given;
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
    // A known norm in the safe range settles the scale without a product.
    const double norm = std::sqrt(result_.total_energy);
    first_norm_ = M_.safe_norm(norm) ? norm : M_.settle_scale(basis_->rows(0, block_), Y_.view());
  }

  [[gnu::cold]] void iterate() {
    const Index most = options_.max_passes > 0 ? options_.max_passes : 1000;
    // A warm start may be good enough at once; a cold one is not before its basis has outgrown the rank.
    Index next_check = warm_ ? k_ : std::max(k_ + 4 * block_, k_ + k_ / 2);
    while (true) {
      const bool full = step();
      if (incomplete_) return;
      const bool last = full || M_.passes() + 4 > most, crowded = settled_ + block_ > capacity_;
      if (!last && !crowded && settled_ < next_check) continue;
      if (settled_ >= k_) {
        check(full, crowded);
        if (last || (energy_met_ && residual_met_)) return;
      } else if (last) {
        return;
      }
      if (crowded) restart();
      next_check = settled_ + steps_to_go() * block_;
      // A look shortly before the basis is full would be followed by the restart's.
      if (next_check + 2 * block_ > capacity_) next_check = capacity_;
    }
  }

  /// Steps until the next look: as many as the tolerances seem to need at the speed of the last ones, else a quarter of
  /// the basis.
  [[nodiscard]] Index steps_to_go() const {
    Index steps = std::max<Index>(1, settled_ / (4 * block_));
    if (rate_ > 0) steps = std::clamp<Index>(Index(std::ceil(distance_ / rate_)), 1, 2 * steps);
    return steps;
  }

  /// One block step: Z = MᵀM·(last block), its part of T, and the next block. True when the space is exhausted.
  [[gnu::cold]] bool step() {
    const Index d = basis_->count(), b = block_;
    const Index room = M_.domain() - d;
    Z_.resize(b, M_.domain());
    M_.gram(basis_->rows(d - b, b), Y_.view().middle_rows(0, b), Z_.view());
    settled_ = d;
    if (room < b || d + b > M_.domain()) {
      // No room for another block. Without any, what is left of Z outside of the basis is rounding; with a little,
      // there are directions that no block will take, and the space is taken whole.
      incomplete_ = room > 0;
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
    basis_->accept(b, C.view(), coupling_.view(), restarted_ ? 0 : std::max<Index>(0, d - 2 * b));
    restarted_ = false;
    store_column(d - b, C.view());
    return false;
  }

  template <class C>
  [[gnu::cold]] void store_column(Index first, const C& c) {
    for (Index i = 0; i < c.rows(); ++i)
      for (Index j = 0; j < c.cols(); ++j) {
        const double x = double(c(i, j));
        // The part among the new vectors comes twice; the mean is symmetric.
        if (j >= first)
          T_(first + i, j) = T_(j, first + i) = 0.5 * (x + double(c(j - first, first + i)));
        else
          T_(first + i, j) = T_(j, first + i) = x;
      }
  }

  /// Rayleigh–Ritz on the settled part of the basis: Ritz vectors, residual and energy estimates, verdict.
  [[gnu::cold]] void check(bool full, bool crowded) {
    const Index d = settled_;
    // Residuals need the last elements of the Ritz vectors; a restart will want them whole.
    form_.emplace(projection(d), "truncated_svd");
    ritz_ = crowded ? form_->whole() : form_->tail(std::min(d, block_));
    const SymmetricEigen& ritz = ritz_;
    const double top = std::max(ritz.values[0], 0.0), floor = top * eps;
    const double next = d > k_ ? std::max(ritz.values[std::size_t(k_)], 0.0) : 0;
    double energy = 0, worst = 0, missing = 0;
    may_hide_copies_ = false;
    for (Index i = 0; i < k_; ++i) {
      const double theta = std::max(ritz.values[std::size_t(i)], 0.0);
      double square = 0;
      for (Index c = 0; c < block_; ++c) {
        const double r = coupling_to_next(ritz, i, c);
        square += r * r;
      }
      // ‖MᵀM·v − θ·v‖; divided by √θ, the residual of the triplet.
      const double r = std::sqrt(square);
      energy += theta;
      // A Ritz value is within r of an eigenvalue (Weyl), and about r²/gap below its own (Kato–Temple).
      missing += std::min(r, square / std::max(theta - next, std::numeric_limits<double>::min()));
      // A group no wider than the residuals, with all the copies that the start can have brought, and not the last.
      const double group = theta - std::max(r, 256 * floor);
      const Index reach = i + std::max<Index>(2, random_) - 1;
      if (!full && reach < d && ritz.values[std::size_t(reach)] >= group && ritz.values[std::size_t(k_ - 1)] < group)
        may_hide_copies_ = true;
      worst = std::max(worst, r / std::sqrt(std::max({theta, floor, std::numeric_limits<double>::min()})));
    }
    const double before = deficit_, relative = top > 0 ? worst / std::sqrt(top) : 0;
    estimate_deficit(energy, energy > 0 ? missing / energy : 0);
    if (full) deficit_ = 0;
    // Below some eps the estimates mean nothing; what is left is for the refinement.
    const double residual_goal = std::max(options_.residual_tolerance, 4 * eps);
    residual_met_ = full || options_.residual_tolerance == 0 || relative <= residual_goal;
    energy_met_ = full || options_.energy_tolerance == 0 || deficit_ <= std::max(options_.energy_tolerance, 4 * eps);
    // How far to go and how fast, on a logarithmic scale, for the slower of the two criteria.
    const double steps = double(std::max<Index>(1, M_.passes() - pass_of_check_));
    const auto progress = [&](bool asked, bool met, double was, double is, double goal) {
      if (!asked || met || !(was > 0) || !(is > 0)) return;
      const double rate = std::log(was / is) / steps, distance = std::log(is / goal);
      if (rate_ == 0 || distance * rate_ > distance_ * rate) {
        rate_ = std::max(rate, 1e-3);
        distance_ = distance;
      }
    };
    rate_ = distance_ = 0;
    if (energies_ > 2) progress(true, energy_met_, before, deficit_, std::max(options_.energy_tolerance, 4 * eps));
    if (energies_ > 1) progress(true, residual_met_, worst_, relative, residual_goal);
    worst_ = relative;
    pass_of_check_ = M_.passes();
    basis_size_ = d;
  }

  /// Component of MᵀM·(Ritz vector i) along vector c of the next block.
  [[nodiscard]] double coupling_to_next(const SymmetricEigen& ritz, Index i, Index c) const {
    const Index last = ritz.vectors.rows() - block_;
    double r = 0;
    for (Index l = c; l < block_; ++l) r += ritz.vectors(last + l, i) * coupling_(l, c);
    return r;
  }
  /// The Ritz vectors of the last look, whole.
  [[gnu::cold]] const SymmetricEigen& whole_ritz() {
    if (ritz_.vectors.rows() < ritz_.vectors.cols()) ritz_ = form_->whole();
    return ritz_;
  }
  /// T's part for the first d vectors of the basis.
  [[nodiscard]] MatrixView<const double> projection(Index d) const { return T_.view().block(0, 0, d, d); }

  /// The energy still missing. Once it is small the residuals bound it well (measured: 1 to 4 times the truth); before
  /// that they miss directions not seen yet, and its growth, as a geometric series through the gains of the last two
  /// intervals, says more. The larger of the two then.
  [[gnu::cold]] void estimate_deficit(double energy, double from_residuals) {
    deficit_ = from_residuals;
    // Directions not met yet may be worth several times as much, until the energy has been seen growing; a warm start,
    // whose first few steps say little about them (measured: up to 3 times), is watched for one look more.
    if (energies_ < (warm_ ? 3 : 2)) deficit_ *= 4;
    const double steps = double(std::max<Index>(1, M_.passes() - pass_of_check_));
    if (energies_ >= 1 && energy > 0) {
      const double gain = std::max(0.0, energy - energy_) / energy;
      if (energies_ >= 2 && gain_ > 0) {
        const double ratio = std::pow((gain / steps) / (gain_ / steps_), 2 / (steps + steps_));
        const double decay = std::clamp(std::pow(ratio, steps), 0.0, 0.97);
        if (from_residuals > 2e-3) deficit_ = std::max(deficit_, gain * decay / (1 - decay));
      }
      gain_ = gain;
      steps_ = steps;
    }
    energy_ = energy;
    ++energies_;
  }

  /// Keeps the best Ritz vectors and the next block, forgets the rest; T becomes an arrow.
  [[gnu::cold]] void restart() {
    const Index d = settled_, b = block_;
    const Index extra = options_.oversampling > 0 ? options_.oversampling : std::max<Index>(2 * b, k_ / 2);
    const Index keep = std::min({k_ + extra, d - b, std::max(k_, capacity_ - 3 * b)});
    const SymmetricEigen& ritz = whole_ritz();
    Matrix<T> Q(keep + b, d + b);
    for (Index i = 0; i < keep; ++i)
      for (Index j = 0; j < d; ++j) Q(i, j) = T(ritz.vectors(j, i));
    for (Index i = 0; i < b; ++i) Q(keep + i, d + i) = T(1);
    basis_->rotate(Q.view());
    T_.set_zero();
    for (Index i = 0; i < keep; ++i) {
      T_(i, i) = ritz.values[std::size_t(i)];
      for (Index c = 0; c < b; ++c) T_(i, keep + c) = T_(keep + c, i) = coupling_to_next(ritz, i, c);
    }
    settled_ = keep;
    restarted_ = true;
  }

  /// The triplets from the Ritz vectors: Y = M·V is decomposed anew, so that squares of singular values play no part in
  /// them; where the squares kept small singular vectors from converging, those are refined.
  [[gnu::cold]] TruncatedSvd<T> finish() {
    const Index n = M_.domain(), d = basis_size_;
    Matrix<T> V(k_, n);
    if (d >= k_) {
      const SymmetricEigen& ritz = whole_ritz();
      Matrix<T> Q(k_, d);
      for (Index i = 0; i < k_; ++i)
        for (Index j = 0; j < d; ++j) Q(i, j) = T(ritz.vectors(j, i));
      gemm(T(1), Q.view(), basis_->rows(0, d), V.view());
    } else {  // stopped before there were k vectors: those there are, and random ones
      CounterRng(options_.seed, 2).fill_normal(V.view());
      const MatrixView<const T> have = basis_->view().middle_rows(0, std::min(k_, basis_->count()));
      std::copy_n(have.data(), have.size(), V.data());
    }
    refresh_orthonormal(V.view());
    take(V);
    const Index most = options_.max_passes > 0 ? options_.max_passes : 1000;
    if (options_.residual_tolerance > 0 && residual_met_ && !triplets_met() && M_.passes() + 8 < most) {
      GolubKahan<T>::refine(M_, V, options_.residual_tolerance, most, options_.seed);
      refresh_orthonormal(V.view());
      take(V);
    }
    return deliver();
  }

  [[gnu::cold]] void take(const Matrix<T>& V) {
    Matrix<T> Y(V.rows(), M_.range());
    M_.forward(V.view(), Y.view());
    decompose(V, std::move(Y));
  }

  /// SVD of Y = M·V (vectors in rows), truncated to k, with the residuals measured.
  [[gnu::cold]] void decompose(Matrix<T> V, Matrix<T> Y) {
    const Index w = V.rows(), n = V.cols(), m = Y.cols();
    Matrix<T> R(w, w), product(Y.view());  // M·V as it came, to measure by
    thin_qr_in_place(Y.view().transposed(), R.view());
    const Svd<double> inner = small_svd<double>(Matrix<double>(R.view()).view());
    Matrix<T> P(w, k_), Q(w, k_), Z(k_, n);
    for (Index i = 0; i < w; ++i)
      for (Index j = 0; j < k_; ++j) {
        P(i, j) = T(inner.U(i, j));
        Q(i, j) = T(inner.V(i, j));
      }
    left_.resize(k_, m);
    right_.resize(k_, n);
    gemm(T(1), P.view().transposed(), Y.view(), left_.view());
    gemm(T(1), Q.view().transposed(), V.view(), right_.view());
    M_.adjoint(left_.view(), Z.view());
    gemm(T(1), Q.view().transposed(), product.view(), Y.view().middle_rows(0, k_));  // M·(right vectors)
    sigma_.assign(inner.S.begin(), inner.S.begin() + k_);
    residual_.assign(std::size_t(k_), 0.0);
    for (Index i = 0; i < k_; ++i) {
      const double sigma = sigma_[std::size_t(i)];
      residual_[std::size_t(i)] = std::max(distance_to_multiple(n, &Z(i, 0), sigma, &right_(i, 0)),
                                           distance_to_multiple(m, &Y(i, 0), sigma, &left_(i, 0)));
    }
  }

  /// `converged` and `stopped`, from the tolerances as asked for. The iteration stops at a few eps; what is below that
  /// was not reached, except by a zero matrix.
  [[gnu::cold]] void settle_verdict() {
    const Index most = options_.max_passes > 0 ? options_.max_passes : 1000;
    const bool resolved = options_.energy_tolerance == 0 || options_.energy_tolerance >= 4 * eps || sigma_[0] == 0;
    const bool triplets = options_.residual_tolerance == 0 || triplets_met();
    result_.converged = energy_met_ && resolved && triplets;
    const bool cut_short = !energy_met_ || (!triplets && (!residual_met_ || M_.passes() + 8 >= most));
    result_.stopped = result_.converged ? StopReason::met : cut_short ? StopReason::passes : StopReason::scalar_limit;
  }

  [[nodiscard]] bool triplets_met() const {
    return *std::max_element(residual_.begin(), residual_.end()) <= options_.residual_tolerance * sigma_[0];
  }

  [[gnu::cold]] TruncatedSvd<T> deliver() {
    for (Index i = 0; i < k_; ++i) {
      const double sigma = M_.unscaled(sigma_[std::size_t(i)]);
      result_.S.push_back(T(sigma));
      result_.residuals.push_back(M_.unscaled(residual_[std::size_t(i)]));
      result_.captured_energy += sigma * sigma;
    }
    result_.energy_deficit = deficit_;
    result_.passes = spent_ + M_.passes();
    result_.block = block_;
    result_.basis = basis_size_;
    result_.rounding = (std::sqrt(double(std::max(left_.cols(), right_.cols()))) + 8) * eps * M_.unscaled(sigma_[0]) +
                       double(std::numeric_limits<T>::denorm_min());
    settle_verdict();
    const bool right = M_.side() == GramSide::right;
    result_.U = Matrix<T>((right ? left_ : right_).view().transposed());
    result_.V = Matrix<T>((right ? right_ : left_).view().transposed());
    return std::move(result_);
  }

  static constexpr double eps = double(std::numeric_limits<T>::epsilon());

  AnyOperator<T> A_;
  Index k_;
  TruncatedSvdOptions options_;
  SidedOperator<T> M_;
  std::optional<OrthonormalRows<T>> basis_;
  Matrix<T> Y_, Z_, left_, right_;  // the last two: the triplets' vectors, in rows, on M's left and right
  Matrix<double> T_, coupling_;
  // Of T's settled part, at the last look.
  std::optional<TridiagonalForm> form_;
  SymmetricEigen ritz_;
  std::vector<double> sigma_, residual_;
  Index block_ = 0, random_ = 0, spent_ = 0, capacity_ = 0, settled_ = 0, basis_size_ = 0, energies_ = 0,
        pass_of_check_ = 0;
  double first_norm_ = 0, deficit_ = 1, energy_ = 0, gain_ = 0, steps_ = 1, worst_ = 0, rate_ = 0, distance_ = 0;
  bool may_hide_copies_ = false, incomplete_ = false, warm_ = false, energy_met_ = false, residual_met_ = false,
       restarted_ = false;
  TruncatedSvd<T> result_;
};

}  // namespace lowrank::detail

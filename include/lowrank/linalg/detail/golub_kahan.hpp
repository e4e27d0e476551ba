// SPDX-License-Identifier: Apache-2.0
// Block Golub–Kahan iteration: the refinement for triplets that squares of singular values cannot resolve.
//
// A pass that makes Y = M·X and Z = Mᵀ·Y at once works on MᵀM, whose rounding noise eps·σ₁² drowns singular vectors
// below √eps·σ₁. Here Y is orthogonalised before it is multiplied by Mᵀ, at the price of a second reading of M: noise
// eps·σ₁. Letters: M·V_dᵀ = U_dᵀ·B with orthonormal rows in V_d and U_d; Mᵀ·U_dᵀ = V_dᵀ·Bᵀ + Wᵀ·(0 … 0 L)ᵀ.
#pragma once

#include <algorithm>
#include <limits>

#include "lowrank/linalg/detail/sided_operator.hpp"
#include "lowrank/linalg/detail/vector_block.hpp"
#include "lowrank/linalg/small_svd.hpp"

namespace lowrank::detail {

/// The refinement of k vectors that are good to √eps already, in place.
///
/// **Shapes** M range×domain, V k×domain with orthonormal rows. **Throws** NonFiniteError when M's products do.
/// **Cost** two readings of M a block of up to 16 vectors; (domain + range)·(2k + 64) scalars of memory.
/// **Numerics** the residuals end near eps·σ₁ or where halving stops; the caller measures them.
/// **Source** Golub, Luk & Overton, ACM TOMS 7 (1981) (the block bidiagonalisation); restarted thickly with the worst
/// residuals as the next block: Baglama & Reichel, SIAM J. Sci. Comput. 27 (2005).
template <Real T>
class GolubKahan {
 public:
  /// Improves the k vectors in the rows of V (domain long) until every ‖Mᵀu − σv‖ ≤ tolerance·σ₁, no progress is made,
  /// or `most` passes of M have been spent; V's rows are replaced.
  static void refine(SidedOperator<T>& M, Matrix<T>& V, double tolerance, Index most, std::uint64_t seed) {
    GolubKahan(M, V, seed).run(tolerance, most);
  }

 private:
  GolubKahan(SidedOperator<T>& M, Matrix<T>& V, std::uint64_t seed)
      : M_(M),
        V_out_(V),
        k_(V.rows()),
        block_(std::min<Index>(k_, 16)),
        capacity_(std::min(std::min(M.domain(), M.range()), k_ + std::max<Index>(4 * block_, k_))),
        V_(capacity_, M.domain(), CounterRng(seed, 3)),
        U_(capacity_, M.range(), CounterRng(seed, 4)),
        B_(capacity_, capacity_) {}

  [[gnu::cold]] void run(double tolerance, Index most) {
    load(V_out_.view());
    double best = std::numeric_limits<double>::infinity();
    while (true) {
      // A cycle: from the k vectors and the worst of their residuals up to the capacity, then the best k again.
      while (V_.count() < capacity_ && expand() && M_.passes() + 4 <= most) {
      }
      const double worst = reduce();
      if (worst <= tolerance || worst > 0.5 * best || M_.passes() + 4 > most) break;
      best = worst;
    }
    std::copy_n(V_.view().data(), V_out_.size(), V_out_.data());
  }

  /// M·V for vectors already in V_, its part of U and B.
  [[gnu::cold]] void multiply(Index first, Index n) {
    const MatrixView<T> Y = U_.next(n);
    M_.forward(V_.rows(first, n), Y);
    Matrix<double> C(n, U_.count()), L(n, n);
    const Index old = U_.count();
    U_.accept(n, C.view(), L.view());
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j < old; ++j) B_(j, first + i) = C(i, j);
      for (Index j = 0; j < n; ++j) B_(old + j, first + i) = L(i, j);
    }
  }
  [[gnu::cold]] void load(MatrixView<const T> V) {
    V_.resize(0);
    for (Index i = 0; i < k_; ++i) std::copy_n(&V(i, 0), V.cols(), &V_.next(k_)(i, 0));
    V_.resize(k_);
    multiply(0, k_);
    reduce();
  }

  /// One block more: the residuals Mᵀ·U − V·B of the last U, orthogonalised, are the next V. False when there is no
  /// room.
  [[gnu::cold]] bool expand() {
    const Index d = V_.count(), n = std::min({block_, capacity_ - d, U_.count()});
    if (n <= 0) return false;
    // After a reduction the last rows of U would be the best triplets; take those whose residuals are largest.
    const Index first = fresh_ ? std::max<Index>(0, worst_ - n / 2) : U_.count() - n;
    const Index from = std::min(first, U_.count() - n);
    fresh_ = false;
    M_.adjoint(U_.rows(from, n), V_.next(n));
    Matrix<double> C(n, d), L(n, n);
    V_.accept(n, C.view(), L.view());
    multiply(d, n);
    return true;
  }

  /// SVD of B: V_ and U_ become the best k triplets, B their values. Returns the largest residual, relative, measured.
  [[gnu::cold]] double reduce() {
    const Index d = V_.count();
    const Svd<double> s = small_svd<double>(B_.view().block(0, 0, U_.count(), d));
    Matrix<T> P(k_, U_.count()), Q(k_, d);
    for (Index i = 0; i < k_; ++i) {
      for (Index j = 0; j < d; ++j) Q(i, j) = T(s.V(j, i));
      for (Index j = 0; j < U_.count(); ++j) P(i, j) = T(s.U(j, i));
    }
    V_.rotate(Q.view());
    U_.rotate(P.view());
    B_.set_zero();
    for (Index i = 0; i < k_; ++i) B_(i, i) = s.S[std::size_t(i)];
    Matrix<T> Z(k_, M_.domain());
    M_.adjoint(U_.view(), Z.view());
    double worst = 0;
    for (Index i = 0; i < k_; ++i) {
      double square = 0;
      for (Index j = 0; j < M_.domain(); ++j) {
        const double r = double(Z(i, j)) - s.S[std::size_t(i)] * double(V_.view()(i, j));
        square += r * r;
      }
      if (square > worst) {
        worst = square;
        worst_ = i;
      }
    }
    fresh_ = true;
    return s.S[0] > 0 ? std::sqrt(worst) / s.S[0] : 0;
  }

  SidedOperator<T>& M_;
  Matrix<T>& V_out_;
  Index k_, block_, capacity_, worst_ = 0;
  bool fresh_ = true;
  OrthonormalRows<T> V_, U_;
  Matrix<double> B_;
};

}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// Repeated singular values: what the Krylov space of one block cannot hold, and how it is found all the same.
#pragma once

#include <algorithm>
#include <utility>

#include "lowrank/linalg/detail/block_krylov.hpp"

namespace lowrank::detail {

// The Krylov space of b vectors holds at most b copies of a repeated singular value, and hardly more of values closer
// to each other than the iteration can tell apart. It converges with the others missing, and no residual shows it.

/// A·(I − V·Vᵀ): what orthonormal right vectors, the columns of V, leave of A.
template <Real T>
class DeflatedOperator {
 public:
  using scalar = T;
  DeflatedOperator(AnyOperator<T> A, MatrixView<const T> V) : A_(A), V_(V) {}

  [[nodiscard]] Index rows() const { return A_.rows(); }
  [[nodiscard]] Index cols() const { return A_.cols(); }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const {
    Matrix<T> rest(X);
    project_out(rest.view());
    A_.apply(std::as_const(rest).view(), Y);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    A_.apply_adjoint(X, Y);
    project_out(Y);
  }

 private:
  void project_out(MatrixView<T> X) const {
    const Matrix<T> along = multiply<T>(V_.transposed(), X);
    gemm(T(-1), V_, along.view(), X, Update::accumulate);
  }
  AnyOperator<T> A_;
  MatrixView<const T> V_;
};

/// The triplets `found`, after a fresh random block has searched what they leave of A for larger ones, again and again
/// until it finds none that the tolerances would not let go.
///
/// **Cost** each search takes half of the passes so far, at least 16; each one that finds something is followed by
/// an iteration from all vectors known. **Throws** as truncated_svd. **Source** the deflation and random restart of
/// Golub & Underwood, "The block Lanczos method for computing eigenvalues" (1977).
template <Real T>
[[gnu::cold]] TruncatedSvd<T> with_hidden_copies(AnyOperator<T> A, TruncatedSvdOptions options, TruncatedSvd<T> found) {
  const Index rank = Index(found.S.size()), most = options.max_passes > 0 ? options.max_passes : 1000;
  const Index count = std::min<Index>(8, std::min<Index>(A.rows(), A.cols()) - rank);
  constexpr double eps = double(std::numeric_limits<T>::epsilon());
  options.block = options.max_basis = 0;  // what is started from decides
  for (std::uint64_t round = 1; count > 0 && found.stopped != StopReason::passes; ++round) {
    const Index effort = std::max<Index>(16, found.passes / 2);
    if (found.passes + effort > most) {
      found.converged = false;
      found.stopped = StopReason::passes;
      break;
    }
    const DeflatedOperator<T> rest(A, std::as_const(found.V).view());
    const TruncatedSvd<T> more =
        BlockKrylov<T>(rest, count, {.max_passes = effort, .seed = options.seed + round}).run({});
    found.passes += more.passes;
    double gain = 0;  // in energy, of which the search has met most, if the smallest triplets were exchanged for what
                      // has been found
    for (Index i = 0; i < std::min(count, rank); ++i) {
      const double in = double(more.S[std::size_t(i)]), out = double(found.S[std::size_t(rank - 1 - i)]);
      if (in > out) gain += (in - out) * (in + out);
    }
    const double step = double(more.S[0]) - double(found.S.back()), largest = double(found.S[0]);
    const bool energy = options.energy_tolerance == 0 ||
                        4 * gain <= std::max(options.energy_tolerance, 16 * eps) * found.captured_energy;
    const bool values =
        options.residual_tolerance == 0 || step <= std::max(options.residual_tolerance, 16 * eps) * largest;
    if (energy && values) {
      found.energy_deficit = std::max(found.energy_deficit, gain / found.captured_energy);
      break;
    }
    Matrix<T> start(A.cols(), rank + count);
    for (Index i = 0; i < start.rows(); ++i) {
      std::copy_n(&found.V(i, 0), rank, &start(i, 0));
      std::copy_n(&more.V(i, 0), count, &start(i, rank));
    }
    const Index spent = found.passes;
    found = BlockKrylov<T>(A, rank, options).run(std::as_const(start).view());
    found.passes += spent;
  }
  return found;
}

}  // namespace lowrank::detail

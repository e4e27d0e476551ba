// SPDX-License-Identifier: Apache-2.0
// Lanczos from several vectors in lockstep: they share every reading of W, and each keeps its own fully orthogonal
// basis.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/detail/wide_products.hpp"
#include "lowrank/linalg/lanczos_measure.hpp"

namespace lowrank::detail {

/// Lanczos on W·Wᵀ (vectors of length rows) or WᵀW (length cols, `right`), all in double whatever W is stored in.
///
/// **Cost** a step: two products of W with the active vectors, 8·k·d flops a vector for orthogonalisation in step k;
/// memory steps·d doubles a vector. **Numerics** every new vector is orthogonalised twice against all before it,
/// so T is the true compression of C, not one with ghosts. **Throws** nothing of its own.
/// **Source** Lanczos, J. Res. Nat. Bur. Standards 45 (1950); why twice is enough: Parlett, The Symmetric Eigenvalue
/// Problem, §6.9 and §13.8.
template <class S>
class LanczosBatch {
 public:
  /// X: count×d, one start a row, each of unit length.
  LanczosBatch(MatrixView<const S> W, bool right, const Matrix<double>& X, Index max_steps)
      : W_(right ? W.transposed() : W), d_(W_.rows()), max_steps_(std::min(max_steps, d_)) {
    for (Index v = 0; v < X.rows(); ++v) {
      Run run;
      run.basis.resize(max_steps_ + 1, d_);
      std::copy_n(&X(v, 0), d_, run.basis.data());
      runs_.push_back(std::move(run));
    }
  }

  [[nodiscard]] Index max_steps() const noexcept { return max_steps_; }
  [[nodiscard]] Index steps(Index v) const { return Index(runs_[std::size_t(v)].alpha.size()); }
  /// The start's Krylov space is exhausted: its measure is exact.
  [[nodiscard]] bool exhausted(Index v) const { return runs_[std::size_t(v)].exhausted; }
  [[nodiscard]] LanczosMeasure measure(Index v) const {
    const Run& r = runs_[std::size_t(v)];
    return lanczos_measure(r.alpha, r.beta);
  }

  /// One more step for the vectors named; exhausted ones are left alone.
  void step(const std::vector<Index>& which) {
    active_.clear();
    for (const Index v : which)
      if (!exhausted(v) && steps(v) < max_steps_) active_.push_back(v);
    const Index count = Index(active_.size());
    if (count == 0) return;
    x_.resize(count, d_);
    y_.resize(count, d_);
    z_.resize(count, W_.cols());
    for (Index a = 0; a < count; ++a) {
      const Run& r = runs_[std::size_t(active_[std::size_t(a)])];
      std::copy_n(r.basis.data() + Index(r.alpha.size()) * d_, d_, &x_(a, 0));
    }
    wide_product<S>(W_.transposed(), x_.view(), z_.view());
    wide_product<S>(W_, z_.view(), y_.view());
    parallel_parts(int(std::min<Index>(count, max_threads())), [&](int part, int parts) {
      for (Index a = part; a < count; a += parts) extend(runs_[std::size_t(active_[std::size_t(a)])], &y_(a, 0));
    });
  }

 private:
  struct Run {
    Matrix<double> basis;
    std::vector<double> alpha, beta;
    double scale = 0;
    bool exhausted = false;
  };

  /// y = C·q_k becomes the next basis vector.
  void extend(Run& r, double* y) const {
    const Index k = Index(r.alpha.size());
    const double* q = r.basis.data();
    const double alpha = dot(d_, q + k * d_, y), before = std::sqrt(dot(d_, y, y));
    for (int pass = 0; pass < 2; ++pass)
      for (Index j = k; j >= 0; --j) axpy(d_, -dot(d_, q + j * d_, y), q + j * d_, y);
    const double beta = std::sqrt(dot(d_, y, y));
    r.scale = std::max(r.scale, before);
    r.alpha.push_back(alpha);
    // What is left is rounding: the space is invariant.
    r.exhausted = k + 1 == d_ || beta <= 1e-13 * r.scale;
    r.beta.push_back(r.exhausted ? 0 : beta);
    if (r.exhausted) return;
    double* next = r.basis.data() + (k + 1) * d_;
    for (Index i = 0; i < d_; ++i) next[i] = y[i] / beta;
  }

  MatrixView<const S> W_;
  Index d_, max_steps_;
  std::vector<Run> runs_;
  std::vector<Index> active_;
  Matrix<double> x_, y_, z_;
};

}  // namespace lowrank::detail

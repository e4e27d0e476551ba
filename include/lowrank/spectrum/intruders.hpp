// SPDX-License-Identifier: Apache-2.0
// Intruder dimensions: leading directions of a tuned weight that the base weight does not have, certified without its
// SVD.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "lowrank/core/factors.hpp"
#include "lowrank/linalg/detail/lanczos.hpp"
#include "lowrank/linalg/detail/smallest_value.hpp"
#include "lowrank/linalg/detail/vector_errors.hpp"
#include "lowrank/linalg/factor_operators.hpp"
#include "lowrank/linalg/svd.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/spectrum/christoffel.hpp"

namespace lowrank {

// W out×in: the base. W' = W + ΔW: tuned. u_i: left singular vectors of W', w_j: of W. N = min(out, in).

/// What is looked for, and how hard before the full SVD is asked.
struct IntruderOptions {
  Index k = 10;          ///< leading left singular vectors of W' that are judged; clamped to N
  double epsilon = 0.5;  ///< u_i is an intruder when |uᵢᵀw_j| < epsilon for every j
  Index references = 0;  ///< leading singular vectors of W computed for comparison; 0: 2k + 8
  Index max_steps = 64;  ///< Lanczos steps a vector before it is called undecided
};

/// How a verdict was reached.
enum class IntruderProof {
  similar_vector,  ///< a computed w_j has |cos| ≥ ε: no intruder
  little_left,     ///< what the computed w_j leave of u_i has less energy than ε²: an intruder
  christoffel,     ///< the Christoffel function bounds the energy on any single singular vector below ε²: an intruder
  ritz_pair,       ///< a converged Ritz pair holds energy ≥ ε²: no intruder
  full_svd,        ///< the certificates left it open: compared with all singular vectors
};

/// The name of a proof as reports print it.
inline const char* proof_name(IntruderProof p) {
  switch (p) {
    case IntruderProof::similar_vector:
      return "similar vector";
    case IntruderProof::little_left:
      return "little left";
    case IntruderProof::christoffel:
      return "Christoffel bound";
    case IntruderProof::ritz_pair:
      return "Ritz pair";
    case IntruderProof::full_svd:
      return "full SVD";
  }
  return "?";
}

/// One leading singular vector of W' and what became of it.
struct IntruderVerdict {
  double singular_value = 0;  ///< of W'
  bool intruder = false;
  IntruderProof proof = IntruderProof::full_svd;
  double cosine =
      0;            ///< the largest |cos| with a vector of W that was seen; a lower bound unless the proof is full_svd
  Index steps = 0;  ///< Lanczos steps spent on it
};

/// Verdicts on the k leading directions, and the weight they carry.
struct IntruderReport {
  std::vector<IntruderVerdict> vectors;  ///< by descending singular value
  /// Σσ² over the intruders / ‖W'‖_F². A random direction counts as an intruder too, so a number of intruders without
  /// this says little.
  double energy_share = 0;
  bool used_full_svd = false;  ///< at least one verdict needed the two full SVDs

  /// 0-based indices of the intruders, ascending.
  [[nodiscard]] std::vector<Index> intruders() const {
    std::vector<Index> list;
    for (std::size_t i = 0; i < vectors.size(); ++i)
      if (vectors[i].intruder) list.push_back(Index(i));
    return list;
  }
};

namespace detail {

/// Judges the vectors one certificate after the other.
template <class T, class S>
class IntruderSearch {
 public:
  IntruderSearch(MatrixView<const S> W, const IntruderOptions& o) : W_(W), o_(o), full_(std::min(W.rows(), W.cols())) {
    if (o.k < 1) throw ArgumentError(text("find_intruders: k must be at least 1, got ", o.k));
    if (!(o.epsilon > 0 && o.epsilon <= 1))
      throw ArgumentError(text("find_intruders: epsilon must lie in (0, 1], got ", o.epsilon));
    if (o.references < 0 || o.max_steps < 1)
      throw ArgumentError(text("find_intruders: references must not be negative and max_steps at least 1, got ",
                               o.references, " and ", o.max_steps));
    if (full_ == 0) throw ShapeError(text("find_intruders: W is empty, ", shape_text(W.rows(), W.cols())));
    k_ = std::min(o.k, full_);
    references_ = std::min(full_, std::max<Index>(o.references > 0 ? o.references : 2 * k_ + 8, 1));
  }

  /// `tuned` multiplies by W', `wide` in double; `form()` makes W' as a matrix of T, which only the fallback needs.
  template <class Op, class Wide, class Form>
  [[gnu::cold]] IntruderReport run(const Op& tuned, const Wide& wide, Form&& form) {
    const Index wanted = std::min(k_ + 1, full_);
    const auto base = dense_operator<T, S>(W_);
    // First a cheap look: whatever has a clear partner among few vectors of W, or clearly none anywhere, is settled
    // here.
    auto top = truncated_svd<T>(tuned, wanted, accuracy(1e-4));
    const Index few = std::min(references_, k_ + 4);
    auto known = truncated_svd<T>(base, few, accuracy(1e-3));
    total_ = top.total_energy;
    report_.vectors.assign(std::size_t(k_), {});
    std::vector<Index> open(static_cast<std::size_t>(k_));
    for (Index i = 0; i < k_; ++i) open[std::size_t(i)] = i;
    auto own = vector_errors(top, stated_errors(top), full_),
         theirs = vector_errors(known, stated_errors(known), full_);
    for (const Look look : {Look::cheap, Look::accurate, Look::wider}) {
      if (look == Look::accurate) {
        top = truncated_svd<T>(tuned, wanted, accuracy(3e-6), top.V.view());
        own = vector_errors(top, measured_errors(top, wide), full_);
      }
      if (look != Look::cheap) {
        const Index count = look == Look::accurate ? few : references_;
        if (look == Look::wider && count == few) break;
        known = truncated_svd<T>(base, count, accuracy(3e-6), known.V.view());
        theirs = vector_errors(known, measured_errors(known, WideDense<S>{W_}), full_);
      }
      for (Index i = 0; i < k_; ++i) verdict(i).singular_value = double(top.S[std::size_t(i)]);
      open = lanczos(top, decide(top, known, own, theirs, open));
      if (open.empty()) break;
    }
    if (!open.empty()) compare_all(form());
    double energy = 0;
    for (const auto& v : report_.vectors) energy += v.intruder ? v.singular_value * v.singular_value : 0;
    report_.energy_share = total_ > 0 ? energy / total_ : 0;
    return std::move(report_);
  }

 private:
  enum class Look { cheap, accurate, wider };
  static TruncatedSvdOptions accuracy(double residual) {
    return {.energy_tolerance = 0, .residual_tolerance = residual, .max_passes = 200};
  }
  IntruderVerdict& verdict(Index i) { return report_.vectors[std::size_t(i)]; }
  void settle(Index i, bool intruder, IntruderProof proof) {
    verdict(i).intruder = intruder;
    verdict(i).proof = proof;
  }

  /// Certificates that need nothing but the computed vectors; returns the indices they leave open.
  /// own, theirs: sines of the angles by which the vectors of `top` and `known` may be off.
  [[gnu::cold]] std::vector<Index> decide(const TruncatedSvd<T>& top, const TruncatedSvd<T>& known,
                                          const std::vector<double>& own, const std::vector<double>& theirs,
                                          const std::vector<Index>& among) {
    const Matrix<T> C = multiply<T>(known.U.view().transposed(), top.U.view());
    // Only vectors that are known well may be projected out; the others stay with the unknown ones.
    std::vector<Index> usable;
    for (Index j = 0; j < C.rows(); ++j)
      if (theirs[std::size_t(j)] < 0.02) usable.push_back(j);
    const bool all_known = Index(usable.size()) == full_;
    rest_.resize(k_, W_.rows());
    limit_.assign(std::size_t(k_), 0.0);
    // Of a sum of W.rows() products in T.
    const double rounding = (std::sqrt(double(W_.rows())) + 8) * double(std::numeric_limits<T>::epsilon());
    std::vector<Index> open;
    for (const Index i : among) {
      double energy = 0, spill = own[std::size_t(i)] + rounding, best = 0, surely = 0, at_most = 0;
      for (Index r = 0; r < W_.rows(); ++r) rest_(i, r) = double(top.U(r, i));
      for (Index j = 0; j < C.rows(); ++j) {
        const double c = std::abs(double(C(j, i))), error = own[std::size_t(i)] + theirs[std::size_t(j)] + rounding;
        best = std::max(best, c);
        surely = std::max(surely, c - error);
        if (theirs[std::size_t(j)] >= 0.02) continue;
        at_most = std::max(at_most, c + error);
        spill += c * theirs[std::size_t(j)];
        for (Index r = 0; r < W_.rows(); ++r) rest_(i, r) -= double(C(j, i)) * double(known.U(r, j));
      }
      for (Index r = 0; r < W_.rows(); ++r) energy += rest_(i, r) * rest_(i, r);
      verdict(i).cosine = best;
      limit_[std::size_t(i)] = at_most < o_.epsilon ? std::max(0.0, o_.epsilon - spill) : 0;
      if (surely >= o_.epsilon)
        settle(i, false, IntruderProof::similar_vector);
      else if (at_most < o_.epsilon && (all_known || std::sqrt(energy) < limit_[std::size_t(i)]))
        settle(i, true, IntruderProof::little_left);
      else
        open.push_back(i);
    }
    return open;
  }

  /// Christoffel and Ritz certificates on what the known vectors leave; returns what stays open.
  [[gnu::cold]] std::vector<Index> lanczos(const TruncatedSvd<T>& top, std::vector<Index> open) {
    // A vector whose own accuracy is not enough to tell, or that lies at ε of a known one, is beyond this certificate.
    std::vector<Index> given_up, active;
    for (const Index i : open) (limit_[std::size_t(i)] > 0 ? active : given_up).push_back(i);
    if (active.empty()) return given_up;
    // A tall W has left vectors of zero value that no thin SVD lists. WᵀW has none of them, and the energy of u at
    // value x is that of Wᵀu divided by x; which is a bound once x cannot come near zero.
    const bool right = W_.rows() > W_.cols();
    const double floor = right ? smallest_squared_value(W_) : 0;
    if (right && floor == 0) return open;
    Matrix<double> X(Index(active.size()), W_.rows()), Z;
    for (std::size_t a = 0; a < active.size(); ++a) std::copy_n(&rest_(active[a], 0), W_.rows(), &X(Index(a), 0));
    if (right) {
      Z.resize(X.rows(), W_.cols());
      wide_product<S>(W_.transposed(), X.view(), Z.view());
      std::swap(X, Z);
    }
    std::vector<double> energy;
    for (Index a = 0; a < X.rows(); ++a) {
      const double e = dot(X.cols(), &X(a, 0), &X(a, 0));
      energy.push_back(e);
      for (Index j = 0; j < X.cols(); ++j) X(a, j) = e > 0 ? X(a, j) / std::sqrt(e) : j == 0;
    }
    LanczosBatch<S> batch(W_, right, X, o_.max_steps);
    std::vector<Index> slots(active.size());
    for (std::size_t a = 0; a < slots.size(); ++a) slots[a] = Index(a);
    const double scale = double(top.S[0]) * double(top.S[0]);
    for (Index step = 1, check = 4; step <= batch.max_steps() && !slots.empty(); ++step) {
      batch.step(slots);
      if (step < check && step < batch.max_steps()) continue;
      check = step + std::max<Index>(2, step / 5);
      std::erase_if(slots, [&](Index a) {
        const Index i = active[std::size_t(a)];
        verdict(i).steps = batch.steps(a);
        if (judge(i, batch.measure(a), energy[std::size_t(a)], right, floor, scale)) return true;
        if (!batch.exhausted(a)) return false;
        given_up.push_back(i);
        return true;
      });
    }
    for (const Index a : slots) given_up.push_back(active[std::size_t(a)]);
    return given_up;
  }

  [[gnu::cold]] bool judge(Index i, const LanczosMeasure& m, double energy, bool right, double floor, double scale) {
    const double limit = limit_[std::size_t(i)], level = limit * limit / energy;
    // The energy of u on one singular vector of squared value x, from that of the vector Lanczos ran on.
    const auto share = [&](std::size_t j) { return m.weights[j] * energy / (right ? std::max(m.nodes[j], floor) : 1); };
    const bool proven = right ? christoffel_below(m, floor, [=](double x) { return level * x; })
                              : christoffel_below(m, -INFINITY, [=](double) { return level; });
    if (proven) {
      settle(i, true, IntruderProof::christoffel);
      return true;
    }
    const double margin = o_.epsilon - limit;
    for (std::size_t j = 0; j < m.nodes.size(); ++j) {
      // Converged, and by so much that only singular values of W could share this energy which T does not tell apart
      // either. Far below σ₁ the squares of all values crowd together: there a pair says nothing.
      if (!(std::max(m.residuals[j], 1e-14 * scale) <= 1e-6 * m.nodes[j])) continue;
      if (std::is_same_v<T, double> && m.residuals[j] > 1e-12 * scale) continue;
      const double cosine = std::sqrt(share(j));
      verdict(i).cosine = std::max(verdict(i).cosine, std::min(1.0, cosine));
      if (cosine - margin >= o_.epsilon) {
        settle(i, false, IntruderProof::ritz_pair);
        return true;
      }
    }
    return false;
  }

  /// What the peers do for every vector: both full decompositions.
  [[gnu::cold, gnu::noinline]] void compare_all(const Matrix<T>& tuned) {
    report_.used_full_svd = true;
    const Matrix<T> wide(W_);
    const Svd<T> base = svd(wide), own = svd(tuned);
    const Matrix<T> C = multiply<T>(base.U.view().transposed(), own.U.view().middle_cols(0, k_));
    for (Index i = 0; i < k_; ++i) {
      double best = 0;
      for (Index j = 0; j < C.rows(); ++j) best = std::max(best, std::abs(double(C(j, i))));
      verdict(i).singular_value = double(own.S[std::size_t(i)]);
      verdict(i).cosine = best;
      settle(i, best < o_.epsilon, IntruderProof::full_svd);
    }
  }

  MatrixView<const S> W_;
  IntruderOptions o_;
  Index full_, k_ = 0, references_ = 0;
  double total_ = 0;
  IntruderReport report_;
  Matrix<double> rest_;        // what the known vectors leave of each u_i, a row each
  std::vector<double> limit_;  // ε less the errors of the vectors; 0: no certificate can decide
};

}  // namespace detail

/// Which of the k leading left singular vectors of a tuned weight are intruders: |cos| below ε with *every* left
/// singular vector of the base.
///
/// Instead of two full SVDs: the leading vectors of both by truncated SVD; a similar pair settles the answer; otherwise
/// the part of u_i outside the computed vectors of W is put through Lanczos on WWᵀ, and sup_x of its Christoffel
/// function bounds the energy it can have on any single singular vector. What no certificate settles gets the two full
/// SVDs, and says so.
/// **Shapes** W, tuned out×in, any order, float, double, bf16 or f16 each. **Throws** ShapeError when they differ or
/// are empty; ArgumentError on a bad option; NonFiniteError when either holds NaN or infinity.
/// **Cost** typically 20–60 readings of W; a tall W with open vectors adds a Gram matrix and two Cholesky
/// factorisations; undecided cases add 2 full SVDs. **Numerics** every decision keeps a margin for the errors of the
/// vectors (residual over gap); vectors inside a cluster of singular values are not determined by the matrix, and go to
/// the full SVD.
/// **Source** Shuttleworth et al., "LoRA vs full fine-tuning: an illusion of equivalence", arXiv 2410.21228, algorithm
/// 1; the certificates: see no_atom_above.
template <class S, class S1>
IntruderReport find_intruders(MatrixView<const S> W, MatrixView<const S1> tuned, const IntruderOptions& options = {}) {
  using T = std::conditional_t<std::is_same_v<S, double> || std::is_same_v<S1, double>, double, float>;
  static_assert(StorageOf<S, T> && StorageOf<S1, T>, "find_intruders: W and tuned must both be double, or neither");
  detail::expect_shape("find_intruders", "tuned", tuned.rows(), tuned.cols(), W.rows(), W.cols());
  try {
    return detail::IntruderSearch<T, S>(W, options)
        .run(dense_operator<T, S1>(tuned), detail::WideDense<S1>{tuned}, [&] { return Matrix<T>(tuned); });
  } catch (const NonFiniteError&) {  // says of which, and where
    detail::expect_finite("find_intruders", "W", W);
    detail::expect_finite("find_intruders", "tuned", tuned);
    throw;
  }
}
/// As above for matrix-like things: Eigen, xtensor, lowrank::Matrix.
template <class X, class Y>
requires MatrixLike<const X&> && MatrixLike<const Y&> IntruderReport
find_intruders(const X& W, const Y& tuned, const IntruderOptions& options = {}) {
  return find_intruders<scalar_of<const X&>, scalar_of<const Y&>>(view_of(W), view_of(tuned), options);
}

/// As above for W' = W + s·B·A, which is never formed unless a verdict needs the full SVD.
template <class S, Real T>
requires StorageOf<S, T> IntruderReport find_intruders(MatrixView<const S> W, const LoraFactors<T>& update,
                                                       const IntruderOptions& options = {}) {
  detail::check_factors("find_intruders", update);
  detail::expect_shape("find_intruders", "the update", update.out_features(), update.in_features(), W.rows(), W.cols());
  try {
    return detail::IntruderSearch<T, S>(W, options)
        .run(updated_operator(dense_operator<T, S>(W), update), detail::WideUpdated<S, T>{W, update}, [&] {
          Matrix<T> tuned(W);
          gemm(update.scale, update.B.view(), update.A.view(), tuned.view(), Update::accumulate);
          return tuned;
        });
  } catch (const NonFiniteError&) {
    detail::expect_finite("find_intruders", "W", W);
    throw;
  }
}
template <class X, Real T>
requires MatrixLike<const X&> IntruderReport find_intruders(const X& W, const LoraFactors<T>& update,
                                                            const IntruderOptions& options = {}) {
  return find_intruders<scalar_of<const X&>, T>(view_of(W), update, options);
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank {
extern template IntruderReport find_intruders(MatrixView<const float>, MatrixView<const float>, const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const double>, MatrixView<const double>,
                                              const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const bf16>, MatrixView<const bf16>, const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const f16>, MatrixView<const f16>, const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const float>, const LoraFactors<float>&,
                                              const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const double>, const LoraFactors<double>&,
                                              const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const bf16>, const LoraFactors<float>&,
                                              const IntruderOptions&);
extern template IntruderReport find_intruders(MatrixView<const f16>, const LoraFactors<float>&, const IntruderOptions&);
}  // namespace lowrank
#endif

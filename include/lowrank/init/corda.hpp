// SPDX-License-Identifier: Apache-2.0
// CorDA: the split of W that a task's inputs ask for, from the covariance of the layer's activations.
#pragma once

#include "lowrank/init/pissa.hpp"
#include "lowrank/linalg/detail/times_symmetric.hpp"
#include "lowrank/linalg/minor_svd.hpp"

namespace lowrank {

/// Σ x·xᵀ of the inputs of a layer, batch by batch.
///
/// **Shapes** in×in. **Cost** 2·tokens·in² flops a batch; in² scalars of memory. **Numerics** accumulates in T; not
/// centred, as in the paper: a direction that is always on matters too.
template <Real T>
class ActivationCovariance {
 public:
  /// **Throws** ArgumentError unless in ≥ 1.
  explicit ActivationCovariance(Index in) {
    if (in < 1) throw ArgumentError(detail::text("ActivationCovariance: needs at least one input, got ", in));
    sum_ = Matrix<T>(in, in);
  }

  /// A covariance somebody else collected: C = E[x·xᵀ] over that many tokens. More batches may follow.
  ///
  /// **Shapes** C in×in, any order. **Throws** ShapeError unless square; NonFiniteError; ArgumentError: no tokens, a
  /// negative diagonal, C_ij further from C_ji than √eps·√(C_ii·C_jj), or larger than that root.
  template <MatrixOf<const T> Square>
  static ActivationCovariance from_mean(Square&& mean, Index tokens) {
    const MatrixView<const T> C = view_of(mean);
    detail::expect_shape("ActivationCovariance::from_mean", "C", C.rows(), C.cols(), C.rows(), C.rows());
    if (tokens < 1)
      throw ArgumentError(detail::text("ActivationCovariance::from_mean: tokens must be positive, got ", tokens));
    detail::expect_covariance("ActivationCovariance::from_mean", C);
    ActivationCovariance result(C.rows());
    for (Index i = 0; i < C.rows(); ++i)  // the diagonal holds the largest
      if (!(double(tokens) * double(C(i, i)) < double(std::numeric_limits<T>::max())))
        throw ArgumentError(detail::text("ActivationCovariance::from_mean: tokens times C must stay in range, got ",
                                         tokens, " times ", double(C(i, i)), " at (", i, ", ", i, ")"));
    for (Index i = 0; i < C.rows(); ++i)
      for (Index j = 0; j < C.rows(); ++j) result.sum_(i, j) = T(double(tokens) * double(C(i, j)));
    result.tokens_ = tokens;
    return result;
  }

  /// Adds a batch. **Shapes** X tokens×in, any order. **Throws** ShapeError; NonFiniteError; ArgumentError when squares
  /// of X would leave T's range (|x| near 1e19 in float); all before anything is added.
  template <MatrixOf<const T> Batch>
  void add(Batch&& batch) {
    const MatrixView<const T> X = view_of(batch);
    detail::expect_shape("ActivationCovariance::add", "X", X.rows(), X.cols(), X.rows(), sum_.cols());
    const double largest = detail::checked_max_abs("ActivationCovariance::add", "X", X);
    if (X.rows() == 0) return;
    if (!(largest * largest * double(tokens_ + X.rows()) < double(std::numeric_limits<T>::max())))
      throw ArgumentError(
          detail::text("ActivationCovariance::add: the squares of X must stay in range, got an element of ", largest));
    nonzero_ = nonzero_ || largest > 0;
    detail::product<T, T, T>(T(1), X.transposed(), X.transposed(), true, sum_.view());
    tokens_ += X.rows();
  }

  [[nodiscard]] Index tokens() const noexcept { return tokens_; }
  [[nodiscard]] Index in_features() const noexcept { return sum_.cols(); }

  /// C = (1/tokens)·Σ x·xᵀ + damping·mean(diag)·I, symmetric to the last bit.
  /// **Throws** ArgumentError before the first token, on a damping that is negative or not finite, and when the squares
  /// of all activations were below T's range, so that nothing is left of them.
  [[nodiscard]] Matrix<T> damped(double damping) const {
    if (tokens_ == 0) throw ArgumentError("ActivationCovariance: no activations were added");
    if (!(damping >= 0) || !std::isfinite(damping))
      throw ArgumentError(detail::text("ActivationCovariance: damping must be finite and not negative, got ", damping));
    const Index n = sum_.cols();
    Matrix<T> C(n, n);
    double trace = 0;
    for (Index i = 0; i < n; ++i) trace += double(sum_(i, i));
    if (nonzero_ && !(trace > 0))
      throw ArgumentError("ActivationCovariance: the squares of the activations vanish in this scalar; scale them up");
    const double scale = 1 / double(tokens_), shift = damping * trace * scale / double(n);
    for (Index i = 0; i < n; ++i) {
      for (Index j = 0; j < i; ++j) C(i, j) = C(j, i) = T(scale * 0.5 * (double(sum_(i, j)) + double(sum_(j, i))));
      C(i, i) = T(scale * double(sum_(i, i)) + shift);
    }
    return C;
  }

 private:
  Matrix<T> sum_;
  Index tokens_ = 0;
  bool nonzero_ = false;
};

/// Which end of the spectrum of W·C trains.
enum class CordaMode {
  instruction,  ///< the first r: what the sampled task uses most is adapted
  knowledge     ///< the last r: what the sampled knowledge uses most stays frozen
};

struct CordaOptions {
  /// r, 1 … min(out, in).
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  CordaMode mode = CordaMode::instruction;
  /// C + damping·mean(diag C)·I is what stands for C.
  double damping = 0.01;
  /// Type the factors will be stored in; the base is formed from the rounded ones.
  FactorStorage factor_storage = FactorStorage::native;
  /// Accuracy of the truncated SVD of W·C (mode instruction); svd.seed is that of its start vectors.
  TruncatedSvdOptions svd = {};
};

namespace detail {

/// The triplets of W·C a mode asks for, with what the report says about them.
template <Real T>
struct CordaTriplets {
  Svd<T> svd;
  double total_energy = 0;  ///< ‖W·C‖_F²
  double largest = 0;       ///< what a value must not be rounding beside
  Index passes = 0;
  bool converged = true;
  const char* how = "";
};

/// ‖W·C‖_F², the rows of W·C taken in bands of `band`'s height; a band as high as W keeps them all.
template <Real T, class S>
double corda_energy(MatrixView<const S> W, MatrixView<const T> C, MatrixView<T> band) {
  double energy = 0;
  for (Index i = 0; i < W.rows(); i += band.rows()) {
    const auto rows = band.middle_rows(0, std::min(band.rows(), W.rows() - i));
    product<T, S, T>(T(1), W.middle_rows(i, rows.rows()), C, false, rows);
    energy += squared_norm(rows);
  }
  return energy;
}

/// The first r triplets of W·C without forming it, or the last r, for which it is formed.
template <Real T, class S>
CordaTriplets<T> corda_triplets(MatrixView<const S> W, MatrixView<const T> C, const CordaOptions& options) {
  const Index m = W.rows(), n = W.cols(), r = options.rank;
  const bool knowledge = options.mode == CordaMode::knowledge;
  CordaTriplets<T> out;
  Matrix<T> band(knowledge ? m : std::clamp<Index>((Index(1) << 20) / n, 1, m), n);
  out.total_energy = corda_energy<T, S>(W, C, band.view());
  if (knowledge) {
    MinorSvd<T> minor = minor_svd(band, r, {.seed = options.svd.seed});
    out.how = way_found(minor);
    out.svd = std::move(static_cast<Svd<T>&>(minor));
    out.largest = std::sqrt(out.total_energy / double(std::min(m, n)));
  } else {
    TruncatedSvd<T> top = truncated_svd<T>(TimesSymmetric<T, S>(W, C), r, options.svd);
    out.passes = top.passes;
    out.converged = top.converged;
    out.largest = double(top.S[0]);
    out.svd = std::move(static_cast<Svd<T>&>(top));
  }
  return out;
}

/// B = U·√(S/s) and A = (s·S)^(−½)·Uᵀ·W; both zero where S is rounding.
template <Real T, class S>
void corda_factors(MatrixView<const S> W, CordaTriplets<T>&& d, double scale, LoraFactors<T>& f) {
  const Index m = W.rows(), n = W.cols(), r = Index(d.svd.S.size());
  f.scale = T(scale);
  f.A.resize(r, n);
  f.B = std::move(d.svd.U);
  product<T, T, S>(T(1), f.B.view().transposed(), W.transposed(), false, f.A.view());  // Uᵀ·W
  for (Index k = 0; k < r; ++k) {
    const double s = double(d.svd.S[std::size_t(k)]);
    const bool dead = s <= d.largest * double(std::max(m, n)) * double(std::numeric_limits<T>::epsilon());
    const T up = T(dead ? 0 : std::sqrt(s / scale)), down = T(dead ? 0 : 1 / std::sqrt(s * scale));
    for (Index i = 0; i < m; ++i) f.B(i, k) *= up;
    for (Index j = 0; j < n; ++j) f.A(k, j) *= down;
  }
}

}  // namespace detail

/// CorDA: with W·C = U·S·Vᵀ, C the damped covariance of the layer's inputs, the chosen r triplets give B = U·√(S/s) and
/// A = √(S/s)·(C⁻¹V)ᵀ; base = W − s·B·A.
///
/// C is not inverted: S·(C⁻¹V)ᵀ = Uᵀ·W·C·C⁻¹ = Uᵀ·W, so A = (s·S)^(−½)·Uᵀ·W and s·B·A = U·Uᵀ·W.
/// **Shapes** W out×in in any order and storage, the covariance in×in; base out×in stored as `Base`,
/// `corda<float, bf16>(W, covariance)`. **Scale** s = α/r
/// or α/√r.
/// **Throws** ShapeError: the covariance is of another layer; ArgumentError: rank, α, damping, no activations, svd
/// options, factors outside the range of their storage type; NonFiniteError. **Cost** instruction: a truncated SVD of
/// an operator of 2·(out·in + in²) flops a vector; knowledge: W·C formed, 2·out·in² flops, and minor_svd of it.
/// **Numerics** base + s·B·A = W to rounding. Where σ_i of W·C vanishes the pair (B, A) is zero, and `notes` says so.
/// PEFT doubles the damping until its inverse is accurate; here nothing depends on an inverse and the damping stays as
/// given. `captured_energy` and `total_energy` are those of W·C.
/// **Source** Yang et al., "CorDA", arXiv 2406.05223, §3.2–3.3.
template <class Factor = void, class Base = void, MatrixLike X>
requires FactorScalarOf<Factor, X> && BaseStorageOf<Base, X> InitialisedFrom<X, Base> corda(
    X&& weight, const ActivationCovariance<factor_scalar<X>>& covariance, const CordaOptions& options = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  const detail::Stopwatch watch;
  const MatrixView<const S> W = view_of(weight);
  const Index m = W.rows(), n = W.cols(), r = options.rank;
  detail::check_rank("corda", r, m, n);
  const double scale = detail::scale_of<T>(options);
  if (covariance.in_features() != n)
    throw ShapeError(detail::text("corda: the covariance must be ", detail::shape_text(n, n), ", got ",
                                  detail::shape_text(covariance.in_features(), covariance.in_features())));
  detail::expect_finite("corda", "W", W);
  const Matrix<T> C = covariance.damped(options.damping);

  InitialisedFrom<X, Base> result;
  InitReport& report = result.report;
  detail::CordaTriplets<T> d = detail::corda_triplets<T, S>(W, C.view(), options);
  report.total_energy = d.total_energy;
  report.passes = d.passes;
  report.converged = d.converged;
  for (const T s : d.svd.S) report.captured_energy += double(s) * double(s);
  report.notes = detail::dead_pairs_note(d.svd.S, d.largest, m, n, double(std::numeric_limits<T>::epsilon())) + d.how;
  detail::corda_factors<T, S>(W, std::move(d), scale, result.factors);
  detail::split_weight("corda", W, options.factor_storage, result);
  report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

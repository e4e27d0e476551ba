// SPDX-License-Identifier: Apache-2.0
// CorDA: the split of W that a task's inputs ask for, from the covariance of the layer's activations.
#pragma once

#include "lowrank/init/minor_svd.hpp"
#include "lowrank/init/pissa.hpp"

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
    for (Index i = 0; i < C.rows(); ++i)
      for (Index j = 0; j < C.rows(); ++j) result.sum_(i, j) = T(double(tokens) * double(C(i, j)));
    result.tokens_ = tokens;
    return result;
  }

  /// Adds a batch. **Shapes** X tokens×in, any order. **Throws** ShapeError; NonFiniteError, before anything is added.
  template <MatrixOf<const T> Batch>
  void add(Batch&& batch) {
    const MatrixView<const T> X = view_of(batch);
    detail::expect_shape("ActivationCovariance::add", "X", X.rows(), X.cols(), X.rows(), sum_.cols());
    detail::expect_finite("ActivationCovariance::add", "X", X);
    if (X.rows() == 0) return;
    detail::product<T, T, T>(T(1), X.transposed(), X.transposed(), true, sum_.view());
    tokens_ += X.rows();
  }

  [[nodiscard]] Index tokens() const noexcept { return tokens_; }
  [[nodiscard]] Index in_features() const noexcept { return sum_.cols(); }

  /// C = (1/tokens)·Σ x·xᵀ + damping·mean(diag)·I, symmetric to the last bit.
  /// **Throws** ArgumentError before the first token, on a damping that is negative or not finite.
  [[nodiscard]] Matrix<T> damped(double damping) const {
    if (tokens_ == 0) throw ArgumentError("ActivationCovariance: no activations were added");
    if (!(damping >= 0) || !std::isfinite(damping))
      throw ArgumentError(detail::text("ActivationCovariance: damping must be finite and not negative, got ", damping));
    const Index n = sum_.cols();
    Matrix<T> C(n, n);
    double trace = 0;
    for (Index i = 0; i < n; ++i) trace += double(sum_(i, i));
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
};

/// Which end of the spectrum of W·C trains.
enum class CordaMode {
  instruction,  ///< the first r: what the sampled task uses most is adapted
  knowledge     ///< the last r: what the sampled knowledge uses most stays frozen
};

struct CordaOptions {
  /// r, 1 … min(out, in).
  Index rank = 8;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  CordaMode mode = CordaMode::instruction;
  /// C + damping·mean(diag C)·I is what stands for C.
  double damping = 0.01;
  /// Type the factors will be stored in; the base is formed from the rounded ones.
  FactorStorage factor_storage = FactorStorage::native;
  /// Accuracy of the truncated SVD of W·C (mode instruction); svd.seed is the seed of all randomness here.
  TruncatedSvdOptions svd = {};
};

namespace detail {

/// W·C for symmetric C, never formed.
template <Real T, class S>
class TimesSymmetric {
 public:
  using scalar = T;
  TimesSymmetric(MatrixView<const S> W, MatrixView<const T> C) : W_(W), C_(C) {}
  [[nodiscard]] Index rows() const { return W_.rows(); }
  [[nodiscard]] Index cols() const { return W_.cols(); }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const {
    const Matrix<T> CX = multiply<T>(C_, X);
    product<T, S, T>(T(1), W_, CX.view().transposed(), false, Y);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    Matrix<T> WtX(W_.cols(), X.cols());
    product<T, S, T>(T(1), W_.transposed(), X.transposed(), false, WtX.view());
    product<T, T, T>(T(1), C_, WtX.view().transposed(), false, Y);
  }

 private:
  MatrixView<const S> W_;
  MatrixView<const T> C_;
};

}  // namespace detail

/// CorDA: with W·C = U·S·Vᵀ, C the damped covariance of the layer's inputs, the chosen r triplets give B = U·√(S/s) and
/// A = √(S/s)·(C⁻¹V)ᵀ; base = W − s·B·A.
///
/// C is not inverted: S·(C⁻¹V)ᵀ = Uᵀ·W·C·C⁻¹ = Uᵀ·W, so A = (s·S)^(−½)·Uᵀ·W and s·B·A = U·Uᵀ·W.
/// **Shapes** W out×in in any order and storage, the covariance in×in; base out×in stored as `Base`. **Scale** s = α/r
/// or α/√r.
/// **Throws** ShapeError: the covariance is of another layer; ArgumentError: rank, α, damping, no activations, svd
/// options; NonFiniteError. **Cost** instruction: a truncated SVD of an operator of 2·(out·in + in²) flops a vector;
/// knowledge: W·C formed, 2·out·in² flops, and minor_svd of it.
/// **Numerics** base + s·B·A = W to rounding. Where σ_i of W·C vanishes the pair (B, A) is zero, and `notes` says so.
/// PEFT doubles the damping until its inverse is accurate; here nothing depends on an inverse and the damping stays as
/// given. `captured_energy` and `total_energy` are those of W·C.
/// **Source** Yang et al., "CorDA", arXiv 2406.05223, §3.2–3.3.
template <class Base = void, MatrixLike X>
auto corda(X&& weight, const ActivationCovariance<arithmetic_of<scalar_of<X>>>& covariance,
           const CordaOptions& options = {}) {
  using S = scalar_of<X>;
  using T = arithmetic_of<S>;
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

  Initialised<T, std::conditional_t<std::is_void_v<Base>, T, Base>> result;
  InitReport& report = result.report;
  Svd<T> d;
  double largest = 0;
  const char* how = "";
  {
    // ‖W·C‖_F² = Σ over rows of W·C; the instruction mode takes it in bands so that W·C is not kept.
    const bool keep = options.mode == CordaMode::knowledge;
    const Index height = keep ? m : std::clamp<Index>((Index(1) << 20) / n, 1, m);
    Matrix<T> band(height, n);
    for (Index i = 0; i < m; i += height) {
      const auto rows = band.view().middle_rows(0, std::min(height, m - i));
      detail::product<T, S, T>(T(1), W.middle_rows(i, rows.rows()), C.view(), false, rows);
      report.total_energy += detail::squared_norm(rows);
    }
    if (keep) {
      MinorSvd<T> minor = minor_svd(band, r, {.seed = options.svd.seed});
      how = detail::way_found(minor);
      d = std::move(static_cast<Svd<T>&>(minor));
      largest = std::sqrt(report.total_energy / double(std::min(m, n)));
    } else {
      TruncatedSvd<T> top = truncated_svd<T>(detail::TimesSymmetric<T, S>(W, C.view()), r, options.svd);
      report.passes = top.passes;
      report.converged = top.converged;
      largest = double(top.S[0]);
      d = std::move(static_cast<Svd<T>&>(top));
    }
  }
  for (const T s : d.S) report.captured_energy += double(s) * double(s);
  const double eps = double(std::numeric_limits<T>::epsilon());
  report.notes = detail::dead_pairs_note(d.S, largest, m, n, eps) + how;

  LoraFactors<T>& f = result.factors;
  f.scale = T(scale);
  f.A.resize(r, n);
  f.B = std::move(d.U);
  detail::product<T, T, S>(T(1), f.B.view().transposed(), W.transposed(), false, f.A.view());  // Uᵀ·W
  for (Index k = 0; k < r; ++k) {
    const double s = double(d.S[std::size_t(k)]);
    const bool dead = s <= largest * double(std::max(m, n)) * eps;
    const T up = T(dead ? 0 : std::sqrt(s / scale)), down = T(dead ? 0 : 1 / std::sqrt(s * scale));
    for (Index i = 0; i < m; ++i) f.B(i, k) *= up;
    for (Index j = 0; j < n; ++j) f.A(k, j) *= down;
  }
  detail::split_weight("corda", W, options.factor_storage, result);
  report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

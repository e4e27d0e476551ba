// SPDX-License-Identifier: Apache-2.0
// EVA: A from the directions in which a layer's inputs vary most, found in one pass over the activations; ranks where
// they explain most.
#pragma once

#include <numeric>
#include <span>

#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank {

struct ActivationSvdOptions {
  /// Directions kept; EVA keeps ρ·r of them, ρ up to 2, so that a layer may get more than its share.
  Index components = 16;
  /// Subtract the running mean, as the published implementation does (principal components); without, the plain SVD of
  /// X.
  bool centre = true;
  /// Of the start vectors of the first SVD, on which the directions depend only as far as its accuracy goes.
  std::uint64_t seed = 0;
};

/// The leading right singular vectors of all inputs X a layer has seen, updated batch by batch.
///
/// With k directions V·diag(S) of the past and a new batch X, the leading triplets of [S·Vᵀ; X − x̄; √(pt/(p+t))·(x̄_p −
/// x̄)] are those of everything, up to what the cut to k directions dropped before; p, t are tokens past and new, x̄_p, x̄
/// their means.
/// **Shapes** batches tokens×in, at least one token each. **Cost** a truncated SVD of (k + tokens + 1)×in a batch,
/// started from V; k·in + in scalars between batches. **Numerics** the total variance is exact (double); the captured
/// one is a lower bound.
/// **Source** Paischer et al., "EVA", arXiv 2410.07170, §3.1; Ross, Lim, Lin and Yang, IJCV 77 (2008), for the update.
template <Real T>
class ActivationSvd {
 public:
  /// **Throws** ArgumentError unless 1 ≤ components ≤ in.
  ActivationSvd(Index in, const ActivationSvdOptions& options)
      : options_(options), mean_(std::size_t(std::max<Index>(in, 0))) {
    if (in < 1 || options.components < 1 || options.components > in)
      throw ArgumentError(
          detail::text("ActivationSvd: components must lie in [1, ", in, "], got ", options.components));
  }

  /// The directions of a covariance somebody else collected, C = E[x·xᵀ] over that many tokens.
  ///
  /// **Shapes** C in×in, any order. **Throws** ShapeError unless square; NonFiniteError; ArgumentError: no tokens, no
  /// covariance (asymmetric, a negative eigenvalue among the leading ones), options as the constructor, and `centre`,
  /// since C no longer knows a mean: subtract it before, or do without. **Cost** a truncated SVD of C.
  template <MatrixOf<const T> Square>
  static ActivationSvd from_covariance(Square&& covariance, Index tokens, const ActivationSvdOptions& options) {
    const MatrixView<const T> C = view_of(covariance);
    detail::expect_shape("ActivationSvd::from_covariance", "C", C.rows(), C.cols(), C.rows(), C.rows());
    if (tokens < 1)
      throw ArgumentError(detail::text("ActivationSvd::from_covariance: tokens must be positive, got ", tokens));
    if (options.centre)
      throw ArgumentError("ActivationSvd::from_covariance: a covariance cannot be centred afterwards, set centre off");
    detail::expect_covariance("ActivationSvd::from_covariance", C);
    ActivationSvd result(C.rows(), options);
    TruncatedSvd<T> d = truncated_svd(C, options.components, {.seed = options.seed});
    for (Index i = 0; i < C.rows(); ++i) result.total_ += double(tokens) * double(C(i, i));
    for (Index k = 0; k < options.components; ++k) {
      T& s = d.S[std::size_t(k)];
      const double side = detail::lane_sum(C.rows(), [&](Index i) { return double(d.U(i, k)) * double(d.V(i, k)); });
      // C·v = λ·v has u = v; u = −v is an eigenvalue below zero, which rounding alone makes no larger than eps·trace.
      if (side < 0 && double(s) * double(tokens) > double(std::sqrt(std::numeric_limits<T>::epsilon())) * result.total_)
        throw ArgumentError(detail::text("ActivationSvd::from_covariance: C has the eigenvalue ", -double(s),
                                         ", a covariance has none below 0"));
      s = T(std::sqrt(double(tokens) * double(s)));
    }
    result.V_ = std::move(d.V);
    result.S_ = std::move(d.S);
    result.cosines_.assign(std::size_t(options.components), 0);
    result.converged_ = d.converged;
    result.tokens_ = tokens;
    return result;
  }

  /// Takes in a batch. **Throws** ShapeError; NonFiniteError, before anything has changed.
  template <MatrixOf<const T> Batch>
  void add(Batch&& batch) {
    const MatrixView<const T> X = view_of(batch);
    const Index n = in_features(), t = X.rows();
    detail::expect_shape("ActivationSvd::add", "X", t, X.cols(), t, n);
    detail::expect_finite("ActivationSvd::add", "X", X);
    if (t == 0) return;
    const Index k = Index(S_.size());
    std::vector<double> batch_mean(mean_.size());
    if (options_.centre) {
      for (Index i = 0; i < t; ++i)
        for (Index j = 0; j < n; ++j) batch_mean[std::size_t(j)] += double(X(i, j));
      for (double& x : batch_mean) x /= double(t);
    }
    const bool shift = options_.centre && tokens_ > 0;
    Matrix<T> stacked(k + t + (shift ? 1 : 0), n);
    for (Index i = 0; i < k; ++i)
      for (Index j = 0; j < n; ++j) stacked(i, j) = S_[std::size_t(i)] * V_(j, i);
    for (Index i = 0; i < t; ++i)
      for (Index j = 0; j < n; ++j) stacked(k + i, j) = T(double(X(i, j)) - batch_mean[std::size_t(j)]);
    if (shift) {
      const double w = std::sqrt(double(tokens_) * double(t) / double(tokens_ + t));
      for (Index j = 0; j < n; ++j) stacked(k + t, j) = T(w * (mean_[std::size_t(j)] - batch_mean[std::size_t(j)]));
    }
    // Everything below the first k rows is new; those stand for what total_ holds already.
    total_ += detail::squared_norm(MatrixView<const T>(stacked.view().middle_rows(k, stacked.rows() - k)));

    const Index rank = std::min({options_.components, stacked.rows(), n});
    TruncatedSvd<T> d = truncated_svd(stacked, rank, {.seed = options_.seed},
                                      k > 0 ? MatrixView<const T>(V_.view()) : MatrixView<const T>());
    converged_ = converged_ && d.converged;
    cosines_.assign(std::size_t(rank), 0);
    for (Index i = 0; i < std::min(rank, k); ++i)
      cosines_[std::size_t(i)] =
          std::abs(detail::lane_sum(n, [&](Index j) { return double(V_(j, i)) * double(d.V(j, i)); }));
    V_ = std::move(d.V);
    S_ = std::move(d.S);
    const double p = double(tokens_), all = p + double(t);
    for (std::size_t j = 0; j < mean_.size(); ++j) mean_[j] = (mean_[j] * p + batch_mean[j] * double(t)) / all;
    tokens_ += t;
  }

  [[nodiscard]] Index in_features() const noexcept { return Index(mean_.size()); }
  [[nodiscard]] Index tokens() const noexcept { return tokens_; }
  /// in×k, orthonormal; k = components once enough tokens have come.
  [[nodiscard]] MatrixView<const T> directions() const noexcept { return V_.view(); }
  [[nodiscard]] const std::vector<T>& singular_values() const noexcept { return S_; }
  /// σ_i²/‖X‖_F² (of the centred X when centring), the share of the variance each direction explains.
  [[nodiscard]] std::vector<double> explained() const {
    std::vector<double> out;
    for (const T s : S_) out.push_back(total_ > 0 ? double(s) * double(s) / total_ : 0);
    return out;
  }
  [[nodiscard]] double total_energy() const noexcept { return total_; }
  /// Whether every truncated SVD on the way converged.
  [[nodiscard]] bool converged() const noexcept { return converged_; }
  /// Whether the first `rank` directions moved by less than arccos(threshold) with the last batch: EVA's stopping rule.
  [[nodiscard]] bool settled(Index rank, double threshold = 0.99) const {
    if (rank > Index(cosines_.size())) return false;
    return std::all_of(cosines_.begin(), cosines_.begin() + rank, [&](double c) { return c >= threshold; });
  }

 private:
  ActivationSvdOptions options_;
  Matrix<T> V_;
  std::vector<T> S_;
  std::vector<double> mean_, cosines_;
  double total_ = 0;
  Index tokens_ = 0;
  bool converged_ = true;
};

/// Ranks for many layers: the `budget` largest explained shares win, whichever layer they are in.
///
/// **Shapes** explained[l] are the shares of layer l, descending, as ActivationSvd::explained gives them. A layer may
/// get 0.
/// **Throws** ArgumentError: a budget that is negative; shares that are negative or not sorted; NonFiniteError.
/// **Cost** O(N log N). **Numerics** ties go to the layer that comes first. A budget beyond all shares gives all of
/// them.
/// **Source** EVA, arXiv 2410.07170, §3.2: the redistribution of r·layers ranks.
inline std::vector<Index> eva_ranks(const std::vector<std::vector<double>>& explained, Index budget) {
  if (budget < 0) throw ArgumentError(detail::text("eva_ranks: the budget must not be negative, got ", budget));
  struct Share {
    double value;
    std::size_t layer;
  };
  std::vector<Share> shares;
  for (std::size_t l = 0; l < explained.size(); ++l)
    for (std::size_t i = 0; i < explained[l].size(); ++i) {
      const double x = explained[l][i];
      if (!std::isfinite(x))
        throw NonFiniteError(detail::text("eva_ranks: share ", i, " of layer ", l, " is not finite"));
      if (x < 0 || (i > 0 && x > explained[l][i - 1]))
        throw ArgumentError(
            detail::text("eva_ranks: the shares of layer ", l, " must descend and not be negative, got ", x));
      shares.push_back({x, l});
    }
  std::stable_sort(shares.begin(), shares.end(), [](const Share& a, const Share& b) { return a.value > b.value; });
  std::vector<Index> ranks(explained.size());
  for (std::size_t i = 0; i < std::min(shares.size(), std::size_t(budget)); ++i) ++ranks[shares[i].layer];
  return ranks;
}

struct EvaOptions {
  /// r, 1 … the directions found; for redistributed ranks, what eva_ranks gave this layer.
  Index rank = 16;
  /// α; s = α/r, or α/√r when rank_stabilised.
  double alpha = 16;
  bool rank_stabilised = false;
  /// Divide row i of A by √σ_i.
  bool whiten = false;
};

/// EVA: A = the first r directions of the layer's inputs, B = 0.
///
/// **Shapes** A r×in, B out×r; the base is W, unchanged. **Scale** s = α/r or α/√r.
/// **Throws** ArgumentError: rank above the directions found or min(out, in), α, whitening a zero direction.
/// **Cost** a copy. **Numerics** A has orthonormal rows unless whitened. `captured_energy` and `total_energy` are those
/// of X.
/// **Source** Paischer et al., "EVA", arXiv 2410.07170, Algorithm 1.
template <Real T>
Initialised<T> eva(Index out, const ActivationSvd<T>& inputs, const EvaOptions& options = {}) {
  const detail::Stopwatch watch;
  const Index r = options.rank, n = inputs.in_features();
  detail::check_rank("eva", r, out, n);
  if (r > inputs.directions().cols())
    throw ArgumentError(detail::text("eva: rank must not exceed the ", inputs.directions().cols(),
                                     " directions found in ", inputs.tokens(), " tokens, got ", r));
  Initialised<T> result;
  result.factors.scale = T(detail::scale_of<T>(options));
  result.factors.A = Matrix<T>(inputs.directions().middle_cols(0, r).transposed());
  result.factors.B = Matrix<T>(out, r);
  for (Index i = 0; i < r; ++i) {
    const double s = double(inputs.singular_values()[std::size_t(i)]);
    result.report.captured_energy += s * s;
    if (!options.whiten) continue;
    if (!(s > 0)) throw ArgumentError(detail::text("eva: cannot whiten direction ", i, ", its singular value is 0"));
    for (Index j = 0; j < n; ++j) result.factors.A(i, j) = T(double(result.factors.A(i, j)) / std::sqrt(s));
  }
  result.report.method = "eva";
  result.report.total_energy = inputs.total_energy();
  result.report.converged = inputs.converged();
  result.report.seconds = watch.seconds();
  return result;
}

}  // namespace lowrank

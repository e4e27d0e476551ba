// SPDX-License-Identifier: Apache-2.0
// TIES, DARE and magnitude pruning: combinations that first drop most entries of every update.
#pragma once

#include <algorithm>
#include <limits>

#include "lowrank/adapter/combine.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank {

enum class SparseMethod {
  ties,             ///< keep the largest entries, elect a sign for each position, average those that agree
  magnitude_prune,  ///< keep the largest entries, weighted sum
  dare_linear,      ///< drop entries at random, rescale the rest by 1/density, weighted sum
  dare_ties         ///< drop at random and rescale, then elect signs as TIES does
};

/// Where entries are dropped: in the updates ΔW_i, as the papers have it, or in A and B apart, as PEFT's methods
/// without
/// "_svd" do (cheap, same rank needed, with cross terms).
enum class SparseSpace { update, factors };

/// How TIES elects the sign of a position: by the sum of the values, or by counting signs.
enum class SignElection { total, frequency };

struct SparseCombineOptions {
  SparseMethod method = SparseMethod::ties;
  /// Share of entries kept, in (0, 1].
  double density = 0.2;
  SparseSpace space = SparseSpace::update;
  SignElection election = SignElection::total;
  /// Rank of the result when space is update; with factors it is the adapters' own.
  Index rank = 16;
  /// For DARE; adapter i of the list draws from stream i.
  std::uint64_t seed = 0;
};

/// What a sparse combination did.
template <Real T>
struct SparseCombined : Combined<T> {
  /// ‖M‖_F and ‖M − s·B·A‖_F for the merged update M, which has no low rank of its own; space update only.
  double merged_norm = 0, truncation_error = 0;
  bool converged = true;
};

namespace detail {

/// The smallest magnitude that is kept when a share `density` of `values` (overwritten by magnitudes) stays.
template <class T>
T keep_threshold(std::vector<T>& values, double density) {
  const auto keep = std::max<std::size_t>(1, std::size_t(density * double(values.size())));
  if (keep >= values.size()) return T(0);
  for (T& v : values) v = std::abs(v);
  const auto at = values.begin() + std::ptrdiff_t(keep - 1);
  std::nth_element(values.begin(), at, values.end(), std::greater<>());
  return *at;
}

/// The rule for one position: sparsified entries of every adapter in, one merged entry out.
struct SparseRule {
  SparseMethod method;
  SignElection election;
  double density;

  [[nodiscard]] bool random() const { return method == SparseMethod::dare_linear || method == SparseMethod::dare_ties; }
  [[nodiscard]] bool elects() const { return method == SparseMethod::ties || method == SparseMethod::dare_ties; }

  /// Entry `value` after sparsification; `index` addresses the random number of its position.
  template <class T>
  [[nodiscard]] T sparsify(T value, T threshold, const CounterRng& rng, std::uint64_t index) const {
    if (random()) return rng.uniform(index) < density ? T(double(value) / density) : T(0);
    return std::abs(value) >= threshold ? value : T(0);
  }
  /// Σ w_i·v_i, or the mean of those w_i·v_i whose v_i has the elected sign.
  template <class T>
  [[nodiscard]] T merge(const T* v, const double* w, std::size_t k) const {
    double sum = 0;
    if (!elects()) {
      for (std::size_t i = 0; i < k; ++i) sum += w[i] * double(v[i]);
      return T(sum);
    }
    double vote = 0;
    for (std::size_t i = 0; i < k; ++i)
      vote += election == SignElection::total ? double(v[i]) : double((v[i] > 0) - (v[i] < 0));
    int agreeing = 0;
    for (std::size_t i = 0; i < k; ++i)
      if (v[i] != 0 && (v[i] > 0) == (vote >= 0)) {
        sum += w[i] * double(v[i]);
        ++agreeing;
      }
    return T(agreeing > 0 ? sum / agreeing : 0.0);
  }
};

/// Sparsifies and merges `k` equal-shaped matrices given panel by panel: fill(i, row0, panel) writes rows of matrix i.
template <Real T, class Fill>
void sparse_merge(const SparseRule& rule, std::span<const double> weights, std::uint64_t seed, std::uint64_t stream0,
                  Fill&& fill, MatrixView<T> out) {
  const std::size_t k = weights.size();
  const Index m = out.rows(), n = out.cols();
  if (m == 0 || n == 0) return;
  std::vector<T> thresholds(k, T(0));
  if (!rule.random()) {
    std::vector<T> all(static_cast<std::size_t>(m * n));
    for (std::size_t i = 0; i < k; ++i) {
      fill(i, Index(0), MatrixView<T>(all.data(), m, n, n, 1));
      thresholds[i] = keep_threshold(all, rule.density);
    }
  }
  const Index height = std::clamp<Index>((Index(1) << 20) / (n * Index(k)), 1, m);
  Matrix<T> panels(Index(k) * height, n);
  for (Index i0 = 0; i0 < m; i0 += height) {
    const Index rows = std::min(height, m - i0);
    for (std::size_t i = 0; i < k; ++i) fill(i, i0, panels.view().block(Index(i) * height, 0, rows, n));
    parallel_ranges(rows, 1 + 4096 / n, [&](Index begin, Index end) {
      std::array<T, 64> few;
      std::vector<T> many(k > few.size() ? k : 0);
      T* v = k > few.size() ? many.data() : few.data();
      for (Index r = begin; r < end; ++r)
        for (Index j = 0; j < n; ++j) {
          for (std::size_t i = 0; i < k; ++i)
            v[i] = rule.sparsify(panels(Index(i) * height + r, j), thresholds[i], CounterRng(seed, stream0 + i),
                                 std::uint64_t((i0 + r) * n + j));
          out(i0 + r, j) = rule.merge(v, weights.data(), k);
        }
    });
  }
}

}  // namespace detail

/// Combines adapters after dropping a share 1 − density of the entries of each: TIES, DARE, magnitude pruning.
///
/// For every position, with v_i the sparsified entries: ties and dare_ties take the sign of Σv_i (or of the count of
/// signs) and return the mean of the w_i·v_i that agree with it; the others return Σw_i·v_i. In space `update` the
/// entries are those of ΔW_i = s_i·B_i·A_i and the merged matrix is cut to `rank` by a truncated SVD; in space
/// `factors` those of √(w_i s_i)-scaled A_i and B_i, merged apart, which is what PEFT's `ties`, `dare_linear`, ... do.
/// **Shapes** all adapters out×in; in space factors of one rank. **Scale** s = 1.
/// **Throws** ArgumentError: density outside (0, 1], rank out of range, no adapter, a weight not finite or (space
/// factors) negative; ShapeError; NonFiniteError.
/// **Cost** update: 2·k·out·in·Σr flops twice and a truncated SVD; memory out·in twice. factors: O((out + in)·r·k).
/// **Numerics** entries equal to the threshold are all kept. Ties of the vote go to +. Same seed, same mask, whatever
/// the threads.
/// **Source** Yadav et al., "TIES-Merging", arXiv 2306.01708, Algorithm 1; Yu et al., "DARE", arXiv 2311.03099, eq. 3.
template <Real T>
SparseCombined<T> combine_sparse(const std::vector<Weighted<T>>& list, const SparseCombineOptions& options = {}) {
  detail::check_combination("combine_sparse", list);
  if (!(options.density > 0 && options.density <= 1))
    throw ArgumentError(detail::text("combine_sparse: the density must lie in (0, 1], got ", options.density));
  const LoraFactors<T>& first = list.front().adapter;
  const Index m = first.out_features(), n = first.in_features();
  const detail::SparseRule rule{options.method, options.election, options.density};
  SparseCombined<T> out;
  out.factors.scale = T(1);

  if (options.space == SparseSpace::factors) {
    std::vector<double> roots;
    for (const auto& [f, w] : list) {
      if (f.rank() != first.rank())
        throw ShapeError(detail::text("combine_sparse: in space factors all adapters must have one rank, got ",
                                      first.rank(), " and ", f.rank()));
      if (w * double(f.scale) < 0)
        throw ArgumentError(detail::text("combine_sparse: in space factors weights must not be negative, got ", w));
      roots.push_back(std::sqrt(w * double(f.scale)));
    }
    const auto merge = [&](Matrix<T> LoraFactors<T>::*which, std::uint64_t stream) {
      Matrix<T>& target = out.factors.*which;
      target = Matrix<T>((first.*which).rows(), (first.*which).cols());
      detail::sparse_merge<T>(
          rule, roots, options.seed, stream,
          [&](std::size_t i, Index row, MatrixView<T> panel) {
            for (Index r = 0; r < panel.rows(); ++r)
              for (Index j = 0; j < panel.cols(); ++j) panel(r, j) = (list[i].adapter.*which)(row + r, j);
          },
          target.view());
    };
    merge(&LoraFactors<T>::A, 0);
    merge(&LoraFactors<T>::B, list.size());
  } else {
    detail::check_rank("combine_sparse", options.rank, m, n);
    std::vector<double> weights;
    for (const auto& item : list) weights.push_back(item.weight);
    Matrix<T> merged(m, n);
    detail::sparse_merge<T>(
        rule, weights, options.seed, 0,
        [&](std::size_t i, Index row, MatrixView<T> panel) {
          const LoraFactors<T>& f = list[i].adapter;
          detail::product<T, T, T>(f.scale, f.B.view().middle_rows(row, panel.rows()), f.A.view().transposed(), false,
                                   panel);
        },
        merged.view());
    const auto d = truncated_svd(merged, options.rank, {.seed = options.seed});
    detail::balanced_factors<T>(d.U.view(), d.S, d.V.view(), 1, out.factors);
    out.merged_norm = std::sqrt(d.total_energy);
    out.truncation_error = std::sqrt(std::max(0.0, d.total_energy - d.captured_energy));
    out.converged = d.converged;
  }
  out.sum_norm = detail::weighted_sum_norm(list);
  out.distance = detail::distance_to_sum(out.factors, list);
  return out;
}

}  // namespace lowrank

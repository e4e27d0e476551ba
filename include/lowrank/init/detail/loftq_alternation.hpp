// SPDX-License-Identifier: Apache-2.0
// The steps LoftQ and QPiSSA alternate: quantise what the factors leave, and fit factors to what quantisation leaves.
#pragma once

#include <optional>

#include "lowrank/init/detail/loftq_weighting.hpp"
#include "lowrank/init/loftq_options.hpp"
#include "lowrank/init/residual.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/quant/gptq.hpp"

namespace lowrank::detail {

/// W, the current Q and s·B·A, one dense scratch matrix, and the singular subspace of the last fit, where the next
/// starts.
template <class T, class S>
class QuantisedAlternation {
 public:
  [[gnu::cold]] QuantisedAlternation(const char* method, MatrixView<const S> W, const LoftqOptions& o,
                                     MatrixView<const T> covariance)
      : method_(method), W_(W), o_(o) {
    check_rank(method, o.rank, W.rows(), W.cols());
    if (o.iterations < 1) throw ArgumentError(text(method, ": iterations must be at least 1, got ", o.iterations));
    if (!(o.svd_slack > 0) || !(o.svd_slack < 1))
      throw ArgumentError(text(method, ": svd_slack must lie in (0, 1), got ", o.svd_slack));
    scale_ = scale_of<T>(o);
    if (o.gptq && covariance.empty()) throw ArgumentError(text(method, ": gptq needs a covariance, got none"));
    if (!covariance.empty()) weight_ = ActivationWeight(method, covariance, W.cols(), o.damping);
    result.base = QuantisedMatrix<T>::zero(W.rows(), W.cols(), o.quantise);
    result.factors = zero_factors();
    current_ = result.factors;
    Q_ = result.base;
    LoftqReport& report = result.report;
    report.method = method;
    report.weight_norm = std::sqrt(squared_norm(W));
    if (!std::isfinite(report.weight_norm)) refuse_non_finite();
    E_.resize(W.rows(), W.cols());
    quantise_rest();
    report.plain = measure();
    if (!o.gptq) return;
    feedback_.quantise = o.quantise;
    feedback_.damping = o.damping;
    const bool aligned = Q_.layout().rows_start_blocks() || W.rows() <= 1;
    feedback_.fixed_scales = o.quantise.double_quantise || !aligned;
    factor_.emplace(covariance, feedback_);
  }

  /// Q = quant(W − s·B·A).
  [[gnu::cold, gnu::noinline]] void quantise_rest() {
    subtract_factors();
    if (factor_)
      Q_ = lowrank::gptq(std::as_const(E_).view(), *factor_, feedback_).base;
    else
      Q_.assign(std::as_const(E_).view());
  }

  /// s·B·A = the best rank-r approximation of W − Q, or of W itself.
  [[gnu::cold, gnu::noinline]] void fit_factors(bool of_weight) {
    form_residual(of_weight);
    MatrixView<T> target = E_.view();
    if (!weight_.empty()) {
      weighted_.resize(W_.rows(), W_.cols());
      weight_.template apply<T>(std::as_const(E_).view(), weighted_.view());
      target = weighted_.view();
    }
    const auto d = leading_triplets(target, of_weight ? MatrixView<const T>{} : std::as_const(subspace_).view());
    balanced_factors<T>(d.U.view(), d.S, d.V.view(), scale_, current_);
    if (!weight_.empty()) weight_.template solve_rows<T>(current_.A.view());
    round_to_storage(method_, current_.A.view(), o_.factor_storage);
    round_to_storage(method_, current_.B.view(), o_.factor_storage);
    if (!of_weight) subspace_ = d.V;
  }

  /// The errors of the current pair (Q, s·B·A).
  [[gnu::cold, gnu::noinline]] LoftqStep measure() {
    LoftqStep step;
    subtract_factors();
    step.frobenius = std::sqrt(subtract_codes());
    step.passes = std::exchange(passes_, 0);
    const MatrixView<const T> E = std::as_const(E_).view();
    if (step.frobenius > 0) {
      // One vector, a few readings: the largest value of a flat spectrum to some percent.
      const auto top = truncated_svd(
          E, 1, {.energy_tolerance = 0.02, .block = 4, .max_passes = 6, .seek_copies = false, .seed = o_.seed});
      step.spectral = double(top.S[0]);
      if (o_.nuclear) step.nuclear = nuclear_norm(E);
    } else if (o_.nuclear) {
      step.nuclear = 0;
    }
    if (!weight_.empty()) {
      weighted_.resize(W_.rows(), W_.cols());
      weight_.template apply<T>(E, weighted_.view());
      step.weighted = std::sqrt(squared_norm(MatrixView<const T>(weighted_.view())));
    }
    step.seconds = watch_.seconds();
    watch_ = Stopwatch();
    return step;
  }

  /// Takes the current pair as result if it is the best so far; false when it is not and the method should end.
  [[gnu::cold, gnu::noinline]] bool keep_if_better(const LoftqStep& step) {
    LoftqReport& report = result.report;
    report.steps.push_back(step);
    const bool first = report.steps.size() == 1;
    if (first || error(step) < error(report.result())) {
      report.best = Index(report.steps.size()) - 1;
      result.base = Q_;
      result.factors = current_;
      return true;
    }
    return !o_.stop_when_worse;
  }

  /// Completes the report. When no pair beat plain quantisation (factors rounded too coarsely, W = Q), B is zero and
  /// the base is quant(W).
  [[gnu::cold, gnu::noinline]] QuantisedInit<T> finish() {
    LoftqReport& report = result.report;
    if (!(error(report.result()) <= error(report.plain))) {
      factor_.reset();
      current_ = zero_factors();
      current_.A = result.factors.A;  // random-like directions to train in; B = 0
      quantise_rest();
      result.base = Q_;
      result.factors = current_;
      report.steps.push_back(report.plain);
      report.best = Index(report.steps.size()) - 1;
    }
    report.seconds = total_.seconds();
    return std::move(result);
  }

  QuantisedInit<T> result;

 private:
  /// What is fitted and compared.
  [[nodiscard]] double error(const LoftqStep& s) const { return weight_.empty() ? s.frobenius : s.weighted; }
  [[nodiscard]] LoraFactors<T> zero_factors() const {
    return {Matrix<T>(o_.rank, W_.cols()), Matrix<T>(W_.rows(), o_.rank), T(scale_)};
  }
  /// Throws if an element of W is not finite in float, where blocks are quantised.
  void refuse_non_finite() const {
    for (Index i = 0; i < W_.rows(); ++i)
      for (Index j = 0; j < W_.cols(); ++j)
        if (const auto x = double(W_(i, j)); !std::isfinite(float(x)))
          throw NonFiniteError(text(method_, ": W must be finite", std::isfinite(x) ? " in float" : "", ", got ", x,
                                    " at (", i, ", ", j, "), block ", Q_.layout().block_of(i, j)));
  }
  /// The rank-r truncated SVD of `target`, no more accurate than the error needs.
  [[gnu::cold]] TruncatedSvd<T> leading_triplets(MatrixView<const T> target, MatrixView<const T> start) {
    // A deficit d in a captured share c of the energy raises the error by d·c/(2(1 − c)), relatively. Before anything
    // is known c is taken to be small, as it is where quantisation noise is fitted; if it is not, the SVD goes on.
    const auto tolerance = [&] {
      return std::clamp(2 * o_.svd_slack * (1 - captured_share_) / captured_share_, 1e-6, 0.01);
    };
    const double first = tolerance();
    TruncatedSvd<T> d = triplets_to(first, target, start);
    const double now = tolerance();
    return now <= first / 2 ? triplets_to(now, target, std::as_const(d.V).view()) : d;
  }
  [[gnu::cold]] TruncatedSvd<T> triplets_to(double tolerance, MatrixView<const T> target, MatrixView<const T> start) {
    // No search for repeated values: quantisation noise has none, and the error is measured in any case.
    auto d =
        truncated_svd(target, o_.rank, {.energy_tolerance = tolerance, .seek_copies = false, .seed = o_.seed}, start);
    passes_ += d.passes;
    if (d.total_energy > 0) captured_share_ = std::clamp(d.captured_energy / d.total_energy, 1e-3, 0.999);
    return d;
  }
  /// E = W − s·B·A.
  void subtract_factors() { residual_base(W_, current_, E_.view()); }
  /// E −= Q; returns ‖E‖_F².
  [[gnu::noinline]] double subtract_codes() {
    std::vector<double> sums(std::size_t(W_.rows()));
    parallel_ranges(W_.rows(), 1 + 16384 / W_.cols(), [&](Index i0, Index i1) {
      T q[512];
      for (Index i = i0; i < i1; ++i)
        for (Index j = 0; j < W_.cols(); j += 512) {
          const Index n = std::min<Index>(512, W_.cols() - j);
          Q_.decode_row(i, j, n, q);
          T* e = &E_(i, j);
          for (Index k = 0; k < n; ++k) e[k] -= q[k];
          sums[std::size_t(i)] += sum_of_squares(n, e);
        }
    });
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
  }
  /// E = W, or W − Q.
  void form_residual(bool of_weight) {
    parallel_ranges(W_.rows(), 1 + 16384 / W_.cols(), [&](Index i0, Index i1) {
      for (Index i = i0; i < i1; ++i)
        for (Index j = 0; j < W_.cols(); ++j) E_(i, j) = T(W_(i, j));
    });
    if (!of_weight) subtract_codes();
  }
  static double nuclear_norm(MatrixView<const T> E) {
    double sum = 0;
    for (const double s : singular_values(E).values) sum += s;
    return sum;
  }

  const char* method_;
  MatrixView<const S> W_;
  const LoftqOptions& o_;
  double scale_ = 1, captured_share_ = 0.02;
  ActivationWeight weight_;
  GptqOptions feedback_;
  std::optional<GptqFactor<T>> factor_;  ///< of the covariance, once plain quantisation has been measured
  QuantisedMatrix<T> Q_;
  LoraFactors<T> current_;
  Matrix<T> E_, weighted_, subspace_;
  Index passes_ = 0;
  Stopwatch watch_, total_;
};

}  // namespace lowrank::detail

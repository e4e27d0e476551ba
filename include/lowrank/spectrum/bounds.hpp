// SPDX-License-Identifier: Apache-2.0
// Error bounds for rank metrics: what is certain when singular values carry an error, or when only the largest are
// known.
#pragma once

#include <numbers>
#include <vector>

#include "lowrank/linalg/truncated_svd_result.hpp"
#include "lowrank/spectrum/metrics.hpp"

namespace lowrank {

/// Between which values each metric certainly lies. A rank whose two ends agree is exact.
struct SpectrumBounds {
  SpectrumMetrics lower, upper;

  /// Whether both ends of an energy rank agree: `bounds.exact(&SpectrumMetrics::energy_rank_90)`.
  [[nodiscard]] bool exact(Index SpectrumMetrics::*rank) const { return lower.*rank == upper.*rank; }
};

/// What is known of a spectrum.
struct SpectrumKnowledge {
  /// Every singular value given is within this of the true one (absolute, the unit of the matrix).
  double error = 0;
  /// The same for each value by itself, as many as there are values; empty: `error` for all.
  std::span<const double> errors = {};
  /// ‖W‖_F when it is known by itself, from the elements; negative: only from the values. Required when the values are
  /// not all min(m, n).
  double frobenius = -1;
  /// Relative error of `frobenius`. A double sum over fewer than 2^30 elements keeps this.
  double frobenius_error = 1e-12;
  /// See numerical_rank.
  double eps = std::numeric_limits<float>::epsilon();
};

namespace detail {

/// −x·ln x, 0 at 0.
inline double entropy_term(double x) { return x > 0 ? -x * std::log(x) : 0; }

/// Head values in [lo_i, hi_i], and a tail of `count` values ≤ cap whose squares sum to something in [energy_lo,
/// energy_hi]. Everything relative to the largest upper end.
struct SpectrumBox {
  std::vector<double> lo, hi;
  double count = 0, cap = 0, energy_lo = 0, energy_hi = 0;

  /// The tail's Σσ: Σσ²/cap ≤ Σσ ≤ √(count·Σσ²).
  [[nodiscard]] double tail_sum_lo() const { return cap > 0 ? energy_lo / cap : 0; }
  [[nodiscard]] double tail_sum_hi() const { return std::min(std::sqrt(count * energy_hi), count * cap); }
};

struct Interval {
  double lo = 0, hi = 0;
};

/// Entropy of p = σ/Σσ is ln S + G/S with S = Σσ, G = Σ −σ·ln σ: growing in G; in S it falls until S = G and rises
/// after. A tail of sum t has t·(−ln cap) ≤ G_tail ≤ t·ln(count/t). Each end is the extreme of a smooth function of
/// (S_head, t) over a rectangle, found among its corners, edge minima and the one inner root.
inline Interval entropy_interval(const SpectrumBox& b) {
  Interval S, G;
  for (std::size_t i = 0; i < b.lo.size(); ++i) {
    S.lo += b.lo[i];
    S.hi += b.hi[i];
    const double at_lo = entropy_term(b.lo[i]), at_hi = entropy_term(b.hi[i]);
    G.lo += std::min(at_lo, at_hi);
    G.hi +=
        b.lo[i] <= 1 / std::numbers::e && b.hi[i] >= 1 / std::numbers::e ? 1 / std::numbers::e : std::max(at_lo, at_hi);
  }
  const Interval t{b.tail_sum_lo(), b.tail_sum_hi()};
  const auto entropy = [](double s, double g) { return s > 0 ? std::log(s) + g / s : 0.0; };
  const double slope = b.cap > 0 ? -std::log(b.cap) : 0;
  const auto low = [&](double s, double x) { return entropy(s + x, G.lo + x * slope); };
  const auto high = [&](double s, double x) {
    return entropy(s + x, G.hi + (x > 0 ? x * std::log(std::max(b.count, 1.0) / x) : 0));
  };
  Interval h{INFINITY, 0};
  for (const double s : {S.lo, S.hi}) {
    for (const double x : {t.lo, t.hi, std::clamp(G.lo - s * (1 + slope), t.lo, t.hi)})
      h.lo = std::min(h.lo, low(s, x));
    const double peak = s > 0 ? b.count * std::exp(-G.hi / s) : t.hi;
    for (const double x : {t.lo, t.hi, std::clamp(peak, t.lo, t.hi)}) h.hi = std::max(h.hi, high(s, x));
  }
  for (const double x : {t.lo, t.hi}) h.lo = std::min(h.lo, low(std::clamp(G.lo + x * slope - x, S.lo, S.hi), x));
  h.lo = std::max(h.lo, 0.0);
  return h;
}

/// The interval of the energy rank for a share τ. Within the head it follows from partial sums; beyond it from the tail
/// being sorted: its first j values hold at least j/count of its energy, and at most j·cap².
inline Interval energy_rank_interval(const SpectrumBox& b, double tau, Interval total, bool total_known) {
  Interval sum, r{-1, -1};
  const std::size_t k = b.lo.size();
  double tail_lo = 0, tail_hi = 0;  // energy of the values after i, when the total has to come from the values
  if (!total_known)
    for (std::size_t i = 0; i < k; ++i) {
      tail_lo += b.lo[i] * b.lo[i];
      tail_hi += b.hi[i] * b.hi[i];
    }
  for (std::size_t i = 0; i < k && r.hi < 0; ++i) {
    sum.lo += b.lo[i] * b.lo[i];
    sum.hi += b.hi[i] * b.hi[i];
    Interval all = total;
    if (!total_known) {
      tail_lo = std::max(0.0, tail_lo - b.lo[i] * b.lo[i]);
      tail_hi = std::max(0.0, tail_hi - b.hi[i] * b.hi[i]);
      all = {sum.hi + tail_lo, sum.lo + tail_hi};
    }
    // Rounding of the sums themselves: never claim exactness that hangs on the last bits.
    const double slack = 4e-16 * double(k + 4) * (total_known ? total.hi : std::max(all.lo, all.hi));
    if (r.lo < 0 && sum.hi + slack >= tau * all.lo) r.lo = double(i + 1);
    if (sum.lo - slack >= tau * all.hi) r.hi = double(i + 1);
  }
  const double last = double(k) + b.count;
  if (r.lo < 0) {
    const double missing = tau * total.lo - sum.hi;
    r.lo =
        std::min(last, double(k) + (b.cap > 0 ? std::max(1.0, std::ceil(missing / (b.cap * b.cap) * (1 - 1e-12))) : 0));
  }
  if (r.hi < 0) {
    const double missing = tau * total.hi - sum.lo;
    r.hi = b.energy_lo > 0
               ? std::min(last, double(k) + std::max(1.0, std::ceil(b.count * missing / b.energy_lo * (1 + 1e-12))))
               : last;
  }
  return r;
}

template <class T>
void check_knowledge(std::span<const T> s, Index count, const SpectrumKnowledge& known) {
  if (!(known.error >= 0) || !std::isfinite(known.error))
    throw ArgumentError(text("spectrum_bounds: error must be finite and not negative, got ", known.error));
  if (!known.errors.empty() && known.errors.size() != s.size())
    throw ShapeError(text("spectrum_bounds: ", s.size(), " values came with ", known.errors.size(), " errors"));
  for (const double e : known.errors)
    if (!(e >= 0) || !std::isfinite(e))
      throw ArgumentError(text("spectrum_bounds: errors must be finite and not negative, got ", e));
  if (Index(s.size()) < count && !(known.frobenius >= 0))
    throw ArgumentError(text("spectrum_bounds: ", s.size(), " of ", count, " singular values need the Frobenius norm"));
}

/// A spectrum of `count` values as a box of them all and an interval of their energy, relative to `unit`, the largest
/// the first can be; nothing else is known of it when `unit` is 0: all are zero.
struct BoundedSpectrum {
  SpectrumBox box;
  Interval total;
  double unit = 0, count = 0;
  bool total_known = false;

  [[nodiscard]] bool complete() const { return box.count == 0; }
  /// σ₁ is at most 1; it is at least this.
  [[nodiscard]] double top_lo() const { return box.lo.empty() ? std::sqrt(total.lo) / std::sqrt(count) : box.lo[0]; }
};

template <class T>
BoundedSpectrum bounded_spectrum(std::span<const T> s, Index count, const SpectrumKnowledge& known) {
  const auto error = [&](std::size_t i) { return known.errors.empty() ? known.error : known.errors[i]; };
  BoundedSpectrum r;
  r.count = double(count);
  r.total_known = known.frobenius >= 0;
  r.unit = s.empty() ? known.frobenius : double(s[0]) + error(0);
  if (count == 0 || r.unit == 0) return {};
  SpectrumBox& b = r.box;
  Interval head;
  for (std::size_t i = 0; i < s.size(); ++i) {
    const double x = double(s[i]), e = error(i);
    b.lo.push_back(std::max(0.0, x - e) / r.unit);
    b.hi.push_back(std::min(x + e, r.unit) / r.unit);
    head.lo += b.lo.back() * b.lo.back();
    head.hi += b.hi.back() * b.hi.back();
  }
  r.total = head;
  if (r.total_known) {
    const double f = known.frobenius / r.unit;
    r.total = {f * f * (1 - 2 * known.frobenius_error), f * f * (1 + 2 * known.frobenius_error)};
    if (r.total.hi < head.lo * (1 - 1e-9))
      throw ArgumentError(text("spectrum_bounds: the values alone have norm ", frobenius_norm(s),
                               ", more than the Frobenius norm ", known.frobenius));
  }
  b.count = double(count - Index(s.size()));
  if (b.count > 0) {
    b.cap = s.empty() ? 1 : b.hi.back();
    b.energy_lo = std::max(0.0, r.total.lo - head.hi);
    b.energy_hi = std::min(std::max(0.0, r.total.hi - head.lo), b.count * b.cap * b.cap);
  }
  return r;
}

inline void bound_norms(const BoundedSpectrum& s, SpectrumBounds& out) {
  Interval sum{s.box.tail_sum_lo(), s.box.tail_sum_hi()};
  for (const double x : s.box.lo) sum.lo += x;
  for (const double x : s.box.hi) sum.hi += x;
  const double F_lo = std::sqrt(s.total.lo), F_hi = std::sqrt(s.total.hi);
  out.lower.spectral_norm = s.unit * s.top_lo();
  out.upper.spectral_norm = s.unit;
  out.lower.frobenius_norm = s.unit * F_lo;
  out.upper.frobenius_norm = s.unit * F_hi;
  out.lower.nuclear_norm = s.unit * std::max(sum.lo, F_lo);
  out.upper.nuclear_norm = s.unit * std::min(sum.hi, F_hi * std::sqrt(s.count));
}

inline void bound_energy_ranks(const BoundedSpectrum& s, SpectrumBounds& out) {
  const auto rank = [&](double tau, Index SpectrumMetrics::*field) {
    const Interval r = energy_rank_interval(s.box, tau, s.total, s.total_known);
    out.lower.*field = Index(r.lo);
    out.upper.*field = Index(r.hi);
  };
  rank(0.90, &SpectrumMetrics::energy_rank_90);
  rank(0.95, &SpectrumMetrics::energy_rank_95);
  rank(0.99, &SpectrumMetrics::energy_rank_99);
}

/// Effective rank, stable rank and participation ratio, which lie between 1 and the number of values.
inline void bound_smooth_ranks(const BoundedSpectrum& s, SpectrumBounds& out) {
  const SpectrumBox& b = s.box;
  auto &lo = out.lower, &hi = out.upper;
  const Interval entropy = entropy_interval(b);
  lo.effective_rank = std::clamp(std::exp(entropy.lo), 1.0, s.count);
  hi.effective_rank = std::min(std::exp(entropy.hi), s.count);
  const double top = s.top_lo();
  lo.stable_rank = std::clamp(s.total.lo, 1.0, s.count);
  hi.stable_rank = top > 0 ? std::min(s.total.hi / (top * top), s.count) : s.count;
  // Σσ⁴ of a tail of energy E: at least E²/count, when it is flat; at most E·cap².
  Interval four{b.count > 0 ? b.energy_lo * b.energy_lo / b.count : 0, b.energy_hi * b.cap * b.cap};
  for (const double x : b.lo) four.lo += std::pow(x, 4);
  for (const double x : b.hi) four.hi += std::pow(x, 4);
  lo.participation_ratio = std::clamp(four.hi > 0 ? s.total.lo * s.total.lo / four.hi : 1, 1.0, s.count);
  hi.participation_ratio = four.lo > 0 ? std::min(s.total.hi * s.total.hi / four.lo, s.count) : s.count;
}

/// Numerical rank, for a tolerance of `scale`·σ₁, and condition number: what hangs on the smallest values.
inline void bound_small_values(const BoundedSpectrum& s, double scale, SpectrumBounds& out) {
  const SpectrumBox& b = s.box;
  auto &lo = out.lower, &hi = out.upper;
  const double top = s.top_lo(), tolerance = top * scale;
  for (std::size_t i = 0; i < b.lo.size(); ++i) {
    lo.numerical_rank += b.lo[i] > scale ? 1 : 0;
    hi.numerical_rank += b.hi[i] > tolerance ? 1 : 0;
  }
  if (s.complete()) {
    lo.condition_number = std::max(1.0, b.lo[0] / b.hi.back());  // 1 for 0/0
    hi.condition_number = b.lo.back() > 0 ? 1 / b.lo.back() : std::numeric_limits<double>::infinity();
    return;
  }
  // A tail of energy E has at least E/cap² members, if they are all above the tolerance.
  if (std::sqrt(b.energy_lo / b.count) > scale) lo.numerical_rank += 1;
  if (b.cap > tolerance) hi.numerical_rank += Index(std::min(b.count, b.energy_hi / (tolerance * tolerance)));
  lo.condition_number = std::max(1.0, b.cap > 0 ? top / b.cap : 1.0);
  hi.condition_number = std::numeric_limits<double>::infinity();
}

}  // namespace detail

/// Bounds of every metric from all singular values with an error, or from the largest k of them and ‖W‖_F.
///
/// **Shapes** sigma: all min(m, n) values, or fewer, and then `frobenius` is required. **Scale** `error` and
/// `frobenius` in the unit of the matrix. **Throws** see SingularValueList; ShapeError when there are too many values;
/// ArgumentError when `frobenius` is missing, or smaller than the values allow.
/// **Cost** O(k). **Numerics** with a truncated list the bounds rest on σ_i ≤ σ_k + error for the values not given,
/// which a converged truncated SVD delivers; and the rank metrics whose bounds are wide then are just not known from k
/// values. Entropies use interval arithmetic over the head and the extreme tails (flat, or packed under the cap), so
/// effective rank's bounds are rigorous but not tight.
/// **Source** elementary: sorted tails, Cauchy–Schwarz, concavity of −x·ln x.
template <SingularValueList S>
SpectrumBounds spectrum_bounds(const S& sigma, Index rows, Index cols, const SpectrumKnowledge& known = {}) {
  const auto s = detail::sigma_span(sigma);
  (void)numerical_rank(sigma, rows, cols, known.eps);  // checks the values and their number
  const Index count = std::min(rows, cols);
  detail::check_knowledge(s, count, known);
  const detail::BoundedSpectrum bounded = detail::bounded_spectrum(s, count, known);
  SpectrumBounds out;
  if (bounded.unit == 0) {  // a zero matrix is known exactly; only its condition number is not 0
    out.lower.condition_number = out.upper.condition_number = std::numeric_limits<double>::infinity();
    return out;
  }
  detail::bound_norms(bounded, out);
  detail::bound_energy_ranks(bounded, out);
  detail::bound_smooth_ranks(bounded, out);
  detail::bound_small_values(bounded, double(std::max(rows, cols)) * known.eps, out);
  return out;
}

/// As above from what singular_values returned, each value with its own error. The values of factors are complete: what
/// a product B·A has beyond them is zero.
inline SpectrumBounds spectrum_bounds(const SingularValues& sigma, Index rows, Index cols,
                                      double eps = std::numeric_limits<float>::epsilon()) {
  std::vector<double> errors(sigma.values.size());
  for (std::size_t i = 0; i < errors.size(); ++i) errors[i] = sigma.error(Index(i));
  const Index k = Index(sigma.values.size());
  if (sigma.method != SpectrumMethod::factors || k == 0 || k >= std::min(rows, cols))
    return spectrum_bounds(sigma.values, rows, cols, {.errors = errors, .eps = eps});
  // To its range the product is a k×k matrix; only the numerical rank's tolerance remembers the shape.
  return spectrum_bounds(sigma.values, k, k, {.errors = errors, .eps = eps * double(std::max(rows, cols)) / double(k)});
}

/// How far each value of a truncated SVD may be from the singular value it stands for: the largest t.error(i), or
/// a few units in the last place of the type the values are held in. Zero when there are none.
template <Real T>
double value_error(const TruncatedSvd<T>& t) {
  double error = t.S.empty() ? 0 : 16 * double(std::numeric_limits<T>::epsilon()) * double(t.S[0]);
  for (Index i = 0; i < Index(t.S.size()); ++i) error = std::max(error, t.error(i));
  return error;
}

/// As above from a truncated SVD: its values are within `value_error` of the true ones, and the energy beyond
/// them is total_energy less theirs. A metric is known as far as the leading values determine it.
///
/// **Throws** ArgumentError when total_energy is not known. **Numerics** `frobenius_error` is that of √total_energy;
/// the default allows for a difference of weights formed in float. Rests on the truncated SVD not having missed a
/// value, as converged ones do not.
template <Real T>
SpectrumBounds spectrum_bounds(const TruncatedSvd<T>& t, double frobenius_error = 1e-7,
                               double eps = std::numeric_limits<float>::epsilon()) {
  const Index rows = t.U.rows(), cols = t.V.rows();
  if (!std::isfinite(t.total_energy))
    throw ArgumentError("spectrum_bounds: needs total_energy, which this operator does not know");
  return spectrum_bounds(t.S, rows, cols,
                         {.error = value_error(t),
                          .frobenius = std::sqrt(t.total_energy),
                          .frobenius_error = frobenius_error,
                          .eps = eps});
}

}  // namespace lowrank

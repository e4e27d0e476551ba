// SPDX-License-Identifier: Apache-2.0
// Tracker: the spectra of updates while they are trained, for a fixed small share of the training time.
#pragma once

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lowrank/core/detail/line_file.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/spectrum/bounds.hpp"

namespace lowrank {

namespace detail {

/// The shortest decimal that reads back as x; nothing for NaN and infinity.
inline void append_number(std::string& out, double x, const char* otherwise) {
  if (!std::isfinite(x)) {
    out += otherwise;
    return;
  }
  char buffer[32];
  out.append(buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr);
}

/// A number that lies in [low, high], to the digits that are certain: it is within one unit of the last one written.
inline void append_certain(std::string& out, double low, double high) {
  const double middle = low + (high - low) / 2, spread = high - low;
  if (!(spread > 0) || middle == 0) return append_number(out, middle, "");
  const double leading = std::floor(std::log10(std::abs(middle))), unit = std::ceil(std::log10(spread));
  char buffer[40];
  const int digits = int(std::clamp(leading - unit + 1, 1.0, 17.0));
  out.append(buffer, std::to_chars(buffer, buffer + sizeof buffer, middle, std::chars_format::general, digits).ptr);
}

inline void append_quoted(std::string& out, std::string_view s, bool json) {
  out += '"';
  for (const char c : s) {
    if (json && (c == '"' || c == '\\')) out += '\\';
    if (!json && c == '"') out += '"';
    if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, json ? "\\u%04x" : " ", unsigned(c));
      out += code;
    } else {
      out += c;
    }
  }
  out += '"';
}

}  // namespace detail

/// What a Tracker records, how often and how much.
struct TrackerOptions {
  /// Record every so many steps; 0: as often as `budget` allows.
  Index every = 0;
  /// Share of the training time that recording may take when `every` is 0.
  double budget = 0.02;
  /// Leading singular values followed of a dense update. LoRA updates are followed exactly.
  Index rank = 16;
  /// Names of the metrics recorded, as for_each_metric has them, in its order; empty: all.
  std::vector<std::string> metrics = {};
  /// Steps taken before this run: the first one counted is the next. A run that resumes says here where it stands.
  Index first_step = 0;
  /// Seconds from any start, for training loops with a clock of their own; null: the steady clock.
  double (*clock)() = nullptr;
};

/// Follows ΔW of any number of modules through a training run and appends their metrics to a file.
///
///     Tracker<float> tracker("run.csv");            // or run.jsonl
///     tracker.watch("q_proj", layer);               // s·B·A; or A, B, s; or a dense weight, whose start is remembered
///     for (...) { train_one_step(); tracker.step(); }
///
/// One line a module and record: step, seconds of training, name, the metrics chosen, and for a dense update
/// "captured", the share of its energy in the values followed.
/// **Throws** IoError when the file cannot be opened or written, or is not empty and begins with a line no tracker with
/// these metrics writes (it is then left alone); ArgumentError on bad options. A weight that has become NaN does not
/// stop the training: its metrics are empty from then on. **Cost** a LoRA module O((m + n)·r²); a dense one at most 30
/// readings of W, fewer than a cold start takes because each SVD begins at the vectors of the one before. With `every`
/// 0 the first step is recorded, and later ones when all recording so far, and one more like the last, stay within
/// `budget` of the time trained.
/// **Numerics** every number is written to the digits spectrum_bounds makes certain: the metric lies within one unit of
/// the last digit. One known to less than 1 in 1000, and a rank whose bounds do not agree, is left empty; an update
/// that cannot be told from zero has zeros. Singular values of a dense update are taken to within their residuals
/// (value_error), which are asked to be 2e-4·σ₁. The file survives a crash of the process: whole lines only, and a new
/// run appends to it.
template <Real T>
class Tracker {
 public:
  explicit Tracker(const std::string& path, const TrackerOptions& options = {})
      : o_(checked(options)),
        json_(path.ends_with(".jsonl") || path.ends_with(".json")),
        file_(path, first_line()),
        start_(now()),
        step_(o_.first_step) {
    if (!json_ && file_.empty()) file_.append(head() + "\n");
  }

  /// Follows s·B·A. The matrices are looked at when a record is made; they must outlive the tracker.
  void watch(std::string name, MatrixView<const T> A, MatrixView<const T> B, T scale) {
    if (A.rows() != B.cols())
      throw ShapeError(detail::text("Tracker::watch: B must have as many columns as A has rows, got B ",
                                    detail::shape_text(B.rows(), B.cols()), " and A ",
                                    detail::shape_text(A.rows(), A.cols())));
    modules_.push_back({std::move(name), A, B, scale, {}, {}, {}});
  }
  /// Follows s·B·A − s₀·B₀·A₀: what became of an adapter whose product did not start at zero (PiSSA and its kin). The
  /// start is copied. **Throws** ShapeError when the two are no updates of one shape.
  void watch(std::string name, MatrixView<const T> A, MatrixView<const T> B, T scale, const LoraFactors<T>& start) {
    if (start.out_features() != B.rows() || start.in_features() != A.cols())
      throw ShapeError(detail::text("Tracker::watch: start must be an update of shape ",
                                    detail::shape_text(B.rows(), A.cols()), ", got ",
                                    detail::shape_text(start.out_features(), start.in_features())));
    watch(std::move(name), A, B, scale);
    modules_.back().start = start;
    modules_.back().start.scale = -start.scale;
  }
  /// As above; the scale is the one the factors have now.
  void watch(std::string name, const LoraFactors<T>& f) { watch(std::move(name), f.A.view(), f.B.view(), f.scale); }
  /// Factors that die at the end of the expression, as those of `layer.factors()`, a copy: pass the layer instead.
  void watch(std::string name, LoraFactors<T>&& f) = delete;
  /// Follows the s·B·A of a LoRA layer, where its parameters lie now: after `FlatParameters::pack()`, which moves them.
  /// The layer, or the block they were moved into, must outlive the tracker.
  template <class Layer>
  requires requires(const Layer& l) {
    { l.A() } -> std::convertible_to<MatrixView<const T>>;
    { l.B() } -> std::convertible_to<MatrixView<const T>>;
    { l.scale() } -> std::convertible_to<T>;
  }
  void watch(std::string name, const Layer& layer) { watch(std::move(name), layer.A(), layer.B(), T(layer.scale())); }
  /// As the ones above, for matrix-like things: Eigen, xtensor, lowrank::Matrix.
  template <class X>
  requires MatrixOf<X, const T>
  void watch(std::string name, X&& W) { watch(std::move(name), MatrixView<const T>(view_of(W))); }
  template <class X, class Y>
  requires MatrixOf<X, const T> && MatrixOf<Y, const T>
  void watch(std::string name, X&& A, Y&& B, T scale) {
    watch(std::move(name), MatrixView<const T>(view_of(A)), MatrixView<const T>(view_of(B)), scale);
  }
  /// Follows what becomes of W: ΔW = W − (W as it is now), of which a copy is kept. W must outlive the tracker.
  void watch(std::string name, MatrixView<const T> W) {
    modules_.push_back({std::move(name), W, {}, T(1), {}, Matrix<T>(W), {}});
  }

  /// To be called once after every training step. Returns whether a record was made.
  bool step() {
    ++step_;
    if (o_.every > 0) {
      if (step_ % o_.every != 0) return false;
    } else {
      const double trained = seconds_elapsed() - spent_;
      if (records_ > 0 && spent_ + last_cost_ > o_.budget * trained) return false;
    }
    record();
    return true;
  }
  /// A record now, whatever the budget says.
  void record() {
    const double begin = now(), trained = begin - start_ - spent_;
    std::string block;
    for (Module& m : modules_) append_line(block, m, trained);
    file_.append(block);
    ++records_;
    last_cost_ = now() - begin;
    spent_ += last_cost_;
  }

  /// Steps counted, those before this run (`first_step`) included.
  [[nodiscard]] Index steps() const noexcept { return step_; }
  [[nodiscard]] Index records() const noexcept { return records_; }
  /// Seconds spent recording so far, and since the tracker was made.
  [[nodiscard]] double seconds_spent() const noexcept { return spent_; }
  [[nodiscard]] double seconds_elapsed() const { return now() - start_; }

 private:
  [[nodiscard]] double now() const {
    if (o_.clock != nullptr) return o_.clock();
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  static TrackerOptions checked(const TrackerOptions& o) {
    if (o.every < 0 || o.rank < 1 || !(o.budget > 0 && o.budget <= 1) || o.first_step < 0)
      throw ArgumentError(
          detail::text("Tracker: every and first_step must not be negative, rank at least 1 and budget in (0, 1], got ",
                       o.every, ", ", o.first_step, ", ", o.rank, " and ", o.budget));
    for (const std::string& name : o.metrics) {
      bool known = false;
      const SpectrumMetrics all;
      for_each_metric(all, [&](const char* metric, auto) { known = known || name == metric; });
      if (!known) throw ArgumentError("Tracker: metrics must be names of SpectrumMetrics, got '" + name + "'");
    }
    return o;
  }
  [[nodiscard]] bool chosen(std::string_view metric) const {
    return o_.metrics.empty() || std::find(o_.metrics.begin(), o_.metrics.end(), metric) != o_.metrics.end();
  }
  [[nodiscard]] std::string head() const {
    std::string line = "step,seconds,module";
    const SpectrumMetrics all;
    for_each_metric(all, [&](const char* name, auto) {
      if (chosen(name)) line += std::string(",") + name;
    });
    return line + ",captured";
  }
  [[nodiscard]] detail::FirstLine first_line() const {
    if (json_) return {"{\"step\":", false};
    return {head(), true};
  }
  struct Module {
    std::string name;
    MatrixView<const T> A, B;  // dense: A is W and B is empty
    T scale;
    LoraFactors<T> start;  // of an adapter that did not start at zero, with −s₀; else empty
    Matrix<T> base;
    Matrix<T> vectors;  // right singular vectors of the last record
    [[nodiscard]] bool dense() const { return !base.empty(); }
  };

  void append_line(std::string& out, Module& m, double trained) {
    SpectrumBounds known;
    double captured = 1;
    bool good = true;
    try {
      known = m.dense() ? dense_bounds(m, captured) : factor_bounds(m);
    } catch (const NonFiniteError&) {
      good = false;
    }
    const char* nothing = json_ ? "null" : "";
    out += json_ ? "{\"step\":" : "";
    detail::append_number(out, double(step_), nothing);
    out += json_ ? ",\"seconds\":" : ",";
    detail::append_number(out, trained, nothing);
    out += json_ ? ",\"module\":" : ",";
    detail::append_quoted(out, m.name, json_);
    std::vector<double> low;
    for_each_metric(std::as_const(known.lower), [&](const char*, auto x) { low.push_back(double(x)); });
    std::size_t i = 0;
    for_each_metric(std::as_const(known.upper), [&](const char* name, auto x) {
      const double lower = low[i++], upper = double(x);
      if (!chosen(name)) return;
      out += json_ ? std::string(",\"") + name + "\":" : std::string(",");
      constexpr double share = std::is_integral_v<decltype(x)> ? 0 : 1e-3;
      if (good && std::isfinite(upper) && upper - lower <= share * upper)
        detail::append_certain(out, lower, upper);
      else
        out += nothing;
    });
    out += json_ ? ",\"captured\":" : ",";
    detail::append_number(out, good ? captured : NAN, nothing);
    out += json_ ? "}\n" : "\n";
  }
  static SpectrumBounds factor_bounds(const Module& m) {
    std::vector<LoraFactors<T>> terms;
    terms.push_back({Matrix<T>(m.A), Matrix<T>(m.B), m.scale});
    if (!m.start.A.empty()) terms.push_back(m.start);
    const SingularValues sigma = singular_values(std::span<const LoraFactors<T>>(terms));
    if (sigma.values.empty() || sigma.values[0] <= sigma.error(0)) return {};  // zero, for all that can be known
    return spectrum_bounds(sigma, m.B.rows(), m.A.cols());
  }
  SpectrumBounds dense_bounds(Module& m, double& captured) const {
    const auto delta = difference_operator<T, T, T>(m.A, m.base.view());
    const double energy = delta.frobenius_norm_squared();
    const Index rank = std::min({o_.rank, m.A.rows(), m.A.cols()});
    if (!std::isfinite(energy)) throw NonFiniteError("Tracker: a weight is not finite");
    if (energy == 0) return {};
    const auto t = truncated_svd<T>(delta, rank, {.energy_tolerance = 0, .residual_tolerance = 2e-4, .max_passes = 30},
                                    m.vectors.view());
    m.vectors = t.V;
    captured = t.captured_energy / energy;
    return spectrum_bounds(t);
  }

  TrackerOptions o_;
  bool json_;
  detail::LineFile file_;
  double start_;
  std::vector<Module> modules_;
  Index step_, records_ = 0;
  double spent_ = 0, last_cost_ = 0;
};

}  // namespace lowrank

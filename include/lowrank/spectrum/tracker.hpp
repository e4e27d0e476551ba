// SPDX-License-Identifier: Apache-2.0
// Tracker: the spectra of updates while they are trained, for a fixed small share of the training time.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/spectrum/bounds.hpp"

namespace lowrank {

namespace detail {

/// Lines appended to a file so that a crash leaves whole lines: each block is one write, and a torn last line of an
/// earlier run is cut off when the file is opened again.
class LineFile {
 public:
  explicit LineFile(std::string path) : path_(std::move(path)) {
    fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_APPEND, 0644);
    if (fd_ < 0) fail("cannot open for appending");
    struct stat info {};
    if (::fstat(fd_, &info) != 0) fail("cannot stat");
    if (!S_ISREG(info.st_mode)) {
      ::close(fd_);
      throw IoError(path_, "is not a regular file");
    }
    off_t end = info.st_size;
    char c = 0;
    while (end > 0 && (::pread(fd_, &c, 1, end - 1) != 1 || c != '\n')) --end;
    if (end != info.st_size && ::ftruncate(fd_, end) != 0) fail("cannot cut off the torn last line");
    empty_ = end == 0;
  }
  LineFile(LineFile&& o) noexcept : path_(std::move(o.path_)), fd_(std::exchange(o.fd_, -1)), empty_(o.empty_) {}
  LineFile& operator=(LineFile&&) = delete;
  ~LineFile() {
    if (fd_ >= 0) ::close(fd_);
  }
  [[nodiscard]] bool empty() const noexcept { return empty_; }
  void append(std::string_view block) {
    while (!block.empty()) {
      const ssize_t n = ::write(fd_, block.data(), block.size());
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) fail("cannot append");
      block.remove_prefix(std::size_t(n));
    }
    empty_ = false;
  }

 private:
  [[noreturn]] void fail(const char* what) {
    const int error = errno;
    throw IoError(path_, text(what, ": ", std::strerror(error)));
  }
  std::string path_;
  int fd_ = -1;
  bool empty_ = true;
};

/// The shortest decimal that reads back as x; nothing for NaN and infinity.
inline void append_number(std::string& out, double x, const char* otherwise) {
  if (!std::isfinite(x)) {
    out += otherwise;
    return;
  }
  char buffer[32];
  out.append(buffer, std::to_chars(buffer, buffer + sizeof buffer, x).ptr);
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

/// How often and how much a Tracker records.
struct TrackerOptions {
  /// Record every so many steps; 0: as often as `budget` allows.
  Index every = 0;
  /// Share of the training time that recording may take when `every` is 0.
  double budget = 0.02;
  /// Leading singular values followed of a dense update. LoRA updates are followed exactly.
  Index rank = 16;
};

/// Follows ΔW of any number of modules through a training run and appends their metrics to a file.
///
///     Tracker<float> tracker("run.csv");            // or run.jsonl
///     tracker.watch("q_proj", factors);             // A, B, scale: or a dense weight, whose start is remembered
///     for (...) { train_one_step(); tracker.step(); }
///
/// One line a module and record: step, seconds of training, name, every metric of SpectrumMetrics, and for a dense
/// update "captured", the share of its energy in the values followed; metrics that these do not determine are left
/// empty.
/// **Throws** IoError when the file cannot be opened or written; ArgumentError on bad options. A weight that has become
/// NaN does not stop the training: its metrics are empty from then on. **Cost** a LoRA module O((m + n)·r²); a dense
/// one some readings of W, fewer than a cold start takes because each SVD begins at the vectors of the one before. With
/// `every` 0 the first step is recorded, and later ones when all recording so far, and one more like the last, stay
/// within `budget` of the time trained.
/// **Numerics** see singular_values and truncated_svd. The file survives a crash of the process: whole lines only, and
/// a new run appends to it.
template <Real T>
class Tracker {
 public:
  explicit Tracker(const std::string& path, const TrackerOptions& options = {})
      : file_(path), json_(path.ends_with(".jsonl") || path.ends_with(".json")), o_(options), start_(Clock::now()) {
    if (o_.every < 0 || o_.rank < 1 || !(o_.budget > 0 && o_.budget <= 1))
      throw ArgumentError(
          detail::text("Tracker: every must not be negative, rank at least 1 and budget in (0, 1], got ", o_.every,
                       ", ", o_.rank, " and ", o_.budget));
    if (json_ || !file_.empty()) return;
    std::string head = "step,seconds,module";
    const SpectrumMetrics names;
    for_each_metric(names, [&](const char* name, auto) { head += std::string(",") + name; });
    file_.append(head + ",captured\n");
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
      const double trained = seconds(start_) - spent_;
      if (records_ > 0 && spent_ + last_cost_ > o_.budget * trained) return false;
    }
    record();
    return true;
  }
  /// A record now, whatever the budget says.
  void record() {
    const auto begin = Clock::now();
    const double trained = seconds(start_) - spent_;
    std::string block;
    for (Module& m : modules_) append_line(block, m, trained);
    file_.append(block);
    ++records_;
    last_cost_ = seconds(begin);
    spent_ += last_cost_;
  }

  [[nodiscard]] Index steps() const noexcept { return step_; }
  [[nodiscard]] Index records() const noexcept { return records_; }
  /// Seconds spent recording so far, and since the tracker was made.
  [[nodiscard]] double seconds_spent() const noexcept { return spent_; }
  [[nodiscard]] double seconds_elapsed() const { return seconds(start_); }

 private:
  using Clock = std::chrono::steady_clock;
  static double seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }
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
    SpectrumMetrics lower, upper;
    double captured = 1;
    bool good = true;
    try {
      if (m.dense())
        dense_metrics(m, lower, upper, captured);
      else
        factor_metrics(m, lower, upper);
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
    for_each_metric(std::as_const(lower), [&](const char*, auto x) { low.push_back(double(x)); });
    std::size_t i = 0;
    for_each_metric(std::as_const(upper), [&](const char* name, auto x) {
      out += json_ ? std::string(",\"") + name + "\":" : std::string(",");
      const double high = double(x), spread = high - low[i];
      const bool known = good && (spread <= 0 || spread <= 1e-3 * high);
      detail::append_number(out, known ? (low[i] + high) / 2 : NAN, nothing);
      ++i;
    });
    out += json_ ? ",\"captured\":" : ",";
    detail::append_number(out, good ? captured : NAN, nothing);
    out += json_ ? "}\n" : "\n";
  }
  static void factor_metrics(const Module& m, SpectrumMetrics& lower, SpectrumMetrics& upper) {
    std::vector<LoraFactors<T>> terms;
    terms.push_back({Matrix<T>(m.A), Matrix<T>(m.B), m.scale});
    if (!m.start.A.empty()) terms.push_back(m.start);
    const auto values = singular_values(std::span<const LoraFactors<T>>(terms)).values;
    lower = upper = spectrum_metrics(values, m.B.rows(), m.A.cols());
  }
  void dense_metrics(Module& m, SpectrumMetrics& lower, SpectrumMetrics& upper, double& captured) const {
    const auto delta = difference_operator<T, T, T>(m.A, m.base.view());
    const double energy = delta.frobenius_norm_squared();
    const Index rows = m.A.rows(), cols = m.A.cols(), rank = std::min({o_.rank, rows, cols});
    if (!std::isfinite(energy)) throw NonFiniteError("Tracker: a weight is not finite");
    if (energy == 0) return;
    const auto t = truncated_svd<T>(delta, rank, {.energy_tolerance = 1e-4}, m.vectors.view());
    m.vectors = t.V;
    captured = t.captured_energy / energy;
    double error = 0;
    for (const double r : t.residuals) error = std::max(error, r);
    // An energy tolerance leaves residuals that are no error of the values: those err by about residual²/σ.
    error = std::min(error, error * error / std::max(double(t.S[0]) * 1e-3, double(t.S.back())));
    error += 16 * double(std::numeric_limits<T>::epsilon()) * double(t.S[0]);
    const auto b =
        spectrum_bounds(t.S, rows, cols, {.error = error, .frobenius = std::sqrt(energy), .frobenius_error = 1e-6});
    lower = b.lower;
    upper = b.upper;
  }

  detail::LineFile file_;
  bool json_;
  TrackerOptions o_;
  Clock::time_point start_;
  std::vector<Module> modules_;
  Index step_ = 0, records_ = 0;
  double spent_ = 0, last_cost_ = 0;
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// The entries of a spectrum report.
#include "spectrum_entries.hpp"

#include <lowrank/linalg/factor_svd.hpp>
#include <lowrank/linalg/gemm.hpp>
#include <lowrank/linalg/norm.hpp>
#include <lowrank/linalg/singular_values.hpp>
#include <lowrank/spectrum/alignment.hpp>
#include <lowrank/spectrum/bounds.hpp>
#include <lowrank/spectrum/noise.hpp>
#include <lowrank/spectrum/power_law.hpp>
#include <lowrank/spectrum/rounding.hpp>

#include <map>
#include <mutex>

#include "spectrum_leading.hpp"

namespace lowrank::tool {
namespace {

Json to_json(const SpectrumMetrics& m) {
  Json j = Json::object();
  for_each_metric(m, [&](const char* name, auto value) {
    if constexpr (std::is_same_v<decltype(value), double>)
      j[name] = finite(value);
    else
      j[name] = value;
  });
  return j;
}

/// The null of a shape is asked for by hundreds of matrices: metrics for entries of unit variance, computed once.
const SpectrumMetrics& unit_noise(Index m, Index n) {
  static std::map<std::pair<Index, Index>, SpectrumMetrics> cache;
  static std::mutex lock;
  const std::scoped_lock guard(lock);
  const auto key = std::pair(std::min(m, n), std::max(m, n));
  const auto it = cache.find(key);
  return it != cache.end() ? it->second : cache.emplace(key, noise_metrics(key.first, key.second, 1)).first->second;
}

/// The metric that two bounds leave: themselves where they agree, the middle where they are a thousandth apart; a rank
/// is a whole number and must be exact. Otherwise null.
Json between(const Json& lower, const Json& upper) {
  if (!lower.is_number() || !upper.is_number()) return nullptr;
  if (lower == upper) return lower;
  if (lower.is_number_integer()) return nullptr;
  const double lo = lower.get<double>(), hi = upper.get<double>();
  return hi - lo <= 1e-3 * hi ? Json((lo + hi) / 2) : Json(nullptr);
}

/// "metrics", "noise", "ratio" and "bounds" of one matrix. `known`: the metrics, where all singular values gave them;
/// null: what the bounds determine, for metrics of some of the values are not those of the matrix.
void add_metrics(Json& j, const SpectrumMetrics* known, const SpectrumBounds& b, Index rows, Index cols) {
  Json metrics = known != nullptr ? to_json(*known) : Json::object(), bounds = Json::object(), ratio = Json::object();
  const Json lower = to_json(b.lower), upper = to_json(b.upper);
  for (const auto& [key, value] : lower.items()) {
    bounds[key] = {value, upper.at(key)};
    if (known == nullptr) metrics[key] = between(value, upper.at(key));
  }
  const double norm = known != nullptr ? known->frobenius_norm : (b.lower.frobenius_norm + b.upper.frobenius_norm) / 2;
  const double std = norm / std::sqrt(double(rows) * double(cols));
  SpectrumMetrics noise = unit_noise(rows, cols);
  noise.spectral_norm *= std;
  noise.frobenius_norm *= std;
  noise.nuclear_norm *= std;
  const Json null = to_json(noise);
  for (const auto& [key, value] : metrics.items())
    ratio[key] = value.is_number() && null.at(key).is_number() && null.at(key).get<double>() > 0
                     ? finite(value.get<double>() / null.at(key).get<double>())
                     : Json(nullptr);
  j["metrics"] = std::move(metrics);
  j["noise"] = null;
  j["ratio"] = std::move(ratio);
  j["bounds"] = std::move(bounds);
}

const char* method_name(SpectrumMethod m) {
  switch (m) {
    case SpectrumMethod::gram:
      return "gram";
    case SpectrumMethod::bidiagonal:
      return "bidiagonal";
    case SpectrumMethod::lapack:
      return "lapack";
    case SpectrumMethod::factors:
      return "factors";
  }
  return "?";
}

/// The values themselves where they are asked for, and a thinned-out copy for the pictures: 200 points describe any
/// spectrum on log axes.
void add_values(Json& j, const std::vector<double>& values, const SpectrumOptions& o) {
  const Index n = Index(values.size());
  Json curve = Json::array();
  for (Index i = 0, last = -1; i < 200 && n > 0; ++i) {
    const Index at = std::min(n - 1, Index(std::llround(std::pow(double(n), double(i) / 199))) - 1);
    if (at != last) curve.push_back({at + 1, values[std::size_t(at)]});
    last = at;
  }
  j["curve"] = std::move(curve);
  if (o.values) j["singular_values"] = values;
}

/// From the largest o.top singular values.
/// `formed`: by how much singular values may be off because W was formed in S from what is analysed (Weyl).
template <class S>
void analyse_leading(Json& j, MatrixView<const S> W, const SpectrumOptions& o, double formed) {
  const Index m = W.rows(), n = W.cols();
  const auto op = dense_operator<S, S>(W);
  std::vector<double> values(std::size_t(o.top), 0.0);
  j["method"] = "truncated";
  if (op.frobenius_norm_squared() > 0) {
    auto t = truncated_svd<S>(op, o.top, {.energy_tolerance = 0, .residual_tolerance = 1e-4});
    t.rounding += formed;
    values.assign(t.S.begin(), t.S.end());
    add_metrics(j, nullptr, spectrum_bounds(t), m, n);
    j["converged"] = t.converged;
    j["error"] = value_error(t);
    j["captured_energy"] = t.captured_energy / t.total_energy;
  } else {
    add_metrics(j, nullptr, spectrum_bounds(values, m, n, {.frobenius = 0}), m, n);
    j["converged"] = true;
    j["error"] = 0;
    j["captured_energy"] = 0;
  }
  add_values(j, values, o);
}

/// Everything about a dense matrix, from all its singular values or from the largest o.top of them.
template <class S>
void analyse(Json& j, MatrixView<const S> W, const SpectrumOptions& o, double formed = 0) {
  const Index m = W.rows(), n = W.cols();
  if (o.top > 0 && o.top < std::min(m, n)) return analyse_leading(j, W, o, formed);
  auto sv = singular_values(W);
  if (formed > 0) {
    sv.absolute_error += formed;
    // |σ̂² − σ²| ≤ |σ̂ − σ|·(2σ₁ + |σ̂ − σ|).
    sv.squared_error += sv.values.empty() ? 0 : formed * (2 * sv.values[0] + formed);
  }
  const auto metrics = spectrum_metrics(sv.values, m, n);
  add_metrics(j, &metrics, spectrum_bounds(sv, m, n), m, n);
  j["method"] = method_name(sv.method);
  j["error"] = sv.absolute_error;
  if (sv.values[0] > 0) {
    const auto e = estimate_noise(sv.values, m, n);
    const auto count = [&](Index values) { return e.determined ? Json(values) : Json(nullptr); };
    j["noise_level"] = {{"determined", e.determined},
                        {"std", finite(e.std)},
                        {"edge", finite(e.edge)},
                        {"threshold", finite(e.threshold)},
                        {"above_edge", count(e.above_edge)},
                        {"optimal_rank", count(e.optimal_rank)}};
    if (!e.determined) j["noise_level"]["reason"] = e.reason;
    const auto fit = fit_power_law(sv.values, {.max_candidates = 256});
    if (fit.tail_count > 0)  // else there is no tail to fit: too few values, or all equal
      j["power_law"] = {{"alpha", fit.alpha},     {"alpha_error", fit.alpha_error},
                        {"x_min", fit.x_min},     {"ks_distance", fit.ks_distance},
                        {"tail", fit.tail_count}, {"weighted_alpha", finite(fit.weighted_alpha)}};
  }
  add_values(j, sv.values, o);
}

/// "base" and "tuned": the spectra of the weight without and with the update.
template <class T>
void add_sides(Json& j, MatrixView<const T> base, MatrixView<const T> tuned, SpectrumOptions o, double formed = 0) {
  o.values = false;
  analyse<T>(j["base"], base, o);
  analyse<T>(j["tuned"], tuned, o, formed);
}

/// "alignment": where the update points, seen from the weight. Each share stands beside that of a random update.
template <class T>
void add_alignment(Json& j, MatrixView<const T> W, Svd<T> delta, double captured, const SpectrumOptions& o) {
  const Index m = W.rows(), n = W.cols();
  delta = trimmed(std::move(delta), Index(delta.S.size()));
  const auto weight = leading(W, o.alignment);
  const Index k = Index(weight.S.size()), r = Index(delta.S.size());
  double total = 0, energy = 0;
  for (Index i = 0; i < m; ++i)
    for (Index l = 0; l < n; ++l) total += double(W(i, l)) * double(W(i, l));
  for (const T s : delta.S) energy += double(s) * double(s);
  if (r == 0 || !(total > 0)) {
    j["alignment"] = {{"k", k}, {"rank", r}, {"note", r == 0 ? "the update is zero" : "the weight is zero"}};
    return;
  }
  const Alignment a = alignment<T>(weight, delta);
  // For random directions U and V of r dimensions ‖UᵀWV‖² is r²/(mn) of ‖W‖².
  const double random = std::sqrt(energy / total * double(m) * double(n)) / double(r);
  j["alignment"] = {{"k", k},
                    {"rank", r},
                    {"captured_energy", captured},
                    {"amplification", finite(amplification_factor<T>(W, delta))},
                    {"amplification_noise", finite(random)},
                    {"left", a.left.back()},
                    {"left_noise", double(k) / double(m)},
                    {"right", a.right.back()},
                    {"right_noise", double(k) / double(n)},
                    {"both", a.both.back()},
                    {"both_noise", double(k) * double(k) / (double(m) * double(n))},
                    {"left_by_k", a.left},
                    {"right_by_k", a.right},
                    {"both_by_k", a.both}};
}

Json entry(const std::string& name, Index rows, Index cols, const char* what) {
  return {{"name", name}, {"rows", rows}, {"cols", cols}, {"of", what}};
}

/// What can be said of an update as a whole.
const char* verdict(double top, double edge) { return top == 0 ? "zero" : top <= edge ? "no signal" : "signal"; }

template <class T>
RoundingNoise rounding_of(const MatrixTensor& m, MatrixView<const T> values) {
  return !m.is_16_bit()                        ? RoundingNoise{}
         : m.tensor.dtype() == io::Dtype::BF16 ? rounding_noise<bf16>(values, false)
                                               : rounding_noise<f16>(values, false);
}

template <class T>
Json difference_of(const MatrixTensor& tuned, const MatrixTensor& base, const SpectrumOptions& o) {
  Matrix<T> W = values_of<T>(tuned);
  const Matrix<T> W0 = values_of<T>(base);
  Json j = entry(tuned.name, tuned.rows, tuned.cols, "difference");
  j["dtype"] = tuned.stored_as();
  say_storage(j, {{"scale", &tuned}, {"base_scale", &base}});
  if (const int a = tuned.quantised_bits(), b = base.quantised_bits(); a != b)
    j["note"] = text("one side is stored in ",
                     a == 0   ? b
                     : b == 0 ? a
                              : std::min(a, b),
                     " bits: the difference holds the error of that storage");
  Json sides = Json::object();
  if (o.side_by_side) add_sides<T>(sides, W0.view(), W.view(), o);
  // Roundings of their own on either side: variances add, each of its own type. The bound of the sum is built from row
  // and column sums; where these have one profile on both sides, as the same weight twice has, its square is the sum of
  // the two squares.
  const RoundingNoise own = rounding_of<T>(tuned, W.view()), other = rounding_of<T>(base, W0.view());
  const double std = std::hypot(own.std, other.std), edge = std::hypot(own.edge, other.edge);
  double lost = 0;  // to the rounding of the difference, squared
  for (Index i = 0; i < W.size(); ++i) {
    const double exact = double(W.data()[i]) - double(W0.data()[i]);
    W.data()[i] = T(exact);
    lost += (exact - double(W.data()[i])) * (exact - double(W.data()[i]));
  }
  analyse<T>(j, W.view(), o, std::sqrt(lost));
  const Json &top = j["metrics"]["spectral_norm"], &most = j["bounds"]["spectral_norm"][1];
  j["verdict"] = verdict((top.is_number() ? top : most).get<double>(), edge);
  if (tuned.is_16_bit() || base.is_16_bit())
    j["rounding"] = {{"std", std}, {"edge", edge}, {"both_rounded", tuned.is_16_bit() && base.is_16_bit()}};
  for (auto& [key, value] : sides.items()) j[key] = std::move(value);
  if (o.alignment > 0) {
    TruncatedSvd<T> delta;
    if (j["verdict"] != "zero") delta = leading<T>(W.view(), o.alignment);
    const double captured = delta.total_energy > 0 ? delta.captured_energy / delta.total_energy : 0;
    add_alignment<T>(j, W0.view(), std::move(static_cast<Svd<T>&>(delta)), captured, o);
  }
  return j;
}

/// What needs the weight: the update's size beside it, the spectra of both, where the update points.
template <class T>
void add_weight(Json& j, const ModulePair& pair, const SpectrumOptions& o) {
  const Matrix<T> stored = values_of<T>(*pair.weight);
  say_storage(j, {{"weight_scale", pair.weight}});
  double sum = 0;
  for (Index i = 0; i < stored.size(); ++i) sum += double(stored.data()[i]) * double(stored.data()[i]);
  j["relative_norm"] = sum > 0 ? finite(j["metrics"]["frobenius_norm"].get<double>() / std::sqrt(sum)) : Json(nullptr);
  const MatrixView<const T> W = pair.transposed ? stored.view().transposed() : stored.view();
  const LoraFactors<T> f = factors_as<T>(pair.module->factors);
  if (o.side_by_side) {
    Matrix<T> tuned(W);
    gemm(f.scale, f.B.view(), f.A.view(), tuned.view(), Update::accumulate);
    // r products and the sum, each element's roundings relative to the parts.
    const double eps = double(std::numeric_limits<T>::epsilon()), r = double(f.rank());
    const auto norm = [](MatrixView<const T> M) { return frobenius_norm(M); };
    const double parts = std::abs(double(f.scale)) * norm(f.B.view()) * norm(f.A.view());
    add_sides<T>(j, W, tuned.view(), o, eps * ((r + 2) * parts + norm(std::as_const(tuned).view())));
  }
  if (o.alignment > 0) add_alignment<T>(j, W, svd(f), 1, o);
}

}  // namespace

Json weight_entry(const MatrixTensor& w, const SpectrumOptions& o) {
  Json j = entry(w.name, w.rows, w.cols, "weight");
  j["dtype"] = w.stored_as();
  with_precision(w.is_double(), [&]<class T>(T) {
    const Matrix<T> W = values_of<T>(w);
    say_storage(j, {{"scale", &w}});
    analyse<T>(j, W.view(), o);
  });
  w.tensor.drop();
  return j;
}

Json difference_entry(const MatrixPair& pair, const SpectrumOptions& o) {
  return with_precision(pair.is_double(), [&]<class T>(T) { return difference_of<T>(*pair.first, *pair.second, o); });
}

Json adapter_entry(const ModulePair& pair, const SpectrumOptions& o) {
  const io::AdapterModule& module = *pair.module;
  const auto& f = module.factors;
  const Index m = f.out_features(), n = f.in_features();
  Json j = entry(module.name, m, n, "adapter");
  const auto sv = singular_values(f);
  const auto metrics = spectrum_metrics(sv.values, m, n);
  add_metrics(j, &metrics, spectrum_bounds(sv, m, n), m, n);
  j["rank"] = f.rank();
  j["scale"] = f.scale;
  j["method"] = method_name(sv.method);
  j["error"] = sv.absolute_error;
  j["verdict"] = verdict(sv.values.empty() ? 0 : sv.values[0], 0);
  if (!module.magnitude.empty()) j["note"] = "DoRA: the spectrum is that of s·B·A, before the magnitudes";
  with_precision(pair.weight->is_double(), [&]<class T>(T) { add_weight<T>(j, pair, o); });
  pair.weight->tensor.drop();
  add_values(j, sv.values, o);
  return j;
}

}  // namespace lowrank::tool

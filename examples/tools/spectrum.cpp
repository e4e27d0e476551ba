// SPDX-License-Identifier: Apache-2.0
// lowrank spectrum: rank metrics of every matrix of a checkpoint, of its difference to a base, or of an adapter.
#include <lowrank/linalg/factor_operators.hpp>
#include <lowrank/linalg/factor_svd.hpp>
#include <lowrank/linalg/singular_values.hpp>
#include <lowrank/linalg/truncated_svd.hpp>
#include <lowrank/spectrum/bounds.hpp>
#include <lowrank/spectrum/noise.hpp>
#include <lowrank/spectrum/power_law.hpp>
#include <lowrank/spectrum/rounding.hpp>

#include <cstdio>
#include <map>
#include <mutex>

#include "spectrum_scan.hpp"

namespace lowrank::tool::spectrum_command {
namespace {

struct Options {
  ScanOptions scan;
  std::string checkpoint, base, adapter, filter;
  Index top = 0;
  bool values = false, side_by_side = false;
};

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

/// "metrics", "noise", "ratio" and "bounds" of one matrix. A metric that the bounds do not pin down is null.
void add_metrics(Json& j, const SpectrumMetrics& m, const SpectrumBounds& b, Index rows, Index cols, bool complete) {
  Json metrics = to_json(m), bounds = Json::object(), ratio = Json::object();
  const Json lower = to_json(b.lower), upper = to_json(b.upper);
  for (const auto& [key, value] : lower.items()) {
    bounds[key] = {value, upper[key]};
    if (complete || (value.is_number() && upper[key].is_number() &&
                     upper[key].get<double>() - value.get<double>() <= 1e-3 * upper[key].get<double>()))
      continue;
    metrics[key] = nullptr;
  }
  const double std = m.frobenius_norm / std::sqrt(double(rows) * double(cols));
  SpectrumMetrics noise = unit_noise(rows, cols);
  noise.spectral_norm *= std;
  noise.frobenius_norm *= std;
  noise.nuclear_norm *= std;
  const Json null = to_json(noise);
  for (const auto& [key, value] : metrics.items())
    ratio[key] = value.is_number() && null[key].is_number() && null[key].get<double>() > 0
                     ? finite(value.get<double>() / null[key].get<double>())
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

Json values_json(const auto& values) {
  Json j = Json::array();
  for (const auto x : values) j.push_back(double(x));
  return j;
}

/// Everything about a dense matrix, from all its singular values or from the largest `top` of them.
template <class S>
void analyse(Json& j, MatrixView<const S> W, const Options& o) {
  const Index m = W.rows(), n = W.cols(), N = std::min(m, n);
  std::vector<double> values;
  if (o.top > 0 && o.top < N) {
    using T = S;  // values are widened to float or double before they come here

    const auto op = dense_operator<T, S>(W);
    if (!(op.frobenius_norm_squared() > 0)) {
      values.assign(std::size_t(o.top), 0.0);
    } else {
      const auto t = truncated_svd<T>(op, o.top, {.energy_tolerance = 0, .residual_tolerance = 1e-4});
      values.assign(t.S.begin(), t.S.end());
      auto known = spectrum_metrics(values, m, n);
      known.frobenius_norm = std::sqrt(t.total_energy);
      known.stable_rank = t.total_energy / (values[0] * values[0]);
      add_metrics(j, known, spectrum_bounds(t), m, n, false);
      j["method"] = "truncated";
      j["converged"] = t.converged;
      j["error"] = value_error(t);
      j["captured_energy"] = t.total_energy > 0 ? t.captured_energy / t.total_energy : 0;
      if (o.values) j["singular_values"] = values_json(values);
      return;
    }
  }
  const auto sv = singular_values(W);
  values = sv.values;
  add_metrics(j, spectrum_metrics(values, m, n), spectrum_bounds(sv, m, n), m, n, true);
  j["method"] = method_name(sv.method);
  j["error"] = sv.absolute_error;
  if (values[0] > 0) {
    const auto e = estimate_noise(values, m, n);
    j["noise_level"] = {{"std", e.std},
                        {"edge", e.edge},
                        {"threshold", e.threshold},
                        {"above_edge", e.above_edge},
                        {"optimal_rank", e.optimal_rank}};
    const auto fit = fit_power_law(values, {.max_candidates = 256});
    j["power_law"] = {{"alpha", fit.alpha},     {"alpha_error", fit.alpha_error},
                      {"x_min", fit.x_min},     {"ks_distance", fit.ks_distance},
                      {"tail", fit.tail_count}, {"weighted_alpha", finite(fit.weighted_alpha)}};
  }
  // A thinned-out copy for the pictures: 200 points describe any spectrum on log axes.
  Json curve = Json::array();
  for (Index i = 0, last = -1; i < 200; ++i) {
    const Index at = std::min(N - 1, Index(std::llround(std::pow(double(N), double(i) / 199))) - 1);
    if (at != last) curve.push_back({at + 1, values[std::size_t(at)]});
    last = at;
  }
  j["curve"] = std::move(curve);
  if (o.values) j["singular_values"] = values_json(values);
}

Json entry(const std::string& name, Index rows, Index cols, const char* what) {
  return {{"name", name}, {"rows", rows}, {"cols", cols}, {"of", what}};
}

/// What can be said of an update as a whole.
const char* verdict(double top, double edge) { return top == 0 ? "zero" : top <= edge ? "no signal" : "signal"; }

Json weight_entry(const MatrixTensor& w, const Options& o) {
  Json j = entry(w.name, w.rows, w.cols, "weight");
  j["dtype"] = w.stored_as();
  say_storage(j, {{"scale", &w}});
  w.tensor.populate();
  if (w.tensor.dtype() == io::Dtype::F64)
    analyse<double>(j, values_of<double>(w).view(), o);
  else
    analyse<float>(j, values_of<float>(w).view(), o);
  w.tensor.drop();
  return j;
}

template <class T>
Json difference_entry(const MatrixTensor& tuned, const MatrixTensor& base, const Options& o) {
  Json j = entry(tuned.name, tuned.rows, tuned.cols, "difference");
  j["dtype"] = tuned.stored_as();
  say_storage(j, {{"scale", &tuned}, {"base_scale", &base}});
  if (const int a = tuned.quantised_bits(), b = base.quantised_bits(); a != b)
    j["note"] = lowrank::detail::text("one side is stored in ",
                                      a == 0   ? b
                                      : b == 0 ? a
                                               : std::min(a, b),
                                      " bits: the difference holds the error of that storage");
  Matrix<T> W = values_of<T>(tuned);
  const Matrix<T> W0 = values_of<T>(base);
  Json sides = Json::object();
  if (o.side_by_side) {
    Options quiet = o;
    quiet.values = false;
    analyse<T>(sides["base"], W0.view(), quiet);
    analyse<T>(sides["tuned"], W.view(), quiet);
  }
  const bool narrow = tuned.is_16_bit() || base.is_16_bit();
  const bool both = tuned.is_16_bit() && base.is_16_bit();
  RoundingNoise rounding;
  if (narrow) {
    const auto which = tuned.is_16_bit() ? tuned.tensor.dtype() : base.tensor.dtype();
    const MatrixView<const T> v = W.view();
    rounding = which == io::Dtype::BF16 ? rounding_noise<bf16>(v, both) : rounding_noise<f16>(v, both);
  }
  for (Index i = 0; i < W.size(); ++i) W.data()[i] -= W0.data()[i];
  analyse<T>(j, W.view(), o);
  const double top = j.contains("metrics") ? j["metrics"]["spectral_norm"].get<double>() : 0;
  j["verdict"] = verdict(top, rounding.edge);
  if (narrow) j["rounding"] = {{"std", rounding.std}, {"edge", rounding.edge}, {"both_rounded", both}};
  for (auto& [key, value] : sides.items()) j[key] = std::move(value);
  return j;
}

Json adapter_entry(const io::AdapterModule& module, const MatrixTensor* weight, const Options& o) {
  const auto& f = module.factors;
  const Index m = f.out_features(), n = f.in_features();
  Json j = entry(module.name, m, n, "adapter");
  const auto sv = singular_values(f);
  add_metrics(j, spectrum_metrics(sv.values, m, n), spectrum_bounds(sv, m, n), m, n, true);
  j["rank"] = f.rank();
  j["scale"] = f.scale;
  j["method"] = method_name(sv.method);
  j["error"] = sv.absolute_error;
  j["verdict"] = verdict(sv.values.empty() ? 0 : sv.values[0], 0);
  if (!module.magnitude.empty()) j["note"] = "DoRA: the spectrum is that of s·B·A, before the magnitudes";
  if (weight != nullptr) {
    say_storage(j, {{"weight_scale", weight}});
    double sum = 0;
    const auto W = values_of<float>(*weight);
    for (Index i = 0; i < W.size(); ++i) sum += double(W.data()[i]) * double(W.data()[i]);
    j["relative_norm"] =
        sum > 0 ? finite(j["metrics"]["frobenius_norm"].get<double>() / std::sqrt(sum)) : Json(nullptr);
    weight->tensor.drop();
  }
  Json curve = Json::array();
  for (std::size_t i = 0; i < sv.values.size(); ++i) curve.push_back({i + 1, sv.values[i]});
  j["curve"] = std::move(curve);
  if (o.values) j["singular_values"] = values_json(sv.values);
  return j;
}

std::string table_text(const ScanResult& r) {
  std::string text = "    r90   noise  ratio    eff  stable        ‖·‖₂        ‖·‖_F  matrix\n";
  char line[160];
  for (const Json& j : r.matrices) {
    const auto number = [&](const char* section, const char* key) {
      return j[section][key].is_number() ? j[section][key].get<double>() : NAN;
    };
    std::snprintf(
        line, sizeof line, "%7.0f %7.0f %6.3f %6.1f %7.2f %11.4g %12.4g  ", number("metrics", "energy_rank_90"),
        number("noise", "energy_rank_90"), number("ratio", "energy_rank_90"), number("metrics", "effective_rank"),
        number("metrics", "stable_rank"), number("metrics", "spectral_norm"), number("metrics", "frobenius_norm"));
    text += line + j["name"].get<std::string>();
    if (j.contains("verdict") && j["verdict"] != "signal") text += "  (" + j["verdict"].get<std::string>() + ")";
    text += "\n";
  }
  return text;
}

void run(const Options& o) {
  if (!o.base.empty() && !o.adapter.empty()) throw UsageError("--base and --adapter do not go together");
  if (o.side_by_side && o.base.empty()) throw UsageError("--side-by-side needs --base");
  const io::Checkpoint checkpoint(o.checkpoint);
  std::vector<Skipped> skipped;
  const auto all = matrices_of(checkpoint, skipped);
  std::vector<ScanJob> jobs;
  const auto cost = [&](Index m, Index n) {
    const double small = double(std::min(m, n)), big = double(std::max(m, n));
    return o.top > 0 && double(o.top) < small ? big * small * double(o.top) * 20
                                              : big * small * small + 3 * small * small * small;
  };
  std::optional<io::Checkpoint> base;
  std::vector<MatrixTensor> base_list;
  std::optional<io::PeftAdapter> adapter;
  if (!o.base.empty()) {
    base.emplace(o.base);
    std::vector<Skipped> ignored;
    base_list = matrices_of(*base, ignored);
    for (const auto& w : all) {
      if (!selected(w.name, o.filter)) continue;
      const MatrixTensor* b = find_matrix(base_list, w.name);
      if (b == nullptr) {
        skipped.push_back({w.name, "is not in the base", true});
      } else if (b->rows != w.rows || b->cols != w.cols) {
        skipped.push_back({w.name,
                           lowrank::detail::text("is ", lowrank::detail::shape_text(w.rows, w.cols), " here and ",
                                                 lowrank::detail::shape_text(b->rows, b->cols), " in the base"),
                           true});
      } else {
        const bool wide = w.tensor.dtype() == io::Dtype::F64 || b->tensor.dtype() == io::Dtype::F64;
        jobs.push_back({w.name, w.bytes() + b->bytes(), cost(w.rows, w.cols), [&o, &w, b, wide] {
                          return wide ? difference_entry<double>(w, *b, o) : difference_entry<float>(w, *b, o);
                        }});
      }
    }
    for (const auto& b : base_list)
      if (selected(b.name, o.filter) && find_matrix(all, b.name) == nullptr)
        skipped.push_back({b.name, "is only in the base", true});
  } else if (!o.adapter.empty()) {
    adapter.emplace(io::read_peft(o.adapter));
    for (const auto& module : adapter->modules) {
      if (!selected(module.name, o.filter)) continue;
      const MatrixTensor* w = find_matrix(all, module.name + ".weight");
      const Index m = module.factors.out_features(), n = module.factors.in_features();
      const bool fits = w != nullptr && (module.kind == ModuleKind::embedding || adapter->config.fan_in_fan_out
                                             ? w->rows == n && w->cols == m
                                             : w->rows == m && w->cols == n);
      if (!fits && module.kind != ModuleKind::conv) {
        skipped.push_back({module.name,
                           w == nullptr
                               ? "the adapter's module is not in the checkpoint"
                               : lowrank::detail::text("the adapter's update is ", lowrank::detail::shape_text(m, n),
                                                       ", the weight ", lowrank::detail::shape_text(w->rows, w->cols)),
                           true});
        continue;
      }
      jobs.push_back({module.name, (fits ? w->bytes() : 0) + 1,
                      double(m + n) * double(module.factors.rank()) * double(module.factors.rank()),
                      [&o, &module, w, fits] { return adapter_entry(module, fits ? w : nullptr, o); }});
    }
  } else {
    for (const auto& w : all)
      if (selected(w.name, o.filter))
        jobs.push_back({w.name, w.bytes(), cost(w.rows, w.cols), [&o, &w] { return weight_entry(w, o); }});
  }
  note_quantised(o.scan.common, {&all, &base_list});
  if (jobs.empty() && skipped.empty()) throw IoError(o.checkpoint, "holds no matrices");
  if (jobs.empty() && !o.filter.empty()) throw UsageError("--filter " + o.filter + " selects nothing");
  const std::string settings = "spectrum top " + std::to_string(o.top) + (o.values ? " values" : "") +
                               (o.side_by_side ? " sides" : "") + (o.base.empty() ? "" : " base") +
                               (o.adapter.empty() ? "" : " adapter");
  auto result = run_scan(o.scan, "spectrum", fingerprint({o.checkpoint, o.base, o.adapter}, settings), jobs);
  result.skipped.insert(result.skipped.end(), skipped.begin(), skipped.end());
  const std::string table = table_text(result);
  finish_scan(o.scan, std::move(result),
              {{"command", "spectrum"},
               {"checkpoint", o.checkpoint},
               {"base", o.base.empty() ? Json(nullptr) : Json(o.base)},
               {"adapter", o.adapter.empty() ? Json(nullptr) : Json(o.adapter)},
               {"top", o.top},
               {"numerical_rank_eps", std::numeric_limits<float>::epsilon()}},
              table);
}

void add_spectrum(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      app.add_subcommand("spectrum", "Ranks and spectra of weights, differences or adapters, beside those of noise");
  sub->add_option("checkpoint", o->checkpoint, "A .safetensors file or a Hugging Face directory")->required();
  sub->add_option("--base", o->base, "Analyse CHECKPOINT - BASE");
  sub->add_option("--adapter", o->adapter, "Analyse the updates of this PEFT adapter, which fits CHECKPOINT");
  sub->add_option("--top", o->top, "Only the largest K singular values; metrics then have bounds instead of values")
      ->check(CLI::PositiveNumber);
  sub->add_option("--filter", o->filter, "Only matrices whose name contains this");
  sub->add_flag("--values", o->values, "Write all singular values too");
  sub->add_flag("--side-by-side", o->side_by_side, "With --base: the spectra of the base and the tuned weight too");
  o->scan.add_to(sub);
  sub->callback([o] { run(*o); });
}

const Registration registration{60, "spectrum", add_spectrum};

}  // namespace
}  // namespace lowrank::tool::spectrum_command

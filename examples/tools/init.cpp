// SPDX-License-Identifier: Apache-2.0
// lowrank init: an adapter for a checkpoint, and the changed base where the method changes it. Streams tensor by
// tensor.
#include <lowrank/adapter/dora.hpp>
#include <lowrank/init/gaussian.hpp>
#include <lowrank/init/kaiming.hpp>
#include <lowrank/init/milora.hpp>
#include <lowrank/init/olora.hpp>
#include <lowrank/init/orthogonal.hpp>
#include <lowrank/init/pissa.hpp>

#include <algorithm>
#include <filesystem>

#include "models.hpp"

namespace lowrank::tool {
namespace {

using io::TensorView;

struct Options {
  Common common;
  std::string method, checkpoint, output, dtype = "f32";
  TargetArguments targets;
  Index rank = 16;
  double alpha = 0;  // 0: equal to rank
  bool rslora = false, fan_in_fan_out = false, dora = false, dry_run = false;
  std::uint64_t seed = 0;
};

bool changes_base(const std::string& method) { return method == "pissa" || method == "milora" || method == "olora"; }

FactorStorage factor_storage(const std::string& dtype) {
  return dtype == "bf16" ? FactorStorage::bf16 : dtype == "f16" ? FactorStorage::f16 : FactorStorage::native;
}

/// One module's outcome; the base, if there is one, is written by `write_base`.
struct Outcome {
  LoraFactors<float> factors;
  InitReport report;
};

struct Times {
  double read = 0, compute = 0, write = 0;
};

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Runs a method that splits W; the base, in W's storage, goes to `use_base`.
template <class S, class UseBase>
Outcome split(const Options& o, MatrixView<const S> W, std::uint64_t seed, UseBase&& use_base) {
  using T = arithmetic_of<S>;
  const auto finish = [&](auto&& result) {
    use_base(result.base);
    return Outcome{to_float(std::move(result.factors)), std::move(result.report)};
  };
  const FactorStorage storage = factor_storage(o.dtype);
  // f64 checkpoints are split in double, but the adapter is stored in float at most: the base must be formed from what
  // is stored, so round first. The float conversion of a double factor is such a rounding.
  if constexpr (std::is_same_v<T, double>) {
    Matrix<float> narrow(W);
    Outcome out = split<float>(o, narrow.view(), seed, [](Matrix<float>&) {});
    LoraFactors<double> exact{Matrix<double>(out.factors.A.view()), Matrix<double>(out.factors.B.view()),
                              double(out.factors.scale)};
    Matrix<double> base;
    base.resize(W.rows(), W.cols());
    const ResidualNorms norms = residual_base(W, exact, base.view());
    out.report.residual_norm = norms.residual;
    out.report.storage_error = norms.storage_error;
    use_base(base);
    return out;
  } else {
    if (o.method == "pissa") {
      PissaOptions p{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage};
      p.svd.seed = seed;
      return finish(pissa<S>(W, p));
    }
    if (o.method == "milora")
      return finish(
          milora<S>(W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage}));
    return finish(
        olora<S>(W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage}));
  }
}

/// Runs a method that leaves W as it is.
Outcome start(const Options& o, const TensorView& weight, const ModuleInfo& info, std::uint64_t seed) {
  const auto take = [](auto&& result) {
    return Outcome{to_float(std::move(result.factors)), std::move(result.report)};
  };
  const Index out = o.fan_in_fan_out ? info.cols : info.rows, in = o.fan_in_fan_out ? info.rows : info.cols;
  if (info.kind == ModuleKind::embedding)  // stored vocab×dim; A is r×vocab, zero, and B dim×r, normal
    return take(gaussian_embedding<float>(
        info.cols, info.rows, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  if (o.method == "kaiming")
    return take(kaiming<float>(out, in, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  if (o.method == "gaussian")
    return take(
        gaussian<float>(out, in, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  if (o.method == "orthogonal")
    return take(
        orthogonal<float>(out, in, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  return with_weight(weight, [&](const auto& W) {
    return take(
        mica(o.fan_in_fan_out ? W.transposed() : W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora}));
  });
}

/// DoRA's magnitudes at the start, where base + s·B·A = W: the row norms of W.
std::vector<float> row_norms(const TensorView& weight, bool transposed) {
  return with_weight(weight, [&](auto W) {
    if (transposed) W = W.transposed();
    std::vector<float> norms;
    for (Index i = 0; i < W.rows(); ++i) {
      double sum = 0;
      for (Index j = 0; j < W.cols(); ++j) sum += double(W(i, j)) * double(W(i, j));
      norms.push_back(float(std::sqrt(sum)));
    }
    return norms;
  });
}

void check_shapes(const Options& o, const Modules& modules, const TargetSelection& chosen) {
  for (const std::size_t i : chosen.selected) {
    const ModuleInfo& m = modules.infos[i];
    if (m.kind == ModuleKind::conv) modules.weights[i].fail("is a convolution; init adapts matrices");
    if (m.kind == ModuleKind::embedding && (changes_base(o.method) || o.dora))
      modules.weights[i].fail("is an embedding; " + (o.dora ? std::string("DoRA") : o.method) +
                              " adapts linear layers, leave it out with --exclude");
    if (o.rank > std::min(m.rows, m.cols))
      modules.weights[i].fail(
          lowrank::detail::text("is ", lowrank::detail::shape_text(m.rows, m.cols), ", too small for rank ", o.rank));
    const auto d = modules.weights[i].dtype();
    if (d != io::Dtype::F32 && d != io::Dtype::F64 && d != io::Dtype::BF16 && d != io::Dtype::F16)
      with_weight(modules.weights[i], [](const auto&) {});  // throws, naming the type
  }
}

Json module_report(const std::string& name, const InitReport& r) {
  return {{"name", name},
          {"captured_energy", r.total_energy > 0 ? r.captured_energy / r.total_energy : 0.0},
          {"residual_norm", r.residual_norm},
          {"storage_error", r.storage_error},
          {"passes", r.passes},
          {"converged", r.converged},
          {"seconds", r.seconds},
          {"notes", r.notes}};
}

void run(Options& o) {
  namespace fs = std::filesystem;
  if (o.alpha == 0) o.alpha = double(o.rank);
  const io::Checkpoint checkpoint(o.checkpoint);
  const Modules modules(checkpoint);
  const TargetSelection chosen = o.targets.select(modules);
  check_shapes(o, modules, chosen);
  expect_different(o.checkpoint, o.output);
  note(o.common, chosen.summary());
  const std::string base_directory = (fs::path(o.output) / "base").string();
  const bool changed = changes_base(o.method);

  io::PeftAdapter adapter;
  adapter.config.r = o.rank;
  adapter.config.lora_alpha = o.alpha;
  adapter.config.use_rslora = o.rslora;
  adapter.config.use_dora = o.dora;
  adapter.config.fan_in_fan_out = o.fan_in_fan_out;
  adapter.config.task_type = "CAUSAL_LM";
  adapter.config.target_modules = target_list(modules, chosen.selected);
  adapter.config.base_model_name_or_path = changed ? base_directory : o.checkpoint;
  adapter.metadata["lowrank_method"] = o.method;
  if (changed) {
    adapter.metadata[io::base_metadata_key] = "residual";
    adapter.metadata["lowrank_original_base"] = o.checkpoint;
  }
  Index parameters = 0;
  std::uint64_t total_bytes = 0;
  for (const std::size_t i : chosen.selected) {
    parameters += o.rank * (modules.infos[i].rows + modules.infos[i].cols);
    total_bytes += modules.weights[i].bytes().size();
  }
  Json report = {{"command", "init"},
                 {"method", o.method},
                 {"rank", o.rank},
                 {"alpha", o.alpha},
                 {"rslora", o.rslora},
                 {"applied", chosen.selected.size()},
                 {"adaptable", chosen.adaptable},
                 {"parameters", parameters},
                 {"output", o.output},
                 {"base_changed", changed},
                 {"dry_run", o.dry_run}};
  if (o.dry_run) {
    Json names = Json::array();
    std::string text = chosen.summary() + "\n";
    for (const std::size_t i : chosen.selected) {
      names.push_back(modules.infos[i].name);
      text += "  " + modules.infos[i].name + "  " +
              lowrank::detail::shape_text(modules.infos[i].rows, modules.infos[i].cols) + "\n";
    }
    report["modules"] = std::move(names);
    text += std::to_string(parameters) + " parameters; would write " + o.output +
            (changed ? " and " + base_directory : "") + "\n";
    return print(o.common, report, text);
  }

  Times times;
  Json module_reports = Json::array();
  double captured_least = 1;
  bool converged = true;
  const auto keep = [&](const ModuleInfo& info, const TensorView& weight, Outcome&& out) {
    io::AdapterModule m;
    m.name = info.name;
    m.kind = info.kind;
    m.factors = std::move(out.factors);
    m.dtype = factor_dtype(o.dtype);
    round_factors(m.factors, m.dtype);  // nothing changes where the method rounded already
    if (o.dora) m.magnitude = row_norms(weight, o.fan_in_fan_out);
    if (out.report.total_energy > 0)
      captured_least = std::min(captured_least, out.report.captured_energy / out.report.total_energy);
    converged = converged && out.report.converged;
    module_reports.push_back(module_report(info.name, out.report));
    adapter.modules.push_back(std::move(m));
  };
  std::vector<bool> selected(modules.infos.size());
  for (const std::size_t i : chosen.selected) selected[i] = true;
  // One stream of random numbers a module, whatever else is selected or how the checkpoint is sharded.
  const auto seed_of = [&](std::size_t i) { return CounterRng(o.seed, 1).bits(i); };

  const auto started = std::chrono::steady_clock::now();
  if (changed) {
    std::uint64_t all = 0;
    checkpoint.for_each([&](const TensorView& t) { all += t.bytes().size(); });
    Progress progress(o.common, o.method, all);
    const auto rewrite = [&](const TensorView& t) -> std::optional<io::TensorRewrite> {
      const auto suffix = std::string_view(".weight").size();
      const auto at = t.name().ends_with(".weight")
                          ? modules.find(std::string_view(t.name()).substr(0, t.name().size() - suffix))
                          : std::nullopt;
      if (!at || !selected[*at]) return std::nullopt;
      const std::size_t i = *at;
      return io::TensorRewrite{
          {{t.name(), t.dtype(), t.shape()}}, [&, i](io::SafeTensorsWriter& out) {
            const TensorView& weight = modules.weights[i];
            auto clock = std::chrono::steady_clock::now();
            weight.populate();
            times.read += since(clock);
            with_weight(weight, [&]<class S>(MatrixView<const S> W) {
              clock = std::chrono::steady_clock::now();
              if (o.fan_in_fan_out) W = W.transposed();
              double writing = 0;
              Outcome outcome = split<S>(o, W, seed_of(i), [&](Matrix<S>& base) {
                const auto before = std::chrono::steady_clock::now();
                const auto stored = o.fan_in_fan_out ? base.view().transposed() : base.view();
                if (stored.is_row_major()) {
                  out.write(weight.name(), std::as_bytes(std::span(base.data(), std::size_t(base.size()))));
                } else {
                  const Matrix<S> copy(stored);
                  out.write(weight.name(), std::as_bytes(std::span(copy.data(), std::size_t(copy.size()))));
                }
                writing = since(before);
              });
              times.write += writing;
              times.compute += since(clock) - writing;
              keep(modules.infos[i], weight, std::move(outcome));
            });
          }};
    };
    auto clock = std::chrono::steady_clock::now();
    io::rewrite_checkpoint(checkpoint, base_directory, rewrite,
                           [&](const TensorView& t) { progress.advance(t.bytes().size(), t.name()); });
    times.write += std::max(0.0, since(clock) - times.read - times.compute - times.write);  // copies and fsync
    copy_model_files(o.checkpoint, base_directory);
  } else {
    Progress progress(o.common, o.method, total_bytes);
    for (const std::size_t i : chosen.selected) {
      const TensorView& weight = modules.weights[i];
      const auto clock = std::chrono::steady_clock::now();
      keep(modules.infos[i], weight, start(o, weight, modules.infos[i], seed_of(i)));
      times.compute += since(clock);
      weight.drop();
      progress.advance(weight.bytes().size(), modules.infos[i].name);
    }
  }
  std::sort(adapter.modules.begin(), adapter.modules.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  const auto clock = std::chrono::steady_clock::now();
  io::write_peft(o.output, adapter);
  times.write += since(clock);
  const double seconds = since(started);
  report["seconds"] = {{"total", seconds}, {"read", times.read}, {"compute", times.compute}, {"write", times.write}};
  report["converged"] = converged;
  report["modules"] = std::move(module_reports);
  std::string text = chosen.summary() + "\n" + std::to_string(parameters) + " parameters, rank " +
                     std::to_string(o.rank) + ", scale " +
                     number(o.rslora ? rslora_scale(o.alpha, o.rank) : lora_scale(o.alpha, o.rank)) + "\n";
  if (changed) text += "least captured energy of a module: " + number(captured_least) + "\n";
  text += time_text(seconds) + ": reading " + time_text(times.read) + ", computing " + time_text(times.compute) +
          ", writing " + time_text(times.write) + "\n" + "wrote " + o.output +
          (changed ? " and " + base_directory : "") + "\n";
  if (!converged) note(o.common, "some decompositions stopped before their tolerance; see --json");
  print(o.common, report, text);
}

void add_init(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      add_command(app, "init", "Initialise an adapter (PEFT) and, where the method changes it, the base", o->common);
  sub->add_option("method", o->method, "kaiming, gaussian, orthogonal, mica; pissa, milora, olora (change the base)")
      ->required()
      ->check(CLI::IsMember({"kaiming", "gaussian", "orthogonal", "mica", "pissa", "milora", "olora"}));
  sub->add_option("checkpoint", o->checkpoint, "A .safetensors file or a Hugging Face directory")->required();
  sub->add_option("-o,--output", o->output, "Directory for the adapter, and base/ below it")->required();
  sub->add_option("-r,--rank", o->rank, "Rank")->capture_default_str()->check(CLI::PositiveNumber);
  sub->add_option("--alpha", o->alpha, "LoRA alpha; default: the rank, so that the scale is 1")
      ->check(CLI::PositiveNumber);
  sub->add_flag("--rslora", o->rslora, "Scale alpha/sqrt(rank) instead of alpha/rank");
  sub->add_flag("--dora", o->dora, "Add DoRA's magnitudes: the row norms of the weights");
  o->targets.add_to(sub);
  sub->add_option("--seed", o->seed, "Seed of all random numbers")->capture_default_str();
  sub->add_option("--dtype", o->dtype, "Type of the stored factors")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  sub->add_flag("--fan-in-fan-out", o->fan_in_fan_out, "Weights are stored in x out (GPT-2's Conv1D)");
  sub->add_flag("--dry-run", o->dry_run, "Say what would be done, write nothing");
  sub->callback([o] { run(*o); });
}

const Registration registration{20, "init", add_init};

}  // namespace
}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// lowrank init: an adapter for a checkpoint, and the changed base where the method changes it. Streams tensor by
// tensor.

#include <algorithm>
#include <filesystem>

#include "init_methods.hpp"
#include "lowrank/io/bitsandbytes.hpp"
#include "outputs.hpp"

namespace lowrank::tool::init_command {
namespace {

using io::TensorView;

struct Options {
  Common common;
  MethodOptions method;
  std::string checkpoint, output, activations, gradients;
  TargetArguments targets;
  bool fan_in_fan_out = false, dora = false, packed = false, dry_run = false;
  std::uint64_t seed = 0;
};

struct Times {
  double read = 0, compute = 0, write = 0;
};

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::string packed_dtype(const TensorView& weight) {
  return weight.dtype() == io::Dtype::BF16 ? "bfloat16" : weight.dtype() == io::Dtype::F16 ? "float16" : "float32";
}

/// Writes the base in the order of the file; returns its fingerprint.
std::string write_base(io::SafeTensorsWriter& out, const TensorView& weight, const BaseStorage& base, bool transposed) {
  return std::visit(
      [&]<class M>(const M& m) -> std::string {
        if constexpr (std::is_same_v<M, std::monostate>) {
          throw ArgumentError("lowrank init: the method left the base as it was");
        } else {
          const auto write = [&](const M& x) {
            const auto bytes = std::as_bytes(std::span(x.data(), std::size_t(x.size())));
            out.write(weight.name(), bytes);
            return io::fingerprint(weight.dtype(), weight.shape(), bytes);
          };
          return transposed ? write(M(m.view().transposed())) : write(m);
        }
      },
      base);
}

/// The same as bitsandbytes' tensors; the fingerprint is that of the codes.
std::string write_packed(io::SafeTensorsWriter& out, const TensorView& weight, const QuantisedMatrix<float>& q) {
  std::string print;
  for (const auto& part : io::bitsandbytes_tensors(weight.name(), q, packed_dtype(weight))) {
    out.write(part.spec.name, part.bytes);
    if (part.spec.name == weight.name()) print = io::fingerprint(part.spec.dtype, part.spec.shape, part.bytes);
  }
  return print;
}

/// What transformers needs in config.json to load packed weights: which layers are, and how.
std::string with_quantization_config(const std::string& path, const std::string& text, const Options& o,
                                     const Modules& modules, const std::vector<bool>& packed) {
  Json config = io::parse_json(path, text);
  if (!config.is_object()) throw IoError(path, "must hold a JSON object");
  Json plain = Json::array();
  std::string compute = "float32";
  for (std::size_t i = 0; i < packed.size(); ++i) {
    if (packed[i])
      compute = packed_dtype(modules.weights[i]);
    else if (modules.infos[i].kind == ModuleKind::linear)
      plain.push_back(modules.infos[i].name);
  }
  config["quantization_config"] = {{"quant_method", "bitsandbytes"},
                                   {"load_in_4bit", true},
                                   {"load_in_8bit", false},
                                   {"bnb_4bit_quant_type", "nf4"},
                                   {"bnb_4bit_use_double_quant", o.method.double_quantise},
                                   {"bnb_4bit_compute_dtype", compute},
                                   {"bnb_4bit_quant_storage", "uint8"},
                                   {"llm_int8_skip_modules", std::move(plain)}};
  return config.dump(2) + "\n";
}

/// What the packed form of a weight will be, before there is one: the same tensors with the sizes known from the shape.
std::vector<io::TensorSpec> packed_specs(const Options& o, const TensorView& weight, bool transposed) {
  QuantiseOptions q;
  q.block_size = o.method.block_size;
  q.double_quantise = o.method.double_quantise;
  const Index rows = transposed ? weight.cols() : weight.rows(), cols = transposed ? weight.rows() : weight.cols();
  std::vector<io::TensorSpec> specs;
  for (auto& t :
       io::bitsandbytes_tensors(weight.name(), QuantisedMatrix<float>::zero(rows, cols, q), packed_dtype(weight)))
    specs.push_back(std::move(t.spec));
  return specs;
}

void check_shapes(const Options& o, const Modules& modules, const TargetSelection& chosen) {
  for (const std::size_t i : chosen.selected) {
    const ModuleInfo& m = modules.infos[i];
    if (m.kind == ModuleKind::conv) modules.weights[i].fail("is a convolution; init adapts matrices");
    if (m.kind == ModuleKind::embedding && (changes_base(o.method.method) || o.method.data || o.dora))
      modules.weights[i].fail("is an embedding; " + (o.dora ? std::string("DoRA") : o.method.method) +
                              " adapts linear layers, leave it out with --exclude");
    if (m.role == ModuleRole::router && o.method.rank > m.rows)
      modules.weights[i].fail(common::text("is a router of ", m.rows, " experts, too few for rank ", o.method.rank));
    if (o.method.rank > std::min(m.rows, m.cols))
      modules.weights[i].fail(
          common::text("is ", common::shape_text(m.rows, m.cols), ", too small for rank ", o.method.rank));
    if (o.method.method == "lora_ga" && 2 * o.method.rank > std::min(m.rows, m.cols))
      modules.weights[i].fail(
          common::text("is ", common::shape_text(m.rows, m.cols), ", lora_ga needs twice the rank ", o.method.rank));
    // All that the method will want of the data is looked for before anything is computed.
    if (needs_activations(o.method.method))
      (void)find_activations(*o.method.data, m.name, m.in_by_out ? m.rows : m.cols);
    if (needs_gradients(o.method.method)) (void)find_gradient(*o.method.data, m);
    const auto d = modules.weights[i].dtype();
    if (d != io::Dtype::F32 && d != io::Dtype::F64 && d != io::Dtype::BF16 && d != io::Dtype::F16)
      with_weight(modules.weights[i], [](const auto&) {});  // throws, naming the type
  }
}

/// Modules to which EVA gave nothing carry no adapter.
void leave_out_rank_zero(const Options& o, TargetSelection& chosen, EvaPlan& plan, std::vector<std::string>& notes) {
  std::size_t kept = 0;
  Index total = 0;
  for (std::size_t k = 0; k < plan.ranks.size(); ++k) {
    if (plan.ranks[k] == 0) continue;
    total += plan.ranks[k];
    chosen.selected[kept] = chosen.selected[k];
    if (kept != k) plan.inputs[kept] = std::move(plan.inputs[k]);
    plan.ranks[kept++] = plan.ranks[k];
  }
  const std::size_t none = plan.ranks.size() - kept;
  if (kept == 0) throw IoError(o.activations, "the activations do not vary: no module has a direction to adapt");
  if (none > 0) notes.push_back(common::text("eva: ", none, " modules explain too little to get a rank"));
  if (total < o.method.rank * Index(plan.ranks.size()))
    notes.push_back(common::text("eva: the activations have only ", total, " directions for ranks of ",
                                 o.method.rank * Index(plan.ranks.size()), " in all"));
  chosen.selected.resize(kept);
  plan.inputs.erase(plan.inputs.begin() + std::ptrdiff_t(kept), plan.inputs.end());
  plan.ranks.resize(kept);
}

/// --block-size as the quantised methods have it, whatever the method.
std::string check_block_size(const std::string& text) {
  Index size = 0;
  const bool number = CLI::detail::lexical_cast(text, size);
  return number && size >= 32 && size <= 4096 && (size & (size - 1)) == 0
             ? std::string()
             : "must be a power of two from 32 to 4096, got " + text;
}

/// An option that only some methods look at.
struct MethodOption {
  const char* option;
  std::vector<std::string_view> methods;
};
const std::vector<MethodOption>& method_options() {
  static const std::vector<std::string_view> quantising{"loftq", "qpissa"};
  static const std::vector<MethodOption> table{
      {"--bits", quantising},
      {"--iters", quantising},
      {"--block-size", quantising},
      {"--double-quant", quantising},
      {"--scale-search", quantising},
      {"--packed", quantising},
      {"--activations", {"eva", "corda"}},
      {"--gradients", {"lora_ga"}},
      {"--mode", {"corda"}},
      {"--damping", {"corda"}},
      {"--gamma", {"lora_ga"}},
      {"--rho", {"eva"}},
      {"--whiten", {"eva"}},
      {"--no-centre", {"eva"}},
  };
  return table;
}

/// **Throws** UsageError for an option that the method has no use for: nothing a user said is ignored.
void expect_used(const CLI::App& sub, const std::string& method) {
  for (const MethodOption& m : method_options()) {
    if (sub.get_option(m.option)->count() == 0 || common::is_one_of(method, m.methods)) continue;
    std::string list;
    for (std::size_t i = 0; i < m.methods.size(); ++i)
      list += (i == 0 ? "" : i + 1 == m.methods.size() ? " and " : ", ") + std::string(m.methods[i]);
    throw UsageError("init: " + method + " has no use for " + m.option + ", which belongs to " + list);
  }
}

/// What the options leave to do, checked in full before anything is computed or written.
struct Plan {
  io::Checkpoint checkpoint;
  Modules modules;
  TargetSelection chosen;
  EvaPlan eva;
  std::string base_directory;
  bool changed = false;            ///< the method writes a base of its own
  Index parameters = 0;            ///< as the nominal ranks have it
  std::vector<std::string> notes;  ///< said when the work is done: an error is one line alone

  explicit Plan(const std::string& path) : checkpoint(checkpoint_path(path)), modules(checkpoint) {}
};

Plan make_plan(Options& o) {
  if (o.packed && o.method.bits != 4) throw UsageError("init: --packed needs --bits 4, the form bitsandbytes has");
  for (const auto& [option, file, needed] :
       {std::tuple("--activations", &o.activations, needs_activations(o.method.method)),
        std::tuple("--gradients", &o.gradients, needs_gradients(o.method.method))})
    if (needed) {
      if (file->empty()) throw UsageError("init: " + o.method.method + " needs " + option);
      o.method.data = std::make_shared<ModuleData>(*file);
    }
  if (o.method.alpha == 0) o.method.alpha = double(o.method.rank);
  Plan p(o.checkpoint);
  p.modules.settle_orientation(o.fan_in_fan_out);
  p.chosen = o.targets.select(p.modules);
  check_shapes(o, p.modules, p.chosen);
  expect_different(o.checkpoint, o.output);
  p.base_directory = (std::filesystem::path(o.output) / "base").string();
  p.changed = changes_base(o.method.method);
  if (!p.changed) expect_no_changed_base(o.output);
  if (const std::string line = p.modules.family_note(p.chosen.selected); !line.empty()) p.notes.push_back(line);
  if (o.method.method == "eva") {
    p.eva = plan_eva(o.method, p.modules, p.chosen.selected, o.seed);
    leave_out_rank_zero(o, p.chosen, p.eva, p.notes);
  }
  for (std::size_t k = 0; k < p.chosen.selected.size(); ++k) {
    const ModuleInfo& m = p.modules.infos[p.chosen.selected[k]];
    const Index rank = p.eva.ranks.empty() ? o.method.rank : p.eva.ranks[k];
    p.parameters += rank * (m.rows + m.cols) + (!o.dora ? 0 : m.in_by_out ? m.cols : m.rows);
  }
  return p;
}

/// The adapter without its modules.
io::PeftAdapter empty_adapter(const Options& o, const Plan& p) {
  io::PeftAdapter adapter;
  adapter.config.r = o.method.rank;
  adapter.config.lora_alpha = o.method.alpha;
  adapter.config.use_rslora = o.method.rslora;
  adapter.config.use_dora = o.dora;
  adapter.config.fan_in_fan_out = p.modules.need_fan_in_fan_out(p.chosen.selected);
  adapter.config.task_type = p.modules.task_type();
  adapter.config.target_modules = target_list(p.modules, p.chosen.selected);
  adapter.config.base_model_name_or_path = absolute_path(p.changed ? p.base_directory : o.checkpoint);
  adapter.metadata[io::method_metadata_key] = o.method.method;
  if (p.changed)
    adapter.changed_base = io::ChangedBase{.kind = quantises(o.method.method) ? "quantized" : "residual",
                                           .method = o.method.method,
                                           .original = absolute_path(o.checkpoint)};
  return adapter;
}

/// What is said of one module.
struct ModuleReport {
  std::string name;
  Index rank = 0;
  InitReport init;
  double plain_error = 0, error = 0;  ///< of a quantised base
};

/// What was done.
struct Results {
  io::PeftAdapter adapter;
  std::vector<ModuleReport> modules;
  Times times;
  double seconds = 0;

  [[nodiscard]] bool converged() const {
    return std::all_of(modules.begin(), modules.end(), [](const ModuleReport& m) { return m.init.converged; });
  }
  [[nodiscard]] double captured_least() const {
    double least = 1;
    for (const ModuleReport& m : modules)
      if (m.init.total_energy > 0) least = std::min(least, m.init.captured_energy / m.init.total_energy);
    return least;
  }
  /// ‖W − (Q + s·B·A)‖ over all modules, relative to plain quantisation.
  [[nodiscard]] double error_ratio() const {
    double plain2 = 0, error2 = 0;
    for (const ModuleReport& m : modules) {
      plain2 += m.plain_error * m.plain_error;
      error2 += m.error * m.error;
    }
    return plain2 > 0 ? std::sqrt(error2 / plain2) : 0;
  }
};

/// Keeps what the method made of one module.
void keep(const Options& o, const ModuleInfo& info, const TensorView& weight, Outcome&& out, Results& results) {
  io::AdapterModule m;
  m.name = info.name;
  m.kind = info.kind;
  m.factors = std::move(out.factors);
  m.dtype = factor_dtype(o.method.dtype);
  round_factors(m.factors, m.dtype);  // nothing changes where the method rounded already
  if (o.dora)
    m.magnitude = quantises(o.method.method) ? row_norms(out.base, m.factors) : row_norms(weight, info.in_by_out);
  results.modules.push_back({info.name, m.factors.rank(), std::move(out.report), out.plain_error, out.error});
  results.adapter.modules.push_back(std::move(m));
}

std::uint64_t seed_of(const Options& o, const ModuleInfo& info) {
  return CounterRng(o.seed, 1).bits(module_stream(info.name));
}

/// The base is another one: module by module while it is written.
io::StagedFiles compute_with_base(const Options& o, Plan& p, Results& results, std::unique_ptr<Finishing>& finishing) {
  const Modules& modules = p.modules;
  Times& times = results.times;
  std::vector<bool> selected(modules.infos.size());
  for (const std::size_t i : p.chosen.selected) selected[i] = true;
  const auto rewrite = [&](const TensorView& t) -> std::optional<io::TensorRewrite> {
    const auto suffix = std::string_view(".weight").size();
    const auto at = t.name().ends_with(".weight")
                        ? modules.find(std::string_view(t.name()).substr(0, t.name().size() - suffix))
                        : std::nullopt;
    if (!at || !selected[*at]) return std::nullopt;
    const ModuleInfo& info = modules.infos[*at];
    return io::TensorRewrite{
        o.packed ? packed_specs(o, t, info.in_by_out) : std::vector<io::TensorSpec>{{t.name(), t.dtype(), t.shape()}},
        [&, i = *at](io::SafeTensorsWriter& out) {
          const TensorView& weight = modules.weights[i];
          auto clock = std::chrono::steady_clock::now();
          weight.populate();
          times.read += since(clock);
          clock = std::chrono::steady_clock::now();
          Outcome outcome = initialise(o.method, weight, info, seed_of(o, info));
          times.compute += since(clock);
          throw_if_interrupted();
          clock = std::chrono::steady_clock::now();
          results.adapter.changed_base->weights[weight.name()] =
              o.packed ? write_packed(out, weight, outcome.quantised)
                       : write_base(out, weight, outcome.base, info.in_by_out);
          times.write += since(clock);
          keep(o, info, weight, std::move(outcome), results);
        }};
  };
  const auto clock = std::chrono::steady_clock::now();
  io::StagedFiles files =
      stage_interruptibly(o.common, o.method.method, p.checkpoint, p.base_directory, rewrite, finishing);
  times.write += std::max(0.0, since(clock) - times.read - times.compute - times.write);  // copies and fsync
  std::function<std::string(const std::string&, std::string)> change;
  if (o.packed)
    change = [&](const std::string& path, const std::string& text) {
      return with_quantization_config(path, text, o, modules, selected);
    };
  if (!stage_model_files(o.checkpoint, p.base_directory, files, change) && o.packed)
    p.notes.emplace_back("there is no config.json beside the checkpoint to say that the base is in 4 bits");
  files.add_text((std::filesystem::path(p.base_directory) / io::changed_base_file).string(),
                 io::changed_base_text(*results.adapter.changed_base));
  return files;
}

/// The base stays: factors alone.
void compute_factors(const Options& o, const Plan& p, Results& results) {
  std::uint64_t total = 0;
  for (const std::size_t i : p.chosen.selected) total += p.modules.weights[i].bytes().size();
  Progress progress(o.common, o.method.method, p.chosen.selected.size(), "matrices", total);
  for (std::size_t k = 0; k < p.chosen.selected.size(); ++k) {
    throw_if_interrupted();
    const ModuleInfo& info = p.modules.infos[p.chosen.selected[k]];
    const TensorView& weight = p.modules.weights[p.chosen.selected[k]];
    const auto clock = std::chrono::steady_clock::now();
    if (!p.eva.ranks.empty()) expect_finite_weight(weight);
    keep(o, info, weight,
         !p.eva.ranks.empty() ? initialise_eva(o.method, p.eva, k, info.in_by_out ? info.cols : info.rows)
                              : initialise(o.method, weight, info, seed_of(o, info)),
         results);
    results.times.compute += since(clock);
    weight.drop();
    progress.advance(weight.bytes().size(), info.name);
  }
  throw_if_interrupted();
}

Results compute(const Options& o, Plan& p) {
  remove_leftovers(o.common, {o.output, p.base_directory});
  const NewDirectories made(p.changed ? p.base_directory : o.output);
  const auto started = std::chrono::steady_clock::now();
  Results results;
  results.adapter = empty_adapter(o, p);
  std::unique_ptr<Finishing> finishing;  // of base and adapter together: one without the other is of no use
  io::StagedFiles files;
  if (p.changed) {
    files = compute_with_base(o, p, results, finishing);
  } else {
    compute_factors(o, p, results);
    finishing = std::make_unique<Finishing>();
  }
  io::PeftAdapter& adapter = results.adapter;
  std::sort(adapter.modules.begin(), adapter.modules.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  if (!p.eva.ranks.empty()) io::describe_modules(adapter);  // ranks and alphas that differ become patterns
  const auto clock = std::chrono::steady_clock::now();
  files.append(io::stage_peft(o.output, adapter));
  files.commit();
  finishing.reset();
  results.times.write += since(clock);
  results.seconds = since(started);
  return results;
}

// ---- what is said ---------------------------------------------------------------------------------------------------

Json json_of(const ModuleReport& m) {
  const InitReport& r = m.init;
  Json j = {{"name", m.name},
            {"residual_norm", r.residual_norm},
            {"storage_error", r.storage_error},
            {"passes", r.passes},
            {"converged", r.converged},
            {"seconds", r.seconds},
            {"notes", r.notes},
            {"rank", m.rank}};
  if (r.total_energy > 0) j["captured_energy"] = r.captured_energy / r.total_energy;
  if (m.plain_error > 0) {
    j["plain_quantisation_error"] = m.plain_error;
    j["error"] = m.error;
  }
  return j;
}

Json json_of(const Options& o, const Plan& p, Index parameters) {
  return {{"command", "init"},
          {"method", o.method.method},
          {"rank", o.method.rank},
          {"alpha", o.method.alpha},
          {"rslora", o.method.rslora},
          {"applied", p.chosen.selected.size()},
          {"adaptable", p.chosen.adaptable},
          {"parameters", parameters},
          {"output", o.output},
          {"base_changed", p.changed},
          {"dry_run", o.dry_run}};
}

std::string outputs_of(const Options& o, const Plan& p) {
  return o.output + (p.changed ? " and " + p.base_directory : "") + "\n";
}

void report_plan(const Options& o, const Plan& p) {
  Json report = json_of(o, p, p.parameters), names = Json::array();
  std::string text = p.chosen.summary() + "\n";
  for (const std::size_t i : p.chosen.selected) {
    const ModuleInfo& m = p.modules.infos[i];
    names.push_back(m.name);
    text += "  " + m.name + "  " + common::shape_text(m.rows, m.cols) + "\n";
  }
  report["modules"] = std::move(names);
  for (const std::string& line : p.notes) note(o.common, line);
  print(o.common, report, text + std::to_string(p.parameters) + " parameters; would write " + outputs_of(o, p));
}

void report_results(const Options& o, const Plan& p, const Results& r) {
  const Index parameters = r.adapter.parameters();
  Json report = json_of(o, p, parameters);
  report["seconds"] = {
      {"total", r.seconds}, {"read", r.times.read}, {"compute", r.times.compute}, {"write", r.times.write}};
  report["converged"] = r.converged();
  report["modules"] = Json::array();
  for (const ModuleReport& m : r.modules) report["modules"].push_back(json_of(m));
  std::string text = p.chosen.summary() + "\n" + std::to_string(parameters) + " parameters, rank " +
                     std::to_string(o.method.rank) + ", scale " +
                     number(o.method.rslora ? rslora_scale(o.method.alpha, o.method.rank)
                                            : lora_scale(o.method.alpha, o.method.rank)) +
                     "\n";
  if (quantises(o.method.method)) {
    report["error_ratio"] = r.error_ratio();
    text += "error relative to plain quantisation: " + number(r.error_ratio()) + "\n";
  } else if (p.changed) {
    text += "least captured energy of a module: " + number(r.captured_least()) + "\n";
  }
  text += time_text(r.seconds) + ": reading " + time_text(r.times.read) + ", computing " + time_text(r.times.compute) +
          ", writing " + time_text(r.times.write) + "\n" + "wrote " + outputs_of(o, p);
  for (const std::string& line : p.notes) note(o.common, line);
  if (!r.converged()) note(o.common, "some decompositions stopped before their tolerance; see --json");
  print(o.common, report, text);
}

void run(Options& o) {
  Plan plan = make_plan(o);
  if (o.dry_run) return report_plan(o, plan);
  const Results results = compute(o, plan);
  report_results(o, plan, results);
}

void add_init(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub =
      add_command(app, "init", "Initialise an adapter (PEFT) and, where the method changes it, the base", o->common);
  o->method.alpha = 0;  // until given: the rank
  sub->add_option(
         "method", o->method.method,
         "kaiming, gaussian, orthogonal, mica; pissa, milora, olora (residual base); loftq, qpissa (quantised base); "
         "eva, corda (residual base), from activations; lora_ga (residual base), from gradients")
      ->required()
      ->check(CLI::IsMember({"kaiming", "gaussian", "orthogonal", "mica", "pissa", "milora", "olora", "loftq", "qpissa",
                             "eva", "corda", "lora_ga"}));
  sub->add_option("checkpoint", o->checkpoint, "A .safetensors file or a Hugging Face directory")->required();
  sub->add_option("-o,--output", o->output, "Directory for the adapter, and base/ below it")->required();
  sub->add_option("-r,--rank", o->method.rank, "Rank")->capture_default_str()->check(positive());
  sub->add_option("--alpha", o->method.alpha,
                  "LoRA alpha; default: the rank (a scale of 1, with --rslora of sqrt(rank))")
      ->check(positive());
  sub->add_flag("--rslora", o->method.rslora, "Scale alpha/sqrt(rank) instead of alpha/rank");
  sub->add_flag("--dora", o->dora, "Add DoRA's magnitudes: the row norms of the weights");
  o->targets.add_to(sub);
  sub->add_option("--bits", o->method.bits, "Bits of loftq and qpissa: NormalFloat for 2 to 4, uniform for 5 to 8")
      ->capture_default_str()
      ->check(between(2, 8));
  sub->add_option("--iters", o->method.iterations, "Iterations of loftq and qpissa")
      ->capture_default_str()
      ->check(positive());
  sub->add_option("--block-size", o->method.block_size, "Elements that share a scale")
      ->capture_default_str()
      ->check(CLI::Validator(check_block_size, "POWER OF TWO"));
  sub->add_flag("--double-quant", o->method.double_quantise, "Quantise the scales too");
  sub->add_option("--scale-search", o->method.scale_search,
                  "Smaller scales to try for each block, for the least squared error (16 suits 2 and 3 bits)")
      ->capture_default_str()
      ->check(between(0, 256));
  sub->add_flag("--packed", o->packed, "Keep the base as 4-bit codes, as bitsandbytes stores them");
  sub->add_option("--activations", o->activations,
                  "corda, eva: .safetensors or .npz with, for each module, its inputs as \"<module>\" (tokens x in) or "
                  "their second moments as \"<module>.covariance\" (in x in)");
  sub->add_option("--gradients", o->gradients,
                  "lora_ga: .safetensors or .npz with the gradient of each weight, in the weight's shape");
  sub->add_option("--mode", o->method.corda_mode,
                  "corda: adapt what the inputs use most (instruction) or least (knowledge)")
      ->capture_default_str()
      ->check(CLI::IsMember({"instruction", "knowledge"}));
  sub->add_option("--damping", o->method.damping, "corda: added to the covariance, relative to its mean diagonal")
      ->capture_default_str()
      ->check(not_negative());
  sub->add_option("--gamma", o->method.gamma, "lora_ga: factors are scaled by out^(1/4)/sqrt(gamma)")
      ->capture_default_str()
      ->check(positive());
  sub->add_option("--rho", o->method.rho, "eva: a module may get up to this multiple of the rank; 1 keeps ranks equal")
      ->capture_default_str()
      ->check(between(1.0, 64.0));
  sub->add_flag("--whiten", o->method.whiten, "eva: divide the rows of A by the roots of their singular values");
  sub->add_flag("--no-centre{false}", o->method.centre, "eva: do not subtract the mean of the inputs");
  sub->add_option("--seed", o->seed, "Seed of all random numbers")->capture_default_str()->check(seed());
  sub->add_option("--dtype", o->method.dtype, "Type of the stored factors")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  sub->add_flag("--fan-in-fan-out", o->fan_in_fan_out,
                "Weights are stored in x out, where config.json does not tell (GPT-2's Conv1D)");
  sub->add_flag("--dry-run", o->dry_run, "Say what would be done, write nothing");
  sub->callback([o, sub] {
    expect_used(*sub, o->method.method);
    run(*o);
  });
}

const Registration registration{20, "init", add_init};

}  // namespace
}  // namespace lowrank::tool::init_command

// SPDX-License-Identifier: Apache-2.0
// lowrank resize, combine, undo: adapters in, one adapter out, no base needed.
#include <lowrank/adapter/combine.hpp>
#include <lowrank/adapter/combine_sparse.hpp>
#include <lowrank/adapter/resize.hpp>
#include <lowrank/adapter/undo.hpp>

#include <algorithm>
#include <map>

#include "models.hpp"
#include "outputs.hpp"

namespace lowrank::tool::adapters_command {
namespace {

/// Grouped convolutions are not of the form B·A on one matrix.
void refuse_grouped(const std::string& path, const io::AdapterModule& m) {
  if (m.factors.B.cols() != m.factors.rank())
    throw IoError(path, m.name, "is a grouped convolution, which is not one product of two matrices");
}

void set_rank(io::AdapterModule& m, LoraFactors<float>&& f) {
  m.factors = std::move(f);
  if (m.kind == ModuleKind::conv) {
    m.a_shape[0] = std::uint64_t(m.factors.rank());
    m.b_shape[1] = std::uint64_t(m.factors.rank());
  }
  round_factors(m.factors, m.dtype);
}

void save(const Common& common, io::PeftAdapter& adapter, const std::string& output, bool dry_run, Json& report,
          std::string text) {
  io::describe_modules(adapter);
  report["parameters"] = adapter.parameters();
  report["output"] = output;
  report["dry_run"] = dry_run;
  throw_if_interrupted();
  if (!dry_run) {
    remove_leftovers(common, {output});
    const NewDirectories made(output);
    const Finishing finishing;
    io::write_peft(output, adapter);
  }
  text += std::to_string(adapter.modules.size()) + " modules, " + std::to_string(adapter.parameters()) +
          " parameters; " + (dry_run ? "would write " : "wrote ") + output + "\n";
  print(common, report, text);
}

double relative(double error, double norm) { return norm > 0 ? error / norm : 0; }

// ---- resize ---------------------------------------------------------------------------------------------------------

struct Resize {
  Common common;
  std::string adapter, output;
  Index rank = 0, max_rank = 0;
  double energy = 0, cumulative = 0, ratio = 0;
  bool dry_run = false;
};

void run(const Resize& o) {
  const int rules = (o.rank > 0) + (o.energy > 0) + (o.cumulative > 0) + (o.ratio > 0);
  if (rules != 1) throw UsageError("resize: give exactly one of --rank, --energy, --cumulative, --ratio");
  expect_different(o.adapter, o.output);
  expect_no_changed_base(o.output);
  io::PeftAdapter adapter = read_adapter(o.adapter);
  note_dora(o.common, o.adapter, adapter);
  ResizeOptions options;
  options.rule = o.rank > 0     ? ResizeRule::rank
                 : o.energy > 0 ? ResizeRule::energy
                 : o.ratio > 0  ? ResizeRule::ratio
                                : ResizeRule::cumulative;
  options.value = o.rank > 0 ? double(o.rank) : o.energy > 0 ? o.energy : o.ratio > 0 ? o.ratio : o.cumulative;
  options.max_rank = o.max_rank;
  Json modules = Json::array();
  double norm2 = 0, error2 = 0;
  for (io::AdapterModule& m : adapter.modules) {
    throw_if_interrupted();
    refuse_grouped(o.adapter, m);
    const Index before = m.factors.rank();
    ResizeOptions own = options;
    // α is one number in the configuration: keep it, so that the scale follows the rank.
    if (own.rule == ResizeRule::rank) own.value = std::min<double>(own.value, double(before));
    Resized<float> r = resize_adapter(m.factors, own);
    norm2 += r.norm * r.norm;
    error2 += r.error * r.error;
    const Index after = r.factors.rank();
    set_rank(m, std::move(r.factors));
    modules.push_back(
        {{"name", m.name}, {"rank", after}, {"was", before}, {"relative_error", relative(r.error, r.norm)}});
  }
  const double error = relative(std::sqrt(error2), std::sqrt(norm2));
  Json report = {{"command", "resize"}, {"relative_error", error}, {"modules", std::move(modules)}};
  save(o.common, adapter, o.output, o.dry_run, report, "relative error of the update: " + number(error) + "\n");
}

void add_resize(CLI::App& app) {
  auto o = std::make_shared<Resize>();
  CLI::App* sub = add_command(app, "resize", "Give an adapter another rank, with the least error", o->common);
  sub->add_option("adapter", o->adapter, "PEFT directory")->required();
  sub->add_option("-o,--output", o->output, "Directory to write")->required();
  sub->add_option("-r,--rank", o->rank, "This rank")->check(count());
  sub->add_option("--energy", o->energy, "Smallest rank with this share of the squared singular values")
      ->check(between(1e-9, 1.0));
  sub->add_option("--cumulative", o->cumulative, "Smallest rank with this share of the singular values")
      ->check(between(1e-9, 1.0));
  sub->add_option("--ratio", o->ratio, "Keep singular values above the largest divided by this")
      ->check(between(1.0, 1e30));
  sub->add_option("--max-rank", o->max_rank, "Never more than this")->check(count());
  sub->add_flag("--dry-run", o->dry_run, "Say what would be done, write nothing");
  sub->callback([o, sub] {
    expect_used(sub, {{"--max-rank", o->rank == 0, "with --rank", "it limits what the other rules find"}});
    run(*o);
  });
}

// ---- combine --------------------------------------------------------------------------------------------------------

struct Combine {
  Common common;
  std::vector<std::string> adapters;
  std::vector<double> weights;
  std::string output, method = "cat", space = "update", election = "total";
  Index rank = 0;
  double density = 0.2;
  std::uint64_t seed = 0;
  bool dry_run = false;
};

Combined<float> combine(const Combine& o, const std::vector<Weighted<float>>& list, std::uint64_t stream) {
  if (o.method == "cat") return combine_cat(list);
  if (o.method == "linear") return combine_linear(list);
  Index largest = 0, total = 0;
  for (const auto& item : list) {
    largest = std::max(largest, item.adapter.rank());
    total += item.adapter.rank();
  }
  const Index bound = std::min(list.front().adapter.out_features(), list.front().adapter.in_features());
  const Index rank = std::min(o.rank > 0 ? o.rank : largest, bound);
  if (o.method == "svd") return combine_svd(list, std::min(rank, total));
  SparseCombineOptions options;
  options.method = o.method == "ties"          ? SparseMethod::ties
                   : o.method == "dare_ties"   ? SparseMethod::dare_ties
                   : o.method == "dare_linear" ? SparseMethod::dare_linear
                                               : SparseMethod::magnitude_prune;
  options.density = o.density;
  options.space = o.space == "update" ? SparseSpace::update : SparseSpace::factors;
  options.election = o.election == "total" ? SignElection::total : SignElection::frequency;
  options.rank = rank;
  options.seed = CounterRng(o.seed, 1).bits(stream);
  return combine_sparse(list, options);
}

void run(const Combine& o) {
  if (!o.weights.empty() && o.weights.size() != o.adapters.size())
    throw UsageError(text("combine: ", o.adapters.size(), " adapters need as many weights, got ", o.weights.size()));
  if (!o.weights.empty() && std::all_of(o.weights.begin(), o.weights.end(), [](double w) { return w == 0; }))
    throw UsageError("combine: all weights are 0, and nothing would be left");
  expect_no_changed_base(o.output);
  std::vector<io::PeftAdapter> inputs;
  std::map<std::string, std::vector<std::size_t>> users;  // module → adapters that have it
  for (const std::string& path : o.adapters) {
    expect_different(path, o.output);
    inputs.push_back(read_adapter(path));
    const io::PeftAdapter& a = inputs.back();
    if (a.config.use_dora) throw IoError(path, "uses DoRA: its magnitudes cannot be added; merge it instead");
    if (!a.saved.empty())
      throw IoError(path, a.saved[0].spec.name, "is a whole tensor saved with the adapter, which cannot be combined");
    if (a.changed_base)  // a sum, or a multiple, of what was taken out of the base is not what has to be put back
      throw IoError(path, "stands on " + changed_base_phrase(*a.changed_base) + ", of which there is only one; " +
                              (a.changed_base->kind == "residual" ? "`undo` it first" : "merge it instead"));
    if (a.config.fan_in_fan_out != inputs.front().config.fan_in_fan_out)
      throw IoError(path, "differs from the others in fan_in_fan_out");
    for (const io::AdapterModule& m : a.modules) {
      refuse_grouped(path, m);
      if (!m.bias.empty()) throw IoError(path, m.name, "has a bias on lora_B, which cannot be combined");
      users[m.name].push_back(inputs.size() - 1);
    }
  }
  io::PeftAdapter out;
  out.config = inputs.front().config;
  out.config.use_rslora = false;
  Json modules = Json::array();
  double norm2 = 0, distance2 = 0;
  for (const auto& [name, indices] : users) {
    throw_if_interrupted();
    std::vector<Weighted<float>> list;
    const io::AdapterModule& first = *inputs[indices.front()].find(name);
    for (const std::size_t i : indices) {
      const io::AdapterModule& m = *inputs[i].find(name);
      if (m.kind != first.kind || m.factors.out_features() != first.factors.out_features() ||
          m.factors.in_features() != first.factors.in_features())
        throw IoError(o.adapters[i], name,
                      "differs in kind or shape from the same module of " + o.adapters[indices.front()]);
      list.push_back({m.factors, o.weights.empty() ? 1.0 : o.weights[i]});
    }
    Combined<float> c = combine(o, list, module_stream(name));
    norm2 += c.sum_norm * c.sum_norm;
    distance2 += c.distance * c.distance;
    modules.push_back({{"name", name},
                       {"rank", c.factors.rank()},
                       {"adapters", indices.size()},
                       {"relative_distance", relative(c.distance, c.sum_norm)},
                       {"notes", c.notes}});
    io::AdapterModule m;
    m.name = name;
    m.kind = first.kind;
    m.a_shape = first.a_shape;
    m.b_shape = first.b_shape;
    m.dtype = first.dtype;
    set_rank(m, std::move(c.factors));
    out.modules.push_back(std::move(m));
  }
  out.config.target_expression.clear();
  out.config.target_modules = io::module_suffixes(out);
  out.config.exclude_modules.clear();  // what one of the inputs left out, another may have brought
  out.config.exclude_expression.clear();
  out.config.layers_to_transform.clear();
  out.config.layers_pattern.clear();
  const double distance = relative(std::sqrt(distance2), std::sqrt(norm2));
  Json report = {
      {"command", "combine"}, {"method", o.method}, {"relative_distance", distance}, {"modules", std::move(modules)}};
  save(o.common, out, o.output, o.dry_run, report,
       o.method + ": distance to the exact weighted sum, relative: " + number(distance) + "\n");
}

void add_combine(CLI::App& app) {
  auto o = std::make_shared<Combine>();
  CLI::App* sub = add_command(app, "combine", "One adapter out of several, weighted", o->common);
  sub->add_option("adapters", o->adapters, "PEFT directories")->required();
  sub->add_option("-o,--output", o->output, "Directory to write")->required();
  sub->add_option("--weights", o->weights, "One weight an adapter, separated by commas; default 1 each")
      ->delimiter(',')
      ->check(finite_number());
  sub->add_option("--method", o->method,
                  "cat is the exact sum; svd the best of --rank; linear has cross terms; the others are sparse")
      ->capture_default_str()
      ->check(CLI::IsMember({"cat", "svd", "linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"}));
  sub->add_option("-r,--rank", o->rank,
                  "Rank of the result (svd and the sparse methods); default: the largest of the inputs")
      ->check(count());
  sub->add_option("--density", o->density, "Share of entries the sparse methods keep")
      ->capture_default_str()
      ->check(between(1e-9, 1.0));
  sub->add_option("--space", o->space, "Where the sparse methods drop entries")
      ->capture_default_str()
      ->check(CLI::IsMember({"update", "factors"}));
  sub->add_option("--election", o->election, "How TIES elects signs")
      ->capture_default_str()
      ->check(CLI::IsMember({"total", "frequency"}));
  sub->add_option("--seed", o->seed, "Seed of DARE")->capture_default_str()->check(seed());
  sub->add_flag("--dry-run", o->dry_run, "Say what would be done, write nothing");
  sub->callback([o, sub] {
    const bool svd = o->method == "svd", dare = o->method.starts_with("dare_"), ties = o->method.ends_with("ties");
    const bool sparse = dare || ties || o->method == "magnitude_prune", factors = sparse && o->space == "factors";
    const std::string with = "with --method " + o->method;
    expect_used(sub, {{"--rank", svd || sparse, with, "it is for svd and the sparse methods"},
                      {"--rank", !factors, "with --space factors", "the rank is the adapters' own"},
                      {"--density", sparse, with, "it is for ties, dare_ties, dare_linear and magnitude_prune"},
                      {"--space", sparse, with, "it is for ties, dare_ties, dare_linear and magnitude_prune"},
                      {"--election", ties, with, "it is for ties and dare_ties"},
                      {"--seed", dare, with, "it is for dare_ties and dare_linear"}});
    run(*o);
  });
}

// ---- undo -----------------------------------------------------------------------------------------------------------

struct Undo {
  Common common;
  std::string adapter, initial, output, base;
  Index rank = 0;
  bool dry_run = false;
};

void run(const Undo& o) {
  expect_different(o.adapter, o.output);
  expect_different(o.initial, o.output);
  expect_no_changed_base(o.output);
  io::PeftAdapter trained = read_adapter(o.adapter);
  const io::PeftAdapter initial = read_adapter(o.initial);
  const std::optional<io::ChangedBase>& mark = initial.changed_base;
  if (mark && mark->kind == "quantized")
    throw IoError(o.initial,
                  "stands on a quantised base, which is not W - s*B*A: an adapter for W cannot be derived from it");
  if (mark && trained.changed_base && !mark->weights.empty() && !trained.changed_base->weights.empty() &&
      mark->weights != trained.changed_base->weights)
    throw IoError(o.adapter, "stands on another changed base than " + o.initial);
  if (!mark && !trained.changed_base)
    note(o.common, "neither adapter says that its base was changed: the result is right only if it was W - s*B*A of " +
                       o.initial);
  if (trained.config.use_dora)
    throw IoError(o.adapter, "uses DoRA: its update is not a difference of products; merge it instead");
  Json modules = Json::array();
  double norm2 = 0, distance2 = 0;
  for (io::AdapterModule& m : trained.modules) {
    throw_if_interrupted();
    refuse_grouped(o.adapter, m);
    const io::AdapterModule* start = initial.find(m.name);
    if (start == nullptr)
      throw IoError(o.initial, m.name, "is missing: it must hold the factors training started from");
    const Index bound =
        std::min({m.factors.rank() + start->factors.rank(), m.factors.out_features(), m.factors.in_features()});
    const Index rank = o.rank == 0 ? bound : std::min(o.rank, bound);
    Combined<float> c = undo_residual(m.factors, start->factors, rank);
    norm2 += c.sum_norm * c.sum_norm;
    distance2 += c.distance * c.distance;
    modules.push_back({{"name", m.name}, {"rank", rank}, {"relative_error", relative(c.distance, c.sum_norm)}});
    set_rank(m, std::move(c.factors));
  }
  for (const io::AdapterModule& m : initial.modules)
    if (trained.find(m.name) == nullptr) throw IoError(o.adapter, m.name, "is missing: its base was changed too");
  trained.config.use_rslora = false;
  trained.config.init_lora_weights = "true";
  trained.config.base_model_name_or_path = !o.base.empty() ? base_name(o.base) : mark ? mark->original : "";
  trained.changed_base.reset();
  trained.metadata.erase(io::method_metadata_key);
  const double error = relative(std::sqrt(distance2), std::sqrt(norm2));
  Json report = {{"command", "undo"}, {"relative_error", error}, {"modules", std::move(modules)}};
  save(o.common, trained, o.output, o.dry_run, report,
       "relative error of the update on the original base: " + number(error) + "\n");
}

void add_undo(CLI::App& app) {
  auto o = std::make_shared<Undo>();
  CLI::App* sub = add_command(
      app, "undo", "Turn an adapter of a residual base (PiSSA, ...) into one of the original base", o->common);
  sub->add_option("adapter", o->adapter, "PEFT directory, after training")->required();
  sub->add_option("--initial", o->initial, "PEFT directory as `init` wrote it, before training")->required();
  sub->add_option("-o,--output", o->output, "Directory to write")->required();
  sub->add_option("-r,--rank", o->rank, "Rank of the result; default: twice the rank, which is exact")->check(count());
  sub->add_option("--base-model", o->base, "Name of the original base for the configuration");
  sub->add_flag("--dry-run", o->dry_run, "Say what would be done, write nothing");
  sub->callback([o] { run(*o); });
}

const Registration resize{40, "resize", add_resize};
const Registration combine_registration{50, "combine", add_combine};
const Registration undo{55, "undo", add_undo};

}  // namespace
}  // namespace lowrank::tool::adapters_command

// SPDX-License-Identifier: Apache-2.0
// lowrank extract: an adapter out of a full fine-tune.
#include <algorithm>
#include <lowrank/adapter/extract.hpp>
#include <lowrank/init/rank_choice.hpp>
#include <lowrank/spectrum/rounding.hpp>

#include <set>

#include "models.hpp"
#include "outputs.hpp"

namespace lowrank::tool::extract_command {
namespace {

struct Options {
  Common common;
  std::string base, tuned, output, dtype = "f32";
  TargetArguments targets;
  Index rank = 0, max_rank = 256;
  double energy = 0;
  bool noise_floor = false, fan_in_fan_out = false, dry_run = false;
  std::uint64_t seed = 0;
};

/// The edge of the rounding noise of a difference of two stored weights.
double rounding_edge(const io::TensorView& a, const io::TensorView& b) {
  const bool bf = a.dtype() == io::Dtype::BF16 || b.dtype() == io::Dtype::BF16;
  const bool half = a.dtype() == io::Dtype::F16 || b.dtype() == io::Dtype::F16;
  if (!bf && !half) b.fail("and its base are stored wide; --noise-floor reads the rounding of bf16 or f16");
  const bool both = a.dtype() == b.dtype();
  const Matrix<float> W = b.to_matrix<float>();
  const MatrixView<const float> view = W.view();
  return bf ? rounding_noise<bf16>(view, both).edge : rounding_noise<f16>(view, both).edge;
}

/// The leading triplets of the difference, as the weights are stored.
/// **Throws** IoError naming the tensor, and the element where it is not finite.
Extracted<float> extracted(const io::TensorView& tuned, const io::TensorView& base, Index rank, std::uint64_t seed) {
  ExtractOptions e{.rank = rank};
  e.svd.seed = seed;
  try {
    if (tuned.dtype() == io::Dtype::BF16 && base.dtype() == io::Dtype::BF16) {
      const Matrix<bf16> W1 = tuned.folded<bf16>(), W0 = base.folded<bf16>();
      return extract_adapter(W1.view(), W0.view(), e);
    }
    const Matrix<float> W1 = tuned.to_matrix<float>(), W0 = base.to_matrix<float>();
    return extract_adapter(W1.view(), W0.view(), e);
  } catch (const IoError&) {
    throw;
  } catch (const Error& error) {
    expect_finite_weight(base);
    expect_finite_weight(tuned);
    tuned.fail(error.what());
  }
}

/// The leading `rank` triplets only.
void cut(LoraFactors<float>& f, Index rank) {
  f.A = Matrix<float>(f.A.view().middle_rows(0, rank));
  f.B = Matrix<float>(f.B.view().middle_cols(0, rank));
}

/// What the options leave to do, checked before anything is computed.
struct Plan {
  io::Checkpoint base, tuned;
  Modules modules;
  TargetSelection chosen;

  explicit Plan(const Options& o) : base(checkpoint_path(o.base)), tuned(checkpoint_path(o.tuned)), modules(base) {}
};

Plan make_plan(const Options& o) {
  expect_different(o.base, o.output);
  expect_different(o.tuned, o.output);
  expect_no_changed_base(o.output);
  Plan p(o);
  p.modules.settle_orientation(o.fan_in_fan_out);
  p.chosen = o.targets.select(p.modules);
  for (const std::size_t i : p.chosen.selected) {
    const io::TensorView& w = p.modules.weights[i];
    const ModuleInfo& m = p.modules.infos[i];
    if (m.kind != ModuleKind::linear)
      w.fail("is no linear layer; extract leaves embeddings and convolutions out (--exclude)");
    const auto t = p.tuned.find(w.name());
    if (!t) throw IoError(o.tuned, w.name(), "is missing");
    if (t->shape() != w.shape())
      throw IoError(o.tuned, w.name(),
                    "has shape " + io::shape_text(t->shape()) + ", the base has " + io::shape_text(w.shape()));
    // Eight bits need the scale that is kept elsewhere.
    for (const io::TensorView& stored : {w, *t})
      with_stored_type(stored, "; extract takes F32, F64, BF16 and F16", [](auto) {});
    if (m.role == ModuleRole::router && o.rank > m.rows)
      w.fail(common::text("is a router of ", m.rows, " experts, too few for rank ", o.rank));
    if (o.rank > std::min(w.rows(), w.cols())) w.fail(common::text("is too small for rank ", o.rank));
  }
  return p;
}

/// What became of a targeted module.
enum class Verdict {
  adapted,
  unchanged,        ///< not a bit differs
  within_rounding,  ///< it differs by no more than the rounding of its type
};

struct ModuleReport {
  std::string name;
  Verdict verdict = Verdict::unchanged;
  RankChoice choice = {};
  double norm = 0, lost = 0;  ///< of the update; of what the rank leaves out
  double sigma_1 = 0, noise_edge = 0;
  Index passes = 0;
  bool converged = true;
};

struct Results {
  io::PeftAdapter adapter;
  std::vector<ModuleReport> modules;    ///< one for each that was targeted
  std::size_t differing_elsewhere = 0;  ///< tensors outside the targets

  [[nodiscard]] std::size_t count(Verdict v) const {
    return std::size_t(
        std::count_if(modules.begin(), modules.end(), [&](const ModuleReport& m) { return m.verdict == v; }));
  }
  /// Of the update over all modules.
  [[nodiscard]] double relative_error() const {
    double norm2 = 0, lost2 = 0;
    for (const ModuleReport& m : modules) {
      norm2 += m.norm * m.norm;
      lost2 += m.lost * m.lost;
    }
    return norm2 > 0 ? std::sqrt(lost2 / norm2) : 0;
  }
};

/// One module whose weight differs: the rank that was asked for, tried in doubling steps, and its factors.
ModuleReport compute_module(const Options& o, const ModuleInfo& info, const io::TensorView& w, const io::TensorView& t,
                            io::PeftAdapter& adapter) {
  const Index full = std::min(w.rows(), w.cols()), cap = std::min(o.max_rank, full);
  ModuleReport r{.name = info.name};
  r.noise_edge = o.noise_floor ? rounding_edge(t, w) : 0;
  Extracted<float> e;
  for (Index tried = o.rank > 0 ? o.rank : std::min<Index>(16, cap);; tried = std::min(2 * tried, cap)) {
    throw_if_interrupted();
    e = extracted(t, w, tried, CounterRng(o.seed, 2).bits(module_stream(info.name)));
    const std::span<const float> sigma(e.sigma);
    r.choice = o.rank > 0     ? RankChoice{.rank = o.rank}
               : o.energy > 0 ? rank_for_energy(sigma, o.energy, e.norm * e.norm)
                              : rank_for_spectral_error(sigma, r.noise_edge, full);
    if (r.choice.reached || tried == cap) break;
  }
  double captured = 0;
  for (Index k = 0; k < r.choice.rank; ++k) captured += std::pow(double(e.sigma[std::size_t(k)]), 2);
  r.norm = e.norm;
  r.lost = std::sqrt(std::max(0.0, e.norm * e.norm - captured));
  r.sigma_1 = e.sigma.empty() ? 0 : double(e.sigma[0]);
  r.passes = e.passes;
  r.converged = e.converged;
  r.verdict = r.choice.rank > 0 ? Verdict::adapted : Verdict::within_rounding;
  if (r.verdict != Verdict::adapted) return r;
  if (r.choice.rank < e.factors.rank()) cut(e.factors, r.choice.rank);
  io::AdapterModule m;
  m.name = info.name;
  m.factors = std::move(e.factors);
  if (info.in_by_out) {  // what was decomposed is the transpose of the update: (B·A)ᵀ = Aᵀ·Bᵀ
    Matrix<float> A(m.factors.B.view().transposed());
    m.factors.B = Matrix<float>(m.factors.A.view().transposed());
    m.factors.A = std::move(A);
  }
  m.dtype = factor_dtype(o.dtype);
  round_factors(m.factors, m.dtype);
  adapter.modules.push_back(std::move(m));
  return r;
}

/// What an adapter cannot carry: differences outside the targets.
std::size_t count_elsewhere(const Plan& p) {
  std::set<std::string> targeted;
  for (const std::size_t i : p.chosen.selected) targeted.insert(p.modules.weights[i].name());
  std::size_t differing = 0;
  p.base.for_each([&](const io::TensorView& w) {
    throw_if_interrupted();
    if (targeted.contains(w.name())) return;
    const auto t = p.tuned.find(w.name());
    differing += !t || !same_bytes(*t, w);
  });
  return differing;
}

Results compute(const Options& o, const Plan& p) {
  Results results;
  io::PeftAdapter& adapter = results.adapter;
  std::vector<std::size_t> kept;
  std::uint64_t total = 0;
  for (const std::size_t i : p.chosen.selected) total += p.modules.weights[i].bytes().size();
  {
    Progress progress(o.common, "extract", p.chosen.selected.size(), "matrices", total);
    for (const std::size_t i : p.chosen.selected) {
      throw_if_interrupted();
      const io::TensorView& w = p.modules.weights[i];
      const io::TensorView t = p.tuned[w.name()];
      const ModuleInfo& info = p.modules.infos[i];
      results.modules.push_back(same_bytes(t, w) ? ModuleReport{.name = info.name}
                                                 : compute_module(o, info, w, t, adapter));
      if (results.modules.back().verdict == Verdict::adapted) kept.push_back(i);
      progress.advance(w.bytes().size(), w.name());
    }
  }
  results.differing_elsewhere = count_elsewhere(p);
  if (kept.empty())
    throw IoError(o.tuned, results.count(Verdict::unchanged) == results.modules.size()
                               ? "equals the base in every targeted module"
                               : "differs from the base by no more than rounding");
  adapter.config.task_type = p.modules.task_type();
  adapter.config.base_model_name_or_path = absolute_path(o.base);
  adapter.config.fan_in_fan_out = p.modules.need_fan_in_fan_out(kept);
  adapter.config.target_modules = target_list(p.modules, kept);
  std::sort(adapter.modules.begin(), adapter.modules.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  io::describe_modules(adapter);
  if (!o.dry_run) {
    throw_if_interrupted();
    remove_leftovers(o.common, {o.output});
    const NewDirectories made(o.output);
    const Finishing finishing;
    io::write_peft(o.output, adapter);
  }
  return results;
}

void report(const Options& o, const Plan& p, const Results& r) {
  Json modules = Json::array();
  std::size_t short_of = 0;
  for (const ModuleReport& m : r.modules) {
    if (m.verdict == Verdict::unchanged) continue;
    short_of += !m.choice.reached;
    modules.push_back({{"name", m.name},
                       {"rank", m.choice.rank},
                       {"reached", m.choice.reached},
                       {"norm", m.norm},
                       {"relative_error", m.norm > 0 ? m.lost / m.norm : 0.0},
                       {"sigma_1", m.sigma_1},
                       {"noise_edge", m.noise_edge},
                       {"passes", m.passes},
                       {"converged", m.converged}});
  }
  if (const std::string line = p.modules.family_note(p.chosen.selected); !line.empty()) note(o.common, line);
  if (short_of > 0)
    note(o.common, common::text(short_of, " modules did not reach what was asked within rank ", o.max_rank,
                                "; --max-rank allows more"));
  if (r.differing_elsewhere > 0)
    note(o.common, common::text(r.differing_elsewhere,
                                " tensors outside the targets differ too; the adapter does not carry that"));
  const Json report = {{"command", "extract"},
                       {"applied", r.adapter.modules.size()},
                       {"targeted", p.chosen.selected.size()},
                       {"unchanged", r.count(Verdict::unchanged)},
                       {"differing_elsewhere", r.differing_elsewhere},
                       {"relative_error", r.relative_error()},
                       {"parameters", r.adapter.parameters()},
                       {"output", o.output},
                       {"dry_run", o.dry_run},
                       {"modules", std::move(modules)}};
  print(o.common, report,
        common::text(r.adapter.modules.size(), " of ", p.chosen.selected.size(), " targeted modules got an adapter, ",
                     r.count(Verdict::unchanged),
                     " unchanged\nrelative error of the update: ", number(r.relative_error()), "\n",
                     r.adapter.parameters(), " parameters; ", o.dry_run ? "would write " : "wrote ", o.output, "\n"));
}

/// **Throws** UsageError unless exactly one rule chooses the ranks, and for what has no use with it.
void expect_one_rule(const CLI::App& sub) {
  std::string given;
  int count = 0;
  for (const char* rule : {"--rank", "--energy", "--noise-floor"})
    if (sub.get_option(rule)->count() > 0) given += (count++ == 0 ? "" : " and ") + std::string(rule);
  if (count != 1)
    throw UsageError("extract: give exactly one of --rank, --energy, --noise-floor" +
                     (count == 0 ? std::string() : ", got " + given));
  if (given == "--rank" && sub.get_option("--max-rank")->count() > 0)
    throw UsageError("extract: --rank has no use for --max-rank, which belongs to --energy and --noise-floor");
}

void run(const Options& o) {
  const Plan plan = make_plan(o);
  const Results results = compute(o, plan);
  report(o, plan, results);
}

void add_extract(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = add_command(app, "extract", "The best adapter for what a full fine-tune changed", o->common);
  sub->add_option("base", o->base, "A .safetensors file or a Hugging Face directory")->required();
  sub->add_option("tuned", o->tuned, "The same model after fine-tuning")->required();
  sub->add_option("-o,--output", o->output, "Directory to write")->required();
  sub->add_option("-r,--rank", o->rank, "This rank everywhere")->check(positive());
  sub->add_option("--energy", o->energy, "Smallest rank with this share of the squared singular values")
      ->check(between(1e-9, 1.0));
  sub->add_flag("--noise-floor", o->noise_floor, "Every singular value above the rounding noise of the stored type");
  sub->add_option("--max-rank", o->max_rank, "Limit for --energy and --noise-floor")
      ->capture_default_str()
      ->check(positive());
  o->targets.add_to(sub);
  sub->add_option("--seed", o->seed, "Seed of the SVD's start")->capture_default_str()->check(seed());
  sub->add_option("--dtype", o->dtype, "Type of the stored factors")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  sub->add_flag("--dry-run", o->dry_run, "Say what would be done, write nothing");
  sub->add_flag("--fan-in-fan-out", o->fan_in_fan_out,
                "Weights are stored in x out, where config.json does not tell (GPT-2's Conv1D)");
  sub->callback([o, sub] {
    expect_one_rule(*sub);
    run(*o);
  });
}

const Registration registration{30, "extract", add_extract};

}  // namespace
}  // namespace lowrank::tool::extract_command

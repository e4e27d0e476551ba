// SPDX-License-Identifier: Apache-2.0
// lowrank extract: an adapter out of a full fine-tune.
#include <algorithm>
#include <lowrank/adapter/extract.hpp>
#include <lowrank/init/rank_choice.hpp>
#include <lowrank/spectrum/rounding.hpp>

#include <cstring>

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
  bool noise_floor = false, dry_run = false;
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

Extracted<float> extracted(const io::TensorView& tuned, const io::TensorView& base, Index rank, std::uint64_t seed) {
  ExtractOptions e{.rank = rank};
  e.svd.seed = seed;
  if (tuned.dtype() == io::Dtype::BF16 && base.dtype() == io::Dtype::BF16)
    return with_weight(tuned, [&]<class S1>(MatrixView<const S1> W1) {
      return with_weight(base, [&]<class S0>(MatrixView<const S0> W0) -> Extracted<float> {
        if constexpr (std::is_same_v<S1, bf16> && std::is_same_v<S0, bf16>)
          return extract_adapter(W1, W0, e);
        else
          throw ArgumentError("lowrank extract: unreachable, both are bf16");
      });
    });
  return extract_adapter(tuned.to_matrix<float>().view(), base.to_matrix<float>().view(), e);
}

/// The leading `rank` triplets only.
void cut(LoraFactors<float>& f, Index rank) {
  f.A = Matrix<float>(f.A.view().middle_rows(0, rank));
  f.B = Matrix<float>(f.B.view().middle_cols(0, rank));
}

void run(const Options& o) {
  if ((o.rank > 0) + (o.energy > 0) + o.noise_floor != 1)
    throw UsageError("extract: give exactly one of --rank, --energy, --noise-floor");
  expect_different(o.base, o.output);
  expect_different(o.tuned, o.output);
  expect_no_changed_base(o.output);
  const io::Checkpoint base(checkpoint_path(o.base)), tuned(checkpoint_path(o.tuned));
  const Modules modules(base);
  const TargetSelection chosen = o.targets.select(modules);
  std::vector<bool> selected(modules.infos.size());
  for (const std::size_t i : chosen.selected) {
    selected[i] = true;
    const io::TensorView& w = modules.weights[i];
    if (modules.infos[i].kind != ModuleKind::linear)
      w.fail("is no linear layer; extract leaves embeddings and convolutions out (--exclude)");
    const auto t = tuned.find(w.name());
    if (!t) throw IoError(o.tuned, w.name(), "is missing");
    if (t->shape() != w.shape())
      throw IoError(o.tuned, w.name(),
                    "has shape " + io::shape_text(t->shape()) + ", the base has " + io::shape_text(w.shape()));
    // Eight bits need the scale that is kept elsewhere.
    for (const io::TensorView& stored : {w, *t})
      with_stored_type(stored, "; extract takes F32, F64, BF16 and F16", [](auto) {});
  }
  io::PeftAdapter adapter;
  adapter.config.task_type = "CAUSAL_LM";
  adapter.config.base_model_name_or_path = absolute_path(o.base);
  Json reports = Json::array();
  std::vector<std::size_t> kept;
  double norm2 = 0, error2 = 0;
  std::size_t unchanged = 0;
  std::uint64_t total = 0;
  for (const std::size_t i : chosen.selected) total += modules.weights[i].bytes().size();
  {
    Progress progress(o.common, "extract", chosen.selected.size(), "matrices", total);
    for (const std::size_t i : chosen.selected) {
      throw_if_interrupted();
      const io::TensorView& w = modules.weights[i];
      const io::TensorView t = tuned[w.name()];
      const auto done = [&] {
        progress.advance(w.bytes().size(), w.name());
        w.drop();
        t.drop();
      };
      if (t.dtype() == w.dtype() && std::memcmp(t.bytes().data(), w.bytes().data(), w.bytes().size()) == 0) {
        ++unchanged;
        done();
        continue;
      }
      const Index full = std::min(w.rows(), w.cols()), cap = std::min(o.max_rank, full);
      if (o.rank > full) w.fail(lowrank::detail::text("is too small for rank ", o.rank));
      const double edge = o.noise_floor ? rounding_edge(t, w) : 0;
      Index tried = o.rank > 0 ? o.rank : std::min<Index>(16, cap);
      Extracted<float> e;
      RankChoice choice;
      for (;; tried = std::min(2 * tried, cap)) {
        throw_if_interrupted();
        e = extracted(t, w, tried, CounterRng(o.seed, 2).bits(module_stream(modules.infos[i].name)));
        const std::span<const float> sigma(e.sigma);
        choice = o.rank > 0     ? RankChoice{.rank = o.rank}
                 : o.energy > 0 ? rank_for_energy(sigma, o.energy, e.norm * e.norm)
                                : rank_for_spectral_error(sigma, edge, full);
        if (choice.reached || tried == cap) break;
      }
      double captured = 0;
      for (Index k = 0; k < choice.rank; ++k) captured += std::pow(double(e.sigma[std::size_t(k)]), 2);
      const double lost2 = std::max(0.0, e.norm * e.norm - captured);
      norm2 += e.norm * e.norm;
      error2 += lost2;
      reports.push_back({{"name", modules.infos[i].name},
                         {"rank", choice.rank},
                         {"reached", choice.reached},
                         {"norm", e.norm},
                         {"relative_error", e.norm > 0 ? std::sqrt(lost2) / e.norm : 0.0},
                         {"sigma_1", e.sigma.empty() ? 0.F : e.sigma[0]},
                         {"noise_edge", edge},
                         {"passes", e.passes},
                         {"converged", e.converged}});
      if (choice.rank > 0) {
        if (choice.rank < e.factors.rank()) cut(e.factors, choice.rank);
        io::AdapterModule m;
        m.name = modules.infos[i].name;
        m.factors = std::move(e.factors);
        m.dtype = factor_dtype(o.dtype);
        round_factors(m.factors, m.dtype);
        adapter.modules.push_back(std::move(m));
        kept.push_back(i);
      }
      done();
    }
  }
  // What an adapter cannot carry: differences elsewhere.
  std::size_t elsewhere = 0;
  base.for_each([&](const io::TensorView& w) {
    throw_if_interrupted();
    const auto suffix = std::string_view(".weight").size();
    const auto at = w.name().ends_with(".weight")
                        ? modules.find(std::string_view(w.name()).substr(0, w.name().size() - suffix))
                        : std::nullopt;
    if (at && selected[*at]) return;
    const auto t = tuned.find(w.name());
    elsewhere += !t || t->dtype() != w.dtype() || t->shape() != w.shape() ||
                 std::memcmp(t->bytes().data(), w.bytes().data(), w.bytes().size()) != 0;
    w.drop();
    if (t) t->drop();
  });
  if (adapter.modules.empty())
    throw IoError(o.tuned, unchanged == chosen.selected.size() ? "equals the base in every targeted module"
                                                               : "differs from the base by no more than rounding");
  adapter.config.target_modules = target_list(modules, kept);
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
  const auto short_of = std::count_if(reports.begin(), reports.end(), [](const Json& r) { return !r["reached"]; });
  if (short_of > 0)
    note(o.common, lowrank::detail::text(short_of, " modules did not reach what was asked within rank ", o.max_rank,
                                         "; --max-rank allows more"));
  if (elsewhere > 0)
    note(o.common,
         lowrank::detail::text(elsewhere, " tensors outside the targets differ too; the adapter does not carry that"));
  const double error = norm2 > 0 ? std::sqrt(error2 / norm2) : 0;
  const Json report = {{"command", "extract"},
                       {"applied", adapter.modules.size()},
                       {"targeted", chosen.selected.size()},
                       {"unchanged", unchanged},
                       {"differing_elsewhere", elsewhere},
                       {"relative_error", error},
                       {"parameters", adapter.parameters()},
                       {"output", o.output},
                       {"dry_run", o.dry_run},
                       {"modules", std::move(reports)}};
  print(o.common, report,
        lowrank::detail::text(adapter.modules.size(), " of ", chosen.selected.size(),
                              " targeted modules got an adapter, ", unchanged, " unchanged\n") +
            "relative error of the update: " + number(error) + "\n" + std::to_string(adapter.parameters()) +
            " parameters; " + (o.dry_run ? "would write " : "wrote ") + o.output + "\n");
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
  sub->callback([o] { run(*o); });
}

const Registration registration{30, "extract", add_extract};

}  // namespace
}  // namespace lowrank::tool::extract_command

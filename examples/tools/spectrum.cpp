// SPDX-License-Identifier: Apache-2.0
// lowrank spectrum: rank metrics of every matrix of a checkpoint, of its difference to a base, or of an adapter.
#include <cstdio>
#include <limits>
#include <optional>

#include "report_values.hpp"
#include "spectrum_entries.hpp"

namespace lowrank::tool::spectrum_command {
namespace {

struct Options {
  ScanOptions scan;
  std::string checkpoint, base, adapter, filter;
  SpectrumOptions spectrum;
};

std::string table_text(const ScanResult& r) {
  std::string text = "    r90   noise  ratio    eff  stable        ‖·‖₂        ‖·‖_F  matrix\n";
  for (const Json& j : r.matrices) {
    const auto add = [&](const char* format, int width, const char* section, const char* key) {
      const double x = number_at(j, section, key);
      char cell[48];
      if (std::isfinite(x))
        std::snprintf(cell, sizeof cell, format, width, x);
      else
        std::snprintf(cell, sizeof cell, "%*s", width, "-");  // the bounds leave it open: see the JSON report
      text += cell;
      text += ' ';
    };
    add("%*.0f", 7, "metrics", "energy_rank_90");
    add("%*.0f", 7, "noise", "energy_rank_90");
    add("%*.3f", 6, "ratio", "energy_rank_90");
    add("%*.1f", 6, "metrics", "effective_rank");
    add("%*.2f", 7, "metrics", "stable_rank");
    add("%*.4g", 11, "metrics", "spectral_norm");
    add("%*.4g", 12, "metrics", "frobenius_norm");
    text += " " + j["name"].get<std::string>();
    if (j.contains("verdict") && j["verdict"] != "signal") text += "  (" + j["verdict"].get<std::string>() + ")";
    text += "\n";
  }
  return text;
}

/// Flops of one matrix, in what unit so ever: to share out and to order.
double cost(Index m, Index n, const SpectrumOptions& o) {
  const double small = double(std::min(m, n)), big = double(std::max(m, n)), top = double(o.top);
  const double one =
      o.top > 0 && top < small ? big * small * top * 20 : big * small * small + 3 * small * small * small;
  return one * (o.side_by_side ? 3 : 1) + 40 * big * small * double(o.alignment);
}

// ---- plan -----------------------------------------------------------------------------------------------------------

/// The inputs, and what is to be done with them. Jobs refer to it: it stays where it is.
struct Plan : ScanPlan {
  io::Checkpoint checkpoint;
  std::optional<io::Checkpoint> base;
  std::optional<io::PeftAdapter> adapter;
  std::vector<MatrixTensor> all, base_list;

  explicit Plan(const Options& o) : checkpoint(checkpoint_path(o.checkpoint)) {}
};

void plan_weights(const Options& o, Plan& p) {
  for (const auto& w : p.all)
    if (selected(w.name, o.filter))
      p.jobs.push_back(
          {w.name, w.bytes(), cost(w.rows, w.cols, o.spectrum), [&o, &w] { return weight_entry(w, o.spectrum); }});
}

void plan_differences(const Options& o, Plan& p) {
  p.base.emplace(checkpoint_path(o.base));
  std::vector<Skipped> same_again;  // what both hold is skipped once
  p.base_list = matrices_of(*p.base, same_again);
  for (const MatrixPair& pair : pairs_of(p.all, p.base_list, "the base", o.filter, p.skipped))
    p.jobs.push_back({pair.first->name, pair.bytes(), cost(pair.first->rows, pair.first->cols, o.spectrum),
                      [&o, pair] { return difference_entry(pair, o.spectrum); }});
}

void plan_updates(const Options& o, Plan& p) {
  p.adapter.emplace(io::read_peft(o.adapter));
  note_dora(o.scan.common, o.adapter, *p.adapter);
  p.names = names_of(p.adapter->modules);
  for (const ModulePair& pair : pairs_of(*p.adapter, p.all, o.filter, p.skipped)) {
    const auto& f = pair.module->factors;
    const Index m = f.out_features(), n = f.in_features();
    const bool dense = o.spectrum.side_by_side || o.spectrum.alignment > 0;
    p.jobs.push_back({pair.module->name, pair.weight->bytes() + 1,
                      double(m + n) * double(f.rank()) * double(f.rank()) + (dense ? cost(m, n, o.spectrum) : 0),
                      [&o, pair] { return adapter_entry(pair, o.spectrum); }});
  }
}

void make_plan(const Options& o, Plan& p) {
  p.all = matrices_of(p.checkpoint, p.skipped);
  p.names = names_of(p.all);
  if (!o.base.empty())
    plan_differences(o, p);
  else if (!o.adapter.empty())
    plan_updates(o, p);
  else
    plan_weights(o, p);
  p.fingerprint = fingerprint({o.checkpoint, o.base, o.adapter},
                              text("spectrum top ", o.spectrum.top, " alignment ", o.spectrum.alignment,
                                   o.spectrum.values ? " values" : "", o.spectrum.side_by_side ? " sides" : "",
                                   o.base.empty() ? "" : " base", o.adapter.empty() ? "" : " adapter"));
  expect_something(o.adapter.empty() ? o.checkpoint : o.adapter, o.filter, p);
  note_quantised(o.scan.common, {&p.all, &p.base_list});
}

void run(const Options& o) {
  o.scan.check({o.checkpoint, o.base, o.adapter});
  Plan plan(o);
  make_plan(o, plan);
  ScanResult result = run_scan(o.scan, "spectrum", plan);
  const std::string table = table_text(result);
  finish_scan(o.scan, std::move(result),
              {{"command", "spectrum"},
               {"checkpoint", o.checkpoint},
               {"base", o.base.empty() ? Json(nullptr) : Json(o.base)},
               {"adapter", o.adapter.empty() ? Json(nullptr) : Json(o.adapter)},
               {"top", o.spectrum.top},
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
  sub->add_option("--top", o->spectrum.top,
                  "Only the largest K singular values; metrics then have bounds instead of values")
      ->check(count());
  sub->add_option("--filter", o->filter, "Only matrices whose name contains this");
  sub->add_flag("--values", o->spectrum.values, "Write all singular values too");
  sub->add_flag("--side-by-side", o->spectrum.side_by_side,
                "With --base or --adapter: the spectra of the base and the tuned weight too");
  sub->add_option(
         "--alignment", o->spectrum.alignment,
         "With --base or --adapter: amplification factor, and the update's energy along the weight's leading K "
         "directions")
      ->check(count());
  o->scan.add_to(sub);
  sub->callback([o, sub] {
    if (!o->base.empty() && !o->adapter.empty()) throw UsageError("spectrum: --base and --adapter do not go together");
    const bool update = !o->base.empty() || !o->adapter.empty(), sides = o->spectrum.side_by_side;
    const std::string alone = "without --base or --adapter", of_updates = "it is about updates";
    expect_used(sub, {{"--side-by-side", update, alone, of_updates},
                      {"--alignment", update, alone, of_updates},
                      {"--top", o->adapter.empty() || sides, "with --adapter",
                       "its values come from its factors, all of them; --side-by-side has others"},
                      {"--values", !o->scan.json.empty(), "without --json", "the other outputs do not hold them"}});
    o->scan.expect_all_used(sub);
    run(*o);
  });
}

const Registration registration{60, "spectrum", add_spectrum};

}  // namespace
}  // namespace lowrank::tool::spectrum_command

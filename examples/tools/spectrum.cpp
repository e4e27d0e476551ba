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

void run(const Options& o) {
  o.scan.check({o.checkpoint, o.base, o.adapter});
  if (!o.base.empty() && !o.adapter.empty()) throw UsageError("spectrum: --base and --adapter do not go together");
  const io::Checkpoint checkpoint(checkpoint_path(o.checkpoint));
  std::vector<Skipped> skipped;
  const auto all = matrices_of(checkpoint, skipped);
  std::vector<std::string> names = names_of(all);
  std::vector<ScanJob> jobs;
  std::optional<io::Checkpoint> base;
  std::vector<MatrixTensor> base_list;
  std::optional<io::PeftAdapter> adapter;
  if (!o.base.empty()) {
    base.emplace(checkpoint_path(o.base));
    std::vector<Skipped> same_again;  // what both hold is skipped once
    base_list = matrices_of(*base, same_again);
    for (const MatrixPair& p : pairs_of(all, base_list, "the base", o.filter, skipped))
      jobs.push_back({p.first->name, p.bytes(), cost(p.first->rows, p.first->cols, o.spectrum),
                      [&o, p] { return difference_entry(p, o.spectrum); }});
  } else if (!o.adapter.empty()) {
    adapter.emplace(io::read_peft(o.adapter));
    note_dora(o.scan.common, o.adapter, *adapter);
    names = names_of(adapter->modules);
    for (const ModulePair& p : pairs_of(*adapter, all, o.filter, skipped)) {
      const auto& f = p.module->factors;
      const Index m = f.out_features(), n = f.in_features();
      const bool dense = o.spectrum.side_by_side || o.spectrum.alignment > 0;
      jobs.push_back({p.module->name, p.weight->bytes() + 1,
                      double(m + n) * double(f.rank()) * double(f.rank()) + (dense ? cost(m, n, o.spectrum) : 0),
                      [&o, p] { return adapter_entry(p, o.spectrum); }});
    }
  } else {
    for (const auto& w : all)
      if (selected(w.name, o.filter))
        jobs.push_back(
            {w.name, w.bytes(), cost(w.rows, w.cols, o.spectrum), [&o, &w] { return weight_entry(w, o.spectrum); }});
  }
  expect_something(o.adapter.empty() ? o.checkpoint : o.adapter, o.filter, jobs.size(), names, skipped);
  note_quantised(o.scan.common, {&all, &base_list});
  const std::string settings =
      text("spectrum top ", o.spectrum.top, " alignment ", o.spectrum.alignment, o.spectrum.values ? " values" : "",
           o.spectrum.side_by_side ? " sides" : "", o.base.empty() ? "" : " base", o.adapter.empty() ? "" : " adapter");
  auto result = run_scan(o.scan, "spectrum", fingerprint({o.checkpoint, o.base, o.adapter}, settings), jobs);
  result.skipped.insert(result.skipped.end(), skipped.begin(), skipped.end());
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

// SPDX-License-Identifier: Apache-2.0
// The page of a report, and `lowrank report`, which makes one from JSON files written earlier.
#include "report_html.hpp"

#include <algorithm>
#include <cstdio>
#include <map>

#include "interrupt.hpp"
#include "lowrank/core/version.hpp"
#include "lowrank/io/file.hpp"
#include "lowrank/io/json.hpp"
#include "models.hpp"
#include "outputs.hpp"
#include "report_values.hpp"

namespace lowrank::tool {
namespace {

std::string escaped(const std::string& s) {
  std::string out;
  for (const char c : s) switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        out += c;
    }
  return out;
}

std::string shown(double x, const char* format = "%.4g") {
  if (!std::isfinite(x)) return "–";
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, format, x);
  return buffer;
}

constexpr const char* style = R"css(
:root { color-scheme: light dark; --back: #fff; --ink: #1a1a1a; --soft: #666; --line: #ddd; --card: #f6f7f9; --accent: #0060a8; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --ink: #e8e8e8; --soft: #a0a4aa; --line: #343840; --card: #1d2026; --accent: #6db7f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p, li { overflow-wrap: anywhere; max-width: 58rem; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; } .tile b { display: block; font-size: 1.3rem; }
figure { margin: 1rem 0; max-width: 58rem; color: var(--ink); overflow-x: auto; } figure svg { display: block; width: 100%; min-width: 30rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th button { all: unset; cursor: pointer; color: var(--accent); }
th button:focus-visible { outline: 2px solid var(--accent); } .warn { border-left: 4px solid #d55e00; padding-left: .7rem; }
@media (max-width: 40rem) { th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9.5rem; } th, td { padding: .25rem .35rem; } }
)css";

constexpr const char* page_script = R"js(
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((th, column) => {
    th.querySelector("button").addEventListener("click", () => {
      const down = th.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("th").forEach(o => o.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const x = key(a), y = key(b), p = parseFloat(x), q = parseFloat(y);
        const order = isNaN(p) || isNaN(q) ? (isNaN(p) - isNaN(q)) || String(x).localeCompare(String(y)) : p - q;
        return down ? -order : order;
      });
      body.append(...rows);
    });
  });
}
)js";

/// What stands in a table, and the number it is sorted by.
struct Cell {
  std::string text;
  double value = NAN;
  Cell(double x) : text(shown(x)), value(x) {}
  Cell(std::string t, double x = NAN) : text(std::move(t)), value(x) {}
};

struct Column {
  std::string title, hint;
  Cell (*cell)(const Json&);
};

/// A metric, or what is known of it.
Cell metric_cell(const Json& j, const char* key) {
  if (const double x = number_at(j, "metrics", key); std::isfinite(x)) return x;
  const auto [low, high] = bounds_at(j, key);
  if (!std::isfinite(low)) return NAN;
  if (!std::isfinite(high)) return {"≥ " + shown(low), low};
  return {shown(low, "%.3g") + " … " + shown(high, "%.3g"), (low + high) / 2};
}

/// A number that follows from the noise level; where too much of a matrix is signal to know that, it says so.
Cell noise_cell(const Json& j, double known) {
  const auto level = j.find("noise_level");
  if (std::isfinite(known) || level == j.end() || level->value("determined", true)) return known;
  return std::string("not determined");
}

/// The error of the singular values relative to the largest.
Cell error_cell(const Json& j) {
  const double error = j.value("error", NAN), top = bounds_at(j, "spectral_norm").second;
  const double relative = top > 0 ? error / top : 0;
  const bool converged = j.value("converged", true);
  return {shown(relative, "%.1e") + (converged ? "" : " (not converged)"), relative};
}

/// How the verdicts on a matrix were reached.
Cell proofs_cell(const Json& j) {
  std::map<std::string, int> counts;
  for (const Json& v : j.at("vectors").get_ref<const Json::array_t&>()) ++counts[v.at("proof").get<std::string>()];
  std::string text;
  for (const auto& [proof, count] : counts) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + proof;
  return text;
}

std::vector<Column> columns_of(const Json& report) {
  const std::string command = report.value("command", "");
  if (command == "intruders")
    return {{"intruders", "of the leading directions judged",
             [](const Json& j) -> Cell { return j.at("count").get<double>(); }},
            {"judged", "k", [](const Json& j) -> Cell { return double(j.at("vectors").size()); }},
            {"energy share", "of the tuned weight, in intruders",
             [](const Json& j) -> Cell { return j.at("energy_share").get<double>(); }},
            {"full SVD", "1: the certificates left it open",
             [](const Json& j) -> Cell { return j.at("full_svd").get<bool>() ? 1.0 : 0.0; }},
            {"decided by", "what proves each verdict, errors of the vectors allowed for", proofs_cell}};
  if (command == "compare")
    return {
        {"difference", "‖A − B‖/‖A‖",
         [](const Json& j) -> Cell {
           const Json& d = j.at("relative_difference");
           return d.is_number() ? d.get<double>() : NAN;
         }},
        {"φ left", "1: the same subspace", [](const Json& j) -> Cell { return number_at(j, "left", "phi"); }},
        {"noise", "φ of random subspaces", [](const Json& j) -> Cell { return number_at(j, "left", "noise_phi"); }},
        {"φ right", "1: the same subspace", [](const Json& j) -> Cell { return number_at(j, "right", "phi"); }},
        {"noise", "φ of random subspaces", [](const Json& j) -> Cell { return number_at(j, "right", "noise_phi"); }},
        {"Grassmann", "left", [](const Json& j) -> Cell { return number_at(j, "left", "grassmann"); }},
        {"error", "largest residual of the vectors / σ₁", [](const Json& j) -> Cell {
           const double e = j.value("error", NAN);
           return {shown(e, "%.1e") + (j.value("converged", true) ? "" : " (not converged)"), e};
         }}};
  std::vector<Column> columns = {
      {"r₉₀", "directions that hold 90 % of the energy",
       [](const Json& j) { return metric_cell(j, "energy_rank_90"); }},
      {"noise r₉₀", "of iid noise of this shape",
       [](const Json& j) -> Cell { return number_at(j, "noise", "energy_rank_90"); }},
      {"ratio", "r₉₀ / noise r₉₀", [](const Json& j) -> Cell { return number_at(j, "ratio", "energy_rank_90"); }},
      {"effective", "exp of the entropy of the singular values",
       [](const Json& j) { return metric_cell(j, "effective_rank"); }},
      {"eff. ratio", "effective rank / that of noise",
       [](const Json& j) -> Cell { return number_at(j, "ratio", "effective_rank"); }},
      {"stable", "‖W‖_F²/σ₁²", [](const Json& j) { return metric_cell(j, "stable_rank"); }},
      {"σ₁", "spectral norm", [](const Json& j) { return metric_cell(j, "spectral_norm"); }},
      {"‖·‖_F", "Frobenius norm", [](const Json& j) { return metric_cell(j, "frobenius_norm"); }},
      {"edge", "noise or rounding ends here",
       [](const Json& j) -> Cell {
         const double e = edge_of(j);
         return e > 0 ? Cell(e) : noise_cell(j, NAN);
       }},
      {"above", "singular values above the Gavish–Donoho threshold",
       [](const Json& j) -> Cell { return noise_cell(j, number_at(j, "noise_level", "optimal_rank")); }},
      {"error", "bound on the error of a singular value / σ₁", error_cell}};
  const Json& list = report.at("matrices");
  if (std::any_of(list.begin(), list.end(), [](const Json& j) { return j.contains("alignment"); })) {
    columns.push_back({"amplification", "‖ΔW‖/‖UᵀWV‖: how much the update strengthens what W hardly has",
                       [](const Json& j) -> Cell { return number_at(j, "alignment", "amplification"); }});
    columns.push_back({"of random", "amplification by random directions",
                       [](const Json& j) -> Cell { return number_at(j, "alignment", "amplification_noise"); }});
    columns.push_back({"in W's left", "share of the update's energy along the leading left directions of W",
                       [](const Json& j) -> Cell { return number_at(j, "alignment", "left"); }});
    columns.push_back({"of random", "the share of a random update",
                       [](const Json& j) -> Cell { return number_at(j, "alignment", "left_noise"); }});
  }
  return columns;
}

std::string table_of(const std::vector<const Json*>& rows, const std::vector<Column>& columns, bool sortable) {
  std::string t = std::string("<div class=\"wide\"><table") + (sortable ? " class=\"sortable\"" : "") + "><thead><tr>";
  const auto head = [&](const std::string& title, const std::string& hint) {
    t += "<th scope=\"col\" title=\"" + escaped(hint) + "\">" +
         (sortable ? "<button>" + escaped(title) + "</button>" : escaped(title)) + "</th>";
  };
  head("matrix", "name in the checkpoint");
  head("shape", "rows × columns");
  for (const Column& c : columns) head(c.title, c.hint);
  t += "</tr></thead><tbody>\n";
  for (const Json* j : rows) {
    const auto m = j->at("rows").get<std::int64_t>(), n = j->at("cols").get<std::int64_t>();
    t += "<tr><td>" + escaped(j->at("name").get<std::string>());
    if (j->contains("verdict") && j->at("verdict") != "signal")
      t += " <b>(" + escaped(j->at("verdict").get<std::string>()) + ")</b>";
    t += "</td><td data-v=\"" + shown(double(m) * double(n), "%.0f") + "\">" + std::to_string(m) + "×" +
         std::to_string(n) + "</td>";
    for (const Column& c : columns) {
      const Cell cell = c.cell(*j);
      t += "<td" + (std::isfinite(cell.value) ? " data-v=\"" + shown(cell.value, "%.9g") + "\"" : std::string()) + ">" +
           escaped(cell.text) + "</td>";
    }
    t += "</tr>\n";
  }
  return t + "</tbody></table></div>\n";
}

std::string methods_of(const Json& r) {
  const std::string command = r.value("command", "");
  if (command == "intruders")
    return "An intruder is a leading left singular vector of the tuned weight whose |cos| with every left singular "
           "vector of the base is below ε (arXiv "
           "2410.21228). Verdicts are certified: a similar vector found, too little left outside the known vectors, or "
           "the Christoffel function of a Lanczos "
           "run from the vector bounding its energy on any single direction; what stays open is decided by two full "
           "SVDs. Random directions count as "
           "intruders too: read the number with its energy share.";
  if (command == "compare")
    return "Leading subspaces by truncated SVD (residual at most 1e-5·σ₁; adapters exactly from their factors). φ(k, "
           "k) = ‖UᵀV‖²/k is 1 for equal and k/m for "
           "random subspaces (arXiv 2106.09685, §7). Angles below 45° from their sines.";
  return "All singular values through the Gram matrix in double, or by bidiagonalisation where that is not accurate "
         "enough; adapters exactly from their "
         "factors; with --top, block Krylov iteration with residuals. Every value carries an error bound, and the JSON "
         "report gives the bounds of every metric "
         "that follow; a metric that the values computed do not determine is shown as its two bounds. Ranks stand "
         "beside those of iid noise of the same shape (Marchenko–Pastur); thresholds are "
         "Gavish and Donoho's (arXiv 1305.5870); the "
         "edge of a difference of 16-bit checkpoints is that of their rounding, any other is estimated from the median "
         "of the "
         "singular values: where that lies among the signals, the level of the noise is not determined. r₉₀ alone says "
         "little: noise of "
         "4096×4096 has r₉₀ = 2089.";
}

}  // namespace

std::string html_report(const std::vector<Json>& reports, const Pictures& pictures) {
  const Json& r = reports.back();
  const auto columns = columns_of(r);
  const Heat heat(reports);
  std::vector<const Json*> rows;
  int silent = 0;
  for (const Json& j : r.at("matrices")) {
    rows.push_back(&j);
    silent += j.contains("verdict") && j.at("verdict") != "signal" ? 1 : 0;
  }
  // By layer as a number: layer 10 after layer 9, whatever the alphabet says.
  std::stable_sort(rows.begin(), rows.end(), [](const Json* a, const Json* b) {
    const LayerName x = layer_name(a->at("name").get<std::string>()), y = layer_name(b->at("name").get<std::string>());
    return x.layer != y.layer ? x.layer < y.layer : x.module < y.module;
  });
  std::vector<const Json*> worst;
  for (const Json* j : rows)
    if (std::isfinite(heat(*j))) worst.push_back(j);
  std::stable_sort(worst.begin(), worst.end(), [&](const Json* a, const Json* b) {
    return heat.high_first() ? heat(*a) > heat(*b) : heat(*a) < heat(*b);
  });
  const double middle = worst.empty() ? NAN : heat(*worst[worst.size() / 2]);
  if (worst.size() > 8) worst.resize(8);

  const std::string title = r.value("command", "report") + " of " + report_label(r);
  std::string h =
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width, initial-scale=1\">\n"
      "<link rel=\"icon\" href=\"data:,\"><title>lowrank: " +
      escaped(title) + "</title><style>" + style + "</style></head><body>\n";
  h += "<h1>" + escaped(title) + "</h1>\n<p class=\"soft\">";
  for (const char* key : {"checkpoint", "base", "tuned", "adapter", "a", "b"})
    if (r.contains(key) && r.at(key).is_string())
      h += std::string(key) + ": " + escaped(r.at(key).get<std::string>()) + "<br>";
  h += "</p>\n<div class=\"tiles\">";
  const auto tile = [&](const std::string& value, const std::string& what) {
    h += "<div class=\"tile\"><b>" + value + "</b>" + escaped(what) + "</div>";
  };
  tile(std::to_string(rows.size()), "matrices");
  tile(shown(middle, "%.3g"), "median " + heat.caption());
  if (silent > 0) tile(std::to_string(silent), "without signal");
  tile(escaped(time_text(r.value("seconds", 0.0))), "to compute");
  h += "</div>\n";
  for (const char* key : {"failed", "skipped"}) {
    if (!r.contains(key) || r.at(key).empty()) continue;
    const auto& list = r.at(key);
    h += std::string("<details") + (key == std::string("failed") ? " class=\"warn\" open" : "") + "><summary>" +
         std::to_string(list.size()) + " tensors " +
         (key == std::string("failed") ? "could not be analysed" : "skipped") + "</summary><ul>";
    for (std::size_t i = 0; i < std::min<std::size_t>(list.size(), 200); ++i)
      h += "<li>" + escaped(list.at(i).at("name").get<std::string>()) + ": " +
           escaped(list.at(i).at("reason").get<std::string>()) + "</li>";
    h += "</ul></details>\n";
  }
  if (!pictures.problem.empty()) h += "<p class=\"warn\">" + escaped(pictures.problem) + ".</p>\n";
  for (const Picture& p : pictures.list)
    h += "<figure>" + p.inline_svg + "<figcaption>" + escaped(p.caption) + "</figcaption></figure>\n";
  const char* order = r.value("command", "") == "intruders" ? "Most" : heat.high_first() ? "Highest" : "Lowest";
  if (worst.size() > 1)
    h += "<h2>" + std::string(order) + " " + escaped(heat.caption()) + "</h2>\n" + table_of(worst, columns, false);
  h += "<h2>All matrices</h2>\n" + table_of(rows, columns, true);
  h += "<h2>How this was computed</h2>\n<p>" + methods_of(r) + "</p>\n<p class=\"soft\">lowrank " +
       std::string(version) + "</p>\n<script>" + page_script + "</script></body></html>\n";
  return h;
}

namespace {

struct Options {
  Common common;
  std::vector<std::string> inputs;
  std::string output;
};

/// A report as it may be drawn. Throws IoError naming the file and what is wrong with it.
Json read_report(const std::string& path) {
  Json j = io::parse_json(path, io::read_text(path));
  const auto known = [&] {
    if (!j.is_object() || !j.contains("matrices") || !j.at("matrices").is_array()) return false;
    const std::string command = j.contains("command") && j.at("command").is_string() ? j.at("command") : "";
    return command == "spectrum" || command == "intruders" || command == "compare";
  };
  if (!known()) throw IoError(path, "is not a report of lowrank spectrum, intruders or compare");
  try {
    for (const Json& m : j.at("matrices"))
      if (m.contains("curve"))
        for (const Json& point : m.at("curve")) (void)(point.at(0).get<double>() + point.at(1).get<double>());
    (void)html_report({j}, {});  // reads every field there is, while the name of the file is known
  } catch (const nlohmann::json::exception& e) {
    throw IoError(path, std::string("lacks a field a report has, or holds another type there: ") + e.what());
  }
  return j;
}

void run(const Options& o) {
  std::vector<Json> reports;
  for (const std::string& path : o.inputs) {
    reports.push_back(read_report(path));
    if (reports.front().at("command") != reports.back().at("command"))
      throw IoError(path, "is the report of another command than the first");
  }
  for (const std::string& input : o.inputs) expect_different(input, o.output);
  expect_writable(o.output);
  remove_leftovers(o.common, {o.output});
  throw_if_interrupted();
  const Finishing finishing;
  Pictures pictures;
  try {
    pictures = draw_pictures(reports, nullptr);
    if (!pictures.problem.empty()) note(o.common, pictures.problem);
    io::write_text(o.output, html_report(reports, pictures));
  } catch (const nlohmann::json::exception& e) {
    throw IoError(o.inputs.back(), std::string("lacks a field a report has, or holds another type there: ") + e.what());
  }
  print(o.common, {{"command", "report"}, {"output", o.output}, {"pictures", pictures.list.size()}},
        "wrote " + o.output + "\n");
}

void add_report(CLI::App& app) {
  auto o = std::make_shared<Options>();
  CLI::App* sub = add_command(
      app, "report", "One HTML page from JSON reports; several, in order, show growth over checkpoints", o->common);
  sub->add_option("reports", o->inputs, "JSON files of spectrum, intruders or compare")->required();
  sub->add_option("-o,--output", o->output, "The page")->required();
  sub->callback([o] {
    if (o->output == "-") throw UsageError("report: this writes a file, not stdout");
    run(*o);
  });
}

const Registration registration{63, "report", add_report};

}  // namespace
}  // namespace lowrank::tool

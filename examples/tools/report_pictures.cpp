// SPDX-License-Identifier: Apache-2.0
// The pictures of a report: data written for gnuplot, gnuplot run once, its SVG made to follow the page's colours.
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>

#include "report_html.hpp"
#include "report_values.hpp"

extern char** environ;

namespace lowrank::tool {
namespace {

namespace fs = std::filesystem;

/// A directory that goes away with its contents.
class Scratch {
 public:
  Scratch() {
    std::string pattern = (fs::temp_directory_path() / "lowrank-XXXXXX").string();
    if (::mkdtemp(pattern.data()) != nullptr) path_ = pattern;
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    std::error_code ignored;
    if (!path_.empty()) fs::remove_all(path_, ignored);
  }
  [[nodiscard]] const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

/// Runs gnuplot on a script; an empty string, or what went wrong.
std::string run_gnuplot(const fs::path& script, const fs::path& log) {
  const std::string s = script.string();
  const char* argv[] = {"gnuplot", s.c_str(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 2, log.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
  pid_t pid = 0;
  const int failed = ::posix_spawnp(&pid, "gnuplot", &actions, nullptr, const_cast<char**>(argv), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) return "gnuplot was not found: the report has no pictures";
  int status = 0;
  ::waitpid(pid, &status, 0);
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
  std::ifstream in(log);
  std::string line, text;
  while (std::getline(in, line))
    if (!line.empty()) text = line;
  return "gnuplot failed, the report has no pictures: " + text;
}

std::string slurp(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// gnuplot strings in double quotes: backslash and quote escaped, enhanced text is off.
std::string gp(const std::string& s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + "\"";
}

std::string number_text(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.8g", x);
  return buffer;
}

// One colour no palette uses, #010203, stands for "the text colour" and becomes currentColor.
constexpr const char* preamble =
    "set encoding utf8\n"
    "set border lc rgb '#010203'\nset tics textcolor rgb '#010203'\nset key textcolor rgb '#010203'\n"
    "set xlabel textcolor rgb '#010203'\nset ylabel textcolor rgb '#010203'\nset cblabel textcolor rgb '#010203'\n"
    "set grid lc rgb '#888888' lw 0.4\n"
    "set palette defined (0 '#352a87', 0.25 '#0f7fd8', 0.5 '#2cb7a0', 0.75 '#d4bb58', 1 '#f9fb0e')\n";

/// Okabe and Ito's colours: told apart by every kind of colour vision, on white and on black.
constexpr const char* colours[] = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                   "#e69f00", "#56b4e9", "#7f7f7f", "#b2a900"};

struct Plot {
  std::string name, caption, body;
  int width = 860, height = 460;
  bool enhanced = false;  ///< only where we format an exponent ourselves: names hold underscores
};

std::string in_ink(std::string svg, const std::string& colour) {
  for (const std::string from : {"rgb(  1,   2,   3)", "rgb(1,2,3)", "#010203"})
    for (std::size_t at = 0; (at = svg.find(from, at)) != std::string::npos; at += colour.size())
      svg.replace(at, from.size(), colour);
  return svg;
}

/// The <svg> element alone, sized by the page, with ids of its own so that several can live in one page.
std::string inline_svg(const std::string& file, const std::string& name, const std::string& caption) {
  const std::size_t begin = file.find("<svg"), end = file.rfind("</svg>");
  if (begin == std::string::npos || end == std::string::npos) return {};
  std::string svg = in_ink(file.substr(begin, end + 6 - begin), "currentColor");
  // Axes are drawn in gnuplot's own black through CSS colour, which must be inherited from the page instead.
  const std::string black = " color=\"black\"";
  for (std::size_t at = 0; (at = svg.find(black, at)) != std::string::npos;) svg.erase(at, black.size());
  // gnuplot's own script for mouse tracking is not asked for; ids are prefixed in definitions and references alike.
  for (const char* mark : {"id=\"", "id='", "href=\"#", "href='#", "url(#"}) {
    const std::string m = mark;
    for (std::size_t at = 0; (at = svg.find(m, at)) != std::string::npos; at += m.size() + name.size() + 1)
      svg.insert(at + m.size(), name + "-");
  }
  const std::size_t tag = svg.find('>');
  std::string open = svg.substr(0, tag);
  for (const char* attribute : {" width=\"", " height=\""})
    if (const std::size_t at = open.find(attribute); at != std::string::npos)
      open.erase(at, open.find('"', at + std::string(attribute).size()) + 1 - at);
  return open + " role=\"img\" aria-label=\"" + caption + "\"" + svg.substr(tag);
}

/// Layer × module, coloured by the number that matters for the command.
void add_heat_map(const Json& report, const Heat& heat, const fs::path& dir, std::vector<Plot>& plots) {
  std::map<std::string, int> columns;
  std::vector<std::tuple<int, std::string, double>> cells;
  int layers = 0;
  for (const Json& j : report.at("matrices")) {
    const LayerName at = layer_name(j.at("name").get<std::string>());
    const double value = heat(j);
    if (at.layer < 0 || !std::isfinite(value)) continue;
    columns.emplace(at.module, 0);
    layers = std::max(layers, at.layer + 1);
    cells.emplace_back(at.layer, at.module, value);
  }
  if (cells.empty() || columns.size() > 64) return;
  int next = 0;
  std::string tics;
  for (auto& [module, column] : columns) {
    column = next++;
    tics += (tics.empty() ? "" : ", ") + gp(module) + " " + std::to_string(column);
  }
  std::ofstream out(dir / "heat.dat");
  double low = INFINITY, high = -INFINITY;
  for (const auto& [layer, module, value] : cells) {
    out << columns[module] << ' ' << layer << ' ' << number_text(value) << '\n';
    low = std::min(low, value);
    high = std::max(high, value);
  }
  if (!(high > low)) high = low + std::max(1e-9, std::abs(low) * 1e-3);
  const std::string what = heat.caption();
  plots.push_back(
      {"heat", what + " by layer and module",
       "unset key\nunset grid\nset ylabel 'layer'\nset cblabel " + gp(heat.label()) + "\nset xtics rotate by -35 (" +
           tics + ")\nset xrange [-0.5:" + std::to_string(next) + "-0.5]\nset yrange [-0.5:" + std::to_string(layers) +
           "-0.5]\nset cbrange [" + number_text(low) + ":" + number_text(high) +
           "]\nset style fill solid 1 noborder\nplot 'heat.dat' using 1:2:(0.5):(0.5):3 with boxxyerror lc palette\n",
       860, std::clamp(180 + 16 * layers, 320, 900)});
}

/// A curve as a file for gnuplot; false when there is nothing to draw.
bool write_curve(const Json& matrix, const fs::path& file) {
  const auto curve = matrix.find("curve");
  if (curve == matrix.end()) return false;
  std::ofstream out(file);
  bool any = false;
  double largest = 0;
  for (const Json& p : *curve) {
    // What is below float's precision of the largest value is rounding, and would stretch the axis by decades.
    const double value = p.at(1).get<double>();
    largest = std::max(largest, value);
    if (!(value > largest * 1e-7)) continue;
    out << p.at(0).get<double>() << ' ' << number_text(value) << '\n';
    any = true;
  }
  return any;
}

/// The matrices whose spectra are shown: half of them nearest to noise, half farthest from it.
std::vector<const Json*> few_of(const Json& report, const Heat& heat, std::size_t most) {
  std::vector<const Json*> list;
  for (const Json& j : report.at("matrices"))
    if (j.contains("curve") && j.at("curve").size() > 1 && j.at("curve").at(0).at(1).get<double>() > 0)
      list.push_back(&j);
  std::stable_sort(list.begin(), list.end(), [&](const Json* a, const Json* b) { return heat(*a) < heat(*b); });
  if (list.size() > most)
    list.erase(list.begin() + std::ptrdiff_t(most / 2), list.end() - std::ptrdiff_t(most - most / 2));
  return list;
}

/// A few spectra on log axes with the edges of noise and rounding: the ones farthest from noise, and the closest.
void add_spectra(const Json& report, const Heat& heat, const fs::path& dir, std::vector<Plot>& plots) {
  // Dash types of the horizontal lines, and what they mean.
  struct Edge {
    int dash;
    const char *title, *caption;
    bool any = false;
  };
  Edge noise{2, "where the bulk of noise ends", "dashed, where the noise estimated from its median value ends"},
      norm{4, "where noise of the same norm ends", "dash-dotted, where noise of the same shape and norm would end"},
      rounding{3, "where 16-bit rounding ends", "dotted, where the rounding of its storage ends"};
  std::string plot, lines;
  int n = 0;
  for (const Json* j : few_of(report, heat, 6)) {
    const std::string file = "curve" + std::to_string(n) + ".dat";
    if (!write_curve(*j, dir / file)) continue;
    const std::string line = " lw 2 lc rgb '" + std::string(colours[n % 8]) + "'";
    plot += (plot.empty() ? "plot " : ", ") + gp(file) + " using 1:2 with lines" + line + " title " +
            gp(j->at("name").get<std::string>());
    const auto draw = [&](Edge& e, double at) {
      if (!(at > 0)) return;
      lines += ", " + number_text(at) + " with lines dt " + std::to_string(e.dash) + line + " notitle";
      e.any = true;
    };
    const double bulk = number_at(*j, "noise_level", "edge");
    if (bulk > 0)
      draw(noise, bulk);
    else
      draw(norm, number_at(*j, "noise", "spectral_norm"));
    draw(rounding, number_at(*j, "rounding", "edge"));
    ++n;
  }
  if (plot.empty()) return;
  std::string caption;
  for (const Edge* e : {&noise, &norm, &rounding}) {
    if (!e->any) continue;
    lines += ", NaN with lines dt " + std::to_string(e->dash) + " lw 2 lc rgb '#010203' title " + gp(e->title);
    caption += (caption.empty() ? "; horizontal lines in the colour of a matrix: " : "; ") + std::string(e->caption);
  }
  plots.push_back({"spectra", "Singular values of the matrices nearest to and farthest from noise" + caption,
                   "set logscale xy\nset format y '10^{%L}'\nset xlabel 'index' offset 0,0.4\nset ylabel 'singular "
                   "value'\nset key outside below maxcols 2 samplen 3 noenhanced\n" +
                       plot + lines + "\n",
                   860, 560, true});
}

/// The spectra of W, W + ΔW and ΔW of a few matrices, a panel each.
void add_sides(const Json& report, const Heat& heat, const fs::path& dir, std::vector<Plot>& plots) {
  std::string body;
  int n = 0;
  for (const Json* j : few_of(report, heat, 4)) {
    if (!j->contains("base") || !j->contains("tuned") || !j->at("base").is_object() || !j->at("tuned").is_object())
      continue;
    const Json* curves[] = {&j->at("base"), &j->at("tuned"), j};
    const char* titles[] = {"W", "W + ΔW", "ΔW"};
    std::string plot;
    for (int c = 0; c < 3; ++c) {
      const std::string file = "side" + std::to_string(n) + "-" + std::to_string(c) + ".dat";
      if (!write_curve(*curves[c], dir / file)) continue;
      plot += (plot.empty() ? "plot " : ", ") + gp(file) + " using 1:2 with lines lw 2 lc rgb '" + colours[c] +
              (c == 1 ? "' dt 2" : "'") + " title " + gp(titles[c]);
    }
    if (plot.empty()) continue;
    if (const double edge = number_at(*j, "rounding", "edge"); edge > 0)
      plot += ", " + number_text(edge) + " with lines dt 3 lw 2 lc rgb '#010203' title 'rounding'";
    body += "set title " + gp(j->at("name").get<std::string>()) + " noenhanced textcolor rgb '#010203'\n" + plot + "\n";
    ++n;
  }
  if (n == 0) return;
  const int rows = (n + 1) / 2;
  plots.push_back({"sides", "Spectra of the weight W, of the tuned weight W + ΔW and of the update ΔW, side by side",
                   "set multiplot layout " + std::to_string(rows) + "," + (n > 1 ? "2" : "1") +
                       "\nset logscale xy\nset format y '10^{%L}'\nset key outside below horizontal samplen 2\n" +
                       body + "unset multiplot\n",
                   860, 60 + 350 * rows, true});
}

/// Medians over several reports, in the order given.
void add_growth(const std::vector<Json>& reports, const Heat& heat, const fs::path& dir, std::vector<Plot>& plots) {
  if (reports.size() < 2) return;
  std::ofstream out(dir / "growth.dat");
  std::string tics;
  int n = 0;
  for (const Json& r : reports) {
    std::vector<double> values;
    for (const Json& j : r.at("matrices"))
      if (const double v = heat(j); std::isfinite(v)) values.push_back(v);
    if (values.empty()) continue;
    std::sort(values.begin(), values.end());
    const auto at = [&](double q) { return number_text(values[std::size_t(q * double(values.size() - 1))]); };
    out << n << ' ' << at(.5) << ' ' << at(.1) << ' ' << at(.9) << '\n';
    std::string label = report_label(r);
    if (label.ends_with(".safetensors")) label.resize(label.size() - std::string_view(".safetensors").size());
    tics += (tics.empty() ? "" : ", ") + gp(label) + " " + std::to_string(n++);
  }
  if (n < 2) return;
  plots.push_back({"growth",
                   heat.caption() + " over the reports: median, and the band from 10 % to 90 % of the matrices",
                   "set xtics rotate by -25 (" + tics + ")\nset ylabel " + gp(heat.label()) +
                       "\nset key off\nset offsets graph 0.04, graph 0.04\nset style fill transparent solid 0.25\nplot "
                       "'growth.dat' using 1:3:4 with filledcurves lc "
                       "rgb '#0072b2', '' using "
                       "1:2 with linespoints pt 7 ps 0.7 lw 2 lc rgb '#0072b2'\n",
                   860, 420});
}

}  // namespace

Pictures draw_pictures(const std::vector<Json>& reports, const char* raster) {
  Pictures result;
  const Scratch scratch;
  if (scratch.path().empty()) {
    result.problem = "no temporary directory for gnuplot: the report has no pictures";
    return result;
  }
  const fs::path& dir = scratch.path();
  const Heat heat(reports);
  std::vector<Plot> plots;
  add_heat_map(reports.back(), heat, dir, plots);
  add_spectra(reports.back(), heat, dir, plots);
  add_sides(reports.back(), heat, dir, plots);
  add_growth(reports, heat, dir, plots);
  if (plots.empty()) return result;
  {
    std::ofstream script(dir / "script.gp");
    script << "cd " << gp(dir.string()) << '\n';
    const auto draw = [&](const Plot& p, const std::string& terminal, const char* suffix) {
      script << "reset\n"
             << preamble << "set term " << terminal << (p.enhanced ? " enhanced" : " noenhanced") << "\nset output '"
             << p.name << suffix << "'\n"
             << p.body << "set output\n";
    };
    for (const Plot& p : plots) {
      const auto size = [&](int scale) {
        return std::to_string(p.width * scale) + "," + std::to_string(p.height * scale);
      };
      draw(p, "svg size " + size(1) + " font 'sans-serif,13'", ".svg");
      if (raster != nullptr) draw(p, "pngcairo size " + size(2) + " font 'sans,22' linewidth 2", ".png");
    }
  }
  result.problem = run_gnuplot(dir / "script.gp", dir / "log");
  if (!result.problem.empty()) return result;
  for (const Plot& p : plots) {
    const std::string svg = slurp(dir / (p.name + ".svg"));
    if (svg.find("</svg>") == std::string::npos) continue;
    std::string light = in_ink(svg, "#000000");
    if (const std::size_t tag = light.find('>', light.find("<svg")); tag != std::string::npos)
      light.insert(tag + 1, "\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>");
    result.list.push_back({p.name, p.caption, inline_svg(svg, p.name, p.caption), std::move(light),
                           raster != nullptr ? slurp(dir / (p.name + ".png")) : std::string()});
  }
  return result;
}

}  // namespace lowrank::tool

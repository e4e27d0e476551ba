// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <map>
#include <utility>

#include "lowrank/io/file.hpp"
#include "lowrank/spectrum/metrics.hpp"
#include "lowrank/spectrum/noise.hpp"

namespace llama {
namespace {

std::string format(const char* pattern, ...) {
  va_list arguments;
  va_start(arguments, pattern);
  char buffer[512];
  std::vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  return buffer;
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  const std::size_t n = v.size();
  return n == 0 ? std::nan("") : (v[(n - 1) / 2] + v[n / 2]) / 2;
}

/// The changes of one kind of module.
struct KindRanks {
  std::string kind;
  Index rows = 0, cols = 0;
  std::vector<double> r90, relative_norm;
};

std::vector<KindRanks> by_kind(const std::vector<Adaptation::Change>& changes) {
  std::vector<KindRanks> kinds;
  for (const auto& c : changes) {
    if (c.rows == 1) continue;  // a norm's weight is a vector
    auto at = std::find_if(kinds.begin(), kinds.end(), [&](const KindRanks& k) { return k.kind == c.kind; });
    if (at == kinds.end()) at = kinds.insert(kinds.end(), {c.kind, c.rows, c.cols, {}, {}});
    at->r90.push_back(double(lowrank::energy_rank(c.sigma, 0.9)));
    at->relative_norm.push_back(c.relative_norm);
  }
  return kinds;
}

/// Kept: the files are written after every method, and a model has few shapes.
Index noise_r90(Index rows, Index cols) {
  static std::map<std::pair<Index, Index>, Index> known;
  const auto [at, is_new] = known.try_emplace({rows, cols}, 0);
  if (is_new) at->second = lowrank::energy_rank(lowrank::noise_spectrum(rows, cols, 1), 0.9);
  return at->second;
}

void create(const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) throw lowrank::IoError(directory, "cannot be created: " + error.message());
}

std::string parameters_text(Index n) {
  return n >= 1000000 ? format("%.2f M", double(n) * 1e-6)
         : n >= 1000  ? format("%.1f k", double(n) * 1e-3)
                      : format("%td", n);
}

}  // namespace

void print_losses(const std::vector<Result>& results, bool with_source) {
  const Result& base = results.front();
  std::printf(
      "\nLoss in nats a token on held-out text; bits a byte = loss / ln 2. 'start' is the new domain's loss before the "
      "first "
      "step,\nforgetting the rise on the old domain.\n\n");
  std::printf("  %-12s %12s %10s %8s %11s %11s %11s %9s %9s\n", "method", "trainable", "lr", "start", "new domain",
              "old domain", "forgetting", "ms/step", "tokens/s");
  for (const Result& r : results) {
    const std::string old = with_source ? format("%.3f", r.source_loss) : "-";
    if (&r == &base) {
      std::printf("  %-12s %12s %10s %8s %11.3f %11s %11s %9s %9s\n", r.method.c_str(), "-", "-", "-", r.target_loss,
                  old.c_str(), "-", "-", "-");
      continue;
    }
    if (r.diverged_at > 0) {
      std::printf("  %-12s %12s %10.2g %8.3f    diverged at step %td\n", r.method.c_str(),
                  parameters_text(r.trainable).c_str(), r.learning_rate, r.first_loss, r.diverged_at);
      continue;
    }
    const std::string forgetting = with_source ? format("%+.3f", r.source_loss - base.source_loss) : "-";
    std::printf("  %-12s %12s %10.2g %8.3f %11.3f %11s %11s %9.1f %9.0f\n", r.method.c_str(),
                parameters_text(r.trainable).c_str(), r.learning_rate, r.first_loss, r.target_loss, old.c_str(),
                forgetting.c_str(), r.training.step_ms, r.training.tokens_per_second);
  }
}

void print_ranks(const std::vector<Result>& results, Index rank) {
  std::vector<std::vector<KindRanks>> tables;
  for (const Result& r : results) tables.push_back(by_kind(r.changes));
  const auto widest =
      std::max_element(tables.begin(), tables.end(), [](const auto& a, const auto& b) { return a.size() < b.size(); });
  if (widest == tables.end() || widest->empty()) return;
  std::printf(
      "\nr90: singular values that hold 90 %% of the energy of dW (median over layers). Adapter rank %td; 'noise' is "
      "the r90 of\n"
      "iid noise of that shape, which any update has to stay below before its rank says something.\n\n",
      rank);
  std::printf("  %-12s %11s %7s", "module", "shape", "noise");
  for (std::size_t i = 0; i < results.size(); ++i)
    if (!tables[i].empty()) std::printf(" %10s", results[i].method.c_str());
  std::printf("\n");
  for (const KindRanks& k : *widest) {
    std::printf("  %-12s %11s %7td", k.kind.c_str(), format("%tdx%td", k.rows, k.cols).c_str(),
                noise_r90(k.rows, k.cols));
    for (const auto& table : tables) {
      if (table.empty()) continue;
      const auto at = std::find_if(table.begin(), table.end(), [&](const KindRanks& o) { return o.kind == k.kind; });
      std::printf(" %10s", at == table.end() ? "-" : format("%g", median(at->r90)).c_str());
    }
    std::printf("\n");
  }
}

std::vector<std::string> write_files(const std::string& directory, const std::vector<Result>& results, Index rank) {
  create(directory);
  std::string table =
      "method,learning_rate,trainable_parameters,new_domain_loss,old_domain_loss,forgetting,first_loss,init_s,train_s,"
      "ms_per_step,"
      "tokens_per_s,status\n";
  std::string ranks = "method,module,rows,cols,r90,noise_r90,adapter_rank,relative_norm\n",
              losses = "method,step,loss\n";
  for (const Result& r : results) {
    table += format("%s,%g,%td,%.6f,%.6f,%.6f,%.6f,%.3f,%.3f,%.3f,%.1f,%s\n", r.method.c_str(), r.learning_rate,
                    r.trainable, r.target_loss, r.source_loss, r.source_loss - results.front().source_loss,
                    r.first_loss, r.init_seconds, r.training.seconds, r.training.step_ms, r.training.tokens_per_second,
                    r.diverged_at > 0 ? "diverged" : "ok");
    for (const auto& c : r.changes)
      ranks += format("%s,%s,%td,%td,%td,%td,%td,%.6g\n", r.method.c_str(), c.module.c_str(), c.rows, c.cols,
                      lowrank::energy_rank(c.sigma, 0.9), noise_r90(c.rows, c.cols), rank, c.relative_norm);
    for (std::size_t step = 0; step < r.training.losses.size(); ++step)
      losses += format("%s,%zu,%.6f\n", r.method.c_str(), step, r.training.losses[step]);
  }
  const std::string base = directory + "/";
  const std::vector<std::pair<std::string, const std::string*>> files{
      {base + "ranks.csv", &ranks}, {base + "losses.csv", &losses}, {base + "results.csv", &table}};
  std::vector<std::string> paths;
  for (const auto& [path, text] : files) {
    lowrank::io::write_text(path, *text);
    paths.push_back(path);
  }
  return paths;
}

void print_sweep(const std::vector<Trial>& trials, const std::vector<std::string>& methods,
                 const std::vector<double>& rates, Index steps) {
  const auto find = [&](const std::string& method, double rate) {
    const auto at = std::find_if(trials.begin(), trials.end(),
                                 [&](const Trial& t) { return t.method == method && t.learning_rate == rate; });
    return at == trials.end() ? nullptr : &*at;
  };
  std::printf("Validation loss on the new domain after %td steps\n\n  %-12s", steps, "method");
  for (const double rate : rates) std::printf(" %9.2g", rate);
  std::printf("\n");
  std::string best;
  for (const std::string& method : methods) {
    std::printf("  %-12s", method.c_str());
    const Trial* lowest = nullptr;
    for (const double rate : rates) {
      const Trial* t = find(method, rate);
      std::printf(" %9s", t == nullptr ? "" : t->diverged_at > 0 ? "diverged" : format("%.4f", t->loss).c_str());
      if (t != nullptr && t->diverged_at == 0 && (lowest == nullptr || t->loss < lowest->loss)) lowest = t;
    }
    std::printf("\n");
    if (lowest == nullptr) continue;
    best += format("%s%s=%g", best.empty() ? "" : ",", method.c_str(), lowest->learning_rate);
  }
  if (!best.empty()) std::printf("\nLowest: --lr %s\n", best.c_str());
}

std::string write_sweep(const std::string& directory, const std::vector<Trial>& trials, Index steps) {
  create(directory);
  std::string table = "method,learning_rate,steps,validation_loss,status,diverged_at_step\n";
  for (const Trial& t : trials)
    table +=
        format("%s,%g,%td,%.6f,%s,%s\n", t.method.c_str(), t.learning_rate, steps, t.loss,
               t.diverged_at > 0 ? "diverged" : "ok", t.diverged_at > 0 ? format("%td", t.diverged_at).c_str() : "");
  lowrank::io::write_text(directory + "/sweep.csv", table);
  return directory + "/sweep.csv";
}

}  // namespace llama

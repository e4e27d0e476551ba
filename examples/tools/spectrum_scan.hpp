// SPDX-License-Identifier: Apache-2.0
// Whole-checkpoint scans: many matrices in flight, results journaled as they come, resumable, spread over MPI ranks.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "spectrum_matrices.hpp"

namespace lowrank::tool {

/// Where a scan writes, and how it runs. "-" is stdout, for one of the three reports.
struct ScanOptions {
  Common common;
  std::string json, csv, html, pictures;  ///< pictures: directory for svg and png files
  bool svg = false, png = false, fresh = false;
  int in_flight = 0;  ///< matrices at once; 0: as many as there are threads

  /// --json [OUT], --csv, --html, --svg, --png, --fresh, --jobs, -q.
  void add_to(CLI::App* sub);
  /// Throws UsageError for an option of add_to() that has no use with the others.
  void expect_all_used(const CLI::App* sub) const;
  /// Throws UsageError when two reports go to one place, IoError when one would overwrite a file of an input or cannot
  /// be written.
  void check(const std::vector<std::string>& inputs) const;
  [[nodiscard]] bool uses_stdout() const { return json == "-" || csv == "-" || html == "-"; }
};

/// One matrix: what it will cost in flops, and how its entry of the report is made. `work` may throw lowrank::Error.
struct ScanJob {
  std::string name;
  std::uint64_t bytes = 0;
  double cost = 0;
  std::function<Json()> work;
};

/// What a scan is to do, found out before any of it is done.
struct ScanPlan {
  std::vector<ScanJob> jobs;
  std::vector<Skipped> skipped;    ///< what is no matrix, and what has no partner
  std::vector<std::string> names;  ///< of all that --filter chooses from
  std::string fingerprint;         ///< a journal with another one is not resumed from

  ScanPlan() = default;
  ScanPlan(const ScanPlan&) = delete;  // jobs refer to what a command keeps beside it
  ScanPlan& operator=(const ScanPlan&) = delete;
};
/// Throws when a scan has nothing to do: a filter that matches nothing, a checkpoint without matrices.
void expect_something(const std::string& path, const std::string& filter, const ScanPlan& plan);

/// What a scan found. `matrices` is in the order of the jobs whatever the number of threads and ranks.
struct ScanResult {
  std::vector<Json> matrices;
  std::vector<Skipped> skipped;
  std::vector<Skipped> failed;  ///< NaN and the like; the rest of the scan went on
  bool leader = true;           ///< this process writes the report
  std::size_t resumed = 0;
  std::string journal;  ///< of this process; empty without an output file
  double seconds = 0;
  /// How many were skipped for this reason.
  [[nodiscard]] std::size_t count(SkipReason why) const;
};

/// Does the jobs. With an output file, finished matrices are appended to `<output>.journal`, and a later call with the
/// same fingerprint takes them from there; the journal is removed by `finish_scan`.
ScanResult run_scan(const ScanOptions& o, const std::string& command, const ScanPlan& plan);

/// Writes JSON, CSV, HTML and pictures; prints the table unless one of them goes to stdout; throws Error at the very
/// end when matrices failed or inputs did not fit, so that the exit code says so.
void finish_scan(const ScanOptions& o, ScanResult&& result, Json header, const std::string& table);

/// A text that changes when the program, the inputs or the options do: the library's version; paths, sizes and times of
/// the files; `options`.
std::string fingerprint(const std::vector<std::string>& paths, const std::string& options);

/// x, or null when it is not finite.
inline Json finite(double x) { return std::isfinite(x) ? Json(x) : Json(nullptr); }

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// The machinery of whole-checkpoint scans. Compiled with LOWRANK_TOOL_MPI it spreads the matrices over MPI ranks.
#include "spectrum_scan.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <optional>
#include <set>

#include "interrupt.hpp"
#include "lowrank/core/balance.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/core/version.hpp"
#include "lowrank/io/file.hpp"
#include "outputs.hpp"
#include "report_csv.hpp"
#include "report_html.hpp"

#if defined(LOWRANK_TOOL_MPI)
#include "lowrank/mpi.hpp"
#endif

namespace lowrank::tool {
namespace {

/// Finished matrices on disk, one line each, so that a kill loses at most the line being written.
class Journal {
 public:
  Journal(const std::string& path, const std::string& fingerprint, bool fresh) : path_(path) {
    if (path.empty()) return;
    const std::string head = Json{{"fingerprint", fingerprint}}.dump() + "\n";
    off_t keep = 0;
    if (!fresh) keep = load(head);
    fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) fail("cannot open");
    if (::ftruncate(fd_, keep) != 0 || ::lseek(fd_, 0, SEEK_END) < 0) fail("cannot prepare");
    if (keep == 0) append(head);
  }
  Journal(const Journal&) = delete;
  ~Journal() {
    if (fd_ >= 0) ::close(fd_);
  }
  [[nodiscard]] const Json* find(const std::string& name) const {
    const auto it = done_.find(name);
    return it == done_.end() ? nullptr : &it->second;
  }
  void add(const std::string& name, const Json& result) {
    if (fd_ >= 0)
      append(Json{{"job", name}, {"result", result}}.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw IoError(path_,
                  std::string(what) + " the journal, which keeps the matrices that are done: " + std::strerror(errno));
  }
  /// Reads whole lines of a journal with our head; returns how many bytes of it are good.
  off_t load(const std::string& head) {
    std::ifstream in(path_, std::ios::binary);
    if (!in) return 0;
    const std::string text((std::istreambuf_iterator<char>(in)), {});
    if (text.compare(0, head.size(), head) != 0) return 0;
    std::size_t at = head.size();
    while (true) {
      const std::size_t end = text.find('\n', at);
      if (end == std::string::npos) break;  // the torn line of a kill, if anything
      const Json line = Json::parse(text.begin() + Index(at), text.begin() + Index(end), nullptr, false);
      if (line.is_discarded() || !line.contains("job") || !line.contains("result") || !line["job"].is_string()) break;
      done_[line["job"].get<std::string>()] = line["result"];
      at = end + 1;
    }
    return off_t(at);
  }
  void append(const std::string& line) {
    std::size_t at = 0;
    while (at < line.size()) {
      const ssize_t n = ::write(fd_, line.data() + at, line.size() - at);
      if (n < 0 && errno != EINTR) fail("cannot append to");
      if (n > 0) at += std::size_t(n);
    }
  }
  std::string path_;
  int fd_ = -1;
  std::map<std::string, Json> done_;
};

std::string journal_path(const ScanOptions& o, int rank, int ranks) {
  std::string out;
  for (const std::string* path : {&o.html, &o.csv, &o.json})
    if (!path->empty() && *path != "-") out = *path;
  return out.empty() ? out
                     : out + (ranks > 1 ? "." + std::to_string(rank) + "of" + std::to_string(ranks) : "") + ".journal";
}

std::string joined(const std::vector<Skipped>& list) {
  std::string s;
  for (std::size_t i = 0; i < std::min<std::size_t>(list.size(), 5); ++i)
    s += (i > 0 ? "; " : "") + list[i].name + ": " + list[i].reason;
  return s + (list.size() > 5 ? "; ..." : "");
}

Json to_json(const std::vector<Skipped>& list) {
  Json j = Json::array();
  for (const Skipped& s : list) j.push_back({{"name", s.name}, {"reason", s.reason}});
  return j;
}

}  // namespace

void ScanOptions::add_to(CLI::App* sub) {
  sub->add_option_function<std::string>(
         "--json", [this](const std::string& path) { json = path.empty() ? "-" : path; },
         "Write the report as JSON to this file, resumable after a kill; - or nothing: stdout")
      ->expected(0, 1);
  sub->add_option("--csv", csv, "Write one row a matrix to this file (- for stdout)");
  sub->add_option("--html", html, "Write one self-contained page with pictures (needs gnuplot when run)");
  sub->add_option("--pictures", pictures, "Directory for --svg and --png")->default_val(".");
  sub->add_flag("--svg", svg, "Write the pictures as SVG files");
  sub->add_flag("--png", png, "Write the pictures as PNG files");
  sub->add_flag("--fresh", fresh, "Do not resume from a journal");
  sub->add_option("-j,--jobs", in_flight, "Matrices in flight; default: the number of threads")->check(whole(0, 4096));
  sub->add_flag("-q,--quiet", common.quiet, "No progress, no notes");
}

void ScanOptions::check(const std::vector<std::string>& inputs) const {
  if ((json == "-") + (csv == "-") + (html == "-") > 1)
    throw UsageError("only one of --json, --csv and --html can go to stdout");
  std::set<std::string> places;
  for (const std::string& out : {json, csv, html}) {
    if (out.empty() || out == "-") continue;
    if (!places.insert(absolute_path(out)).second)
      throw UsageError("two of --json, --csv and --html would be written to " + out);
    for (const std::string& input : inputs)
      if (!input.empty()) expect_different(input, out);
    expect_writable(out);
  }
  if (svg || png) expect_writable_directory(pictures, "--pictures");
  remove_leftovers(common, {json, csv, html});
  if (svg || png) remove_leftovers(common, {pictures});
}

void ScanOptions::expect_all_used(const CLI::App* sub) const {
  const std::array<const std::string*, 3> outputs{&json, &csv, &html};
  const bool file =
      std::any_of(outputs.begin(), outputs.end(), [](const std::string* out) { return !out->empty() && *out != "-"; });
  expect_used(sub, {{"--pictures", svg || png, "without --svg or --png", "it says where these files go"},
                    {"--fresh", file, "without a file to write", "only a scan that writes one keeps a journal"}});
}

std::string fingerprint(const std::vector<std::string>& paths, const std::string& options) {
  namespace fs = std::filesystem;
  constexpr int format = 4;  // of the entries, which may change between two releases
  std::string s = text("lowrank ", version, " format ", format, " ", options);
  const auto stamp = [&](const fs::path& p) {
    struct stat info {};
    if (::stat(p.c_str(), &info) == 0 && S_ISREG(info.st_mode))
      s += "|" + p.string() + ":" + std::to_string(info.st_size) + ":" + std::to_string(info.st_mtim.tv_sec) + "." +
           std::to_string(info.st_mtim.tv_nsec);
  };
  for (const std::string& path : paths) {
    std::error_code ignored;
    if (fs::is_directory(path, ignored)) {
      std::vector<fs::path> files;
      for (const auto& entry : fs::directory_iterator(path, ignored)) files.push_back(entry.path());
      std::sort(files.begin(), files.end());
      for (const auto& f : files)
        if (f.extension() == ".safetensors" || f.extension() == ".json") stamp(f);
    } else {
      stamp(path);
    }
  }
  return s;
}

void expect_something(const std::string& path, const std::string& filter, const ScanPlan& plan) {
  if (!plan.jobs.empty()) return;
  const bool faults =
      std::any_of(plan.skipped.begin(), plan.skipped.end(), [](const Skipped& s) { return s.is_fault(); });
  if (faults) return;  // which the report lists
  if (filter.empty()) {
    if (plan.skipped.empty()) throw IoError(path, "holds no matrices");
    return;
  }
  const auto& names = plan.names;
  std::string some;
  for (std::size_t i = 0; i < std::min<std::size_t>(names.size(), 3); ++i) some += (i > 0 ? ", " : "") + names[i];
  throw IoError(path, text("--filter ", filter, " matches none of its ", names.size(), " names",
                           names.empty() ? std::string() : ": " + some, names.size() > 3 ? ", ..." : ""));
}

namespace {

/// The share of a scan that this process does, and then what all of them did.
class Scan {
 public:
  Scan(const ScanOptions& o, const ScanPlan& plan)
      : o_(o), jobs_(plan.jobs), entries_(plan.jobs.size()), errors_(plan.jobs.size()) {
#if defined(LOWRANK_TOOL_MPI)
    rank_ = world().rank();
    ranks_ = world().size();
#endif
    for (const ScanJob& j : jobs_) costs_.push_back(j.cost);
    owner_ = balance_jobs(costs_, ranks_);
    journal_path_ = journal_path(o, rank_, ranks_);
    try {
      journal_.emplace(journal_path_, plan.fingerprint, o.fresh);
    } catch (const Error& e) {
      fatal_ = e.what();
    }
  }

  /// Takes what the journal holds, and leaves the rest to do, the largest first: the last to finish are then small.
  void claim() {
    for (std::size_t i = 0; i < jobs_.size(); ++i) {
      if (owner_[i] != rank_ || !journal_) continue;
      if (const Json* known = journal_->find(jobs_[i].name)) {
        entries_[i] = *known;
        ++resumed_;
      } else {
        todo_.push_back(i);
      }
    }
    std::stable_sort(todo_.begin(), todo_.end(), [&](std::size_t a, std::size_t b) { return costs_[a] > costs_[b]; });
  }

  /// Many at once. **Throws** Interrupted when a signal came; over MPI it ends all ranks then.
  void compute(const std::string& command) {
    describe_interruption(command, journal_path_.empty() ? "nothing was written"
                                                         : "finished matrices are kept in " + journal_path_ +
                                                               ", from which the same command goes on");
    std::uint64_t bytes = 0;
    for (const std::size_t i : todo_) bytes += jobs_[i].bytes;
    Common common = o_.common;
    common.quiet = common.quiet || rank_ != 0;
    Progress progress(common, command, todo_.size(), "matrices", bytes);
    const int wanted = o_.in_flight > 0 ? o_.in_flight : max_threads();
    const int at_once = int(std::min<std::size_t>(std::size_t(wanted), std::max<std::size_t>(1, todo_.size())));
    if (at_once > 1) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(at_once)
#endif
      for (Index t = 0; t < Index(todo_.size()); ++t) work(todo_[std::size_t(t)], progress);
    } else {
      for (const std::size_t i : todo_) work(i, progress);
    }
    seconds_ = progress.seconds();
#if defined(LOWRANK_TOOL_MPI)
    if (const int signal = interrupted(); signal != 0) {  // nobody may wait for this rank
      say_interrupted();
      MPI_Abort(MPI_COMM_WORLD, Interrupted{signal}.exit_code());
    }
#endif
    throw_if_interrupted();
  }

  /// Brings the shares of all ranks together.
  void gather() {
#if defined(LOWRANK_TOOL_MPI)
    Json mine = Json::array();
    for (std::size_t i = 0; i < jobs_.size(); ++i)
      if (owner_[i] == rank_) mine.push_back({i, errors_[i], entries_[i]});
    const Json share{{"fatal", fatal_}, {"entries", std::move(mine)}};
    for (const std::string& text : world().gather(share.dump(-1, ' ', false, Json::error_handler_t::replace))) {
      const Json theirs = Json::parse(text);
      if (fatal_.empty()) fatal_ = theirs["fatal"].get<std::string>();
      for (const Json& entry : theirs["entries"]) {
        errors_[entry[0].get<std::size_t>()] = entry[1].get<std::string>();
        entries_[entry[0].get<std::size_t>()] = entry[2];
      }
    }
#endif
  }

  /// **Throws** Error for what ended the scan on any rank. A follower's result is empty: what it holds has holes, and
  /// the leader has everything.
  ScanResult result(const ScanPlan& plan) {
    if (!fatal_.empty()) throw Error(fatal_);
    ScanResult r;
    r.leader = rank_ == 0;
    r.journal = journal_path_;
    r.resumed = resumed_;
    r.seconds = seconds_;
    if (!r.leader) return r;
    for (std::size_t i = 0; i < jobs_.size(); ++i) {
      if (errors_[i].empty())
        r.matrices.push_back(std::move(entries_[i]));
      else
        r.failed.push_back({jobs_[i].name, SkipReason::failed, errors_[i]});
    }
    r.skipped = plan.skipped;
    return r;
  }

 private:
#if defined(LOWRANK_TOOL_MPI)
  static MpiWorld& world() {
    static MpiWorld instance;
    return instance;
  }
#endif
  void work(std::size_t i, Progress& progress) {
    if (interrupted() != 0) return;
    Json entry;
    std::string error;
    try {
      entry = jobs_[i].work();
    } catch (const std::bad_alloc&) {
      error = "not enough memory";
    } catch (const std::exception& e) {
      error = e.what();
    }
#if defined(_OPENMP)
#pragma omp critical(lowrank_scan)
#endif
    {
      errors_[i] = error;
      try {
        if (error.empty()) journal_->add(jobs_[i].name, entry);
      } catch (const std::exception& e) {
        fatal_ = e.what();
      }
      entries_[i] = std::move(entry);
      progress.advance(jobs_[i].bytes, jobs_[i].name);
    }
  }

  const ScanOptions& o_;
  const std::vector<ScanJob>& jobs_;
  int rank_ = 0, ranks_ = 1;
  std::vector<double> costs_;
  std::vector<int> owner_;
  std::string journal_path_;
  std::optional<Journal> journal_;
  std::vector<std::size_t> todo_;
  std::vector<Json> entries_;  ///< by job; those of other ranks come with gather()
  std::vector<std::string> errors_;
  std::string fatal_;  ///< thrown only after the ranks have met: nobody may wait for one that has left
  std::size_t resumed_ = 0;
  double seconds_ = 0;
};

}  // namespace

ScanResult run_scan(const ScanOptions& o, const std::string& command, const ScanPlan& plan) {
  Scan scan(o, plan);
  scan.claim();
  scan.compute(command);
  scan.gather();
  return scan.result(plan);
}

namespace {

Json report_of(const ScanResult& r, Json header) {
  Json report = std::move(header);
  report["matrices"] = r.matrices;
  report["skipped"] = to_json(r.skipped);
  report["failed"] = to_json(r.failed);
  report["skipped_vectors"] = r.count(SkipReason::vector);
  report["seconds"] = r.seconds;
  report["resumed"] = r.resumed;
  return report;
}

void write_output(const std::string& path, const std::string& content) {
  if (path == "-")
    std::fwrite(content.data(), 1, content.size(), stdout);
  else if (!path.empty())
    io::write_text(path, content);
}

void write_pictures(const ScanOptions& o, const Json& report) {
  const auto pictures = draw_pictures({report}, o.png ? "png" : nullptr);
  if (!pictures.problem.empty()) note(o.common, pictures.problem);
  for (const Picture& p : pictures.list) {
    const std::string stem = (std::filesystem::path(o.pictures) / p.name).string();
    if (o.svg) io::write_text(stem + ".svg", p.light);
    if (o.png) io::write_text(stem + ".png", p.png);
  }
  if (!o.html.empty()) write_output(o.html, html_report({report}, pictures));
}

/// What stands below the table.
std::string summary_of(const ScanResult& r) {
  const std::size_t vectors = r.count(SkipReason::vector),
                    others = r.count(SkipReason::type) + r.count(SkipReason::empty);
  return text(r.matrices.size(), " matrices in ", time_text(r.seconds),
              r.resumed > 0 ? text(", ", r.resumed, " of them from an earlier run") : std::string(),
              vectors > 0 ? text("; ", vectors, " vectors skipped") : std::string(),
              others > 0 ? text("; ", others, " other tensors skipped") : std::string(), "\n");
}

}  // namespace

std::size_t ScanResult::count(SkipReason why) const {
  return std::size_t(std::count_if(skipped.begin(), skipped.end(), [&](const Skipped& s) { return s.why == why; }));
}

void finish_scan(const ScanOptions& o, ScanResult&& r, Json header, const std::string& table) {
  const auto drop_journal = [&] {
    std::error_code ignored;
    if (!r.journal.empty()) std::filesystem::remove(r.journal, ignored);
  };
  if (!r.leader) return drop_journal();  // its results are with the leader
  throw_if_interrupted();
  const Finishing finishing;
  common::clear_progress();
  const Json report = report_of(r, std::move(header));
  write_output(o.json, report.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
  if (!o.csv.empty()) write_output(o.csv, csv_text(r.matrices));
  if (!o.html.empty() || o.svg || o.png) write_pictures(o, report);
  if (!o.uses_stdout()) write_output("-", table + summary_of(r));
  std::fflush(stdout);
  if (!r.failed.empty())  // the journal stays: a second run need not repeat what went well
    throw Error(text(r.failed.size(), " of ", r.failed.size() + r.matrices.size(),
                     " matrices could not be analysed: ", joined(r.failed)));
  drop_journal();
  std::vector<Skipped> faults;
  std::copy_if(r.skipped.begin(), r.skipped.end(), std::back_inserter(faults),
               [](const Skipped& s) { return s.is_fault(); });
  if (!faults.empty()) throw Error(text(faults.size(), " tensors do not fit each other: ", joined(faults)));
}

}  // namespace lowrank::tool

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
  constexpr int format = 3;  // of the entries, which may change between two releases
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

ScanResult run_scan(const ScanOptions& o, const std::string& what, const std::string& fingerprint,
                    const std::vector<ScanJob>& jobs) {
  int rank = 0, ranks = 1;
#if defined(LOWRANK_TOOL_MPI)
  static MpiWorld world;
  rank = world.rank();
  ranks = world.size();
#endif
  std::vector<double> costs;
  for (const ScanJob& j : jobs) costs.push_back(j.cost);
  const auto owner = balance_jobs(costs, ranks);
  ScanResult r;
  r.journal = journal_path(o, rank, ranks);
  r.leader = rank == 0;
  r.matrices.assign(jobs.size(), Json());
  std::vector<std::string> errors(jobs.size());
  std::string fatal;  // thrown only after the ranks have met: nobody may wait for one that has left
  std::optional<Journal> journal;
  try {
    journal.emplace(r.journal, fingerprint, o.fresh);
  } catch (const Error& e) {
    fatal = e.what();
  }
  describe_interruption(
      what, r.journal.empty() ? "nothing was written"
                              : "finished matrices are kept in " + r.journal + ", from which the same command goes on");
  std::vector<std::size_t> todo;
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (owner[i] != rank || !journal) continue;
    if (const Json* known = journal->find(jobs[i].name)) {
      r.matrices[i] = *known;
      ++r.resumed;
      continue;
    }
    todo.push_back(i);
    bytes += jobs[i].bytes;
  }
  // Largest first: the last to finish are then the small ones.
  std::stable_sort(todo.begin(), todo.end(), [&](std::size_t a, std::size_t b) { return costs[a] > costs[b]; });
  Common common = o.common;
  common.quiet = common.quiet || rank != 0;
  Progress progress(common, what, todo.size(), "matrices", bytes);
  const auto work = [&](std::size_t i) {
    if (interrupted() != 0) return;
    Json result;
    std::string error;
    try {
      result = jobs[i].work();
    } catch (const std::bad_alloc&) {
      error = "not enough memory";
    } catch (const std::exception& e) {
      error = e.what();
    }
#if defined(_OPENMP)
#pragma omp critical(lowrank_scan)
#endif
    {
      errors[i] = error;
      try {
        if (error.empty()) journal->add(jobs[i].name, result);
      } catch (const std::exception& e) {
        fatal = e.what();
      }
      r.matrices[i] = std::move(result);
      progress.advance(jobs[i].bytes, jobs[i].name);
    }
  };
  const int wanted = o.in_flight > 0 ? o.in_flight : max_threads();
  const int at_once = int(std::min<std::size_t>(std::size_t(wanted), std::max<std::size_t>(1, todo.size())));
  if (at_once > 1) {
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(at_once)
#endif
    for (Index t = 0; t < Index(todo.size()); ++t) work(todo[std::size_t(t)]);
  } else {
    for (const std::size_t i : todo) work(i);
  }
#if defined(LOWRANK_TOOL_MPI)
  if (const int signal = interrupted(); signal != 0) {  // nobody may wait for this rank
    say_interrupted();
    MPI_Abort(MPI_COMM_WORLD, Interrupted{signal}.exit_code());
  }
#endif
  throw_if_interrupted();
#if defined(LOWRANK_TOOL_MPI)
  Json mine = Json::array();
  for (std::size_t i = 0; i < jobs.size(); ++i)
    if (owner[i] == rank) mine.push_back({i, errors[i], r.matrices[i]});
  const Json share{{"fatal", fatal}, {"entries", std::move(mine)}};
  for (const std::string& text : world.gather(share.dump(-1, ' ', false, Json::error_handler_t::replace))) {
    const Json theirs = Json::parse(text);
    if (fatal.empty()) fatal = theirs["fatal"].get<std::string>();
    for (const Json& entry : theirs["entries"]) {
      errors[entry[0].get<std::size_t>()] = entry[1].get<std::string>();
      r.matrices[entry[0].get<std::size_t>()] = entry[2];
    }
  }
#endif
  if (!fatal.empty()) throw Error(fatal);
  if (!r.leader) {  // the leader has everything; what a follower holds is its own share, with holes
    r.matrices.clear();
    return r;
  }
  std::vector<Json> kept;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    if (!errors[i].empty())
      r.failed.push_back({jobs[i].name, errors[i], true});
    else
      kept.push_back(std::move(r.matrices[i]));
  }
  r.matrices = std::move(kept);
  r.seconds = progress.seconds();
  return r;
}

void finish_scan(const ScanOptions& o, ScanResult&& r, Json header, const std::string& table) {
  const auto drop_journal = [&] {
    std::error_code ignored;
    if (!r.journal.empty()) std::filesystem::remove(r.journal, ignored);
  };
  if (!r.leader) return drop_journal();  // its results are with the leader
  throw_if_interrupted();
  const Finishing finishing;
  std::vector<Skipped> faults;
  std::size_t vectors = 0, others = 0;
  for (const Skipped& s : r.skipped) {
    if (s.fault)
      faults.push_back(s);
    else
      ++(s.reason.starts_with("has fewer than two dimensions") ? vectors : others);
  }
  Json report = std::move(header);
  report["matrices"] = r.matrices;
  report["skipped"] = to_json(r.skipped);
  report["failed"] = to_json(r.failed);
  report["skipped_vectors"] = vectors;
  report["seconds"] = r.seconds;
  report["resumed"] = r.resumed;
  const auto write = [](const std::string& path, const std::string& text) {
    if (path == "-")
      std::fwrite(text.data(), 1, text.size(), stdout);
    else if (!path.empty())
      io::write_text(path, text);
  };
  write(o.json, report.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
  if (!o.csv.empty()) write(o.csv, csv_text(r.matrices));
  if (!o.html.empty() || o.svg || o.png) {
    const auto pictures = draw_pictures({report}, o.png ? "png" : nullptr);
    if (!pictures.problem.empty()) note(o.common, pictures.problem);
    for (const Picture& p : pictures.list) {
      const std::string stem = (std::filesystem::path(o.pictures) / p.name).string();
      if (o.svg) io::write_text(stem + ".svg", p.light);
      if (o.png) io::write_text(stem + ".png", p.png);
    }
    if (!o.html.empty()) write(o.html, html_report({report}, pictures));
  }
  if (!o.uses_stdout()) {
    std::string out = table;
    out += std::to_string(r.matrices.size()) + " matrices in " + time_text(r.seconds);
    if (r.resumed > 0) out += ", " + std::to_string(r.resumed) + " of them from an earlier run";
    if (vectors > 0) out += "; " + std::to_string(vectors) + " vectors skipped";
    if (others > 0) out += "; " + std::to_string(others) + " other tensors skipped";
    out += "\n";
    std::fwrite(out.data(), 1, out.size(), stdout);
  }
  std::fflush(stdout);
  if (r.failed.empty()) drop_journal();  // otherwise a second run need not repeat what went well
  if (!r.failed.empty())
    throw Error(text(r.failed.size(), " of ", r.failed.size() + r.matrices.size(),
                     " matrices could not be analysed: ", joined(r.failed)));
  if (!faults.empty()) throw Error(text(faults.size(), " tensors do not fit each other: ", joined(faults)));
}

}  // namespace lowrank::tool

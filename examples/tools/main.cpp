// SPDX-License-Identifier: Apache-2.0
// lowrank: initialise, extract, merge, convert and inspect low-rank adapters of real checkpoints.
//
// Exit codes: 0 done, 1 the input was wrong (one line on stderr says what), 2 usage, 130 SIGINT (Ctrl-C), 143 SIGTERM.
#include <lowrank/core/errors.hpp>
#include <lowrank/core/version.hpp>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <new>

#include "common/cli.hpp"
#include "interrupt.hpp"
#include "tool.hpp"

namespace lowrank::tool {
namespace {

struct Entry {
  int order;
  const char* name;
  void (*add)(CLI::App&);
};
std::vector<Entry>& entries() {
  static std::vector<Entry> list;  // a function's static: registrations run before main, in any order of files
  return list;
}

int complain(int code, const std::string& message) { return common::complain("lowrank", code, message); }

int run(std::vector<std::string> words) {
  CLI::App app{"Low-rank adapters of real checkpoints: initialise, extract, resize, merge, combine, convert, inspect."};
  app.name("lowrank");
  app.set_version_flag("--version", std::string("lowrank ") + version);
  app.require_subcommand(1);
  auto list = entries();
  std::sort(list.begin(), list.end(), [](const Entry& a, const Entry& b) { return a.order < b.order; });
  for (const Entry& e : list) e.add(app);
  for (CLI::App* sub : app.get_subcommands(nullptr))
    sub->preparse_callback([name = sub->get_name()](std::size_t) { describe_interruption(name); });
  if (!words.empty() && words[0] == "help") {  // lowrank help [SUBCOMMAND]
    words.erase(words.begin());
    std::vector<std::string> known;
    for (const CLI::App* sub : app.get_subcommands(nullptr)) known.push_back(sub->get_name());
    if (!words.empty() && !common::is_one_of(words[0], known))
      return complain(2, common::unknown("subcommand", words[0], known) + " (see lowrank --help)");
    words.emplace_back("--help");
  }
  std::reverse(words.begin(), words.end());  // as CLI11 wants them
  try {
    watch_for_interrupts();
    app.parse(std::move(words));
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) return complain(1, "cannot write the report to stdout");
    return 0;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    return complain(2, common::explain(app, e));
  } catch (const Interrupted& e) {
    say_interrupted();
    return e.exit_code();
  } catch (const UsageError& e) {
    return complain(2, e.what());
  } catch (const Error& e) {
    return complain(1, e.what());
  } catch (const std::filesystem::filesystem_error& e) {
    return complain(1, e.what());
  } catch (const std::bad_alloc&) {
    return complain(1, "not enough memory");
  } catch (const std::exception& e) {
    return complain(1, e.what());
  }
}

}  // namespace

Registration::Registration(int order, const char* name, void (*add)(CLI::App&)) {
  entries().push_back({order, name, add});
}

}  // namespace lowrank::tool

int main(int argc, char** argv) {
  // A limit on file sizes is a disk that is full: an error of the write that met it, with the temporary file removed.
  std::signal(SIGXFSZ, SIG_IGN);
  return lowrank::tool::run({argv + 1, argv + argc});
}

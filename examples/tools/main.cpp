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
#include <string_view>

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

/// One line on stderr, whatever the message holds.
int complain(int code, std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  std::fprintf(stderr, "lowrank: %s\n", message.c_str());
  return code;
}

/// What to say of a command line that does not parse, and of which subcommand the help would tell more.
int complain_of_usage(const CLI::App& app, const CLI::ParseError& e) {
  const auto chosen = app.get_subcommands();
  const std::string name = chosen.empty() ? std::string() : chosen.front()->get_name();
  std::string what = e.what();
  constexpr std::string_view converting = "Could not convert: ";
  if (dynamic_cast<const CLI::ExtrasError*>(&e) != nullptr) {
    if (const std::string words = unexpected_words(app); !words.empty()) what = words;
  } else if (what.starts_with(converting)) {  // the words of a conversion, of which no check said more
    what = "not a value this option takes: " + what.substr(converting.size());
  }
  if (!name.empty() && !what.starts_with(name + ": ")) what = name + ": " + what;
  return complain(2, what + " (see lowrank " + (name.empty() ? "" : name + " ") + "--help)");
}

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
  if (!words.empty() && words[0] == "help") {  // lowrank help SUBCOMMAND
    words.erase(words.begin());
    words.resize(std::min<std::size_t>(words.size(), 1));
    words.emplace_back("--help");
  }
  if (!words.empty() && !words[0].starts_with('-') &&
      app.get_subcommands([&](const CLI::App* sub) { return sub->get_name() == words[0]; }).empty())
    return complain(2, unknown_subcommand(app, words[0]) + " (see lowrank --help)");
  std::reverse(words.begin(), words.end());  // as CLI11 wants them
  try {
    watch_for_interrupts();
    app.parse(std::move(words));
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) return complain(1, "cannot write the report to stdout");
    return 0;
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
    return complain_of_usage(app, e);
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

// SPDX-License-Identifier: Apache-2.0
// Ctrl-C and SIGTERM: work stops where it may, what is half-written is removed, a second signal ends the program at
// once.
#pragma once

#include <string>

namespace lowrank::tool {

/// Thrown where work stops because of a signal. No std::exception on purpose: what turns the error of one matrix into a
/// line of the report must not take it for one.
struct Interrupted {
  int signal;
  [[nodiscard]] int exit_code() const noexcept { return 128 + signal; }
};

/// The first SIGINT or SIGTERM from now on is only noted; a second one of either kind has its usual effect. A signal
/// that is ignored (nohup, a shell's background job) stays ignored.
///
/// Work that does not come to throw_if_interrupted() within a second, one large decomposition for example, is left: the
/// files being written are removed by the handler, and the process ends with the code and the message it would have
/// had.
void watch_for_interrupts();

/// The signal that came; 0 if none did. For any thread.
[[nodiscard]] int interrupted() noexcept;

/// Throws Interrupted if a signal came. Not in a parallel region, which no exception may leave.
void throw_if_interrupted();

/// What say_interrupted() will say: the command, and what becomes of its files.
void describe_interruption(const std::string& command,
                           const std::string& files = "unfinished files are removed, existing ones are untouched");

/// "lowrank: interrupted (SIGINT) in COMMAND: FILES" on stderr, from a handler too.
void say_interrupted() noexcept;

/// While one lives, files that belong together are moved into place: the first signal is answered with a line that says
/// so, and does not stop it.
class Finishing {
 public:
  Finishing() noexcept;
  Finishing(const Finishing&) = delete;
  Finishing& operator=(const Finishing&) = delete;
  ~Finishing();
};

/// Directories that are not there yet and will be made on the way to `path`. Those in which nothing came to lie are
/// removed when this goes, or when a signal ends the process: a run that failed leaves no empty ones.
class NewDirectories {
 public:
  explicit NewDirectories(const std::string& path);
  NewDirectories(const NewDirectories&) = delete;
  NewDirectories& operator=(const NewDirectories&) = delete;
  ~NewDirectories();
};

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// How both programs say that something is wrong: one line, "PROGRAM: error: WHAT", and a code to end with.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace common {

/// What a program ends with. A signal ends it with 128 + its number (130 for Ctrl-C).
namespace exit_code {
inline constexpr int done = 0;
inline constexpr int failed = 1;    ///< the input or the machine was not as expected
inline constexpr int usage = 2;     ///< the command line was wrong
inline constexpr int diverged = 3;  ///< the rest was done, but a training diverged
}  // namespace exit_code

/// A command line that makes no sense: an unknown name, a value out of range, options that do not go together or have
/// no use. The program ends with exit_code::usage.
class UsageError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Prints "PROGRAM: error: MESSAGE" on stderr, on one line whatever the message holds, over an open progress bar; gives
/// `code` back.
int complain(std::string_view program, int code, std::string message);

/// Prints "PROGRAM: LINE" on stderr, over an open progress bar.
void note(std::string_view program, std::string_view line);

/// How many letters must be put in, taken out, replaced, or swapped with the next one to make b of a.
std::size_t edit_distance(std::string_view a, std::string_view b);

/// The one of `known` that was most likely meant; "" when none is near: more than a third of the letters would change.
std::string nearest(std::string_view word, const std::vector<std::string>& known);

/// "unknown WHAT 'WORD'; did you mean 'NEAREST'?", or, when none is near, "…; expected one of A, B, C".
std::string unknown(std::string_view what, std::string_view word, const std::vector<std::string>& known);

}  // namespace common

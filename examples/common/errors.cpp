// SPDX-License-Identifier: Apache-2.0
#include "common/errors.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "common/progress.hpp"
#include "common/text.hpp"

namespace common {

int complain(std::string_view program, int code, std::string message) {
  std::replace(message.begin(), message.end(), '\n', ' ');
  note(program, "error: " + message);
  return code;
}

void note(std::string_view program, std::string_view line) {
  clear_progress();
  const std::string whole = text(program, ": ", line, "\n");  // one write: lines of several processes stay whole
  std::fwrite(whole.data(), 1, whole.size(), stderr);
}

std::size_t edit_distance(std::string_view a, std::string_view b) {
  // Rows i-2, i-1 and i of the table of distances between beginnings of a and beginnings of b.
  std::vector<std::size_t> before(b.size() + 1), above(b.size() + 1), row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    before = std::exchange(above, std::exchange(row, before));
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({above[j] + 1, row[j - 1] + 1, above[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before[j - 2] + 1);
    }
  }
  return row[b.size()];
}

std::string nearest(std::string_view word, const std::vector<std::string>& known) {
  std::string best;
  std::size_t least = std::string::npos;
  for (const std::string& k : known) {
    const std::size_t d = edit_distance(word, k);
    // Most of a long name ("--checkpoint" of "--checkpoint-every") is taken for the whole.
    const bool begins = word.size() >= 4 && k.starts_with(word);
    if (d < least && (begins || d <= std::max<std::size_t>(1, std::max(word.size(), k.size()) / 3))) {
      best = k;
      least = d;
    }
  }
  return best;
}

std::string unknown(std::string_view what, std::string_view word, const std::vector<std::string>& known) {
  std::string message = text("unknown ", what, " '", word, "'");
  if (const std::string near = nearest(word, known); !near.empty()) return message + "; did you mean '" + near + "'?";
  std::string list;
  for (const std::string& k : known) list += (list.empty() ? "" : ", ") + k;
  return message + "; expected one of " + list;
}

}  // namespace common

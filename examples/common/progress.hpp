// SPDX-License-Identifier: Apache-2.0
// The progress bar of both programs: "label [####....] 12 of 48 matrices, 120 MB/s, 0:40 left  name", redrawn in place
// on stderr when that is a terminal; elsewhere a plain line now and then, or nothing.
//
// On a terminal the bar is one line that is cleared before anything else is said, so it may be mixed with reports on
// stdout: call clear_progress() before printing a report.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace common {

/// "13.5 GB", "4.0 KB".
std::string size_text(std::uint64_t bytes);
/// "0.8 s", "1:05", "2:01:05".
std::string time_text(double seconds);

struct ProgressOptions {
  std::string label;
  std::uint64_t items = 0;                          ///< in all; 0: not counted, only the share of the work is shown
  std::string item_name = "";                       ///< "matrices", "steps"
  std::uint64_t work = 0;                           ///< in all, what time goes with; 0: the items are the work
  std::string work_name = "bytes";                  ///< "bytes" are written as MB/s, others as "1234 tokens/s"
  std::uint64_t items_before = 0, work_before = 0;  ///< done by an earlier run: no part of the rate
  int plain_lines = 0;                              ///< lines in all where stderr is no terminal
  bool quiet = false;                               ///< show nothing anywhere
};

/// One at a time. Not for several threads at once: guard it if they report.
class Progress {
 public:
  explicit Progress(ProgressOptions options);
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  /// Clears the bar.
  ~Progress();

  /// `items` and `work` are done in all, earlier runs included; `detail` is shown behind.
  void update(std::uint64_t items, std::uint64_t work, std::string_view detail = {});
  /// Leaves a line that stays: the same with the time it took.
  void finish(std::string_view detail = {});
  [[nodiscard]] double seconds() const;

 private:
  [[nodiscard]] std::string line(bool bar, bool last, std::string_view detail) const;
  ProgressOptions o_;
  bool terminal_;
  std::uint64_t items_, work_;
  double start_, drawn_ = -1e9;
  int lines_ = 0;
};

/// Clears the bar that is open, if one is; it comes back with the next update.
void clear_progress();

}  // namespace common

// SPDX-License-Identifier: Apache-2.0
// What the two programs share.
#include <doctest/doctest.h>

#include "common/errors.hpp"
#include "common/progress.hpp"
#include "common/text.hpp"

TEST_CASE("edit distance counts insertions, removals, replacements and swapped neighbours") {
  using common::edit_distance;
  CHECK(edit_distance("", "") == 0);
  CHECK(edit_distance("", "abc") == 3);
  CHECK(edit_distance("abc", "") == 3);
  CHECK(edit_distance("kitten", "sitting") == 3);
  CHECK(edit_distance("loar", "lora") == 1);  // swapped
  CHECK(edit_distance("ca", "abc") == 3);     // optimal string alignment: no letter is touched twice
  CHECK(edit_distance("flaw", "lawn") == 2);
}

TEST_CASE("the nearest name is suggested when one is near") {
  const std::vector<std::string> known{"full", "lora", "pissa", "olora", "qlora4", "loftq4"};
  CHECK(common::nearest("loar", known) == "lora");
  CHECK(common::nearest("pisa", known) == "pissa");
  CHECK(common::nearest("dora", known) == "lora");
  CHECK(common::nearest("zebra", known).empty());
  CHECK(common::nearest("", known).empty());
  CHECK(common::nearest("--checkpoint", {"--check", "--checkpoint-every"}) == "--checkpoint-every");
  CHECK(common::unknown("method", "loar", known) == "unknown method 'loar'; did you mean 'lora'?");
  CHECK(common::unknown("method", "zebra", {"full", "lora"}) == "unknown method 'zebra'; expected one of full, lora");
}

TEST_CASE("sizes, times and messages") {
  CHECK(common::size_text(999) == "999 B");
  CHECK(common::size_text(13500000000) == "13.5 GB");
  CHECK(common::time_text(0.84) == "0.8 s");
  CHECK(common::time_text(59.97) == "1:00");
  CHECK(common::time_text(65) == "1:05");
  CHECK(common::time_text(7265) == "2:01:05");
  CHECK(common::text("rank ", 3, " of ", common::shape_text(3, 5), ", ", 0.5, true) == "rank 3 of 3x5, 0.5true");
  CHECK(common::last_component("model.layers.0.q_proj") == "q_proj");
  CHECK(common::last_component("lm_head") == "lm_head");
}

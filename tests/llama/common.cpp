// SPDX-License-Identifier: Apache-2.0
// What the two programs share.
#include <doctest/doctest.h>
#include <stdlib.h>

#include <filesystem>
#include <set>

#include "common/errors.hpp"
#include "common/outputs.hpp"
#include "common/progress.hpp"
#include "common/text.hpp"
#include "lowrank/io/file.hpp"

namespace fs = std::filesystem;

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

namespace {

/// A folder of its own for one test case.
struct Scratch {
  Scratch() {
    char name[] = "/tmp/lowrank-common-XXXXXX";
    path = mkdtemp(name);
  }
  ~Scratch() { fs::remove_all(path); }
  void write(const std::string& name, const std::string& text) const {
    fs::create_directories(fs::path(path + "/" + name).parent_path());
    lowrank::io::write_text(path + "/" + name, text);
  }
  [[nodiscard]] std::string read(const std::string& name) const { return lowrank::io::read_text(path + "/" + name); }
  [[nodiscard]] std::set<std::string> names() const {
    std::set<std::string> all;
    for (const auto& entry : fs::directory_iterator(path)) all.insert(entry.path().filename().string());
    return all;
  }
  std::string path;
};

}  // namespace

TEST_CASE("a staged folder appears whole, replaces another whole, or leaves everything as it was") {
  const Scratch d;
  {
    common::StagedFolder staged(d.path + "/out/full/");
    lowrank::io::write_text(staged.folder() + "/a", "1");
    CHECK_FALSE(fs::exists(d.path + "/out/full"));
    staged.commit();
  }
  CHECK(d.read("out/full/a") == "1");
  {
    common::StagedFolder staged(d.path + "/out/full");
    lowrank::io::write_text(staged.folder() + "/b", "2");
  }  // not committed
  CHECK(d.read("out/full/a") == "1");
  CHECK_FALSE(fs::exists(d.path + "/out/full/b"));
  {
    common::StagedFolder staged(d.path + "/out/full");
    lowrank::io::write_text(staged.folder() + "/b", "2");
    staged.commit();
  }
  CHECK(d.read("out/full/b") == "2");
  CHECK_FALSE(fs::exists(d.path + "/out/full/a"));
  CHECK(std::distance(fs::directory_iterator(d.path + "/out"), fs::directory_iterator()) == 1);
  d.write("file", "x");
  common::StagedFolder over_a_file(d.path + "/file");
  CHECK_THROWS_AS(over_a_file.commit(), lowrank::IoError);
  CHECK(d.read("file") == "x");
}

TEST_CASE("leftovers of killed runs are removed; what is being written, or is not ours, stays") {
  const Scratch d;
  d.write("full.partial-abc123/model.safetensors", "half");
  d.write("results.csv.partial-abc123", "half");
  d.write("other.partial-abc123", "a stranger's");
  d.write("full.partial-abc", "no such name is made");
  d.write("full", "whole");
  common::StagedFolder live(d.path + "/full.d");
  lowrank::io::OutputFile open(d.path + "/losses.csv");
  const auto before = d.names();
  const auto removed = common::remove_leftovers(d.path, [](const std::string& name) { return name != "other"; });
  CHECK(removed == std::vector<std::string>{d.path + "/full.partial-abc123", d.path + "/results.csv.partial-abc123"});
  CHECK(d.names().size() == before.size() - 2);
  CHECK(fs::exists(live.folder()));
  CHECK(common::remove_leftovers(d.path + "/nowhere", [](const std::string&) { return true; }).empty());
}

TEST_CASE("what exists is refused with the option that replaces it; paths mean the same from anywhere") {
  const Scratch d;
  fs::create_symlink("nowhere", d.path + "/dangling");
  CHECK_THROWS_WITH_AS(common::refuse_existing(d.path, "--overwrite"),
                       (d.path + ": exists already; --overwrite replaces it").c_str(), lowrank::IoError);
  CHECK_THROWS_AS(common::refuse_existing(d.path + "/dangling", "--overwrite"), lowrank::IoError);
  CHECK_NOTHROW(common::refuse_existing(d.path + "/new", "--overwrite"));
  CHECK(common::absolute("/a/../b/./c/") == "/b/c");
  CHECK(common::absolute("/") == "/");
  CHECK(common::absolute("base") == (fs::current_path() / "base").string());
}

// SPDX-License-Identifier: Apache-2.0
// Files on disk: what is not a regular file is refused, and a failed write leaves the old file as it was.
#include <sys/resource.h>

#include <csignal>

#include "lowrank/io/changed_base.hpp"
#include "lowrank/io/checkpoint.hpp"
#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;
namespace fs = std::filesystem;

namespace {
/// A one-tensor safetensors file, 1×n floats counted from `first`.
void put_tensor(const std::string& path, const std::string& name, Index n, float first = 0) {
  Matrix<float> m(1, n);
  for (Index i = 0; i < n; ++i) m(0, i) = first + float(i);
  fs::create_directories(fs::path(path).parent_path());
  SafeTensorsWriter w(path, {{name, Dtype::F32, {1, std::uint64_t(n)}}}, {{"format", "pt"}});
  w.write_matrix(name, m);
  w.commit();
}
}  // namespace

TEST_CASE("only regular files are read; links to them are") {
  TempDir dir;
  put(dir / "f", "x");
  fs::create_symlink(dir / "f", dir / "link");
  CHECK(MappedFile(dir / "link").bytes().size() == 1);
  check_error([&] { MappedFile f(dir.path()); }, {"is a directory"});
  check_error([&] { MappedFile f(dir / "none"); }, {"none", "No such file"});
  check_error([&] { MappedFile f("/dev/null"); }, {"not a regular file"});
  REQUIRE(::mkfifo((dir / "fifo").c_str(), 0600) == 0);
  check_error([&] { MappedFile f(dir / "fifo"); }, {"not a regular file"});  // and does not wait for a writer
  fs::create_symlink(dir / "loop", dir / "loop");
  check_error([&] { MappedFile f(dir / "loop"); }, {"loop"});
  put(dir / "empty", "");
  CHECK(MappedFile(dir / "empty").bytes().empty());
  check_error([&] { (void)read_text(dir / "f", 0); }, {"more than the 0 allowed"});
}

TEST_CASE("output replaces a file whole or not at all") {
  TempDir dir;
  const std::string path = dir / "out";
  put(path, "old");
  {
    OutputFile f(path);
    f.write_at(0, bytes_of("new"));
  }  // never committed
  CHECK(get(path) == "old");
  CHECK(files_in(dir.path()) == 1);
  write_text(path, "new");
  CHECK(get(path) == "new");
  CHECK(files_in(dir.path()) == 1);
  const auto mode = fs::status(path).permissions();
  CHECK((mode & fs::perms::owner_read) != fs::perms::none);
  CHECK((mode & fs::perms::owner_exec) == fs::perms::none);

  fs::create_directory(dir / "d");
  check_error([&] { OutputFile f(dir / "d"); }, {"is a directory"});
  fs::create_symlink(path, dir / "link");
  check_error([&] { OutputFile f(dir / "link"); }, {"symbolic link"});
  check_error([&] { OutputFile f(dir / "absent/out"); }, {"cannot create"});
  check_error([&] { OutputFile f("/dev/null"); }, {"not a regular file"});
}

TEST_CASE("no room on the disk: an error, and the old file intact") {
  TempDir dir;
  const std::string path = dir / "model.safetensors";
  put_tensor(path, "w", 4);
  const std::string old = get(path);
  // A limit on the size of files stands in for a full disk: writes fail in the same places.
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 64 << 10;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  std::string at_once, while_writing;
  try {
    SafeTensorsWriter w(path, {{"w", Dtype::F32, {1 << 20}}});
    at_once = "nothing";
  } catch (const IoError& e) {
    at_once = e.what();
  }
  try {
    OutputFile f(path);  // without reserve(): fails in the middle
    const std::string chunk(16 << 10, 'x');
    for (std::uint64_t i = 0; i < 8; ++i) f.write_at(i * chunk.size(), bytes_of(chunk));
    f.commit();
    while_writing = "nothing";
  } catch (const IoError& e) {
    while_writing = e.what();
  }
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
  CHECK(at_once.find("model.safetensors") != std::string::npos);
  CHECK(at_once.find("too large") != std::string::npos);
  CHECK(while_writing.find("cannot write") != std::string::npos);
  CHECK(get(path) == old);
  CHECK(files_in(dir.path()) == 1);
}

TEST_CASE("a checkpoint is a file, a directory, or shards with an index") {
  TempDir dir;
  put_tensor(dir / "one/model.safetensors", "w", 3, 7);
  for (const std::string& path : {dir / "one", dir / "one/model.safetensors"}) {
    const Checkpoint c(path);
    CHECK(c.size() == 1);
    CHECK(c["w"].to_matrix<float>()(0, 2) == 9);
    CHECK(c.index().empty());
  }
  put_tensor(dir / "many/m-1.safetensors", "a", 2);
  put_tensor(dir / "many/m-2.safetensors", "b", 3);
  put(dir / "many/model.safetensors.index.json",
      R"({"metadata":{"total_size":20,"x":[1,{"weight_map":3}]},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  const Checkpoint c(dir / "many");
  CHECK(c.size() == 2);
  CHECK(c.shard_count() == 2);
  CHECK(c["b"].size() == 3);
  CHECK_FALSE(c.find("c").has_value());
  std::string order;
  c.for_each([&](const TensorView& t) { order += t.name(); });
  CHECK(order == "ab");
  check_error([&] { (void)c["c"]; }, {"'c'", "no such tensor"});
  fs::create_directory(dir / "bare");
  check_error([&] { Checkpoint x(dir / "bare"); }, {"bare", "model.safetensors"});
  check_error([&] { Checkpoint x(dir / "nowhere"); }, {"nowhere"});
}

TEST_CASE("an index that does not fit its shards is refused") {
  TempDir dir;
  put_tensor(dir / "m-1.safetensors", "a", 2);
  put_tensor(dir / "m-2.safetensors", "a", 2);
  const auto with = [&](const std::string& map, std::initializer_list<const char*> parts) {
    INFO(map);
    put(dir / "model.safetensors.index.json", map);
    check_error([&] { Checkpoint c(dir.path()); }, parts);
  };
  with(R"({"weight_map":{"a":"m-9.safetensors"}})", {"'a'", "m-9.safetensors", "does not exist"});
  with(R"({"weight_map":{"a":"m-1.safetensors","z":"m-1.safetensors"}})", {"'z'", "m-1.safetensors"});
  with(R"({"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})", {"'a'", "two shards"});
  with(R"({"weight_map":{"a":"../m-1.safetensors"}})", {"'a'", "plain file name"});
  with(R"({"weight_map":{"a":"/etc/passwd"}})", {"plain file name"});
  with(R"({"weight_map":{"a":".."}})", {"plain file name"});
  with(R"({"weight_map":{"a":"m-1.safetensors","a":"m-2.safetensors"}})", {"'a'", "twice"});
  with(R"({"weight_map":{},"weight_map":{}})", {"twice"});
  with(R"({"weight_map":{"a":1}})", {"'a'", "file names"});
  with(R"({"weight_map":{"a":{"b":"c"}}})", {"file names"});
  with(R"({"weight_map":["a"]})", {"file names"});
  with(R"({"weight_map":3})", {"weight_map"});
  with(R"({"metadata":{}})", {"weight_map", "missing"});
  with(R"([])", {
                    "JSON object",
                });
  with(R"({"weight_map":{)", {"JSON"});
  with("{\"x\":" + std::string(100000, '['), {"nested"});
}

TEST_CASE("a rewritten checkpoint keeps what was not replaced, byte for byte, shard for shard") {
  TempDir dir;
  put_tensor(dir / "in/m-1.safetensors", "a", 5, 1);
  put_tensor(dir / "in/m-2.safetensors", "b", 4, 2);
  put(dir / "in/model.safetensors.index.json", R"({"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  const Checkpoint in(dir / "in");
  std::size_t seen = 0;
  const auto keep = [](const TensorView&) { return std::optional<TensorRewrite>(); };
  rewrite_checkpoint(in, dir / "copy", keep, [&](const TensorView&) { ++seen; });
  CHECK(seen == 2);
  for (const char* f : {"m-1.safetensors", "m-2.safetensors"})
    CHECK(get(dir / (std::string("copy/") + f)) == get(dir / (std::string("in/") + f)));
  CHECK(Checkpoint(dir / "copy").size() == 2);

  const auto change = [&](const TensorView& t) -> std::optional<TensorRewrite> {
    if (t.name() != "b") return std::nullopt;
    return TensorRewrite{{{"b", t.dtype(), t.shape()}, {"b.extra", Dtype::U8, {2}}}, [](SafeTensorsWriter& w) {
                           Matrix<float> m(1, 4);
                           w.write_matrix("b", m);
                           w.write("b.extra", bytes_of("ab"));
                         }};
  };
  rewrite_checkpoint(in, dir / "new", change, [](const TensorView&) {});
  const Checkpoint out(dir / "new");
  CHECK(out.size() == 3);
  CHECK(out["b"].to_matrix<float>()(0, 3) == 0);
  CHECK(out["a"].to_matrix<float>()(0, 4) == 5);
  CHECK(out["b.extra"].bytes().size() == 2);
  check_error([&] { rewrite_checkpoint(in, dir / "in", keep, [](const TensorView&) {}); }, {"both input and output"});
}

TEST_CASE("files that belong together: all of the old ones, all of the new ones, or a set without its key") {
  TempDir dir;
  const auto put_set = [&](const std::string& text) {
    for (const char* f : {"set/a", "set/b", "set/key"}) put(dir / f, text);
  };
  const auto stage = [&] {
    StagedFiles s;
    s.add_text(dir / "set/key", "new", true);
    for (const char* f : {"set/a", "set/b"}) s.add_text(dir / f, "new");
    return s;
  };
  put_set("old");
  put(dir / "set/stale", "old");
  {
    StagedFiles s = stage();
    s.remove(dir / "set/stale");
  }  // never committed
  for (const char* f : {"set/a", "set/b", "set/key", "set/stale"}) CHECK(get(dir / f) == "old");
  CHECK(files_in(dir / "set") == 4);
  {
    StagedFiles s = stage();
    s.remove(dir / "set/stale");
    s.remove(dir / "set/never there");
    s.commit();
  }
  for (const char* f : {"set/a", "set/b", "set/key"}) CHECK(get(dir / f) == "new");
  CHECK(files_in(dir / "set") == 3);
  // Something gets in the way of the second file while the first is in place already: as far as a crash there would
  // get.
  put_set("old");
  StagedFiles s = stage();
  fs::remove(dir / "set/b");
  fs::create_directory(dir / "set/b");
  check_error([&] { s.commit(); }, {"set/b"});
  CHECK(get(dir / "set/a") == "new");
  CHECK(!fs::exists(dir / "set/key"));
  // What is removed must be a file.
  check_error([&] { s.remove(dir / "set/b"); }, {"is a directory"});
}

TEST_CASE("a sharded checkpoint that was not put in place whole is not read") {
  TempDir dir;
  const auto put_shards = [&](const std::string& d, Index n) {
    put_tensor(dir / (d + "/m-1.safetensors"), "a", n);
    put_tensor(dir / (d + "/m-2.safetensors"), "b", n);
    put(dir / (d + "/model.safetensors.index.json"), R"({"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  };
  put_shards("in", 5);
  put_shards("out", 3);
  const Checkpoint in(dir / "in");
  const auto keep = [](const TensorView&) { return std::optional<TensorRewrite>(); };
  StagedFiles files = stage_checkpoint(in, dir / "out", keep, [](const TensorView&) {});
  CHECK(Checkpoint(dir / "out")["b"].size() == 3);
  fs::remove(dir / "out/m-2.safetensors");
  fs::create_directory(dir / "out/m-2.safetensors");
  check_error([&] { files.commit(); }, {"m-2.safetensors"});
  check_error([&] { Checkpoint c(dir / "out"); }, {"neither model.safetensors nor"});
}

TEST_CASE("weights of another layout do not stay beside new ones, other files do") {
  TempDir dir;
  put_tensor(dir / "one/model.safetensors", "a", 2);
  put_tensor(dir / "two/m-1.safetensors", "a", 5);
  put_tensor(dir / "two/m-2.safetensors", "b", 4);
  put(dir / "two/model.safetensors.index.json", R"({"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  const auto rewrite = [&](const std::string& from, const std::string& to) {
    rewrite_checkpoint(
        Checkpoint(dir / from), dir / to, [](const TensorView&) { return std::optional<TensorRewrite>(); },
        [](const TensorView&) {});
  };
  put(dir / "out/mine.safetensors", "mine");
  rewrite("one", "out");
  put_tensor(dir / "out/adapter_model.safetensors", "c", 1);
  rewrite("two", "out");  // neither the single file nor the adapter is taken for it
  CHECK(Checkpoint(dir / "out").size() == 2);
  CHECK(!fs::exists(dir / "out/model.safetensors"));
  rewrite("one", "out");
  CHECK(Checkpoint(dir / "out")["a"].size() == 2);
  for (const char* f : {"out/m-1.safetensors", "out/m-2.safetensors", "out/model.safetensors.index.json"})
    CHECK(!fs::exists(dir / f));
  CHECK(get(dir / "out/mine.safetensors") == "mine");
  // An index that is none says nothing of the files beside it; one that names an input does not cost it its life.
  put(dir / "out/model.safetensors.index.json", "{");
  rewrite("one", "out");
  CHECK(!fs::exists(dir / "out/model.safetensors.index.json"));
  put(dir / "two/model.safetensors.index.json", R"({"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}})");
  check_error([&] { rewrite("two/m-2.safetensors", "two"); }, {"m-2.safetensors", "is an input"});
  CHECK(Checkpoint(dir / "two").size() == 2);
}

TEST_CASE("XXH64 is the published one, and a fingerprint is of type, shape and every bit") {
  CHECK(xxh64(std::string_view("")) == 0xEF46DB3751D8E999U);
  CHECK(xxh64(std::string_view("a")) == 0xD24EC4F1A98C6E5BU);
  CHECK(xxh64(std::string_view("abc")) == 0x44BC2CF5AD770999U);
  CHECK(xxh64(std::string_view("Nobody inspects the spammish repetition")) == 0xFBCEA83C8A378BF1U);
  std::string bytes(96, 'x');
  const auto print = [&](Dtype d, const Shape& s) { return fingerprint(d, s, bytes_of(bytes)); };
  const std::string whole = print(Dtype::F32, {4, 6});
  CHECK(whole.size() == 16);
  std::set<std::string> seen{whole, print(Dtype::F32, {6, 4}), print(Dtype::I32, {4, 6}), print(Dtype::BF16, {4, 12})};
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = 'y';
    seen.insert(print(Dtype::F32, {4, 6}));
    bytes[i] = 'x';
  }
  CHECK(seen.size() == 4 + bytes.size());
  CHECK(print(Dtype::F32, {4, 6}) == whole);
}

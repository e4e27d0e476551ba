// SPDX-License-Identifier: Apache-2.0
// Text in: what is read, what is passed over, what is refused and in which words; what is held out and what a batch
// holds.
#include "corpus.hpp"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "lowrank/core/errors.hpp"
#include "lowrank/io/npy.hpp"
#include "support/temp_dir.hpp"

using namespace llama;
namespace fs = std::filesystem;

namespace {

/// A folder of its own for each test, removed at the end.
/// Text without repeats: line i says so.
std::string lines(int count, const std::string& tag) {
  std::string s;
  for (int i = 0; i < count; ++i) s += tag + " line " + std::to_string(i) + "\n\n";
  return s;
}

std::string text_of(const std::vector<Token>& tokens) { return {tokens.begin(), tokens.end()}; }

/// The message of the exception of type E that f throws.
template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  } catch (const std::exception& e) {
    FAIL("another exception: ", e.what());
  }
  FAIL("no exception");
  return {};
}
bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("bad input: each refusal names the path, what was expected and what came") {
  const test::TempDir f;
  const CorpusOptions o{.window = 16};
  const auto refused = [&](const std::string& path) {
    const std::string m = message_of<lowrank::IoError>([&] { load_text({path}, o); });
    CAPTURE(m);
    CHECK(contains(m, path));
    return m;
  };
  CHECK(contains(refused(f / "absent"), "No such file"));
  CHECK(contains(refused(f.write("empty.txt", "")), "empty"));
  CHECK(contains(refused(f.write("zero.txt", std::string("text\0more", 9))), "byte 0 at offset 4"));
  CHECK(contains(refused(f.write("control.txt", "ab\x01\x02\x03\x04gh")), "byte 1 at offset 2"));
  fs::create_directory(f / "nothing");
  CHECK(contains(refused(f / "nothing"), "expected text files, found 0 binary, 0 empty"));
  f.write("mixed/a", "");
  f.write("mixed/b", std::string("\0", 1));
  CHECK(contains(refused(f / "mixed"), "found 1 binary, 1 empty"));
  REQUIRE(::mkfifo((f / "pipe").c_str(), 0600) == 0);  // must not wait for a writer
  CHECK(contains(refused(f / "pipe"), "neither a file nor a folder"));
  fs::create_symlink("loop", f / "loop");
  refused(f / "loop");
  if (::geteuid() != 0) {  // root may read everything
    const std::string secret = f.write("secret.txt", lines(50, "x"));
    fs::permissions(secret, fs::perms::none);
    CHECK(contains(refused(secret), "Permission denied"));
  }
  CHECK(contains(message_of<lowrank::ArgumentError>([&] { load_text({}, o); }), "at least one path"));
  const std::string fine = f.write("fine.txt", lines(100, "x"));
  CHECK(contains(message_of<lowrank::ArgumentError>([&] { load_text({fine}, {.window = 0}); }), "window"));
  CHECK(contains(message_of<lowrank::ArgumentError>([&] { load_text({fine}, {.held_out = 0.5}); }), "held out"));
}

TEST_CASE("a text shorter than a window is refused with both lengths, at every length around the limit") {
  const test::TempDir f;
  for (const std::size_t n : {1U, 16U, 17U, 100U, 282U}) {
    const std::string path = f.write("short.txt", lines(60, "a").substr(0, n));
    const std::string m = message_of<lowrank::ArgumentError>([&] { load_text({path}, {.window = 16}); });
    CAPTURE(m);
    CHECK(contains(m, std::to_string(n) + " tokens"));
    CHECK(contains(m, "a window needs 17"));
  }
  const std::string path = f.write("long.txt", lines(60, "a").substr(0, 284));  // 6 % of 284 is 17
  const Corpus c = load_text({path}, {.window = 16});
  CHECK(c.test.size() == 17);
  CHECK(even_batches(c.test, 100, 16, 8).size() == 1);
  CHECK(random_batch(c.train, 4, 16, 0, 0).tokens() == 64);
}

TEST_CASE("folders: sorted, binary and empty files counted, hidden ones and second names not read") {
  const test::TempDir f;
  f.write("b.txt", lines(40, "second"));
  f.write("a/z.txt", lines(40, "first"));
  f.write("c.bin", std::string("\0\1\2", 3));
  f.write("d.txt", "");
  f.write(".git/config", lines(40, "hidden"));
  fs::create_symlink("b.txt", f / "again.txt");
  const Corpus c = load_text({f.path()}, {.window = 16});
  CHECK(c.report.files == 2);
  CHECK(c.report.binary == 1);
  CHECK(c.report.empty == 1);
  CHECK(c.report.links == 1);
  CHECK_FALSE(c.report.whole_files);
  const std::string train = text_of(c.train);
  CHECK(train.starts_with("first line 0\n"));
  CHECK(contains(train, "second line 0\n"));
  CHECK_FALSE(contains(train, "hidden"));
  // Nothing lost, nothing twice: the parts together are the two files.
  CHECK(c.train.size() + c.validation.size() + c.test.size() == lines(40, "second").size() + lines(40, "first").size());
}

TEST_CASE("a file named twice, or beside its folder, is read once") {
  const test::TempDir f;
  const std::string path = f.write("t.txt", lines(200, "x"));
  const Corpus once = load_text({path}, {.window = 16}), twice = load_text({path, path, f.path()}, {.window = 16});
  CHECK(once.train == twice.train);
  CHECK(twice.report.links == 2);
}

TEST_CASE("paragraphs that repeat are kept once, so held-out text has none of them") {
  const test::TempDir f;
  std::string licence;
  for (int i = 0; i < 5; ++i)
    licence += "// Permission is granted under these conditions, clause " + std::to_string(i) + "\n";
  for (int i = 0; i < 30; ++i)
    f.write("file" + std::to_string(i) + ".h", "// Author " + std::to_string(i) + "\n//\n" + licence + "\n" +
                                                   lines(20, "code of file " + std::to_string(i)));
  const Corpus c = load_text({f.path()}, {.window = 16, .seed = 1});
  CHECK(c.report.whole_files);
  CHECK(c.report.duplicates == 29 * (licence.size() + 1));  // and the empty line that follows each
  std::size_t found = 0;
  for (const auto* part : {&c.train, &c.validation, &c.test}) found += contains(text_of(*part), licence);
  CHECK(found == 1);
  // Held out by file: every file's text is in one part as a whole.
  for (int i = 0; i < 30; ++i) {
    int parts = 0;
    for (const auto* part : {&c.train, &c.validation, &c.test})
      parts += contains(text_of(*part), "code of file " + std::to_string(i) + " line");
    CHECK(parts == 1);
  }
  const std::size_t all = c.train.size() + c.validation.size() + c.test.size();
  for (const auto* part : {&c.validation, &c.test}) {
    CHECK(double(part->size()) >= 0.06 * double(all) * 0.5);
    CHECK(double(part->size()) <= 0.06 * double(all) * 1.5);
  }
  CHECK(load_text({f.path()}, {.window = 16, .seed = 1}).test == c.test);
  CHECK(load_text({f.path()}, {.window = 16, .seed = 2}).test != c.test);
}

TEST_CASE("short repeats and CRLF stay; bytes above 127 are text") {
  const test::TempDir f;
  const std::string text = lines(50, "}\r\n}\r\n\xc3\xa9t\xc3\xa9");
  const Corpus c = load_text({f.write("t", text)}, {.window = 8});
  CHECK(text_of(c.train) + text_of(c.validation) + text_of(c.test) == text);
  CHECK(*std::max_element(c.train.begin(), c.train.end()) == 0xc3);
  CHECK(*std::min_element(c.train.begin(), c.train.end()) >= 0);
}

TEST_CASE("batches: the target is the next token, places depend on seed and step alone and reach both ends") {
  std::vector<Token> tokens(100);
  for (int i = 0; i < 100; ++i) tokens[std::size_t(i)] = i;
  std::set<Token> starts;
  for (std::uint64_t step = 0; step < 400; ++step) {
    const Batch b = random_batch(tokens, 3, 10, 7, step);
    REQUIRE(b.inputs.size() == 30);
    for (std::size_t i = 0; i < 30; ++i) CHECK(b.targets[i] == b.inputs[i] + 1);
    for (std::size_t w = 0; w < 3; ++w) starts.insert(b.inputs[10 * w]);
  }
  CHECK(*starts.begin() == 0);
  CHECK(*starts.rbegin() == 89);
  CHECK(starts.size() == 90);
  CHECK(random_batch(tokens, 3, 10, 7, 5).inputs == random_batch(tokens, 3, 10, 7, 5).inputs);
  CHECK(random_batch(tokens, 3, 10, 8, 5).inputs != random_batch(tokens, 3, 10, 7, 5).inputs);

  std::set<Token> seen;
  for (const Batch& b : even_batches(tokens, 1000, 10, 4)) {
    CHECK(b.batch <= 4);
    for (std::size_t i = 0; i < b.inputs.size(); ++i) {
      CHECK(b.targets[i] == b.inputs[i] + 1);
      CHECK(seen.insert(b.inputs[i]).second);  // without overlap
    }
  }
  CHECK(seen.size() == 90);
}

TEST_CASE("token ids: .npy and .bin round trip, and what is refused") {
  const test::TempDir f;
  const CorpusOptions o{.window = 8};
  std::string bin16, bin32;
  for (int i = 0; i < 300; ++i) {
    const int id = (i * 37) % 1000;
    bin16 += {char(id & 255), char(id >> 8)};
    bin32 += {char(id & 255), char(id >> 8), '\0', '\0'};
  }
  const Corpus a = load_tokens({f.write("a.bin", bin16)}, o, 16, 1000),
               b = load_tokens({f.write("b.bin", bin32)}, o, 32, 1000);
  CHECK(a.train == b.train);
  CHECK(a.train[2] == 74);
  std::string npy = lowrank::io::npy_header(lowrank::io::Dtype::U16, std::vector<std::uint64_t>{300});
  CHECK(load_tokens({f.write("c.npy", npy + bin16)}, o, 16, 1000).train == a.train);
  const auto refused = [&](const std::string& path, int bits, Index vocabulary) {
    return message_of<lowrank::IoError>([&] { load_tokens({path}, o, bits, vocabulary); });
  };
  CHECK(contains(refused(f / "a.bin", 16, 900), "the vocabulary has 900"));
  CHECK(contains(refused(f.write("odd.bin", "abc"), 16, 1000), "3 bytes"));
  CHECK(contains(refused(f.write("none.bin", ""), 16, 1000), "0 bytes"));
  CHECK(contains(refused(f.write("cut.npy", npy + bin16.substr(2)), 16, 1000), "needs 600"));
  CHECK(contains(refused(f.write("no.npy", "text"), 16, 1000), "not a .npy"));
  CHECK(contains(
      message_of<lowrank::ArgumentError>([&] { load_tokens({f.write("s.bin", bin16.substr(0, 20))}, o, 16, 1000); }),
      "too short"));
  CHECK(contains(message_of<lowrank::ArgumentError>([&] { load_tokens({"x.bin"}, o, 8, 1000); }), "16 or 32"));
}

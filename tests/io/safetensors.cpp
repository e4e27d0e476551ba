// SPDX-License-Identifier: Apache-2.0
// safetensors: what the format allows is read, what it forbids is refused with the tensor's name, and bytes survive.
#include "lowrank/io/safetensors.hpp"

#include "lowrank/io/changed_base.hpp"
#include "lowrank/io/checkpoint.hpp"
#include "lowrank/io/safetensors_writer.hpp"
#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;

namespace {
SafeTensorsHeader parsed_safetensors(const std::string& bytes) {
  std::uint64_t offset = 0;
  return parse_safetensors("t.safetensors", bytes_of(bytes), offset);
}
void refuses(const std::string& header, const std::string& data, std::initializer_list<const char*> parts) {
  INFO("header: ", header);
  check_error([&] { parsed_safetensors(safetensors_bytes(header, data)); }, parts);
}
}  // namespace

TEST_CASE("a file written by hand is read as the format says") {
  TempDir dir;
  // f32 [1, 2] = {1, -2}; bf16 scalar 1.5; empty i64 [0, 7]; metadata; padding; fields in another order
  const std::string header =
      R"({"__metadata__":{"format":"pt","k":"v"},"b":{"shape":[],"data_offsets":[8,10],"dtype":"BF16"},)"
      R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"e":{"dtype":"I64","shape":[0,7],"data_offsets":[10,10]}}   )";
  const float a[] = {1, -2};
  const std::string data = std::string(reinterpret_cast<const char*>(a), 8) + std::string("\xc0\x3f", 2);
  put(dir / "x.safetensors", safetensors_bytes(header, data));
  const SafeTensors f(dir / "x.safetensors");
  REQUIRE(f.tensors().size() == 3);
  CHECK(f.tensors()[0].name == "a");  // in the order of the data
  CHECK(f.metadata().at("k") == "v");
  CHECK(f["a"].to_matrix<double>()(0, 1) == -2.0);
  CHECK(f["b"].to_matrix<float>()(0, 0) == 1.5F);
  CHECK(f["b"].size() == 1);
  CHECK(f["e"].rows() == 0);
  CHECK(f["e"].cols() == 7);
  CHECK(f.find("nope") == nullptr);
  check_error([&] { (void)f["nope"]; }, {"x.safetensors", "'nope'", "no such tensor"});
  check_error([&] { (void)f["e"].to_matrix<float>(); }, {"'e'", "I64", "floating-point"});
  check_error([&] { (void)f["a"].view<bf16>(); }, {"'a'", "F32", "not BF16"});
  check_error([&] { (void)f["b"].rows(); }, {"'b'", "[]", "expected a matrix"});
}

TEST_CASE("no tensors at all is a valid file, with and without metadata") {
  CHECK(parsed_safetensors(safetensors_bytes("{}")).tensors.empty());
  CHECK(parsed_safetensors(safetensors_bytes(R"({"__metadata__":{}})")).tensors.empty());
  CHECK(parsed_safetensors(safetensors_bytes(R"({"e":{"dtype":"F32","shape":[3,0],"data_offsets":[0,0]}})"))
            .tensors.size() == 1);
}

TEST_CASE("a view in place needs alignment, a copy does not") {
  TempDir dir;
  const float x = 3;
  std::string header = R"({"a":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}})";
  while (header.size() % 4 != 1) header += ' ';  // 8 + n is odd: nothing in the data is aligned
  put(dir / "odd.safetensors", safetensors_bytes(header, std::string(reinterpret_cast<const char*>(&x), 4)));
  const SafeTensors f(dir / "odd.safetensors");
  CHECK(f["a"].to_matrix<float>()(0, 0) == 3);
  check_error([&] { (void)f["a"].view<float>(); }, {"not aligned", "to_matrix"});
}

TEST_CASE("a pass over the bytes gives them in order, and a file cut short meanwhile is an error") {
  TempDir dir;
  const std::string path = dir / "large.safetensors";
  const Index rows = 301, cols = 1021;  // 600 KB in bf16: pieces, and a last one that is short
  Matrix<float> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = float(i % 251) - 100;  // exact in bf16
  SafeTensorsWriter out(path, {{"small", Dtype::F32, {3}}, {"w", Dtype::BF16, {301, 1021}}});
  const float three[] = {1, 2, 3};
  out.write("small", std::as_bytes(std::span(three)));
  out.write_matrix("w", m);
  out.commit();
  const SafeTensors f(path);
  std::vector<std::byte> seen;
  f["w"].read([&](Bytes piece) { seen.insert(seen.end(), piece.begin(), piece.end()); });
  CHECK(std::ranges::equal(seen, f["w"].bytes()));
  const auto copy = f["w"].to_matrix<double>();
  bool same = true;
  for (Index i = 0; i < m.size(); ++i) same = same && copy.data()[i] == double(m.data()[i]);
  CHECK(same);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 300000);
  check_error([&] { (void)f["w"].to_matrix<float>(); }, {"large.safetensors", "shrank"});
  CHECK(f["small"].to_matrix<float>()(0, 2) == 3);
}

TEST_CASE("malformed headers are refused and the message names the culprit") {
  const std::string four(4, '\0');
  check_error([&] { parsed_safetensors("1234567"); }, {"too short"});
  check_error([&] { parsed_safetensors(""); }, {"too short"});
  check_error([&] { parsed_safetensors(with_length("{}", 3)); }, {"beyond the end", "truncated"});
  check_error([&] { parsed_safetensors(with_length("{}", ~std::uint64_t(0))); }, {"limit"});
  check_error([&] { parsed_safetensors(with_length("{}", 100'000'001)); }, {"limit"});
  check_error([&] { parsed_safetensors(with_length("{}", 0)); }, {"'{'"});
  refuses("[]", "", {"'{'"});
  refuses(" {}", "", {"'{'"});
  refuses("\xef\xbb\xbf{}", "", {"'{'"});  // a byte order mark
  refuses("{", "", {"JSON"});
  refuses("{} x", "", {"JSON"});
  refuses("{}{}", "", {"JSON"});
  refuses(R"({"a":1})", "", {"'a'", "a number"});
  refuses(R"({"a":null})", "", {"'a'", "null"});
  refuses(R"({"a":[]})", "", {"'a'", "an array"});
  refuses(R"({"__metadata__":{"a":1}})", "", {"'a'", "metadata"});
  refuses(R"({"__metadata__":{"a":"x","a":"y"}})", "", {"'a'", "twice"});
  refuses(
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
      four, {"'a'", "twice"});
  refuses(R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", four, {"'a'", "dtype", "twice"});
  refuses(R"({"a":{"dtype":"F32","shape":[1]}})", four, {"'a'", "data_offsets"});
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":"y"}})", four, {"'a'", "unknown field", "x"});
  refuses(R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", four, {"'a'", "F33"});
  refuses(R"({"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}})", four, {"'a'", "a number"});
  refuses(R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", four, {"'a'", "64-bit integer", "shape"});
  refuses(R"({"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}})", four, {"'a'", "64-bit integer"});
  refuses(R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", four, {"'a'", "negative"});
  refuses(R"({"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}})", four, {"'a'", "an array"});
  refuses(R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})", four, {"'a'", "a number"});
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", four, {"'a'", "two numbers"});
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,4]}})", four, {"'a'", "two numbers"});
  refuses(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551616]}})", four, {"'a'", "64-bit"});
  refuses("{\"a\xff\":{}}", "", {"JSON"});  // not UTF-8
}

TEST_CASE("data that overlaps, leaves holes, or does not fit its shape is refused") {
  const std::string eight(8, '\0');
  const auto two = [](const char* a, const char* b) {
    return std::string(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)") + a +
           R"(},"b":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}";
  };
  CHECK(parsed_safetensors(safetensors_bytes(two("[4,8]", "[0,4]"), eight)).tensors[0].name == "b");
  refuses(two("[0,4]", "[3,7]"), eight, {"'b'", "overlaps"});
  refuses(two("[0,4]", "[0,4]"), eight, {"overlaps"});
  refuses(two("[0,4]", "[5,9]"), std::string(9, '\0'), {"'b'", "hole"});
  refuses(two("[1,5]", "[5,9]"), std::string(9, '\0'), {"'a'", "hole"});
  refuses(two("[0,4]", "[4,8]"), std::string(9, '\0'), {"1 bytes", "no tensor"});
  refuses(two("[0,4]", "[4,8]"), std::string(7, '\0'), {"'b'", "outside"});
  refuses(two("[4,0]", "[4,8]"), eight, {"'a'", "outside"});
  refuses(two("[0,3]", "[3,7]"), std::string(7, '\0'), {"'a'", "needs 4 bytes", "give 3"});
  refuses("{}", "x", {"no tensor"});
  // 2^63 · 2 wraps to 0 in 64 bits; 2^62 · 4 bytes too
  refuses(R"({"a":{"dtype":"U8","shape":[9223372036854775808,2],"data_offsets":[0,0]}})", "",
          {"'a'", "impossible shape"});
  refuses(R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", "",
          {"'a'", "impossible shape"});
  refuses(R"({"a":{"dtype":"F32","shape":[18446744073709551615,18446744073709551615],"data_offsets":[0,1]}})", "x",
          {"'a'", "impossible shape"});
  // sub-byte types must fill whole bytes
  refuses(R"({"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}})", "xx", {"'a'", "impossible shape"});
  CHECK(parsed_safetensors(safetensors_bytes(R"({"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}})", "xx"))
            .tensors.size() == 1);
  CHECK(parsed_safetensors(safetensors_bytes(R"({"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}})", "xxx"))
            .tensors.size() == 1);
}

TEST_CASE("header bombs cost no memory: deep nesting, long arrays, absurd shapes") {
  check_error([&] { parsed_safetensors(safetensors_bytes("{\"a\":" + std::string(2'000'000, '['))); },
              {"'a'", "an array"});
  std::string nested;
  for (int i = 0; i < 200'000; ++i) nested += "{\"a\":";
  check_error([&] { parsed_safetensors(safetensors_bytes(nested)); }, {"unknown field"});
  std::string shape = R"({"a":{"dtype":"U8","shape":[1)";
  for (int i = 0; i < 1'000'000; ++i) shape += ",1";
  check_error([&] { parsed_safetensors(safetensors_bytes(shape + R"(],"data_offsets":[0,1]}})", "x")); },
              {"'a'", "64 dimensions"});
}

TEST_CASE_TEMPLATE("what is written is read back bit for bit", T, float, double) {
  TempDir dir;
  const std::string path = dir / "w.safetensors";
  std::vector<std::pair<Index, Index>> shapes{{1, 1}, {1, 9}, {9, 1}, {0, 4}, {4, 0}, {17, 33}};
  std::vector<TensorSpec> specs;
  std::vector<Matrix<T>> values;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto [m, n] = shapes[i];
    specs.push_back({"t" + std::to_string(i), dtype_of<T>(), {std::uint64_t(m), std::uint64_t(n)}});
    values.push_back(random_matrix<T>(m, n, 40 + i));
  }
  SafeTensorsWriter w(path, specs, {{"k", "v \"quoted\" \xc3\xa9"}});
  for (std::size_t i = specs.size(); i-- > 0;) w.write_matrix(specs[i].name, values[i]);
  CHECK_FALSE(std::filesystem::exists(path));  // nothing before commit
  w.commit();
  const SafeTensors f(path);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    CHECK(same_bits(f[specs[i].name].template to_matrix<T>(), values[i]));
    if (values[i].size() > 0) CHECK(f[specs[i].name].template view<T>()(0, 0) == values[i](0, 0));
  }
  CHECK(f.metadata().at("k") == "v \"quoted\" \xc3\xa9");
  CHECK(files_in(dir.path()) == 1);  // no temporary left
}

TEST_CASE("canonical order puts wide types first, so that every tensor is aligned for its type") {
  TempDir dir;
  const std::string path = dir / "w.safetensors";
  SafeTensorsWriter w(path, {{"z", Dtype::U8, {3}},
                             {"y", Dtype::F32, {1, 1}},
                             {"x", Dtype::BF16, {1}},
                             {"a", Dtype::I64, {1}},
                             {"b", Dtype::F32, {1}}});
  for (const auto& t : w.tensors()) w.write(t.name, bytes_of(std::string(t.bytes(), '\1')));
  w.commit();
  const SafeTensors f(path);
  std::string order;
  for (const auto& t : f.tensors()) order += t.name;
  CHECK(order == "abyxz");
  for (const auto& t : f.tensors())
    CHECK(reinterpret_cast<std::uintptr_t>(f.view(t).bytes().data()) % (dtype_bits(t.dtype) / 8) == 0);
}

TEST_CASE("reading a file and writing it again gives the same bytes") {
  TempDir dir;
  // as the reference implementation writes: no spaces, metadata first, padded to 8
  std::string header =
      R"({"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]}})";
  header.append((8 - header.size() % 8) % 8, ' ');
  const std::string original = safetensors_bytes(header, "abcdefghijklmn");
  put(dir / "in.safetensors", original);
  const SafeTensors in(dir / "in.safetensors");
  std::vector<TensorSpec> specs(in.tensors().begin(), in.tensors().end());
  SafeTensorsWriter out(dir / "out.safetensors", specs, in.metadata(), TensorOrder::as_given);
  for (const auto& t : in.tensors()) out.copy(t.name, in.view(t));
  out.commit();
  CHECK(get(dir / "out.safetensors") == original);
}

TEST_CASE("views of either order and narrower types are written as asked") {
  TempDir dir;
  const Matrix<float> m = random_matrix(5, 7, 1);
  SafeTensorsWriter w(
      dir / "w",
      {{"t", Dtype::F32, {7, 5}}, {"h", Dtype::BF16, {5, 7}}, {"f", Dtype::F16, {5, 7}}, {"d", Dtype::F64, {5, 7}}});
  w.write_matrix("t", m.view().transposed());
  for (const char* n : {"h", "f", "d"}) w.write_matrix(n, m.view());
  w.commit();
  const SafeTensors f(dir / "w");
  for (Index i = 0; i < 5; ++i)
    for (Index j = 0; j < 7; ++j) {
      CHECK(f["t"].to_matrix<float>()(j, i) == m(i, j));
      CHECK(f["h"].to_matrix<float>()(i, j) == float(bf16(m(i, j))));
      CHECK(f["f"].to_matrix<float>()(i, j) == float(f16(m(i, j))));
      CHECK(f["d"].to_matrix<double>()(i, j) == double(m(i, j)));
    }
}

TEST_CASE("a writer refuses what would not be a valid file") {
  TempDir dir;
  const auto make = [&](std::vector<TensorSpec> specs) { SafeTensorsWriter w(dir / "w", std::move(specs)); };
  check_error([&] { make({{"a", Dtype::F32, {1}}, {"a", Dtype::F32, {1}}}); }, {"'a'", "twice"});
  check_error([&] { make({{"__metadata__", Dtype::F32, {1}}}); }, {"reserved"});
  check_error([&] { make({{"a", Dtype::F32, {1ULL << 62}}}); }, {"'a'", "impossible"});
  check_error([&] { make({{"\xff", Dtype::F32, {1}}}); }, {"UTF-8"});
  SafeTensorsWriter w(dir / "w", {{"a", Dtype::F32, {2}}});
  check_error([&] { w.write("b", bytes_of("1234")); }, {"'b'", "declared"});
  check_error([&] { w.write("a", bytes_of("123456789")); }, {"'a'", "more than"});
  w.write("a", bytes_of("1234"));
  check_error([&] { w.commit(); }, {"'a'", "4 of 8"});
  CHECK_FALSE(std::filesystem::exists(dir / "w"));
}

TEST_CASE("every conversion of a stored type agrees with its definition") {
  // All 256 patterns of the byte types against their definition in double.
  for (int b = 0; b < 256; ++b) {
    const std::byte in[1] = {std::byte(b)};
    float x = 0;
    const int sign = b >> 7;
    convert_from(Dtype::F8_E4M3, in, 1, &x);
    const int e4 = (b >> 3) & 15, m3 = b & 7;
    if (e4 == 15 && m3 == 7)
      CHECK(std::isnan(x));
    else
      CHECK(double(x) ==
            (sign ? -1.0 : 1.0) * (e4 == 0 ? m3 / 8.0 * std::pow(2.0, -6) : (1 + m3 / 8.0) * std::pow(2.0, e4 - 7)));
    convert_from(Dtype::F8_E5M2, in, 1, &x);
    const int e5 = (b >> 2) & 31, m2 = b & 3;
    if (e5 == 31)
      CHECK((m2 != 0 ? std::isnan(x) : std::isinf(x)));
    else
      CHECK(double(x) ==
            (sign ? -1.0 : 1.0) * (e5 == 0 ? m2 / 4.0 * std::pow(2.0, -14) : (1 + m2 / 4.0) * std::pow(2.0, e5 - 15)));
    convert_from(Dtype::F8_E8M0, in, 1, &x);
    if (b == 255)
      CHECK(std::isnan(x));
    else
      CHECK(double(x) == std::pow(2.0, b - 127));
  }
  float x = 0;
  const std::byte in[4] = {};
  check_error<ArgumentError>([&] { convert_from(Dtype::I32, in, 1, &x); }, {"I32"});
  for (std::size_t i = 0; i < 20; ++i) CHECK(parse_dtype(dtype_name(Dtype(i))) == Dtype(i));
  CHECK_FALSE(parse_dtype("F16 ").has_value());
}

TEST_CASE("a Git LFS pointer is called one, whatever file it stands for") {
  TempDir dir;
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid "
      "sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
      "size 4943162336\n";
  put(dir / "model.safetensors", pointer);
  put(dir / "config.json", pointer);
  check_error([&] { SafeTensors f(dir / "model.safetensors"); },
              {"model.safetensors", "Git LFS pointer", "git lfs pull"});
  check_error([&] { Checkpoint c(dir.path()); }, {"model.safetensors", "Git LFS pointer"});
  check_error([&] { (void)read_text(dir / "config.json"); }, {"config.json", "Git LFS pointer"});
  std::uint64_t offset = 0;
  check_error([&] { (void)parse_safetensors("f", bytes_of(pointer), offset); }, {"Git LFS pointer"});
}

TEST_CASE("a file truncated while it is open is an error of every copy, not a signal") {
  TempDir dir;
  const std::string path = dir / "m.safetensors";
  const Index n = 1 << 16;  // many pages: the last ones are gone altogether
  SafeTensorsWriter w(path, {{"w", Dtype::F32, {16, std::uint64_t(n / 16)}}});
  const Matrix<float> values = random_matrix(16, n / 16, 1);
  w.write_matrix("w", values);
  w.commit();
  const SafeTensors f(path);
  const TensorView t = f["w"];
  const std::string before = fingerprint(t);
  CHECK(before == fingerprint(t.dtype(), t.shape(), t.bytes()));
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  check_error([&] { (void)fingerprint(t); }, {path.c_str(), "shrank"});
  check_error([&] { (void)t.to_matrix<float>(); }, {"shrank"});
  check_error([&] { (void)t.folded<float>(); }, {"shrank"});
  check_error([&] { (void)t.copied_bytes(); }, {"shrank"});
  SafeTensorsWriter copy(dir / "c.safetensors", {{"w", Dtype::F32, {16, std::uint64_t(n / 16)}}});
  check_error([&] { copy.copy("w", t); }, {"shrank"});
}

TEST_CASE("a convolution's weight folds out x (in*kh*kw), as adapter files fold theirs") {
  TempDir dir;
  const std::string path = dir / "m.safetensors";
  SafeTensorsWriter w(path, {{"conv", Dtype::F32, {8, 3, 3, 3}}, {"v", Dtype::F32, {5}}});
  std::vector<float> x(216);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  w.write("conv", std::as_bytes(std::span(x)));
  w.write("v", std::as_bytes(std::span(x.data(), 5)));
  w.commit();
  const SafeTensors f(path);
  CHECK(folded_extents(f["conv"].shape()) == std::pair<Index, Index>{8, 27});
  const Matrix<float> m = f["conv"].folded<float>();
  REQUIRE(m.rows() == 8);
  REQUIRE(m.cols() == 27);
  CHECK(m(2, 1 * 9 + 2 * 3 + 1) == float(((2 * 3 + 1) * 3 + 2) * 3 + 1));  // out 2, in 1, row 2, column 1
  CHECK(f["v"].folded<float>().rows() == 5);
  check_error([&] { (void)f["conv"].folded<bf16>(); }, {"conv", "F32", "BF16"});
}

TEST_CASE("XXH64 in pieces is XXH64") {
  std::string text;
  for (int i = 0; i < 301; ++i) text += char(i * 7);
  for (const std::size_t n : {0U, 1U, 31U, 32U, 33U, 64U, 301U})
    for (const std::size_t step : {1U, 5U, 31U, 32U, 40U, 400U}) {
      const Bytes all = bytes_of(text).first(n);
      Xxh64 h(11);
      for (std::size_t at = 0; at < n; at += step) h.add(all.subspan(at, std::min(step, n - at)));
      CHECK(h.value() == xxh64(all, 11));
    }
}

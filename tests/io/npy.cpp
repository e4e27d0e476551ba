// SPDX-License-Identifier: Apache-2.0
// .npy and .npz: headers in every spelling numpy has used, both orders, and archives that do not lie.
#include "lowrank/io/npy.hpp"

#include "lowrank/io/npz.hpp"
#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;

namespace {
std::string npy(const std::string& dict, const std::string& data, int major = 1) {
  std::string s = "\x93NUMPY";
  s += char(major);
  s += '\0';
  const auto n = std::uint32_t(dict.size());
  s.append(reinterpret_cast<const char*>(&n), major == 1 ? 2 : 4);
  return s + dict + data;
}
NpyHeader parsed_npy(const std::string& s) { return parse_npy("a.npy", bytes_of(s)); }
template <class T>
std::string raw(std::initializer_list<T> v) {
  return {reinterpret_cast<const char*>(v.begin()), v.size() * sizeof(T)};
}
}  // namespace

TEST_CASE("headers in any spelling") {
  const std::string data = raw<float>({1, 2, 3, 4, 5, 6});
  for (const int major : {1, 2, 3}) {
    const NpyHeader h = parsed_npy(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", data, major));
    CHECK(h.shape == Shape{2, 3});
    CHECK(h.dtype == Dtype::F32);
    CHECK_FALSE(h.fortran_order);
  }
  CHECK(parsed_npy(npy("{\"shape\":(6L,),\"fortran_order\":True,\"descr\":\"<f4\"}", data)).shape == Shape{6});
  CHECK(parsed_npy(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (), }", "x")).shape.empty());
  CHECK(parsed_npy(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 3)}", "")).shape == Shape{0, 3});
}

TEST_CASE("what is not a npy file of ours is refused with a reason") {
  const auto refuses = [](const std::string& s, std::initializer_list<const char*> parts) {
    check_error([&] { parsed_npy(s); }, parts);
  };
  const std::string four(4, '\0');
  refuses("", {"not a .npy"});
  refuses("\x93NUMPX\1\0\0\0", {"not a .npy"});
  refuses(npy("{}", "", 4), {"version 4"});
  refuses(std::string("\x93NUMPY\2\0\0\0", 10), {"truncated"});
  refuses(std::string("\x93NUMPY\1\0\xff\xff", 10), {"beyond the end"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", four), {"needs 8 bytes", "has 4"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", four + "x"), {"needs 4 bytes", "has 5"});
  refuses(npy("{'descr': '>f4', 'fortran_order': False, 'shape': (1,), }", four), {"big-endian"});
  refuses(npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", four), {"unsupported type '|O'"});
  refuses(npy("{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }", four), {"unsupported type"});
  refuses(npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", four), {"malformed"});
  refuses(npy("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,), }", four), {"True or False"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1), }", four), {"not a tuple"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", four), {"non-negative"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1 1), }", four), {"commas"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }", four), {"64 bits"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }", ""), {"impossible shape"});
  refuses(npy("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", four), {"twice"});
  refuses(npy("{'descr': '<f4', 'shape': (1,), }", four), {"needs descr"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': '1'}", four), {"unknown key 'x'"});
  refuses(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), } x", four), {"after the dictionary"});
  refuses(npy("{'descr", four), {"does not end"});
  refuses(npy("", four), {"malformed"});
}

TEST_CASE_TEMPLATE("matrices of either order survive", T, float, double) {
  TempDir dir;
  for (const auto& [m, n] : {std::pair<Index, Index>{1, 1}, {1, 6}, {6, 1}, {0, 3}, {3, 0}, {5, 8}}) {
    const Matrix<T> x = random_matrix<T>(m, n, 3);
    write_npy(dir / "c.npy", x);
    write_npy(dir / "f.npy", x.view().transposed());
    const NpyFile c(dir / "c.npy"), f(dir / "f.npy");
    CHECK(same_bits(c->to_matrix<T>(), x));
    const Matrix<T> t = f->to_matrix<T>();
    REQUIRE(t.rows() == n);
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) {
        CHECK(t(j, i) == x(i, j));
        CHECK(f->view<T>()(j, i) == x(i, j));
      }
  }
  const Matrix<T> x = random_matrix<T>(6, 9, 4);
  write_npy(dir / "block.npy", x.view().block(1, 2, 3, 4));  // with gaps: copied
  CHECK(NpyFile(dir / "block.npy")->to_matrix<T>()(2, 3) == x(3, 5));
}

TEST_CASE("token ids of every integer type") {
  TempDir dir;
  const auto ids = [&](const char* descr, const std::string& data, const char* shape) {
    put(dir / "t.npy",
        npy(std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': " + shape + "}", data));
    return NpyFile(dir / "t.npy")->to_integers();
  };
  using V = std::vector<std::int64_t>;
  CHECK(ids("|u1", raw<std::uint8_t>({1, 255}), "(2,)") == V{1, 255});
  CHECK(ids("<u2", raw<std::uint16_t>({1, 65535}), "(2,)") == V{1, 65535});
  CHECK(ids("<i4", raw<std::int32_t>({-1, 7}), "(1, 2)") == V{-1, 7});
  CHECK(ids("<i8", raw<std::int64_t>({1LL << 40}), "(1,)") == V{1LL << 40});
  check_error([&] { ids("<u8", raw<std::uint64_t>({~0ULL}), "(1,)"); }, {"beyond int64"});
  check_error([&] { ids("<f4", raw<float>({1}), "(1,)"); }, {"F32", "expected integers"});
}

TEST_CASE("npz archives round-trip and are checked") {
  TempDir dir;
  const std::string path = dir / "z.npz";
  const Matrix<float> a = random_matrix(4, 5, 1);
  const Matrix<double> b = random_matrix<double>(3, 2, 2);
  const std::vector<std::int32_t> v{1, -2, 3};
  NpzWriter w(path);
  w.add("a", a);
  w.add("b.T", b.view().transposed());
  w.add("v", std::span<const std::int32_t>(v));
  check_error([&] { w.add("a", a); }, {"'a'", "twice"});
  w.commit();
  const NpzFile z(path);
  CHECK(z.arrays().size() == 3);
  CHECK(same_bits(z["a"].to_matrix<float>(), a));
  CHECK(z["b.T"].to_matrix<double>()(1, 2) == b(2, 1));
  CHECK(z["v"].to_integers() == std::vector<std::int64_t>{1, -2, 3});
  check_error([&] { (void)z["c"]; }, {"'c'", "no such array"});

  const std::string good = get(path);
  const auto refuses = [&](std::string bad, std::initializer_list<const char*> parts) {
    put(path, bad);
    check_error([&] { NpzFile f(path); }, parts);
  };
  std::string flipped = good;
  flipped[200] = char(flipped[200] ^ 1);  // inside a's data
  refuses(flipped, {"a.npy", "checksum"});
  refuses(good.substr(0, good.size() - 1), {"ZIP"});
  refuses(good.substr(1), {"ZIP"});
  refuses("", {"too short"});
  refuses(std::string(1000, 'x'), {"not a ZIP"});
  // Every truncation and every single changed byte of the directory is an error or harmless, never a crash.
  for (std::size_t i = good.size() - 220; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = char(bad[i] ^ 0x41);
    try {
      (void)parse_npz("z", bytes_of(bad));
    } catch (const IoError&) {
    }
  }
  std::string crc_check = "123456789";
  CHECK(io::detail::crc32(bytes_of(crc_check)) == 0xCBF43926U);  // the check value of CRC-32
  CHECK(io::detail::crc32(bytes_of(crc_check.substr(4)), io::detail::crc32(bytes_of(crc_check.substr(0, 4)))) ==
        0xCBF43926U);
}

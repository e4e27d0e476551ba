// SPDX-License-Identifier: Apache-2.0
// numpy's .npz: a ZIP archive of .npy arrays, stored uncompressed as np.savez does.
#pragma once

#include <array>
#include <map>
#include <string>

#include "lowrank/io/npy.hpp"

namespace lowrank::io {

namespace detail {

/// CRC-32 of ZIP (polynomial 0xEDB88320), eight bytes a step.
inline std::uint32_t crc32(Bytes data, std::uint32_t crc = 0) {
  static constexpr auto tables = [] {
    std::array<std::array<std::uint32_t, 256>, 8> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ ((c & 1U) != 0 ? 0xEDB88320U : 0U);
      t[0][i] = c;
    }
    for (std::size_t s = 1; s < 8; ++s)
      for (std::size_t i = 0; i < 256; ++i) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 255U];
    return t;
  }();
  crc = ~crc;
  const std::byte* p = data.data();
  std::size_t n = data.size();
  for (; n >= 8; n -= 8, p += 8) {
    const std::uint64_t x = load_unaligned<std::uint64_t>(p) ^ crc;
    crc = 0;
    for (std::size_t b = 0; b < 8; ++b) crc ^= tables[7 - b][(x >> (8 * b)) & 255U];
  }
  for (; n > 0; --n, ++p) crc = (crc >> 8) ^ tables[0][(crc ^ std::uint32_t(*p)) & 255U];
  return ~crc;
}

/// A stored member of a ZIP archive.
struct ZipEntry {
  std::string name;
  std::uint64_t offset = 0, size = 0;  ///< of its data
  std::uint32_t crc = 0;
  friend bool operator==(const ZipEntry&, const ZipEntry&) = default;
};

/// Bounded reads from a byte range, with one message for everything that reaches outside.
class ZipCursor {
 public:
  ZipCursor(const std::string& path, Bytes data, std::uint64_t at, std::uint64_t end)
      : path_(path), data_(data), at_(at), end_(end) {
    if (at > end || end > data.size()) fail();
  }
  template <class T>
  T take() {
    need(sizeof(T));
    const T x = load_unaligned<T>(data_.data() + at_);
    at_ += sizeof(T);
    return x;
  }
  std::string take_string(std::uint64_t n) {
    need(n);
    std::string s(reinterpret_cast<const char*>(data_.data()) + at_, std::size_t(n));
    at_ += n;
    return s;
  }
  void skip(std::uint64_t n) { need(n), at_ += n; }
  [[nodiscard]] std::uint64_t position() const { return at_; }
  [[nodiscard]] std::uint64_t left() const { return end_ - at_; }

 private:
  void need(std::uint64_t n) const {
    if (n > end_ - at_) fail();
  }
  [[noreturn]] void fail() const {
    throw IoError(path_, "ZIP structure reaches outside the file: truncated or damaged");
  }
  const std::string& path_;
  Bytes data_;
  std::uint64_t at_, end_;
};

/// The members of an archive. Refuses compression, encryption, several disks, members outside the file or overlapping.
inline std::vector<ZipEntry> parse_zip(const std::string& path, Bytes file) {
  constexpr std::size_t eocd_size = 22;
  if (file.size() < eocd_size) throw IoError(path, "is too short for a ZIP archive");
  std::size_t eocd = file.size() - eocd_size;
  for (const std::size_t stop = eocd > 65535 ? eocd - 65535 : 0;; --eocd) {
    if (load_unaligned<std::uint32_t>(file.data() + eocd) == 0x06054b50U &&
        load_unaligned<std::uint16_t>(file.data() + eocd + 20) == file.size() - eocd - eocd_size)
      break;
    if (eocd == stop) throw IoError(path, "is not a ZIP archive (no end record)");
  }
  ZipCursor end(path, file, eocd + 4, file.size());
  if (end.take<std::uint16_t>() != 0 || end.take<std::uint16_t>() != 0)
    throw IoError(path, "ZIP archive on several disks");
  end.skip(2);
  std::uint64_t count = end.take<std::uint16_t>(), size = end.take<std::uint32_t>(), offset = end.take<std::uint32_t>();
  if ((count == 0xffff || size == 0xffffffffU || offset == 0xffffffffU) && eocd >= 20 &&
      load_unaligned<std::uint32_t>(file.data() + eocd - 20) == 0x07064b50U) {
    const auto at = load_unaligned<std::uint64_t>(file.data() + eocd - 12);
    ZipCursor wide(path, file, at, eocd);
    if (wide.take<std::uint32_t>() != 0x06064b50U) throw IoError(path, "ZIP64 end record is missing");
    wide.skip(8 + 2 + 2 + 4 + 4 + 8);
    count = wide.take<std::uint64_t>();
    size = wide.take<std::uint64_t>();
    offset = wide.take<std::uint64_t>();
  }
  if (offset > eocd || size > eocd - offset) throw IoError(path, "ZIP directory reaches outside the file");
  ZipCursor directory(path, file, offset, offset + size);
  std::vector<ZipEntry> entries;
  for (std::uint64_t i = 0; i < count; ++i) {
    if (directory.take<std::uint32_t>() != 0x02014b50U) throw IoError(path, "ZIP directory is damaged");
    directory.skip(4);
    const auto flags = directory.take<std::uint16_t>(), method = directory.take<std::uint16_t>();
    directory.skip(4);
    ZipEntry e;
    e.crc = directory.take<std::uint32_t>();
    std::uint64_t packed = directory.take<std::uint32_t>(), plain = directory.take<std::uint32_t>();
    const auto name_size = directory.take<std::uint16_t>(), extra_size = directory.take<std::uint16_t>(),
               comment_size = directory.take<std::uint16_t>();
    directory.skip(8);
    std::uint64_t local = directory.take<std::uint32_t>();
    e.name = directory.take_string(name_size);
    ZipCursor extra(path, file, directory.position(),
                    directory.position() + std::min<std::uint64_t>(extra_size, directory.left()));
    directory.skip(extra_size);
    directory.skip(comment_size);
    while (extra.left() >= 4) {
      const auto id = extra.take<std::uint16_t>(), length = extra.take<std::uint16_t>();
      if (length > extra.left()) throw IoError(path, e.name, "ZIP extra field is damaged");
      ZipCursor field(path, file, extra.position(), extra.position() + length);
      if (id == 1) {
        if (plain == 0xffffffffU) plain = field.take<std::uint64_t>();
        if (packed == 0xffffffffU) packed = field.take<std::uint64_t>();
        if (local == 0xffffffffU) local = field.take<std::uint64_t>();
      }
      extra.skip(length);
    }
    if ((flags & 1U) != 0) throw IoError(path, e.name, "is encrypted");
    if (method != 0) throw IoError(path, e.name, "is compressed; write it with np.savez, not np.savez_compressed");
    if (packed != plain) throw IoError(path, e.name, "stored size and plain size differ");
    ZipCursor header(path, file, local, offset);
    if (header.take<std::uint32_t>() != 0x04034b50U) throw IoError(path, e.name, "ZIP member header is missing");
    header.skip(22);
    const auto local_name = header.take<std::uint16_t>(), local_extra = header.take<std::uint16_t>();
    if (header.take_string(local_name) != e.name)
      throw IoError(path, e.name, "ZIP member and directory disagree on the name");
    header.skip(local_extra);
    e.offset = header.position();
    e.size = plain;
    header.skip(plain);
    entries.push_back(std::move(e));
  }
  if (directory.left() != 0) throw IoError(path, "ZIP directory has bytes that belong to no member");
  auto sorted = entries;
  std::sort(sorted.begin(), sorted.end(), [](const ZipEntry& a, const ZipEntry& b) { return a.offset < b.offset; });
  for (std::size_t i = 1; i < sorted.size(); ++i)
    if (sorted[i].offset < sorted[i - 1].offset + sorted[i - 1].size)
      throw IoError(path, sorted[i].name, "overlaps another member");
  return entries;
}
}  // namespace detail

/// Parses the bytes of a .npz archive: array name (without ".npy") → array, a look at those bytes.
///
/// **Throws** IoError naming `path` and the member: not a ZIP archive, compressed or encrypted members, a wrong
/// checksum, two arrays of one name, anything parse_npy refuses.
/// **Cost** one pass over the data for the checksums. **Source** PKWARE APPNOTE 6.3, the stored method and ZIP64.
inline std::map<std::string, NpyArray> parse_npz(const std::string& path, Bytes file) {
  std::map<std::string, NpyArray> arrays;
  for (const auto& e : detail::parse_zip(path, file)) {
    const Bytes data = file.subspan(std::size_t(e.offset), std::size_t(e.size));
    if (detail::crc32(data) != e.crc) throw IoError(path, e.name, "checksum does not match: the data is damaged");
    std::string name = e.name;
    if (name.ends_with(".npy")) name.resize(name.size() - 4);
    const std::string where = path + ": '" + e.name + "'";
    if (!arrays.emplace(name, NpyArray(where, parse_npy(where, data), data)).second)
      throw IoError(path, name, "occurs twice");
  }
  return arrays;
}

/// A .npz archive, open for reading. **Throws** IoError as parse_npz, and naming the array asked for when it is absent.
class NpzFile {
 public:
  explicit NpzFile(const std::string& path) : file_(path), arrays_(parse_npz(path, file_.bytes())) {}
  [[nodiscard]] const std::map<std::string, NpyArray>& arrays() const noexcept { return arrays_; }
  [[nodiscard]] const NpyArray& operator[](const std::string& name) const {
    const auto it = arrays_.find(name);
    if (it == arrays_.end()) throw IoError(file_.path(), name, "no such array");
    return it->second;
  }

 private:
  MappedFile file_;
  std::map<std::string, NpyArray> arrays_;
};

/// Writes a .npz archive array by array, as np.savez would; nothing appears before commit().
///
/// **Throws** IoError as OutputFile, and on a name used twice; ArgumentError for types numpy does not have.
class NpzWriter {
 public:
  explicit NpzWriter(std::string path) : file_(std::move(path)) {}

  template <MatrixLike X>
  void add(const std::string& name, X&& x) {
    using T = scalar_of<X>;
    const MatrixView<const T> m = view_of(x);
    Matrix<T> scratch;
    const Bytes data = detail::contiguous_bytes(m, scratch);
    const std::uint64_t shape[] = {std::uint64_t(m.rows()), std::uint64_t(m.cols())};
    add(name, npy_header(dtype_of<T>(), shape, m.is_contiguous() && !m.is_row_major()), data);
  }
  /// A vector.
  template <class T>
  void add(const std::string& name, std::span<const T> v) {
    const std::uint64_t shape[] = {v.size()};
    add(name, npy_header(dtype_of<T>(), shape), std::as_bytes(v));
  }
  void commit() {
    const std::uint64_t start = at_;
    put(directory_);
    const std::uint64_t size = at_ - start;
    const bool wide = count_ >= 0xffff || start >= 0xffffffffU || size >= 0xffffffffU;
    if (wide) {
      const std::uint64_t record = at_;
      std::string s = little(0x06064b50U, 4) + little(44, 8) + little(45, 2) + little(45, 2) + little(0, 4) +
                      little(0, 4) + little(count_, 8) + little(count_, 8) + little(size, 8) + little(start, 8);
      s += little(0x07064b50U, 4) + little(0, 4) + little(record, 8) + little(1, 4);
      put(s);
    }
    const auto n = wide ? 0xffffU : count_;
    put(little(0x06054b50U, 4) + little(0, 4) + little(n, 2) + little(n, 2) + little(wide ? 0xffffffffU : size, 4) +
        little(wide ? 0xffffffffU : start, 4) + little(0, 2));
    file_.commit();
  }

 private:
  static std::string little(std::uint64_t x, std::size_t n) { return {reinterpret_cast<const char*>(&x), n}; }
  void put(std::string_view s) {
    file_.write_at(at_, std::as_bytes(std::span(s.data(), s.size())));
    at_ += s.size();
  }
  void add(const std::string& array, const std::string& header, Bytes data) {
    const std::string name = array + ".npy";
    if (!names_.emplace(name, true).second) throw IoError(file_.path(), array, "is written twice");
    if (name.size() > 65535) throw IoError(file_.path(), "an array's name is longer than ZIP allows");
    const std::uint64_t size = header.size() + data.size();
    const std::uint32_t crc = detail::crc32(data, detail::crc32(std::as_bytes(std::span(header))));
    const bool wide = size >= 0xffffffffU, far = at_ >= 0xffffffffU;
    const std::uint64_t local = at_, size32 = wide ? 0xffffffffU : size;
    const std::string version = little(wide || far ? 45 : 20, 2), utf8 = little(0x800, 2),
                      date = little(0x00210000U, 4);
    const std::string common = version + utf8 + little(0, 2) + date + little(crc, 4) + little(size32, 4) +
                               little(size32, 4) + little(name.size(), 2);
    const std::string both = little(size, 8) + little(size, 8);
    put(little(0x04034b50U, 4) + common + little(wide ? 20 : 0, 2) + name +
        (wide ? little(1, 2) + little(16, 2) + both : ""));
    put(header);
    file_.write_at(at_, data);
    at_ += data.size();
    std::string extra = (wide ? both : "") + (far ? little(local, 8) : "");
    if (!extra.empty()) extra = little(1, 2) + little(extra.size(), 2) + extra;
    directory_ += little(0x02014b50U, 4) + little(45, 2) + common + little(extra.size(), 2) + little(0, 2) +
                  little(0, 2) + little(0, 2) + little(0x01800000U, 4) + little(far ? 0xffffffffU : local, 4) + name +
                  extra;
    ++count_;
  }
  OutputFile file_;
  std::uint64_t at_ = 0, count_ = 0;
  std::string directory_;
  std::map<std::string, bool> names_;
};

}  // namespace lowrank::io

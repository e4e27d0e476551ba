// SPDX-License-Identifier: Apache-2.0
// MappedFile reads a regular file without copying it; OutputFile replaces one all at once or not at all; StagedFiles
// replaces several that belong together.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lowrank/core/errors.hpp"

namespace lowrank::io {

using Bytes = std::span<const std::byte>;

namespace detail {

[[noreturn]] inline void throw_errno(const std::string& path, const char* what) {
  throw IoError(path, lowrank::detail::text(what, ": ", std::strerror(errno)));
}

/// A file descriptor that closes itself.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int fd) noexcept : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  [[nodiscard]] int get() const noexcept { return fd_; }
  /// Closes now and reports what close said: a full disk may only show here.
  int close() noexcept { return ::close(std::exchange(fd_, -1)); }

 private:
  int fd_ = -1;
};

/// Opens for reading and insists on a regular file (a link to one is followed; hub caches are made of them).
inline Descriptor open_regular(const std::string& path, std::uint64_t& size) {
  // O_NONBLOCK: opening a FIFO must fail the check below, not wait for a writer.
  Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd.get() < 0) throw_errno(path, "cannot open");
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) throw_errno(path, "cannot stat");
  if (S_ISDIR(info.st_mode)) throw IoError(path, "is a directory, expected a file");
  if (!S_ISREG(info.st_mode)) throw IoError(path, "is not a regular file");
  size = std::uint64_t(info.st_size);
  return fd;
}

/// What a clone has instead of a large file until it is fetched begins so.
inline void refuse_lfs_pointer(const std::string& path, std::string_view begin) {
  if (begin.starts_with("version https://git-lfs"))
    throw IoError(path, "is a Git LFS pointer, not the file it stands for; fetch that with `git lfs pull`");
}

/// Makes renames and removals in the directory of a file durable, where the file system lets it.
inline void sync_directory_of(const std::string& path) noexcept {
  const auto slash = path.find_last_of('/');
  const std::string directory = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  const Descriptor dir(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (dir.get() >= 0) ::fsync(dir.get());  // some file systems refuse; the data itself is safe
}
}  // namespace detail

/// A regular file, mapped read-only. The bytes stay valid as long as this object; pages are read when touched.
///
/// Truncating the file while it is mapped raises SIGBUS in whoever touches bytes(), and an IoError in read(): do not
/// modify checkpoints in use.
/// **Throws** IoError when the path cannot be opened, is not a regular file, or is a Git LFS pointer to one.
class MappedFile {
 public:
  MappedFile() = default;
  explicit MappedFile(std::string path) : path_(std::move(path)) {
    std::uint64_t size = 0;
    fd_ = detail::open_regular(path_, size);
    size_ = std::size_t(size);
    if (size_ == 0) return;
    char begin[32];
    const ssize_t n = ::pread(fd_.get(), begin, sizeof begin, 0);
    detail::refuse_lfs_pointer(path_, std::string_view(begin, n < 0 ? 0 : std::size_t(n)));
    void* p = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd_.get(), 0);
    if (p == MAP_FAILED) detail::throw_errno(path_, "cannot map");
    data_ = static_cast<const std::byte*>(p);
  }
  MappedFile(MappedFile&& other) noexcept { swap(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    swap(other);
    return *this;
  }
  ~MappedFile() {
    if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
  }

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] Bytes bytes() const noexcept { return {data_, size_}; }
  [[nodiscard]] int descriptor() const noexcept { return fd_.get(); }

  /// Copies a range of the mapped bytes by reading the file, so that nothing is mapped for it: from the page cache
  /// twice as fast as touching each page once, and what goes wrong is an exception.
  ///
  /// **Throws** IoError when the file cannot be read or has become shorter.
  void read(Bytes range, std::byte* out) const {
    auto at = off_t(range.data() - data_);
    for (std::size_t done = 0; done < range.size();) {
      const ssize_t n = ::pread(fd_.get(), out + done, range.size() - done, at + off_t(done));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) detail::throw_errno(path_, "cannot read");
      if (n == 0) throw IoError(path_, "shrank while it was read");
      done += std::size_t(n);
    }
  }
  /// Starts reading a range in the background. A hint: failure is of no consequence.
  void will_need(Bytes range) const noexcept {
    if (!range.empty()) ::posix_fadvise(fd_.get(), range.data() - data_, off_t(range.size()), POSIX_FADV_WILLNEED);
  }
  /// Maps a range at once instead of page by page; worth it before a full pass over a tensor.
  void populate(Bytes range) const noexcept {
#if defined(MADV_POPULATE_READ)
    if (const auto [p, n] = pages(range, true); n > 0) ::madvise(p, n, MADV_POPULATE_READ);
#else
    (void)range;
#endif
  }
  /// Gives a range's pages back, so that a pass over a file larger than memory stays small. They are read again when
  /// touched again. Pages shared with a neighbour stay.
  void drop(Bytes range) const noexcept {
    if (const auto [p, n] = pages(range, false); n > 0) ::madvise(p, n, MADV_DONTNEED);
  }

 private:
  [[nodiscard]] std::pair<void*, std::size_t> pages(Bytes range, bool outward) const noexcept {
    if (range.empty()) return {nullptr, 0};
    const auto page = std::uintptr_t(::sysconf(_SC_PAGESIZE));
    auto begin = reinterpret_cast<std::uintptr_t>(range.data()), end = begin + range.size();
    if (outward) {
      begin = begin / page * page;
    } else {
      begin = (begin + page - 1) / page * page;
      if (range.data() + range.size() != data_ + size_) end = end / page * page;
    }
    if (end <= begin) return {nullptr, 0};
    return {reinterpret_cast<void*>(begin), end - begin};  // NOLINT(performance-no-int-to-ptr)
  }
  void swap(MappedFile& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(fd_, other.fd_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  std::string path_;
  detail::Descriptor fd_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

/// A small file, read whole. **Throws** IoError, also when it is larger than `limit` bytes or a Git LFS pointer.
inline std::string read_text(const std::string& path, std::uint64_t limit = std::uint64_t(1) << 28) {
  std::uint64_t size = 0;
  const detail::Descriptor fd = detail::open_regular(path, size);
  if (size > limit)
    throw IoError(path, lowrank::detail::text("has ", size, " bytes, more than the ", limit, " allowed"));
  std::string text(std::size_t(size), '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = ::read(fd.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) detail::throw_errno(path, "cannot read");
    if (n == 0) throw IoError(path, "shrank while it was read");
    done += std::size_t(n);
  }
  detail::refuse_lfs_pointer(path, text);
  return text;
}

/// A file written beside its destination and moved over it by `commit()`: fsync, rename, fsync of the directory.
///
/// Whatever happens before commit returns (an exception, a full disk, a crash), the old file is intact.
/// **Throws** IoError from every member; the constructor refuses a destination that is a directory, a device, or a
/// symbolic link (the rename would replace the link, not what it names).
class OutputFile {
 public:
  OutputFile() = default;
  explicit OutputFile(std::string path) : path_(std::move(path)) {
    struct stat info {};
    if (::lstat(path_.c_str(), &info) == 0) {
      if (S_ISDIR(info.st_mode)) throw IoError(path_, "is a directory, cannot write a file there");
      if (S_ISLNK(info.st_mode)) throw IoError(path_, "is a symbolic link; name the file itself as the output");
      if (!S_ISREG(info.st_mode)) throw IoError(path_, "is not a regular file, cannot replace it");
    }
    temporary_ = path_ + ".partial-XXXXXX";
    fd_ = detail::Descriptor(::mkostemp(temporary_.data(), O_CLOEXEC));
    if (fd_.get() < 0) {
      temporary_.clear();
      detail::throw_errno(path_, "cannot create");
    }
    const mode_t mask = ::umask(0);  // mkostemp made it private; a checkpoint gets the mode any new file gets
    ::umask(mask);
    ::fchmod(fd_.get(), 0666 & ~mask);
  }
  OutputFile(OutputFile&& other) noexcept { swap(other); }
  OutputFile& operator=(OutputFile&& other) noexcept {
    swap(other);
    return *this;
  }
  ~OutputFile() {
    if (!temporary_.empty()) ::unlink(temporary_.c_str());
  }

  [[nodiscard]] const std::string& path() const noexcept { return path_; }

  /// Claims the space now where the file system can, so that a full disk is found before the work is done.
  void reserve(std::uint64_t size) {
    if (size > 0 && ::fallocate(fd_.get(), 0, 0, off_t(size)) != 0 &&
        (errno == ENOSPC || errno == EFBIG || errno == EDQUOT))
      detail::throw_errno(path_, lowrank::detail::text("no room for ", size, " bytes").c_str());
  }
  void write_at(std::uint64_t offset, Bytes bytes) {
    while (!bytes.empty()) {
      const ssize_t n = ::pwrite(fd_.get(), bytes.data(), bytes.size(), off_t(offset));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) detail::throw_errno(path_, "cannot write");
      bytes = bytes.subspan(std::size_t(n));
      offset += std::uint64_t(n);
    }
  }
  /// Copies a range of a mapped file; inside the kernel where it can.
  void copy_at(std::uint64_t offset, const MappedFile& from, Bytes range) {
    while (!range.empty()) {
      off64_t in = range.data() - from.bytes().data(), out = off64_t(offset);
      const ssize_t n = ::copy_file_range(from.descriptor(), &in, fd_.get(), &out, range.size(), 0);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {  // across file systems, an old kernel, or there is nothing left to read
        std::vector<std::byte> piece(std::min<std::size_t>(range.size(), std::size_t(1) << 20));
        from.read(range.first(piece.size()), piece.data());
        write_at(offset, piece);
        range = range.subspan(piece.size());
        offset += piece.size();
        continue;
      }
      range = range.subspan(std::size_t(n));
      offset += std::uint64_t(n);
    }
  }
  /// Starts writing a range back in the background, so that commit() has little left to wait for.
  void start_writeback(std::uint64_t offset, std::uint64_t size) const noexcept {
#if defined(SYNC_FILE_RANGE_WRITE)
    ::sync_file_range(fd_.get(), off64_t(offset), off64_t(size), SYNC_FILE_RANGE_WRITE);
#else
    (void)offset, (void)size;
#endif
  }
  /// Makes what was written durable, still under its temporary name; nothing can be written after it.
  void flush() {
    if (fd_.get() < 0) return;
    if (::fsync(fd_.get()) != 0) detail::throw_errno(path_, "cannot flush to disk");
    if (fd_.close() != 0) detail::throw_errno(path_, "cannot close");
  }
  /// Puts the file in place.
  void commit() {
    flush();
    if (::rename(temporary_.c_str(), path_.c_str()) != 0) detail::throw_errno(path_, "cannot rename into place");
    temporary_.clear();
    detail::sync_directory_of(path_);
  }

 private:
  void swap(OutputFile& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(temporary_, other.temporary_);
    std::swap(fd_, other.fd_);
  }
  std::string path_, temporary_;
  detail::Descriptor fd_;
};

/// Replaces a file by the text, all at once or not at all.
inline void write_text(const std::string& path, std::string_view text) {
  OutputFile out(path);
  out.write_at(0, std::as_bytes(std::span(text.data(), text.size())));
  out.commit();
}

/// Files that belong together, each complete under a temporary name, put in place one after the other by commit().
///
/// A crash between two renames must not leave old and new files that pass for one set. A set has key files, without
/// which readers do not take the others for one (an index of shards, adapter_config.json): commit() makes everything
/// durable, takes the old key files and what must not stay away, moves the rest into place and the new key files last.
/// Before that, whatever goes wrong leaves the files that were there; from then on a set that cannot be read, or a
/// whole one.
/// **Throws** IoError from every member.
class StagedFiles {
 public:
  void add(OutputFile file, bool key = false) { (key ? keys_ : files_).push_back(std::move(file)); }
  void add_text(const std::string& path, std::string_view text, bool key = false) {
    OutputFile out(path);
    out.write_at(0, std::as_bytes(std::span(text.data(), text.size())));
    add(std::move(out), key);
  }
  /// A file that the new set must not have beside it; commit() removes it if it is there.
  void remove(const std::string& path) {
    struct stat info {};
    if (::lstat(path.c_str(), &info) != 0) return;
    if (S_ISDIR(info.st_mode)) throw IoError(path, "is a directory and in the way of the output");
    obsolete_.push_back(path);
  }
  /// Those of another set too; its key files come after the ones that are here.
  void append(StagedFiles&& more) {
    const auto move_all = [](auto& from, auto& to) {
      for (auto& x : from) to.push_back(std::move(x));
      from.clear();
    };
    move_all(more.files_, files_);
    move_all(more.keys_, keys_);
    move_all(more.obsolete_, obsolete_);
  }
  void commit() {
    for (auto* list : {&files_, &keys_})
      for (OutputFile& f : *list) f.flush();
    if (files_.size() + keys_.size() > 1 || !obsolete_.empty()) {  // a single file is replaced in one step
      for (auto key = keys_.rbegin(); key != keys_.rend(); ++key) take_away(key->path());
      for (const std::string& path : obsolete_) take_away(path);
    }
    for (auto* list : {&files_, &keys_}) {
      for (OutputFile& f : *list) f.commit();
      list->clear();
    }
    obsolete_.clear();
  }

 private:
  static void take_away(const std::string& path) {
    if (::unlink(path.c_str()) != 0) {
      if (errno != ENOENT) detail::throw_errno(path, "cannot remove");
      return;
    }
    detail::sync_directory_of(path);
  }
  std::vector<OutputFile> files_, keys_;
  std::vector<std::string> obsolete_;
};

}  // namespace lowrank::io

// SPDX-License-Identifier: Apache-2.0
// Reading and writing safetensors beside `cat FILE > /dev/null` and `cp`, in turn, on one file.
//
//     benchmark_io [FILE.safetensors] [--smoke]      without a file, one of 1 GB (--smoke: 32 MB) is made and removed
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/io/safetensors.hpp"
#include "lowrank/io/safetensors_writer.hpp"

using namespace lowrank;
using namespace lowrank::io;
namespace fs = std::filesystem;

namespace {

double seconds(auto&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void shell(const std::string& command) {
  if (std::system(command.c_str()) != 0) std::exit(1);
}

std::uint64_t sum_of(Bytes b) {
  std::uint64_t sum = 0;
  std::size_t i = 0;
  for (; i + 8 <= b.size(); i += 8) sum += io::load_unaligned<std::uint64_t>(b.data() + i);
  for (; i < b.size(); ++i) sum += std::uint64_t(b[i]);
  return sum;
}

/// Every byte of every tensor added up: read into a small buffer, as one pass over a tensor does.
std::uint64_t read_all(const std::string& path) {
  const SafeTensors file(path);
  std::uint64_t sum = 0;
  for (const TensorInfo& t : file.tensors()) file.view(t).read([&](Bytes b) { sum += sum_of(b); });
  return sum;
}

/// The same through the mapping, piece by piece, its pages given back.
std::uint64_t map_all(const std::string& path) {
  const SafeTensors file(path);
  std::uint64_t sum = 0;
  for (const TensorInfo& t : file.tensors()) {
    const Bytes all = file.view(t).bytes();
    constexpr std::size_t piece = 8 << 20;
    for (std::size_t at = 0; at < all.size(); at += piece) {
      const Bytes b = all.subspan(at, std::min(piece, all.size() - at));
      file.file().populate(b);
      sum += sum_of(b);
      file.file().drop(b);
    }
  }
  return sum;
}

void copy_all(const std::string& from, const std::string& to) {
  const SafeTensors file(from);
  std::vector<TensorSpec> specs(file.tensors().begin(), file.tensors().end());
  SafeTensorsWriter out(to, specs, file.metadata(), TensorOrder::as_given);
  for (const TensorInfo& t : file.tensors()) out.copy(t.name, file.view(t));
  out.commit();
}

/// The same through user space: what a program that computed the bytes does.
void write_all(const std::string& from, const std::string& to) {
  const SafeTensors file(from);
  std::vector<TensorSpec> specs(file.tensors().begin(), file.tensors().end());
  SafeTensorsWriter out(to, specs, file.metadata(), TensorOrder::as_given);
  for (const TensorInfo& t : file.tensors()) file.view(t).read([&](Bytes b) { out.write(t.name, b); });
  out.commit();
}

void make(const std::string& path, std::uint64_t bytes) {
  const std::uint64_t rows = bytes / 2 / 4096 / 16;
  std::vector<TensorSpec> specs;
  for (int i = 0; i < 16; ++i) specs.push_back({"w" + std::to_string(i), Dtype::BF16, {rows, 4096}});
  SafeTensorsWriter out(path, specs);
  Matrix<float> m(Index(rows), 4096);
  const CounterRng rng(1);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = float(rng.bits(std::uint64_t(i)) >> 40) * 0x1p-24F;
  for (const auto& t : specs) out.write_matrix(t.name, m);
  out.commit();
}

}  // namespace

int main(int argc, char** argv) {
  bool smoke = false;
  std::string path;
  for (int i = 1; i < argc; ++i) (std::string(argv[i]) == "--smoke" ? smoke = true : (path = argv[i], true));
  std::string made;
  if (path.empty()) {
    path = made = (fs::temp_directory_path() / "lowrank-benchmark-io.safetensors").string();
    make(path, smoke ? std::uint64_t(32) << 20 : std::uint64_t(1) << 30);
  }
  const double gigabytes = double(fs::file_size(path)) / 1e9;
  const std::string copy = path + ".copy", quoted = "'" + path + "'";
  const int repeats = smoke ? 2 : 5;
  std::uint64_t sum = 0;
  double best[6] = {1e30, 1e30, 1e30, 1e30, 1e30, 1e30};
  shell("cat " + quoted + " > /dev/null");  // into the page cache, as far as it fits
  for (int r = 0; r < repeats; ++r) {
    best[0] = std::min(best[0], seconds([&] { shell("cat " + quoted + " > /dev/null"); }));
    best[1] = std::min(best[1], seconds([&] { sum += read_all(path); }));
    best[2] = std::min(best[2], seconds([&] { sum += map_all(path); }));
    // Both copies end on the disk: the writer flushes before it renames, cp is followed by sync of the file.
    best[3] = std::min(best[3], seconds([&] { shell("cp " + quoted + " '" + copy + "' && sync '" + copy + "'"); }));
    fs::remove(copy);
    best[4] = std::min(best[4], seconds([&] { copy_all(path, copy); }));
    fs::remove(copy);
    best[5] = std::min(best[5], seconds([&] { write_all(path, copy); }));
    fs::remove(copy);
  }
  std::printf("%.2f GB, best of %d, cached\n", gigabytes, repeats);
  const char* names[] = {"cat > /dev/null", "SafeTensors, read",       "SafeTensors, mapped",
                         "cp, then sync",   "SafeTensorsWriter::copy", "SafeTensorsWriter::write"};
  for (int i = 0; i < 6; ++i)
    std::printf("%-30s %7.3f s  %6.2f GB/s  %5.2fx\n", names[i], best[i], gigabytes / best[i],
                best[i < 3 ? 0 : 3] / best[i]);
  std::printf("(checksum %llx)\n", static_cast<unsigned long long>(sum));
  if (!made.empty()) fs::remove(made);
  return 0;
}

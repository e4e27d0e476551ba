// SPDX-License-Identifier: Apache-2.0
// 4-bit weights: what is accepted has finite values within its scales, and is written to a file that says the same.
#include "lowrank/io/bitsandbytes.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include "check.hpp"

using namespace lowrank;
using namespace lowrank::io;

namespace {

/// A file in memory: a checkpoint is opened by path.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("checkpoint", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(fd_)) {
    LOWRANK_PROMISE(fd_ >= 0);
  }
  const std::string& holding(Bytes bytes) const {
    LOWRANK_PROMISE(::ftruncate(fd_, 0) == 0);
    LOWRANK_PROMISE(::pwrite(fd_, bytes.data(), bytes.size(), 0) == ssize_t(bytes.size()));
    return path_;
  }

 private:
  int fd_;
  std::string path_;
};

std::string as_file(const std::vector<OwnedTensor>& tensors) {
  std::vector<TensorInfo> infos;
  std::string data;
  for (const OwnedTensor& t : tensors) {
    TensorInfo info;
    info.name = t.spec.name;
    info.dtype = t.spec.dtype;
    info.shape = t.spec.shape;
    info.begin = data.size();
    data.append(reinterpret_cast<const char*>(t.bytes.data()), t.bytes.size());
    info.end = data.size();
    infos.push_back(info);
  }
  return safetensors_header("f", infos, {}) + data;
}

void check(const Checkpoint& c, const std::string& weight) {
  QuantisedMatrix<float> q;
  if (!fuzz::accepted([&] { q = read_bitsandbytes(c, weight); })) return;
  const Matrix<float> values = q.dequantise();
  LOWRANK_PROMISE(values.rows() == q.rows() && values.cols() == q.cols());
  for (Index i = 0; i < q.rows() && q.cols() > 0; ++i)
    for (Index j = 0; j < q.cols(); ++j) {
      const float scale = q.scale(q.layout().block_of(i, j));
      LOWRANK_PROMISE(std::isfinite(values(i, j)) && std::abs(values(i, j)) <= std::abs(scale));
      LOWRANK_PROMISE(q(i, j) == values(i, j));
      LOWRANK_PROMISE(values(i, j) == q.codebook().values()[q.code(i, j)] * scale);
    }
  const auto written = bitsandbytes_tensors(weight, q);
  const std::string text = as_file(written);
  static const MemoryFile second;
  const Checkpoint again(second.holding(fuzz::bytes(text)));
  LOWRANK_PROMISE(bitsandbytes_type(again, weight) == q.codebook().name());
  const auto p = read_bitsandbytes(again, weight);
  LOWRANK_PROMISE(p.rows() == q.rows() && p.cols() == q.cols() && p.codebook() == q.codebook());
  LOWRANK_PROMISE(std::ranges::equal(p.codes(), q.codes()) && p.is_double_quantised() == q.is_double_quantised());
  for (Index b = 0; b < q.layout().block_count(); ++b) LOWRANK_PROMISE(p.scale(b) == q.scale(b));
  const auto twice = bitsandbytes_tensors(weight, p);
  LOWRANK_PROMISE(twice.size() == written.size());
  for (std::size_t i = 0; i < twice.size(); ++i)
    LOWRANK_PROMISE(twice[i].spec.name == written[i].spec.name && twice[i].bytes == written[i].bytes);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const MemoryFile first;
  fuzz::accepted([&] {
    const Checkpoint c(first.holding(fuzz::bytes(data, size)));
    c.for_each([&](const TensorView& t) {
      const std::string name(t.name());
      if (!bitsandbytes_type(c, name).empty()) check(c, name);
    });
  });
  return 0;
}

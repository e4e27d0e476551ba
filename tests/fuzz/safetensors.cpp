// SPDX-License-Identifier: Apache-2.0
// safetensors: accepted files have every tensor inside, no holes, and serialise to a file that says the same.
#include "lowrank/io/safetensors.hpp"

#include "check.hpp"
#include "lowrank/io/safetensors_writer.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  SafeTensorsHeader h;
  std::uint64_t offset = 0;
  const Bytes file = fuzz::bytes(data, size);
  if (!fuzz::accepted([&] { h = parse_safetensors("f", file, offset); })) return 0;
  LOWRANK_PROMISE(offset <= size);
  std::uint64_t at = 0;
  for (const TensorInfo& t : h.tensors) {
    LOWRANK_PROMISE(t.begin == at && t.end >= t.begin && t.end <= size - offset);
    LOWRANK_PROMISE(byte_size(t.dtype, t.shape) == t.bytes());
    at = t.end;
  }
  LOWRANK_PROMISE(at == size - offset);
  auto tensors = h.tensors;
  std::string again = safetensors_header("f", tensors, h.metadata);
  LOWRANK_PROMISE(again.size() % 8 == 0);
  again.append(reinterpret_cast<const char*>(data) + offset, size - offset);
  LOWRANK_PROMISE(parse_safetensors("f", fuzz::bytes(again), offset) == h);
  return 0;
}

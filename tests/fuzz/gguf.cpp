// SPDX-License-Identifier: Apache-2.0
// GGUF: accepted files have every tensor inside and apart, and are rebuilt by our writer to a file that says the same;
// as an adapter they give factors that multiply.
#include "lowrank/io/gguf.hpp"

#include "check.hpp"
#include "lowrank/io/gguf_adapter.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  GgufHeader h;
  const Bytes file = fuzz::bytes(data, size);
  if (!fuzz::accepted([&] { h = parse_gguf("f", file); })) return 0;
  LOWRANK_PROMISE(h.data_offset <= size);
  GgufWriter w{std::uint32_t(h.alignment)};
  for (const auto& [key, value] : h.values) w.set(key, value);
  std::uint64_t end = 0;
  for (const GgufTensor& t : h.tensors) {
    LOWRANK_PROMISE(t.offset >= end && t.offset % h.alignment == 0);
    LOWRANK_PROMISE(t.bytes <= size - h.data_offset && t.offset <= size - h.data_offset - t.bytes);
    end = t.offset + t.bytes;
    w.add(t.name, t.type, t.ne, {reinterpret_cast<const char*>(data) + h.data_offset + t.offset, std::size_t(t.bytes)});
  }
  // Compared as bytes: a NaN among the values does not equal itself.
  const std::string again = w.bytes();
  const GgufHeader second = parse_gguf("f", fuzz::bytes(again));
  LOWRANK_PROMISE(second.tensors == h.tensors && second.values.size() == h.values.size());
  GgufWriter w2{std::uint32_t(second.alignment)};
  for (const auto& [key, value] : second.values) w2.set(key, value);
  for (const GgufTensor& t : second.tensors)
    w2.add(t.name, t.type, t.ne, again.substr(second.data_offset + t.offset, t.bytes));
  LOWRANK_PROMISE(w2.bytes() == again);

  (void)fuzz::accepted([&] {
    const PeftAdapter a = parse_gguf_adapter("f", file, {.architecture = "", .heads = 2, .kv_heads = 1});
    LOWRANK_PROMISE(!a.modules.empty());
    for (const AdapterModule& m : a.modules)
      LOWRANK_PROMISE(m.factors.A.rows() == m.factors.B.cols() && m.factors.rank() > 0 &&
                      std::isfinite(m.factors.scale));
  });
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// lowrank.json, and the same mark in the metadata of an adapter: what is accepted is written to a text that means the
// same.
#include "lowrank/io/changed_base.hpp"

#include "check.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  ChangedBase b;
  if (!fuzz::accepted([&] { b = parse_changed_base("f", fuzz::text(data, size)); })) return 0;
  LOWRANK_PROMISE(b.kind == "residual" || b.kind == "quantized");
  LOWRANK_PROMISE(parse_changed_base("f", changed_base_text(b)) == b);
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// The index of a sharded checkpoint: accepted ones name plain files and serialise to an index that says the same.
#include "check.hpp"
#include "lowrank/io/checkpoint.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::map<std::string, std::string> map;
  if (!fuzz::accepted([&] { map = parse_safetensors_index("f", fuzz::text(data, size)); })) return 0;
  std::map<std::string, std::vector<TensorInfo>> shards;
  for (const auto& [name, shard] : map) {
    LOWRANK_PROMISE(!shard.empty() && shard.find('/') == std::string::npos && shard != "..");
    TensorInfo t;
    t.name = name;
    shards[shard].push_back(t);
  }
  LOWRANK_PROMISE(parse_safetensors_index("f", safetensors_index("f", shards)) == map);
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// config.json of a Llama checkpoint: accepted sizes fit together, and the text we write means the same.
#include "lowrank/io/llama_config.hpp"

#include "check.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  LlamaConfig c;
  if (!fuzz::accepted([&] { c = parse_llama_config("f", fuzz::text(data, size)); })) return 0;
  LOWRANK_PROMISE(c.num_attention_heads % c.num_key_value_heads == 0 && c.head_dim % 2 == 0 && c.head_dim > 0);
  LOWRANK_PROMISE(std::isfinite(c.rope_theta) && c.rope_theta > 0 && c.rms_norm_eps >= 0);
  LOWRANK_PROMISE(parse_llama_config("f", llama_config_text(c)) == c);
  return 0;
}

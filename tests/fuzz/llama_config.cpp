// SPDX-License-Identifier: Apache-2.0
// config.json of a Llama checkpoint: accepted sizes fit together, and the text we write means the same. The reader of
// every family takes the same text.
#include "lowrank/io/llama_config.hpp"

#include "check.hpp"
#include "lowrank/io/gguf_adapter.hpp"
#include "lowrank/io/model_config.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  ModelConfig any;
  if (fuzz::accepted([&] { any = parse_model_config("f", fuzz::text(data, size)); })) {
    LOWRANK_PROMISE(any.heads >= 0 && any.kv_heads >= 0 && any.experts >= 0 && (any.heads == 0 || any.kv_heads > 0));
    GgufAdapterOptions o;
    if (fuzz::accepted([&] { o = gguf_options(any); })) LOWRANK_PROMISE(!o.architecture.empty());
  }
  LlamaConfig c;
  if (!fuzz::accepted([&] { c = parse_llama_config("f", fuzz::text(data, size)); })) return 0;
  LOWRANK_PROMISE(c.num_attention_heads % c.num_key_value_heads == 0 && c.head_dim % 2 == 0 && c.head_dim > 0);
  LOWRANK_PROMISE(std::isfinite(c.rope_theta) && c.rope_theta > 0 && c.rms_norm_eps >= 0);
  LOWRANK_PROMISE(parse_llama_config("f", llama_config_text(c)) == c);
  return 0;
}

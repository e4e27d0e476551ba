// SPDX-License-Identifier: Apache-2.0
// adapter_config.json: accepted ones are written to a text that means the same.
#include "lowrank/io/peft_config.hpp"

#include "check.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  PeftConfig c;
  if (!fuzz::accepted([&] { c = parse_peft_config("f", fuzz::text(data, size)); })) return 0;
  LOWRANK_PROMISE(c.r >= 1 && std::isfinite(c.lora_alpha) && c.lora_dropout >= 0 && c.lora_dropout < 1);
  c.unknown_keys.clear();
  if (!c.target_expression.empty()) c.target_modules.clear();
  if (!c.exclude_expression.empty()) c.exclude_modules.clear();
  const PeftConfig again = parse_peft_config("f", peft_config_text(c));
  LOWRANK_PROMISE(again == c);
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// What takes a LoRA adapter would leave a DoRA adapter's magnitudes out without a word.
// expect: (no matching function|could not convert|no viable)
#include "lowrank/adapter/dora.hpp"

void bad(const lowrank::DoraLinear<float>& layer) {
#ifdef FIXED
  (void)lowrank::delta_weight(layer.factors().lora);
#else
  (void)lowrank::delta_weight(layer.factors());
#endif
}

// SPDX-License-Identifier: Apache-2.0
// expect: Real
#include "lowrank/adapter/lora.hpp"

#ifdef FIXED
lowrank::LoraLinear<double>* layer = nullptr;
#else
lowrank::LoraLinear<int>* layer = nullptr;
#endif

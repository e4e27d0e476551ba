// SPDX-License-Identifier: Apache-2.0
// Two-byte storage has float arithmetic.
// expect: StorageOf
#include "lowrank/linalg/base.hpp"

#ifdef FIXED
lowrank::DenseBase<float, lowrank::bf16>* base = nullptr;
#else
lowrank::DenseBase<double, lowrank::bf16>* base = nullptr;
#endif

// SPDX-License-Identifier: Apache-2.0
// A frozen base must be able to send a gradient back; the compiler names what is missing.
// expect: backward
#include "lowrank/adapter/lora.hpp"

struct Base {
  lowrank::Index rows() const { return 2; }
  lowrank::Index cols() const { return 3; }
  void forward(lowrank::MatrixView<const float>, lowrank::MatrixView<float>, lowrank::Update) const {}
#ifdef FIXED
  void backward(lowrank::MatrixView<const float>, lowrank::MatrixView<float>, lowrank::Update) const {}
#endif
};

using Layer = lowrank::LoraLinear<float, Base>;
Layer* layer = nullptr;

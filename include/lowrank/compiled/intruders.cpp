// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: The search for intruder dimensions.
#include "lowrank/spectrum/intruders.hpp"

namespace lowrank {
template IntruderReport find_intruders(MatrixView<const float>, MatrixView<const float>, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const double>, MatrixView<const double>, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const bf16>, MatrixView<const bf16>, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const f16>, MatrixView<const f16>, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const float>, const LoraFactors<float>&, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const double>, const LoraFactors<double>&, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const bf16>, const LoraFactors<float>&, const IntruderOptions&);
template IntruderReport find_intruders(MatrixView<const f16>, const LoraFactors<float>&, const IntruderOptions&);
}  // namespace lowrank

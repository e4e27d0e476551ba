// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: LoftQ.
#include "lowrank/init/loftq.hpp"

namespace lowrank::detail {
template QuantisedInit<float> loftq_of(MatrixView<const float>, const LoftqOptions&, MatrixView<const float>);
template QuantisedInit<double> loftq_of(MatrixView<const double>, const LoftqOptions&, MatrixView<const double>);
template QuantisedInit<float> loftq_of(MatrixView<const bf16>, const LoftqOptions&, MatrixView<const float>);
template QuantisedInit<float> loftq_of(MatrixView<const f16>, const LoftqOptions&, MatrixView<const float>);
}  // namespace lowrank::detail

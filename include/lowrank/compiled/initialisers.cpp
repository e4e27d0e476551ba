// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: What initialisers with a dense base share.
#include "lowrank/init/residual.hpp"

namespace lowrank {
template ResidualNorms residual_base(MatrixView<const float>, const LoraFactors<float>&, MatrixView<float>);
template ResidualNorms residual_base(MatrixView<const double>, const LoraFactors<double>&, MatrixView<double>);
template ResidualNorms residual_base(MatrixView<const bf16>, const LoraFactors<float>&, MatrixView<float>);
template ResidualNorms residual_base(MatrixView<const f16>, const LoraFactors<float>&, MatrixView<float>);
template ResidualNorms residual_base(MatrixView<const bf16>, const LoraFactors<float>&, MatrixView<bf16>);
template ResidualNorms residual_base(MatrixView<const f16>, const LoraFactors<float>&, MatrixView<f16>);
template ResidualNorms residual_base(MatrixView<const float>, const LoraFactors<float>&, MatrixView<bf16>);
}  // namespace lowrank

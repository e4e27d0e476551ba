// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: Products with codes.
#include "lowrank/quant/quantised_products.hpp"

namespace lowrank::detail {
template void quantised_forward(MatrixView<const float>, const QuantisedArrays&, MatrixView<float>, Update);
template void quantised_forward(MatrixView<const double>, const QuantisedArrays&, MatrixView<double>, Update);
template void quantised_backward(MatrixView<const float>, const QuantisedArrays&, MatrixView<float>, Update);
template void quantised_backward(MatrixView<const double>, const QuantisedArrays&, MatrixView<double>, Update);
template void pack_quantised<float, false>(const QuantisedArrays&, int, Index, Index, Index, Index, float*);
template void pack_quantised<float, true>(const QuantisedArrays&, int, Index, Index, Index, Index, float*);
template void pack_quantised<double, false>(const QuantisedArrays&, int, Index, Index, Index, Index, double*);
template void pack_quantised<double, true>(const QuantisedArrays&, int, Index, Index, Index, Index, double*);
}  // namespace lowrank::detail

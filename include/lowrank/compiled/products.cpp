// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: The packed product, the product of few rows, and the streamed pass.
#include "lowrank/linalg/detail/few_rows.hpp"
#include "lowrank/linalg/detail/packed_gemm.hpp"
#include "lowrank/linalg/detail/streamed_pass.hpp"
#include "lowrank/linalg/gemm.hpp"

extern "C" const char LOWRANK_COMPILED_FOR = 1;

namespace lowrank::detail {
template void gemm_packed(float, const AnySource<float>&, const AnySource<float>&, bool, MatrixView<float>);
template void gemm_packed(double, const AnySource<double>&, const AnySource<double>&, bool, MatrixView<double>);
template void gemm_packed_upper(float, const AnySource<float>&, const AnySource<float>&, bool, MatrixView<float>);
template void gemm_packed_upper(double, const AnySource<double>&, const AnySource<double>&, bool, MatrixView<double>);
template void few_rows_product(float, MatrixView<const float>, MatrixView<const float>, bool, MatrixView<float>);
template void few_rows_product(double, MatrixView<const double>, MatrixView<const double>, bool, MatrixView<double>);
template void few_rows_product(float, MatrixView<const float>, MatrixView<const bf16>, bool, MatrixView<float>);
template void few_rows_product(float, MatrixView<const float>, MatrixView<const f16>, bool, MatrixView<float>);
template void product(float, MatrixView<const float>, MatrixView<const float>, bool, MatrixView<float>);
template void product(double, MatrixView<const double>, MatrixView<const double>, bool, MatrixView<double>);
template void product(float, MatrixView<const float>, MatrixView<const bf16>, bool, MatrixView<float>);
template void product(float, MatrixView<const bf16>, MatrixView<const float>, bool, MatrixView<float>);
template void product(float, MatrixView<const float>, MatrixView<const f16>, bool, MatrixView<float>);
template void product(float, MatrixView<const f16>, MatrixView<const float>, bool, MatrixView<float>);
template void streamed_pass_of(Pass, const AnyRows<float>&, MatrixView<const float>, MatrixView<float>,
                               MatrixView<float>, PanelAdjustment<float>);
template void streamed_pass_of(Pass, const AnyRows<double>&, MatrixView<const double>, MatrixView<double>,
                               MatrixView<double>, PanelAdjustment<double>);
template void streamed_pass_of(Pass, const AnyRows<bf16>&, MatrixView<const float>, MatrixView<float>,
                               MatrixView<float>, PanelAdjustment<float>);
template void streamed_pass_of(Pass, const AnyRows<f16>&, MatrixView<const float>, MatrixView<float>, MatrixView<float>,
                               PanelAdjustment<float>);
template double sum_of_squares_of<float>(const AnyRows<float>&);
template double sum_of_squares_of<double>(const AnyRows<double>&);
template double sum_of_squares_of<float>(const AnyRows<bf16>&);
template double sum_of_squares_of<float>(const AnyRows<f16>&);
}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: The truncated SVD.
#include "lowrank/linalg/truncated_svd.hpp"

namespace lowrank::detail {
template TruncatedSvd<float> truncated_svd_of(AnyOperator<float>, Index, const TruncatedSvdOptions&,
                                              MatrixView<const float>);
template TruncatedSvd<double> truncated_svd_of(AnyOperator<double>, Index, const TruncatedSvdOptions&,
                                               MatrixView<const double>);
template TruncatedSvd<float> truncated_svd_of_dense(MatrixView<const float>, Index, const TruncatedSvdOptions&,
                                                    MatrixView<const float>);
template TruncatedSvd<double> truncated_svd_of_dense(MatrixView<const double>, Index, const TruncatedSvdOptions&,
                                                     MatrixView<const double>);
template TruncatedSvd<float> truncated_svd_of_dense(MatrixView<const bf16>, Index, const TruncatedSvdOptions&,
                                                    MatrixView<const float>);
template TruncatedSvd<float> truncated_svd_of_dense(MatrixView<const f16>, Index, const TruncatedSvdOptions&,
                                                    MatrixView<const float>);
}  // namespace lowrank::detail

// SPDX-License-Identifier: Apache-2.0
// lowrank::compiled: QR, full SVDs and all singular values.
#include "lowrank/linalg/qr.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/small_svd.hpp"
#include "lowrank/linalg/svd.hpp"

namespace lowrank {
template void thin_qr_in_place(MatrixView<float>, MatrixView<float>);
template void thin_qr_in_place(MatrixView<double>, MatrixView<double>);
template void detail::qr_recursive(MatrixView<float>, MatrixView<float>, MatrixView<float>, detail::QrScratch<float>&);
template void detail::qr_recursive(MatrixView<double>, MatrixView<double>, MatrixView<double>,
                                   detail::QrScratch<double>&);
template Svd<float> small_svd(MatrixView<const float>);
template Svd<double> small_svd(MatrixView<const double>);
}  // namespace lowrank

namespace lowrank::detail {
template Svd<float> svd_of(MatrixView<const float>, double);
template Svd<double> svd_of(MatrixView<const double>, double);
template Svd<float> svd_of(MatrixView<const bf16>, double);
template Svd<float> svd_of(MatrixView<const f16>, double);
template SingularValues singular_values_of(MatrixView<const float>, const SingularValueOptions&);
template SingularValues singular_values_of(MatrixView<const double>, const SingularValueOptions&);
template SingularValues singular_values_of(MatrixView<const bf16>, const SingularValueOptions&);
template SingularValues singular_values_of(MatrixView<const f16>, const SingularValueOptions&);
}  // namespace lowrank::detail

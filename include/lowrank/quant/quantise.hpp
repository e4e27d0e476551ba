// SPDX-License-Identifier: Apache-2.0
// quantise: a dense weight to codes and scales, block by block on all threads.
#pragma once

#include "lowrank/core/factor_scalar.hpp"
#include "lowrank/quant/quantised_matrix.hpp"

namespace lowrank {

/// W as codes and scales.
///
/// For each block: scale = largest magnitude, code = the nearest of table to x·(1/scale), ties to the lower.
/// **Shapes** W out×in of float, double, bf16 or f16, in any order; blocks run along its rows.
/// **Throws** NonFiniteError naming element and block, also when levels of an affine block or of int8 would leave the
/// range of float; ArgumentError for a block size that is not a power of two in
/// [32, 4096] or options that do not go together. **Cost** one pass over W, on all threads.
/// **Numerics** everything happens in float, as in bitsandbytes: the reciprocal of the scale is rounded, multiplied,
/// and compared with the midpoints of the table. Codes and scales are the same bits for any number of threads. A block
/// of zeros gets the code of zero; a block so small that the reciprocal overflows is divided instead.
/// **Source** Dettmers et al., arXiv 2305.14314, §3.
template <MatrixLike X>
QuantisedMatrix<factor_scalar<X>> quantise(X&& W, QuantiseOptions options = {}) {
  const auto view = view_of(W);
  using S = typename decltype(view)::value_type;
  auto q = QuantisedMatrix<factor_scalar<X>>::zero(view.rows(), view.cols(), std::move(options));
  q.assign(MatrixView<const S>(view));
  return q;
}

}  // namespace lowrank

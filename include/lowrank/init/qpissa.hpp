// SPDX-License-Identifier: Apache-2.0
// QPiSSA: the principal triplets of W stay in full precision as factors, only the residual base is quantised.
#pragma once

#include "lowrank/init/detail/loftq_alternation.hpp"

namespace lowrank {

/// QPiSSA: s·B·A = the top-r SVD of W, Q = quant(W − s·B·A); then T − 1 times: s·B·A = the best rank-r approximation of
/// W − Q, Q = quant(W − s·B·A).
///
/// The residual of a trained weight has lighter tails than the weight, so quantising it loses less. Returns the pair
/// with the least error of all iterations. With a `covariance` the fits and the comparison are weighted as in loftq
/// (the first factors are then those of CorDA's instruction mode).
/// **Shapes**, **Scale**, **Throws**, **Cost** as loftq. **Numerics** as loftq; but for T = 1 and a W without principal
/// directions (white noise) the error may exceed that of plain quantisation, in which case quant(W) with B = 0 is
/// returned and the last step of the report says so.
/// **Source** Meng et al., "PiSSA", arXiv 2404.02948, §4 and algorithm 1 (QPiSSA-T-iters).
template <class Factor = void, MatrixLike X>
requires FactorScalarOf<Factor, X> QuantisedInit<factor_scalar<X>> qpissa(
    X&& weight, const LoftqOptions& options = {},
    std::type_identity_t<MatrixView<const factor_scalar<X>>> covariance = {}) {
  using S = scalar_of<X>;
  using T = factor_scalar<X>;
  detail::QuantisedAlternation<T, S> a("qpissa", view_of(weight), options, covariance);
  for (int t = 0; t < options.iterations; ++t) {
    a.fit_factors(t == 0);
    a.quantise_rest();
    if (!a.keep_if_better(a.measure())) break;
  }
  return a.finish();
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// LoftQ: a quantised base and low-rank factors fitted to each other, so that training starts near W and not near
// quant(W).
#pragma once

#include "lowrank/init/detail/loftq_alternation.hpp"

namespace lowrank {
namespace detail {

template <class T, class S>
[[gnu::cold]] QuantisedInit<T> loftq_of(MatrixView<const S> W, const LoftqOptions& options,
                                        MatrixView<const T> covariance) {
  QuantisedAlternation<T, S> a("loftq", W, options, covariance);
  for (int t = 0; t < options.iterations; ++t) {
    if (t > 0 || options.gptq) a.quantise_rest();  // else the first Q is quant(W), which the constructor has made
    a.fit_factors(false);
    if (!a.keep_if_better(a.measure())) break;
  }
  return a.finish();
}

}  // namespace detail

/// LoftQ: from B·A = 0, T times: Q = quant(W − s·B·A), then s·B·A = the best rank-r approximation of W − Q.
///
/// Returns the pair with the least error ‖W − (Q + s·B·A)‖_F of all iterations, the base as codes. With a `covariance`
/// C = E[x·xᵀ] of the layer's inputs (in×in), the error fitted and compared is √tr(E·C·Eᵀ), what the outputs see; with
/// `gptq` set quant minimises it too.
/// **Shapes** W out×in of float, double, bf16 or f16 in any order; A r×in, B out×r. **Scale** s = α/r or α/√r is
/// divided out of the factors: the correction is s·B·A whatever α.
/// **Throws** ArgumentError: rank, α, iterations < 1, block size, a covariance that is not symmetric and positive
/// definite after damping, gptq without one; NonFiniteError: NaN or infinity in W, with element and block. **Cost** T
/// times a truncated SVD (started from the last one's subspace) and some passes over W; memory: one dense matrix in T
/// besides Q (two with a covariance).
/// **Numerics** an inexact SVD raises an iteration's error by at most about `svd_slack`; the error never exceeds that
/// of plain quantisation. Same seed, same bits, whatever the threads.
/// **Source** Li et al., "LoftQ", arXiv 2310.08659, algorithm 1. As published, s is ignored by PEFT; here it is not.
template <class Factor = void, MatrixLike X>
requires FactorScalarOf<Factor, X> QuantisedInit<factor_scalar<X>> loftq(
    X&& weight, const LoftqOptions& options = {},
    std::type_identity_t<MatrixView<const factor_scalar<X>>> covariance = {}) {
  using S = scalar_of<X>;
  return detail::loftq_of<factor_scalar<X>, S>(view_of(weight), options, covariance);
}

}  // namespace lowrank

#if defined(LOWRANK_COMPILED)
namespace lowrank::detail {
extern template QuantisedInit<float> loftq_of(MatrixView<const float>, const LoftqOptions&, MatrixView<const float>);
extern template QuantisedInit<double> loftq_of(MatrixView<const double>, const LoftqOptions&, MatrixView<const double>);
extern template QuantisedInit<float> loftq_of(MatrixView<const bf16>, const LoftqOptions&, MatrixView<const float>);
extern template QuantisedInit<float> loftq_of(MatrixView<const f16>, const LoftqOptions&, MatrixView<const float>);
}  // namespace lowrank::detail
#endif

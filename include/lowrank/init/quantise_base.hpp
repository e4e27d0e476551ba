// SPDX-License-Identifier: Apache-2.0
// The base any other initialiser leaves, quantised: QMiLoRA, QOLoRA, QLoRA itself, with the error of the whole
// reported.
#pragma once

#include "lowrank/init/loftq_options.hpp"
#include "lowrank/init/residual.hpp"

namespace lowrank {

/// Quantises the base of an initialisation (pissa, milora, olora, corda, lora_ga …), or W itself for the methods that
/// leave it alone (kaiming …: that is QLoRA).
///
/// **Shapes** W the weight that was initialised from, out×in. **Throws** ShapeError when `init` is not of W's shape;
/// else as quantise. **Cost** one quantisation, 2·out·in·r flops and two dense matrices for the report.
/// **Numerics** the factors are kept as they are; the report's single step holds ‖W − (Q + s·B·A)‖_F and leaves the
/// other norms unset. For the least error with factors of that rank see loftq, for a residual base iterated see qpissa.
template <Real T, class Base, MatrixLike X>
QuantisedInit<T> quantise_base(X&& weight, const Initialised<T, Base>& init, const QuantiseOptions& options = {}) {
  const detail::Stopwatch watch;
  const auto W = view_of(weight);
  using S = typename decltype(W)::value_type;
  const LoraFactors<T>& f = init.factors;
  detail::expect_shape("quantise_base", "W", W.rows(), W.cols(), f.out_features(), f.in_features());
  const auto error = [&](const QuantisedMatrix<T>& q, const LoraFactors<T>& factors) {
    Matrix<T> E;
    E.resize(W.rows(), W.cols());
    residual_base(MatrixView<const S>(W), factors, E.view());
    const Matrix<T> values = q.dequantise();
    for (Index i = 0; i < E.size(); ++i) E.data()[i] -= values.data()[i];
    return std::sqrt(detail::squared_norm(E.view()));
  };
  QuantisedInit<T> result;
  auto plain = QuantisedMatrix<T>::zero(W.rows(), W.cols(), options);
  plain.assign(W);
  LoftqReport& report = result.report;
  report.method = "q" + init.report.method;
  report.weight_norm = std::sqrt(detail::squared_norm(W));
  report.plain.frobenius = error(plain, LoraFactors<T>{Matrix<T>(0, W.cols()), Matrix<T>(W.rows(), 0), T(1)});
  result.factors = f;
  if (init.base_changed) {
    result.base = QuantisedMatrix<T>::zero(W.rows(), W.cols(), options);
    result.base.assign(init.base.view());
  } else {
    result.base = std::move(plain);
  }
  LoftqStep step;
  step.frobenius = error(result.base, f);
  step.spectral = std::numeric_limits<double>::quiet_NaN();
  report.seconds = step.seconds = watch.seconds();
  report.steps.push_back(step);
  return result;
}

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// The parts of a Llama layer without a weight matrix, each forward beside its hand-written backward.
//
// Throughout, x and y are tokens × features and g = ∂L/∂y has y's shape.
#pragma once

#include <cmath>

#include "tensors.hpp"

namespace llama {

// ---- RMSNorm: y = x · inv ∘ w with inv = 1/√(mean(x²) + ε), one inv a token
// ------------------------------------------

template <class T>
void rms_norm(const Mat<T>& x, const RowVec<T>& w, double eps, ColVec<T>& inv, Mat<T>& y) {
  inv.resize(x.rows());
  y.resize(x.rows(), x.cols());
  for_each_parallel(x.rows(), [&](Index i) {
    inv(i) = T(1) / std::sqrt(x.row(i).squaredNorm() / T(x.cols()) + T(eps));
    y.row(i) = (x.row(i).array() * w.array()) * inv(i);
  });
}

/// dx += inv·(g∘w − x·inv²·mean(x∘g∘w)).
template <class T>
void rms_norm_backward(const Mat<T>& x, const RowVec<T>& w, const ColVec<T>& inv, const Mat<T>& g, Mat<T>& dx) {
  for_each_parallel(x.rows(), [&](Index i) {
    const T mean = (x.row(i).array() * g.row(i).array() * w.array()).sum() / T(x.cols());
    const T r = inv(i);
    dx.row(i).array() += r * (g.row(i).array() * w.array()) - (r * r * r * mean) * x.row(i).array();
  });
}

/// dw += Σ_tokens g∘x·inv.
template <class T>
void rms_norm_weight_gradient(const Mat<T>& x, const ColVec<T>& inv, const Mat<T>& g, Eigen::Map<RowVec<T>> dw) {
  for (Index i = 0; i < x.rows(); ++i) dw.array() += inv(i) * x.row(i).array() * g.row(i).array();
}

// ---- SwiGLU: y = silu(gate) ∘ up, silu(z) = z·σ(z)
// --------------------------------------------------------------------

template <class T>
void swiglu(const Mat<T>& gate, const Mat<T>& up, Mat<T>& y) {
  y.resize(gate.rows(), gate.cols());
  for_each_parallel(gate.rows(), [&](Index i) {
    const auto z = gate.row(i).array();
    y.row(i).array() = z / (T(1) + (-z).exp()) * up.row(i).array();
  });
}

/// dgate = g∘up∘σ(1 + z(1 − σ)), dup = g∘silu(z).
template <class T>
void swiglu_backward(const Mat<T>& gate, const Mat<T>& up, const Mat<T>& g, Mat<T>& dgate, Mat<T>& dup) {
  dgate.resize(gate.rows(), gate.cols());
  dup.resize(gate.rows(), gate.cols());
  for_each_parallel(gate.rows(), [&](Index i) {
    const auto z = gate.row(i).array();
    auto sigma = dup.row(i).array();  // a place to keep it until dup needs the memory
    sigma = T(1) / (T(1) + (-z).exp());
    dgate.row(i).array() = g.row(i).array() * up.row(i).array() * sigma * (T(1) + z * (T(1) - sigma));
    dup.row(i).array() = g.row(i).array() * z * sigma;
  });
}

// ---- Cross-entropy, in nats a token
// --------------------------------------------------------------------------------------

/// Mean of −log softmax(logits)[target]. With `gradient`, the logits are overwritten by ∂L/∂logits = (softmax −
/// onehot)/tokens.
template <class T>
double cross_entropy(Mat<T>& logits, const std::vector<Token>& targets, bool gradient) {
  ColVec<double> loss(logits.rows());
  const T share = T(1) / T(logits.rows());
  for_each_parallel(logits.rows(), [&](Index i) {
    auto z = logits.row(i).array();
    const Index target = Index(targets[std::size_t(i)]);
    z -= z.maxCoeff();
    const T at_target = z(target);
    z = z.exp();
    const T sum = z.sum();
    loss(i) = std::log(double(sum)) - double(at_target);
    if (!gradient) return;
    z *= share / sum;
    z(target) -= share;
  });
  return loss.mean();
}

}  // namespace llama

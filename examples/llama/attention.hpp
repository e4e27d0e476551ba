// SPDX-License-Identifier: Apache-2.0
// Causal attention with grouped queries: several query heads share one key and one value head.
//
// For each window and query head, time × time probabilities P = softmax(Q·Kᵀ/√head_dim) over the past, then Y = P·V.
// Rows are done in blocks, and a block only multiplies with the keys it may see, which saves nearly half of the work.
#pragma once

#include <cmath>

#include "lowrank/eigen.hpp"
#include "lowrank/linalg/gemm.hpp"
#include "tensors.hpp"

namespace llama {

struct AttentionShape {
  Index batch = 0, time = 0, heads = 0, kv_heads = 0, head_dim = 0;

  [[nodiscard]] Index group() const { return heads / kv_heads; }
  [[nodiscard]] double scale() const { return 1.0 / std::sqrt(double(head_dim)); }
  static constexpr Index block = 64;  ///< rows of P done at a time
};

/// y (tokens × heads·head_dim) from rotated q (the same shape) and k, v (tokens × kv_heads·head_dim). Keeps P for the
/// way back: (batch·heads·time) × time, zero above each window's diagonal.
template <class T>
void attention(const AttentionShape& s, const Mat<T>& q, const Mat<T>& k, const Mat<T>& v, Mat<T>& P, Mat<T>& y) {
  P.resize(s.batch * s.heads * s.time, s.time);
  y.resize(q.rows(), q.cols());
  const auto qv = lowrank::view_of(q), kv = lowrank::view_of(k), vv = lowrank::view_of(v);
  const auto Pv = lowrank::view_of(P), yv = lowrank::view_of(y);
  for_each_task(s.batch * s.heads, [&](Index task) {
    const Index b = task / s.heads, h = task % s.heads, col = h / s.group() * s.head_dim;
    const auto K = kv.block(b * s.time, col, s.time, s.head_dim), V = vv.block(b * s.time, col, s.time, s.head_dim);
    for (Index r = 0; r < s.time; r += s.block) {
      const Index rows = std::min(s.block, s.time - r), seen = r + rows, first = b * s.time + r;
      const Index Prow = task * s.time + r;
      const auto scores = Pv.block(Prow, 0, rows, seen);
      lowrank::gemm(T(s.scale()), qv.block(first, h * s.head_dim, rows, s.head_dim),
                    K.middle_rows(0, seen).transposed(), scores);
      for (Index i = 0; i < rows; ++i) {
        const Index past = r + i + 1;
        auto p = P.row(Prow + i).head(past).array();
        p = (p - p.maxCoeff()).exp();
        p *= T(1) / p.sum();
        P.row(Prow + i).tail(s.time - past).setZero();
      }
      lowrank::gemm(T(1), scores, V.middle_rows(0, seen), yv.block(first, h * s.head_dim, rows, s.head_dim));
    }
  });
}

/// From g = ∂L/∂y: dV = Pᵀ·g, dP = g·Vᵀ, dS = P∘(dP − rowsum(dP∘P)), dQ = dS·K·scale, dK = dSᵀ·Q·scale. Query heads of
/// a group add into the same dK and dV, so a group is one task.
template <class T>
void attention_backward(const AttentionShape& s, const Mat<T>& q, const Mat<T>& k, const Mat<T>& v, const Mat<T>& P,
                        const Mat<T>& g, Mat<T>& dq, Mat<T>& dk, Mat<T>& dv) {
  dq.resize(q.rows(), q.cols());
  dk.setZero(k.rows(), k.cols());
  dv.setZero(v.rows(), v.cols());
  using lowrank::Update, lowrank::view_of, lowrank::gemm;
  const auto qv = view_of(q), kv = view_of(k), vv = view_of(v), Pv = view_of(P), gv = view_of(g);
  const auto dqv = view_of(dq), dkv = view_of(dk), dvv = view_of(dv);
  const T scale = T(s.scale());
  for_each_task(s.batch * s.kv_heads, [&](Index task) {
    thread_local Mat<T> scratch;
    scratch.resize(s.block, s.time);
    const Index b = task / s.kv_heads, col = task % s.kv_heads * s.head_dim, t0 = b * s.time;
    for (Index h = task % s.kv_heads * s.group(); h < (task % s.kv_heads + 1) * s.group(); ++h)
      for (Index r = 0; r < s.time; r += s.block) {
        const Index rows = std::min(s.block, s.time - r), seen = r + rows, head = h * s.head_dim;
        const Index Prow = (b * s.heads + h) * s.time + r;
        const auto probs = Pv.block(Prow, 0, rows, seen);
        const auto Q = qv.block(t0 + r, head, rows, s.head_dim), G = gv.block(t0 + r, head, rows, s.head_dim);
        const auto K = kv.block(t0, col, seen, s.head_dim), V = vv.block(t0, col, seen, s.head_dim);
        gemm(T(1), probs.transposed(), G, dvv.block(t0, col, seen, s.head_dim), Update::accumulate);
        auto dS = scratch.topLeftCorner(rows, seen);
        gemm(T(1), G, V.transposed(), view_of(dS));
        for (Index i = 0; i < rows; ++i) {
          const auto p = P.row(Prow + i).head(seen).array();
          auto d = dS.row(i).array();
          const T mean = (d * p).sum();
          d = p * (d - mean);
        }
        gemm(scale, view_of(dS), K, dqv.block(t0 + r, head, rows, s.head_dim));
        gemm(scale, view_of(dS).transposed(), Q, dkv.block(t0, col, seen, s.head_dim), Update::accumulate);
      }
  });
}

}  // namespace llama

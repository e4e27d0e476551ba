// SPDX-License-Identifier: Apache-2.0
// What the example computes on: Eigen's row-major matrices, and one loop over rows that uses all cores.
//
// The transformer is written on plain Eigen to play the part of *your* code: none of it knows lowrank. The two meet in
// projection.hpp alone.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace llama {

using Eigen::Index;
using Token = std::int32_t;

/// Activations and gradients: tokens × features, a token's features contiguous.
template <class T>
using Mat = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class T>
using RowVec = Eigen::Matrix<T, 1, Eigen::Dynamic>;
template <class T>
using ColVec = Eigen::Matrix<T, Eigen::Dynamic, 1>;

/// `batch` windows of `time` tokens each, one after the other, and the token that follows each of them.
struct Batch {
  Index batch = 0, time = 0;
  std::vector<Token> inputs, targets;

  [[nodiscard]] Index tokens() const { return batch * time; }
};

/// Calls f(i) for every i in [0, n) on all threads; whoever does an element, it is computed the same way.
template <class F>
void for_each_parallel(Index n, F&& f) {
#pragma omp parallel for schedule(static)
  for (Index i = 0; i < n; ++i) f(i);
}

/// The same with tasks long enough to be handed out one at a time.
template <class F>
void for_each_task(Index n, F&& f) {
#pragma omp parallel for schedule(dynamic, 1)
  for (Index i = 0; i < n; ++i) f(i);
}

}  // namespace llama

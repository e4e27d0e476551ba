// SPDX-License-Identifier: Apache-2.0
// The rows of s·B·A one after another, without the dense product: what merging and comparing stream through.
#pragma once

#include <algorithm>
#include <span>

#include "lowrank/core/factors.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/gemm.hpp"

namespace lowrank {

/// Calls f(i, row i of s·B·A) for every row once, on all threads: f(Index, std::span<const T>), in no promised order.
///
/// **Shapes** A r×in, B out×r; out calls with rows of in elements, which are gone when f returns. **Throws** ShapeError
/// when the factors do not multiply, ArgumentError for a scale that is not finite, and whatever f throws.
/// **Cost** 2·out·in·r flops; memory for 256 rows.
template <Real T, class F>
void for_update_rows(const LoraFactors<T>& factors, F&& f) {
  detail::check_factors("for_update_rows", factors);
  const Index m = factors.out_features(), n = factors.in_features(), height = std::min<Index>(m, 256);
  Matrix<T> panel;
  for (Index i0 = 0; i0 < m; i0 += height) {
    const Index rows = std::min(height, m - i0);
    panel.resize(rows, n);
    gemm(factors.scale, factors.B.view().middle_rows(i0, rows), factors.A.view(), panel.view());
    parallel_ranges(rows, 8, [&](Index a, Index b) {
      for (Index i = a; i < b; ++i) f(i0 + i, std::span<const T>(panel.data() + i * n, std::size_t(n)));
    });
  }
}

}  // namespace lowrank

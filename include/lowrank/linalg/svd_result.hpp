// SPDX-License-Identifier: Apache-2.0
// Svd: what every singular value decomposition of the library returns.
#pragma once

#include <vector>

#include "lowrank/core/matrix.hpp"

namespace lowrank {

/// A ≈ U·diag(S)·Vᵀ.
///
/// **Shapes** A m×n: U m×k, S k, V n×k (V, not Vᵀ: column i of U and column i of V belong to S[i]). **Numerics** S
/// descending and not negative, columns of U and V orthonormal; a pair (u, v) is determined up to a common sign, and
/// pairs of equal singular values up to a common rotation.
template <Real T>
struct Svd {
  Matrix<T> U;
  std::vector<T> S;
  Matrix<T> V;
};

}  // namespace lowrank

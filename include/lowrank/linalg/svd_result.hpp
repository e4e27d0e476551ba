// SPDX-License-Identifier: Apache-2.0
// Svd and SingularValues: what the singular value decompositions of the library return.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/scalar.hpp"

namespace lowrank {

/// A ≈ U·diag(S)·Vᵀ.
///
/// **Shapes** A m×n: U m×k, S k, V n×k (V, not Vᵀ: column i of U and column i of V belong to S[i]). **Numerics** S
/// descending and not negative, columns of U and V orthonormal; a pair (u, v) is determined up to a common sign, and
/// pairs of equal singular values up to a common rotation. Plain data: throws nothing.
template <Real T>
struct Svd {
  Matrix<T> U;
  std::vector<T> S;
  Matrix<T> V;
};

/// How singular values were found.
enum class SpectrumMethod {
  gram,        ///< eigenvalues of the Gram matrix of the short side, in double
  bidiagonal,  ///< bidiagonalisation in double and implicit QR with Demmel & Kahan's criteria
  lapack,      ///< LAPACK's dgesdd
  factors,     ///< QR of the two factors of a product
};

/// All singular values of a matrix, with what they are worth.
///
/// **Scale** the errors are absolute, in units of A (squared_error: of A squared). **Numerics** the bounds take
/// rounding errors as random ones with room of ten and more. **Source** min(√δ, δ/σ) for σ = √λ with an error of δ in
/// λ: Weyl.
struct SingularValues {
  std::vector<double> values;  ///< min(m, n) of them, descending
  double absolute_error = 0;   ///< every value is within this of the singular value it stands for
  double squared_error = 0;    ///< method gram: every squared value is within this of the squared singular value
  SpectrumMethod method = SpectrumMethod::gram;

  /// The error bound of values[i] alone: min(absolute_error, squared_error/σ_i), much smaller for large values.
  [[nodiscard]] double error(Index i) const {
    const double s = values[std::size_t(i)];
    return method == SpectrumMethod::gram && s > 0 ? std::min(absolute_error, squared_error / s) : absolute_error;
  }
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// Decompositions nobody here wrote: Eigen's, in double, compiled once. What our own are judged by.
#pragma once

#include <vector>

#include "lowrank/core/matrix.hpp"

namespace test {

/// A ≈ U·diag(S)·Vᵀ, thin: U m×k, V n×k, k = min(m, n), S descending.
struct OracleSvd {
  lowrank::Matrix<double> U;
  std::vector<double> S;
  lowrank::Matrix<double> V;
};

/// Eigen's one-sided Jacobi up to 64 columns (small values accurate), its divide and conquer above.
OracleSvd oracle_svd(const double* row_major, lowrank::Index m, lowrank::Index n);
std::vector<double> oracle_singular_values(const double* row_major, lowrank::Index m, lowrank::Index n);
/// Eigenvalues of a symmetric matrix, descending.
std::vector<double> oracle_eigenvalues(const double* row_major, lowrank::Index n);

/// The same for any view; elements are widened to double first.
template <class X>
OracleSvd oracle_svd(const X& A) {
  const lowrank::Matrix<double> copy(lowrank::view_of(A));
  return oracle_svd(copy.data(), copy.rows(), copy.cols());
}
template <class X>
std::vector<double> oracle_singular_values(const X& A) {
  const lowrank::Matrix<double> copy(lowrank::view_of(A));
  return oracle_singular_values(copy.data(), copy.rows(), copy.cols());
}

}  // namespace test

// SPDX-License-Identifier: Apache-2.0
// How two subspaces lie to each other: the similarity grid of the LoRA paper, principal angles, distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "lowrank/linalg/small_svd.hpp"

namespace lowrank {

namespace detail {

/// Throws unless the columns of U are orthonormal to the square root of T's precision: enough to catch an unnormalised
/// or transposed matrix, lenient with a basis that float has been through.
template <class T>
void check_orthonormal(const char* where, const char* name, MatrixView<const T> U) {
  if (U.cols() > U.rows())
    throw ShapeError(
        text(where, ": ", name, " must hold a basis in its columns, got ", shape_text(U.rows(), U.cols())));
  const double tolerance = std::sqrt(double(std::numeric_limits<T>::epsilon()));
  const Matrix<T> G = multiply<T>(U.transposed(), U);
  for (Index i = 0; i < G.rows(); ++i)
    for (Index j = 0; j < G.cols(); ++j) {
      const double off = std::abs(double(G(i, j)) - (i == j ? 1 : 0));
      if (!std::isfinite(off)) throw NonFiniteError(text(where, ": ", name, " holds values that are not finite"));
      if (off > tolerance)
        throw ArgumentError(text(where, ": the columns of ", name, " must be orthonormal; the product of columns ", i,
                                 " and ", j, " is off by ", off));
    }
}

}  // namespace detail

/// The similarity of every pair of leading subspaces, φ(i, j) = ‖U_iᵀV_j‖_F² / min(i, j), U_i the first i columns of U.
///
/// **Shapes** U m×p, V m×q with orthonormal columns; the result is p×q and element (i−1, j−1) is φ(i, j), between 0
/// (orthogonal) and 1 (the smaller lies in the larger). **Scale** two random subspaces have φ = max(i, j)/m.
/// **Throws** ShapeError when the row counts differ, ArgumentError when columns are not orthonormal.
/// **Cost** 2·m·p·q flops. **Numerics** products in T, sums in double.
/// **Source** Hu et al., "LoRA", arXiv 2106.09685, §7.2, eq. 4.
template <Real T>
Matrix<double> subspace_similarity(MatrixView<const T> U, std::type_identity_t<MatrixView<const T>> V) {
  detail::expect_shape("subspace_similarity", "V", V.rows(), V.cols(), U.rows(), V.cols());
  detail::check_orthonormal("subspace_similarity", "U", U);
  detail::check_orthonormal("subspace_similarity", "V", V);
  const Matrix<T> G = multiply<T>(U.transposed(), V);
  Matrix<double> phi(G.rows(), G.cols());
  for (Index i = 0; i < G.rows(); ++i) {
    double row = 0;
    for (Index j = 0; j < G.cols(); ++j) {
      row += double(G(i, j)) * double(G(i, j));
      phi(i, j) = row + (i > 0 ? phi(i - 1, j) : 0);
    }
  }
  for (Index i = 0; i < G.rows(); ++i)
    for (Index j = 0; j < G.cols(); ++j) phi(i, j) /= double(std::min(i, j) + 1);
  return phi;
}
/// As above for matrix-like things: Eigen, xtensor, lowrank::Matrix, views of elements that are not const.
template <class X, class Y>
requires RealMatrix<const X&> && MatrixOf<const Y&, const scalar_of<const X&>> Matrix<double> subspace_similarity(
    const X& U, const Y& V) {
  return subspace_similarity<scalar_of<const X&>>(detail::const_view_of(U), detail::const_view_of(V));
}

/// The angles between two subspaces, ascending, in radians: cos θ_i are the singular values of UᵀV.
///
/// **Shapes** U m×p, V m×q with orthonormal columns; min(p, q) angles in [0, π/2].
/// **Throws** as subspace_similarity. **Cost** 4·m·p·q flops and an SVD of size min(p, q).
/// **Numerics** angles under 45° come from their sines, the singular values of V − U·UᵀV, so that an angle of 1e-8 is
/// not lost in a cosine of 1; error about eps of T, absolutely.
/// **Source** Björck & Golub, Math. Comp. 27 (1973), algorithm 1 and its sine form.
template <Real T>
std::vector<double> principal_angles(MatrixView<const T> U, std::type_identity_t<MatrixView<const T>> V) {
  detail::expect_shape("principal_angles", "V", V.rows(), V.cols(), U.rows(), V.cols());
  detail::check_orthonormal("principal_angles", "U", U);
  detail::check_orthonormal("principal_angles", "V", V);
  const bool swap = V.cols() > U.cols();
  const Matrix<double> large(swap ? V : U), small(swap ? U : V);
  const Matrix<double> G = multiply<double>(large.view().transposed(), small.view());
  Matrix<double> rest = small;
  gemm(-1.0, large.view(), G.view(), rest.view(), Update::accumulate);
  const auto cosines = small_svd<double>(G.view()).S, sines = small_svd<double>(rest.view()).S;
  std::vector<double> angles;
  const std::size_t p = std::size_t(small.cols());
  for (std::size_t i = 0; i < p; ++i) {
    const double c = std::min(cosines[i], 1.0), s = p - 1 - i < sines.size() ? std::min(sines[p - 1 - i], 1.0) : 0.0;
    angles.push_back(c * c > 0.5 ? std::asin(s) : std::acos(c));
  }
  std::sort(angles.begin(), angles.end());
  return angles;
}
/// As above for matrix-like things: Eigen, xtensor, lowrank::Matrix, views of elements that are not const.
template <class X, class Y>
requires RealMatrix<const X&> && MatrixOf<const Y&, const scalar_of<const X&>> std::vector<double> principal_angles(
    const X& U, const Y& V) {
  return principal_angles<scalar_of<const X&>>(detail::const_view_of(U), detail::const_view_of(V));
}

/// The length of the geodesic between two subspaces of one dimension: √Σθ².
/// **Scale** radians. **Throws** nothing. **Cost** O(p).
/// **Source** Edelman, Arias & Smith, SIAM J. Matrix Anal. Appl. 20 (1998), §4.3.
inline double grassmann_distance(std::span<const double> angles) {
  double sum = 0;
  for (const double t : angles) sum += t * t;
  return std::sqrt(sum);
}

/// √Σ sin²θ = ‖UUᵀ − VVᵀ‖_F/√2 for subspaces of one dimension.
/// **Scale** free, between 0 and √p. **Throws** nothing. **Cost** O(p). **Source** as grassmann_distance.
inline double chordal_distance(std::span<const double> angles) {
  double sum = 0;
  for (const double t : angles) sum += std::sin(t) * std::sin(t);
  return std::sqrt(sum);
}

}  // namespace lowrank

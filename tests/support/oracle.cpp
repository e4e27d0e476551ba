// SPDX-License-Identifier: Apache-2.0
#include "support/oracle.hpp"

#include <Eigen/Eigenvalues>
#include <Eigen/SVD>

namespace test {
namespace {

using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

lowrank::Matrix<double> copy_of(const Eigen::MatrixXd& X) {
  lowrank::Matrix<double> out(X.rows(), X.cols());
  for (Eigen::Index i = 0; i < X.rows(); ++i)
    for (Eigen::Index j = 0; j < X.cols(); ++j) out(i, j) = X(i, j);
  return out;
}

template <class Decomposition>
OracleSvd result_of(const Decomposition& svd, bool vectors) {
  OracleSvd out;
  out.S.assign(svd.singularValues().data(), svd.singularValues().data() + svd.singularValues().size());
  if (vectors) {
    out.U = copy_of(svd.matrixU());
    out.V = copy_of(svd.matrixV());
  }
  return out;
}

OracleSvd decompose(const double* row_major, Eigen::Index m, Eigen::Index n, bool vectors) {
  if (m == 0 || n == 0) return {lowrank::Matrix<double>(m, 0), {}, lowrank::Matrix<double>(n, 0)};
  const Eigen::MatrixXd A = Eigen::Map<const RowMajor>(row_major, m, n);
  const unsigned options = vectors ? Eigen::ComputeThinU | Eigen::ComputeThinV : 0U;
  if (std::min(m, n) <= 64) return result_of(Eigen::JacobiSVD<Eigen::MatrixXd>(A, options), vectors);
  return result_of(Eigen::BDCSVD<Eigen::MatrixXd>(A, options), vectors);
}

}  // namespace

OracleSvd oracle_svd(const double* row_major, lowrank::Index m, lowrank::Index n) {
  return decompose(row_major, m, n, true);
}
std::vector<double> oracle_singular_values(const double* row_major, lowrank::Index m, lowrank::Index n) {
  return decompose(row_major, m, n, false).S;
}
std::vector<double> oracle_eigenvalues(const double* row_major, lowrank::Index n) {
  if (n == 0) return {};
  const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(Eigen::Map<const RowMajor>(row_major, n, n),
                                                              Eigen::EigenvaluesOnly);
  const auto& values = solver.eigenvalues();
  return {std::reverse_iterator(values.data() + n), std::reverse_iterator(values.data())};
}

}  // namespace test

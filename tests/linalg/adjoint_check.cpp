// The dot-product test of an operator's two products: right pairs pass, wrong and not finite ones do not.
#include "lowrank/linalg/adjoint_check.hpp"

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace lowrank;

namespace {

/// A and Aᵀ of one matrix, or with one element of one product replaced.
template <class T>
struct Pair {
  Matrix<T> A;
  double in_product = 0, in_adjoint = 0;  // what to put into element (1, 0), 0: nothing
  bool wrong = false;                     // an adjoint of another matrix
  [[nodiscard]] Index rows() const { return A.rows(); }
  [[nodiscard]] Index cols() const { return A.cols(); }
  void apply(MatrixView<const T> X, MatrixView<T> Y) const { multiply(A.view(), X, Y, in_product); }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {
    multiply(A.view().transposed(), X, Y, in_adjoint);
    if (wrong) Y(0, 0) += T(1);
  }
  static void multiply(MatrixView<const T> M, MatrixView<const T> X, MatrixView<T> Y, double instead) {
    for (Index i = 0; i < Y.rows(); ++i)
      for (Index j = 0; j < Y.cols(); ++j) {
        double sum = 0;
        for (Index k = 0; k < M.cols(); ++k) sum += double(M(i, k)) * double(X(k, j));
        Y(i, j) = T(sum);
      }
    if (instead != 0) Y(1, 0) = T(instead);
  }
};

}  // namespace

TEST_CASE_TEMPLATE("check_adjoint tells right pairs from wrong ones", T, float, double) {
  const Matrix<T> A = test::random_matrix<T>(9, 8, 1);
  CHECK_NOTHROW(check_adjoint<T>(Pair<T>{A}));
  CHECK_THROWS_AS(check_adjoint<T>(Pair<T>{.A = A, .wrong = true}), ArgumentError);
  CHECK_NOTHROW(check_adjoint<T>(Pair<T>{Matrix<T>(9, 8)}));  // zero
  CHECK_NOTHROW(check_adjoint<T>(Pair<T>{Matrix<T>(0, 8)}));
}

TEST_CASE_TEMPLATE("a product that is not finite is an error, in either one, of any matrix", T, float, double) {
  for (const double bad : {double(NAN), double(INFINITY), -double(INFINITY)})
    for (const Matrix<T>& A : {test::random_matrix<T>(9, 8, 1), Matrix<T>(9, 8)}) {
      CHECK(std::isnan(adjoint_error<T>(Pair<T>{.A = A, .in_product = bad})));
      CHECK(std::isnan(adjoint_error<T>(Pair<T>{.A = A, .in_adjoint = bad})));
      CHECK_THROWS_AS(check_adjoint<T>(Pair<T>{.A = A, .in_product = bad}), NonFiniteError);
      CHECK_THROWS_AS(check_adjoint<T>(Pair<T>{.A = A, .in_adjoint = bad}), NonFiniteError);
    }
}

// SPDX-License-Identifier: Apache-2.0
// R⁻¹ and R⁻ᵀ of a triangular matrix by substitution, as an operator.
#pragma once

#include "lowrank/linalg/gemm.hpp"

namespace lowrank::detail {

/// R⁻¹ of an upper triangular R without a zero on the diagonal, as an operator: solves by blocks, all but the diagonal
/// blocks through products.
///
/// **Shapes** R n×n; below the diagonal nothing is read. **Cost** n²·k flops for k vectors. **Numerics** the solution
/// of a system that differs from R by n·eps·|R|, element by element; a tiny diagonal element may overflow.
template <Real T>
class TriangularInverse {
 public:
  using scalar = T;
  explicit TriangularInverse(MatrixView<const T> R) : R_(R) {}
  [[nodiscard]] Index rows() const { return R_.rows(); }
  [[nodiscard]] Index cols() const { return R_.rows(); }

  void apply(MatrixView<const T> X, MatrixView<T> Y) const {  // R·Y = X, from below
    Matrix<T> y(X);
    for (Index end = rows(); end > 0;) {
      const Index begin = std::max<Index>(0, end - block), size = end - begin, done = rows() - end;
      const auto rhs = y.view().middle_rows(begin, size);
      if (done > 0)
        product<T, T, T>(T(-1), R_.block(begin, end, size, done), y.view().middle_rows(end, done).transposed(), true,
                         rhs);
      for (Index i = size - 1; i >= 0; --i) {
        for (Index l = i + 1; l < size; ++l) add_row(rhs, i, -R_(begin + i, begin + l), l);
        divide_row(rhs, i, R_(begin + i, begin + i));
      }
      end = begin;
    }
    copy(y, Y);
  }
  void apply_adjoint(MatrixView<const T> X, MatrixView<T> Y) const {  // Rᵀ·Y = X, from above
    Matrix<T> y(X);
    for (Index begin = 0; begin < rows();) {
      const Index size = std::min<Index>(block, rows() - begin);
      const auto rhs = y.view().middle_rows(begin, size);
      if (begin > 0)
        product<T, T, T>(T(-1), R_.block(0, begin, begin, size).transposed(),
                         y.view().middle_rows(0, begin).transposed(), true, rhs);
      for (Index i = 0; i < size; ++i) {
        for (Index l = 0; l < i; ++l) add_row(rhs, i, -R_(begin + l, begin + i), l);
        divide_row(rhs, i, R_(begin + i, begin + i));
      }
      begin += size;
    }
    copy(y, Y);
  }

 private:
  static constexpr Index block = 64;
  static void add_row(const MatrixView<T>& y, Index to, T c, Index from) {
    T *a = &y(to, 0), *b = &y(from, 0);
    for (Index j = 0; j < y.cols(); ++j) a[j] += c * b[j];
  }
  static void divide_row(const MatrixView<T>& y, Index i, T d) {
    T* a = &y(i, 0);
    for (Index j = 0; j < y.cols(); ++j) a[j] /= d;
  }
  static void copy(const Matrix<T>& from, const MatrixView<T>& to) {
    for (Index i = 0; i < from.rows(); ++i)
      for (Index j = 0; j < from.cols(); ++j) to(i, j) = from(i, j);
  }

  MatrixView<const T> R_;
};

}  // namespace lowrank::detail

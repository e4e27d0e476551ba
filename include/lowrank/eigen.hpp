// SPDX-License-Identifier: Apache-2.0
// The Eigen front end: Eigen matrices and views of them go wherever a MatrixLike is wanted, and come back by as_eigen.
#pragma once

#include <Eigen/Core>
#include <concepts>
#include <type_traits>
#include <utility>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/scalar.hpp"
#include "lowrank/core/view_of.hpp"

namespace lowrank {
namespace detail {

/// The type D for which X is, or inherits from, Eigen::DenseBase<D>: Eigen's own subclasses (VectorBlock) and users'
/// too.
template <class D>
D eigen_derived(const Eigen::DenseBase<D>&);
template <class X>
using EigenDerived = decltype(eigen_derived(std::declval<const X&>()));

/// Any dense Eigen thing: a matrix, an array, a view of one, an expression.
template <class X>
concept EigenDense = requires {
  typename EigenDerived<X>;
};

/// An Eigen thing whose elements lie in memory: Matrix, Array, Map, Ref, Block, Transpose and Reshaped of these.
template <class X>
concept EigenInMemory = EigenDense<X> &&
                        bool(Eigen::internal::traits<EigenDerived<X>>::Flags& Eigen::DirectAccessBit) &&
                        requires(const X& x) {
  x.data();
  x.rowStride();
  x.colStride();
};

/// An Eigen expression (`A + B`, `A * B`, `A.cwiseAbs()`, ...): it has no elements until it is evaluated.
template <class X>
concept UnevaluatedEigen = EigenDense<std::remove_cvref_t<X>> && !EigenInMemory<std::remove_cvref_t<X>>;

/// Plain objects own their elements. So may a Ref to const: Eigen lets it keep a copy of what did not fit.
template <class X>
inline constexpr bool eigen_owns = std::derived_from<X, Eigen::PlainObjectBase<EigenDerived<X>>>;
template <class P, int Options, class Stride>
inline constexpr bool eigen_owns<Eigen::Ref<const P, Options, Stride>> = true;

}  // namespace detail

/// How Eigen's Matrix, Array, Map, Ref, Block, Transpose and Reshaped become views: same pointer, same strides, no
/// copy.
///
/// Storage order, inner and outer strides are read at run time; whatever Eigen considers const gives a read-only view.
/// **Throws** ShapeError when neither stride is 1, for example for `Map<MatrixXf, 0, InnerStride<2>>`.
template <detail::EigenInMemory X>
requires Real<typename X::Scalar>
struct ViewTraits<X> {
  static constexpr bool owning = detail::eigen_owns<X>;

  static MatrixView<std::remove_pointer_t<decltype(std::declval<X&>().data())>> view(X& x) { return make(x.data(), x); }
  static MatrixView<std::remove_pointer_t<decltype(std::declval<const X&>().data())>> view(const X& x) {
    return make(x.data(), x);
  }

 private:
  template <class T>
  static MatrixView<T> make(T* data, const X& x) {
    detail::expect_unit_stride(x.rows(), x.cols(), x.rowStride(), x.colStride(), ", with .eval() for example");
    return {data, x.rows(), x.cols(), x.rowStride(), x.colStride()};
  }
};

/// An Eigen expression has no elements to look at. Evaluate it into a named matrix, then pass that.
template <class ExpressionToEvaluateFirst>
requires detail::UnevaluatedEigen<ExpressionToEvaluateFirst>
void view_of(ExpressionToEvaluateFirst&&) = delete;

/// Eigen's dynamic matrix of the given order; for a const T, that type made const, as Eigen::Map wants it.
template <class T, Order order>
using EigenMatrix =
    std::conditional_t<std::is_const_v<T>,
                       std::add_const_t<Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic,
                                                      order == Order::row_major ? Eigen::RowMajor : Eigen::ColMajor>>,
                       Eigen::Matrix<std::remove_const_t<T>, Eigen::Dynamic, Eigen::Dynamic,
                                     order == Order::row_major ? Eigen::RowMajor : Eigen::ColMajor>>;

/// What as_eigen makes of a view: a map of either order, one of a named order, and that of a Matrix.
template <class T>
using EigenMap =
    Eigen::Map<EigenMatrix<T, Order::col_major>, Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>>;
template <class T, Order order>
using EigenOrderedMap = Eigen::Map<EigenMatrix<T, order>, Eigen::Unaligned, Eigen::OuterStride<>>;
template <class T>
using EigenMatrixMap = Eigen::Map<EigenMatrix<T, Order::row_major>, Eigen::Aligned64>;

/// A view as an Eigen::Map of either order: strides at run time, for element access and light arithmetic.
///
/// Products of such a map are slow in Eigen, which cannot know that one stride is 1: name the order for those.
/// **Cost** O(1), no copy.
template <class T>
EigenMap<T> as_eigen(MatrixView<T> v) {
  return EigenMap<T>(v.data(), v.rows(), v.cols(),
                     Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>(v.col_stride(), v.row_stride()));
}

/// A view as an Eigen::Map of one order, `as_eigen<Order::row_major>(v)`: inner stride 1 at compile time, as fast as
/// Eigen is.
///
/// **Throws** ShapeError when the view is of the other order; `as_eigen<...>(v.transposed()).transpose()` serves it.
template <Order order, class T>
EigenOrderedMap<T, order> as_eigen(MatrixView<T> v) {
  const bool row_major = order == Order::row_major;
  const Index inner_stride = row_major ? v.col_stride() : v.row_stride();
  const Index outer_stride = row_major ? v.row_stride() : v.col_stride();
  if (inner_stride != 1 && (row_major ? v.cols() : v.rows()) > 1) [[unlikely]]
    throw ShapeError(detail::text("as_eigen: expected a ", row_major ? "row" : "column", "-major view, got row stride ",
                                  v.row_stride(), " and column stride ", v.col_stride()));
  return EigenOrderedMap<T, order>(v.data(), v.rows(), v.cols(), Eigen::OuterStride<>(outer_stride));
}

/// A lowrank::Matrix as an Eigen::Map, row-major without gaps. The matrix must outlive the map, so temporaries are
/// refused.
template <class T>
EigenMatrixMap<T> as_eigen(Matrix<T>& m) {
  return EigenMatrixMap<T>(m.data(), m.rows(), m.cols());
}
template <class T>
EigenMatrixMap<const T> as_eigen(const Matrix<T>& m) {
  return EigenMatrixMap<const T>(m.data(), m.rows(), m.cols());
}
template <class T>
void as_eigen(Matrix<T>&&) = delete;

}  // namespace lowrank

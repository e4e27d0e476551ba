// SPDX-License-Identifier: Apache-2.0
// The xtensor front end: containers, adaptors and strided views of any dimension become matrices, and come back by
// as_xtensor. Works with the flat headers of xtensor up to 0.25 and the nested ones from 0.26.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>

#if __has_include(<xtensor/containers/xadapt.hpp>)
#include <xtensor/containers/xadapt.hpp>
#include <xtensor/containers/xarray.hpp>
#include <xtensor/containers/xfixed.hpp>
#include <xtensor/containers/xtensor.hpp>
#include <xtensor/views/xstrided_view.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xadapt.hpp>
#include <xtensor/xarray.hpp>
#include <xtensor/xfixed.hpp>
#include <xtensor/xstrided_view.hpp>
#include <xtensor/xtensor.hpp>
#include <xtensor/xview.hpp>
#endif

#include "lowrank/core/detail/collapse.hpp"
#include "lowrank/core/matrix.hpp"
#include "lowrank/core/scalar.hpp"
#include "lowrank/core/view_of.hpp"

namespace lowrank {
namespace detail {

// A list of types rather than "anything with data() and strides()": xtensor's functor views (xt::real, ...) have both
// and mean something else by them.

/// Whether storage E of an adaptor dies with it: a reference and a buffer without ownership do not.
template <class E>
inline constexpr bool xtensor_storage_owns = !std::is_reference_v<E>;
template <class P, class A>
inline constexpr bool xtensor_storage_owns<xt::xbuffer_adaptor<P, xt::no_ownership, A>> = false;

/// What the front end knows of an xtensor type: whether its elements lie in memory, and whether it owns them.
template <class X>
struct XtensorKind {
  static constexpr bool in_memory = false, owning = false;
};
template <bool Owning>
struct XtensorInMemory {
  static constexpr bool in_memory = true, owning = Owning;
};
template <class E, xt::layout_type L, class S, class Tag>
struct XtensorKind<xt::xarray_container<E, L, S, Tag>> : XtensorInMemory<true> {};
template <class E, std::size_t N, xt::layout_type L, class Tag>
struct XtensorKind<xt::xtensor_container<E, N, L, Tag>> : XtensorInMemory<true> {};
template <class T, class S, xt::layout_type L, bool Sharable, class Tag>
struct XtensorKind<xt::xfixed_container<T, S, L, Sharable, Tag>> : XtensorInMemory<true> {};
template <class E, xt::layout_type L, class S, class Tag>
struct XtensorKind<xt::xarray_adaptor<E, L, S, Tag>> : XtensorInMemory<xtensor_storage_owns<E>> {};
template <class E, std::size_t N, xt::layout_type L, class Tag>
struct XtensorKind<xt::xtensor_adaptor<E, N, L, Tag>> : XtensorInMemory<xtensor_storage_owns<E>> {};
template <class E, std::size_t N, xt::layout_type L, class Tag>
struct XtensorKind<xt::xtensor_view<E, N, L, Tag>> : XtensorInMemory<xtensor_storage_owns<E>> {};
/// A view holds what it looks at by reference, or by value when that was a temporary; views of views by value.
template <class C, class... Slices>
struct XtensorKind<xt::xview<C, Slices...>> {
  using Inner = XtensorKind<std::remove_cvref_t<C>>;
  static constexpr bool in_memory = Inner::in_memory, owning = Inner::owning && !std::is_reference_v<C>;
};
template <class C, class S, xt::layout_type L, class F>
struct XtensorKind<xt::xstrided_view<C, S, L, F>> {
  using Inner = XtensorKind<std::remove_cvref_t<C>>;
  static constexpr bool in_memory = Inner::in_memory, owning = Inner::owning && !std::is_reference_v<C>;
};

/// Views that pick elements one by one (xt::keep, xt::drop, index lists) have no strides, and so no data() either.
template <class X>
concept XtensorInMemoryType = XtensorKind<X>::in_memory && requires(const X& x) {
  x.data();
  x.data_offset();
  x.strides();
  x.shape();
};

/// An xtensor expression (`a + b`, a broadcast, a view of single elements, ...): no elements until it is evaluated.
template <class X>
concept UnevaluatedXtensor =
    xt::is_xexpression<std::remove_cvref_t<X>>::value && !XtensorInMemoryType<std::remove_cvref_t<X>>;

/// An element as x gives it out: const where it only looks.
template <class X>
using XtensorElement = std::remove_pointer_t<decltype(std::declval<std::remove_reference_t<X>&>().data())>;

template <class T, class X>
MatrixView<T> xtensor_view(const char* where, T* data, const X& x, std::size_t split) {
  const Collapsed c = collapse(where, "copy it into a row-major container first (xt::eval or xt::xtensor<T, N> y = x)",
                               x.shape(), x.strides(), split);
  expect_unit_stride(c.rows, c.cols, c.row_stride, c.col_stride, ", with xt::eval for example");
  return {data + Index(x.data_offset()), c.rows, c.cols, c.row_stride, c.col_stride};
}

}  // namespace detail

/// How xtensor's containers, adaptors, views and strided views become views: same pointer plus data offset, no copy.
///
/// **Shapes** an array of shape [batch, tokens, in] is the matrix (batch·tokens)×in, in row-major order of the leading
/// indices; a 1-D array is one row. Row- and column-major layouts both serve in two dimensions. Above three, token_view
/// and weight_view say which of two readings is meant; a weight of three dimensions (Conv1d) needs weight_view too.
/// **Throws** ShapeError for a 0-D array, above three dimensions, for leading dimensions that are not evenly spaced (a
/// slice of the middle one, a column-major batch), and for strides of which none is 1; the message names the copy to
/// make.
template <detail::XtensorInMemoryType X>
requires Real<typename X::value_type>
struct ViewTraits<X> {
  static constexpr bool owning = detail::XtensorKind<X>::owning;

  static MatrixView<detail::XtensorElement<X>> view(X& x) { return make(x.data(), x); }
  static MatrixView<detail::XtensorElement<const X>> view(const X& x) { return make(x.data(), x); }

 private:
  template <class T>
  static MatrixView<T> make(T* data, const X& x) {
    detail::expect_unambiguous("view_of(xtensor)", "token_view(x)", "weight_view(x)", x.shape());
    return detail::xtensor_view("view_of(xtensor)", data, x, x.dimension() - (x.dimension() > 0));
  }
};

/// An array of activations of any dimension as tokens×in: shape [d₀, …, dₙ, in] reads as (d₀·…·dₙ)×in, as view_of reads
/// up to three dimensions. **Throws** ShapeError as ViewTraits says. **Cost** O(1), no copy.
template <class X>
requires MatrixLike<X> && detail::XtensorInMemoryType<std::remove_cvref_t<X>> MatrixView<detail::XtensorElement<X>>
token_view(X&& x) {
  return detail::xtensor_view("token_view", x.data(), x, x.dimension() - (x.dimension() > 0));
}

/// A weight of any dimension as files fold it, out×everything else: a convolution's [out, in, kh, kw] reads as
/// out×(in·kh·kw), which is what PEFT's factors of a convolution multiply to. **Throws** ShapeError when the trailing
/// dimensions are not evenly spaced in memory, as in a column-major array. **Cost** O(1), no copy.
///
///     const auto start = pissa(weight_view(kernel), {.rank = 8});
template <class X>
requires MatrixLike<X> && detail::XtensorInMemoryType<std::remove_cvref_t<X>> MatrixView<detail::XtensorElement<X>>
weight_view(X&& x) {
  return detail::xtensor_view("weight_view", x.data(), x, x.dimension() > 1 ? 1 : 0);
}

/// An xtensor expression has no elements to look at. Evaluate it into a named container, then pass that.
template <class ExpressionToEvaluateFirst>
requires detail::UnevaluatedXtensor<ExpressionToEvaluateFirst>
void view_of(ExpressionToEvaluateFirst&&) = delete;

/// What as_xtensor makes of a view, and of a Matrix: an adaptor of two dimensions over memory of others.
template <class T>
using XtensorMap = decltype(xt::adapt(std::declval<T*>(), std::size_t(), xt::no_ownership(),
                                      std::declval<const std::array<std::size_t, 2>&>(),
                                      std::declval<const std::array<std::ptrdiff_t, 2>&>()));
template <class T>
using XtensorMatrixMap = decltype(xt::adapt<xt::layout_type::row_major>(
    std::declval<T*>(), std::size_t(), xt::no_ownership(), std::declval<const std::array<std::size_t, 2>&>()));

/// A view as a two-dimensional xtensor adaptor with the view's strides.
/// **Cost** O(1), no copy (xtensor's shape bookkeeping aside).
template <class T>
XtensorMap<T> as_xtensor(MatrixView<T> v) {
  const std::array<std::size_t, 2> shape{std::size_t(v.rows()), std::size_t(v.cols())};
  // xtensor wants stride 0 along an extent of 1, or its assignments take the slow road.
  const std::array<std::ptrdiff_t, 2> strides{v.rows() == 1 ? 0 : v.row_stride(), v.cols() == 1 ? 0 : v.col_stride()};
  return xt::adapt(v.data(), std::size_t(v.size()), xt::no_ownership(), shape, strides);
}

/// A lowrank::Matrix as a row-major xtensor adaptor. The matrix must outlive it, so temporaries are refused.
template <class T>
XtensorMatrixMap<T> as_xtensor(Matrix<T>& m) {
  const std::array<std::size_t, 2> shape{std::size_t(m.rows()), std::size_t(m.cols())};
  return xt::adapt<xt::layout_type::row_major>(m.data(), std::size_t(m.size()), xt::no_ownership(), shape);
}
template <class T>
XtensorMatrixMap<const T> as_xtensor(const Matrix<T>& m) {
  const std::array<std::size_t, 2> shape{std::size_t(m.rows()), std::size_t(m.cols())};
  return xt::adapt<xt::layout_type::row_major>(m.data(), std::size_t(m.size()), xt::no_ownership(), shape);
}
template <class T>
void as_xtensor(Matrix<T>&&) = delete;

}  // namespace lowrank

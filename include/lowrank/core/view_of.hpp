// SPDX-License-Identifier: Apache-2.0
// view_of(x): any matrix-like thing as a MatrixView, without a copy. Front ends teach it new containers.
#pragma once

#include <concepts>
#include <type_traits>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank {

/// How a container becomes a view. A front end (or a user) specialises this for its type:
///
///     template <> struct lowrank::ViewTraits<MyMatrix> {
///       static constexpr bool owning = true;                       // a temporary of it would dangle
///       static auto view(MyMatrix& m)       { return lowrank::MatrixView<float>(m.p, m.r, m.c, m.ld, 1); }
///       static auto view(const MyMatrix& m) { return lowrank::MatrixView<const float>(m.p, m.r, m.c, m.ld, 1); }
///     };
///
/// A trait, not an overload set: it is found whatever the order of includes.
template <class X>
struct ViewTraits;

template <class T>
struct ViewTraits<MatrixView<T>> {
  static constexpr bool owning = false;
  static constexpr MatrixView<T> view(const MatrixView<T>& v) noexcept { return v; }
};

namespace detail {
template <class X>
concept HasView = requires(X&& x) {
  ViewTraits<std::remove_cvref_t<X>>::view(x);
};

/// An owning temporary dies at the end of the full expression: a view of it would dangle.
template <class X>
inline constexpr bool is_owning_temporary = !std::is_lvalue_reference_v<X> && [] {
  if constexpr (HasView<X>) return bool(ViewTraits<std::remove_cvref_t<X>>::owning);
  return false;
}();
}  // namespace detail

/// Something `view_of` accepts: a lowrank, Eigen (include lowrank/eigen.hpp) or xtensor (lowrank/xtensor.hpp) matrix or
/// a view of one, whose elements lie in memory with one stride of 1. Expressions (`A + B`) are not: evaluate them
/// first. Owning temporaries are not either: give them a name.
template <class X>
concept MatrixLike = detail::HasView<X> && !detail::is_owning_temporary<X>;

/// A MatrixLike whose elements are T, or can be read as const T.
template <class X, class T>
concept MatrixOf = MatrixLike<X> && requires(X&& x) {
  { ViewTraits<std::remove_cvref_t<X>>::view(x) } -> std::convertible_to<MatrixView<T>>;
};

/// What view_of gives for an x: a MatrixView, of const where x is only looked at.
template <MatrixLike X>
using ViewOf = decltype(ViewTraits<std::remove_cvref_t<X>>::view(std::declval<std::remove_reference_t<X>&>()));

/// The view of x; no element is copied.
/// **Throws** ShapeError when the strides cannot be expressed (see MatrixView). **Cost** O(1).
/// Returns ViewOf<X>, which is not written there because Clang 14 would then name it, not MatrixLike, in its message.
template <MatrixLike X>
constexpr auto view_of(X&& x) {
  return ViewTraits<std::remove_cvref_t<X>>::view(x);
}

/// An owning temporary passed as a view. Name the matrix, then pass it.
template <class TemporaryToNameFirst>
requires detail::is_owning_temporary<TemporaryToNameFirst>
void view_of(TemporaryToNameFirst&&) = delete;

/// The view of a raw buffer: rows × cols elements, rows (row-major) or columns (column-major) contiguous, consecutive
/// ones `leading_dimension` apart (0: without gaps).
template <class T>
constexpr MatrixView<T> view_of(T* data, Index rows, Index cols, Order order = Order::row_major,
                                Index leading_dimension = 0) {
  if (order == Order::row_major)
    return {data, rows, cols, leading_dimension != 0 ? leading_dimension : (cols > 0 ? cols : 1), 1};
  return {data, rows, cols, 1, leading_dimension != 0 ? leading_dimension : (rows > 0 ? rows : 1)};
}

/// The scalar type of what view_of gives, without const.
template <class X>
using scalar_of = typename decltype(ViewTraits<std::remove_cvref_t<X>>::view(
    std::declval<std::remove_reference_t<X>&>()))::value_type;

/// A MatrixLike of float or double.
template <class X>
concept RealMatrix = MatrixLike<X> &&(std::same_as<scalar_of<X>, float> || std::same_as<scalar_of<X>, double>);

namespace detail {
/// The view of x to read from, whatever its elements may do.
template <MatrixLike X>
constexpr MatrixView<const scalar_of<X>> const_view_of(X&& x) {
  return view_of(x);
}
}  // namespace detail

}  // namespace lowrank

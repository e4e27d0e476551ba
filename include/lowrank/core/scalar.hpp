// SPDX-License-Identifier: Apache-2.0
// Which scalars the library computes in, and what they may be stored in.
#pragma once

#include <concepts>
#include <type_traits>

#include "lowrank/core/half.hpp"

namespace lowrank {

/// The scalars arithmetic is done in.
template <class T>
concept Real = std::same_as<T, float> || std::same_as<T, double>;

/// What a frozen weight may be stored in for arithmetic in T: T itself, or a two-byte type with float arithmetic.
template <class S, class T>
concept StorageOf = Real<T> &&
    (std::same_as<S, T> || (std::same_as<T, float> && (std::same_as<S, bf16> || std::same_as<S, f16>)));

namespace detail {
template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
}  // namespace detail

/// The scalar arithmetic is done in for elements stored as S: double for double, float for float, bf16 and f16.
template <class S>
using arithmetic_of = typename detail::ArithmeticOf<std::remove_const_t<S>>::type;

}  // namespace lowrank

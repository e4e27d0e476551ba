// SPDX-License-Identifier: Apache-2.0
// The scalar a weight is computed in, from how it is stored.
#pragma once

#include "lowrank/core/scalar.hpp"
#include "lowrank/core/view_of.hpp"

namespace lowrank {

namespace detail {

/// Defined for every X, so that a wrong one fails a concept that says what to do and not the spelling of a return type.
template <class X>
struct FactorScalar {
  using type = float;
};
template <MatrixLike X>
struct FactorScalar<X> {
  using type = arithmetic_of<scalar_of<X>>;
};

}  // namespace detail

/// The type the factors of a weight X are computed in, and what its codes are multiplied in: float for float, bf16 and
/// f16, double for double.
template <class X>
using factor_scalar = typename detail::FactorScalar<X>::type;

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// What every layer with a low-rank update has: trainable A and B in a flat block, and the scale.
#pragma once

#include <utility>
#include <vector>

#include "lowrank/adapter/parameters.hpp"
#include "lowrank/core/factors.hpp"

namespace lowrank {

/// The adapter inside a layer: A r×in and B out×r as the first two entries of its parameters, and s. A base class of
/// the layers; not used alone.
template <Real T>
class FactorParameters {
 public:
  using scalar = T;

  [[nodiscard]] Index rank() const noexcept { return A().rows(); }
  [[nodiscard]] T scale() const noexcept { return scale_; }
  [[nodiscard]] MatrixView<T> A() noexcept { return parameters_.value(0); }
  [[nodiscard]] MatrixView<T> B() noexcept { return parameters_.value(1); }
  [[nodiscard]] MatrixView<const T> A() const noexcept { return parameters_.value(0); }
  [[nodiscard]] MatrixView<const T> B() const noexcept { return parameters_.value(1); }
  [[nodiscard]] Parameters<T>& parameters() noexcept { return parameters_; }
  [[nodiscard]] const Parameters<T>& parameters() const noexcept { return parameters_; }

  /// A copy of the adapter as plain data.
  [[nodiscard]] LoraFactors<T> factors() const { return {Matrix<T>(A()), Matrix<T>(B()), scale_}; }
  /// Puts other values (and another scale) of the same shapes in. **Throws** ShapeError otherwise, ArgumentError for a
  /// scale that is not finite; nothing is written then.
  void set_factors(const LoraFactors<T>& f) {
    detail::expect_shape("set_factors", "A", f.A.rows(), f.A.cols(), A().rows(), A().cols());
    detail::expect_shape("set_factors", "B", f.B.rows(), f.B.cols(), B().rows(), B().cols());
    detail::check_factors("set_factors", f);
    std::copy(f.A.data(), f.A.data() + f.A.size(), A().data());
    std::copy(f.B.data(), f.B.data() + f.B.size(), B().data());
    scale_ = f.scale;
  }

 protected:
  /// Takes over factors that must be r×in and out×r with 1 ≤ r ≤ min(out, in); `where` is the layer's name for
  /// messages, `more` are parameters beyond A and B, zero at first.
  FactorParameters(const char* where, const LoraFactors<T>& f, Index out, Index in, const char* name_a,
                   const char* name_b, std::vector<ParameterInfo> more = {})
      : parameters_(table(f, name_a, name_b, std::move(more))) {
    detail::check_factors(where, f);
    detail::check_rank(where, f.rank(), out, in);
    detail::expect_shape(where, "A", f.A.rows(), f.A.cols(), f.rank(), in);
    detail::expect_shape(where, "B", f.B.rows(), f.B.cols(), out, f.rank());
    set_factors(f);
  }
  ~FactorParameters() = default;
  FactorParameters(FactorParameters&&) noexcept = default;
  FactorParameters& operator=(FactorParameters&&) noexcept = default;

  Parameters<T> parameters_;
  T scale_ = T(1);

 private:
  static std::vector<ParameterInfo> table(const LoraFactors<T>& f, const char* name_a, const char* name_b,
                                          std::vector<ParameterInfo> more) {
    std::vector<ParameterInfo> t{{name_a, f.A.rows(), f.A.cols()}, {name_b, f.B.rows(), f.B.cols()}};
    t.insert(t.end(), more.begin(), more.end());
    return t;
  }
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// Initialised, what every initialiser returns: the factors, the base they stand on, and what it cost to find them.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>

#include "lowrank/core/factor_scalar.hpp"
#include "lowrank/core/factors.hpp"
#include "lowrank/core/seeding.hpp"
#include "lowrank/linalg/detail/scaling.hpp"

namespace lowrank {

/// The type the values of A and B will be stored in. `native` keeps every bit; the others round now, so that a residual
/// base can be formed from exactly the factors that will be loaded again.
enum class FactorStorage { native, bf16, f16 };

/// What an initialiser did, in numbers.
struct InitReport {
  /// Name of the method, "pissa".
  std::string method;
  /// ‖s·B·A‖_F² as chosen, before rounding to storage: of W (pissa, milora, ...) or of the matrix the method decomposes
  /// (eva: the inputs, lora_ga: the gradient). 0 for the methods that look at no data.
  double captured_energy = 0;
  /// ‖·‖_F² of the matrix decomposed.
  double total_energy = 0;
  /// ‖W − s·B·A‖_F, the norm of the base before it is rounded to storage; 0 when the base is unchanged.
  double residual_norm = 0;
  /// ‖W − (base + s·B·A)‖_F caused by storing the base in a narrower type; rounding in the type of arithmetic not
  /// counted.
  double storage_error = 0;
  /// Passes over the matrix decomposed; 0 when a full decomposition was taken.
  Index passes = 0;
  double seconds = 0;
  /// The seed of the random numbers drawn, given or taken from the process-wide sequence: as an option it gives these
  /// factors again. 0 for the methods that draw none.
  std::uint64_t seed = 0;
  /// False when an iteration stopped before its tolerance; the factors are the best found, their products exact all the
  /// same.
  bool converged = true;
  /// What a reader must know besides: fallbacks taken, damping chosen.
  std::string notes;
};

/// A frozen base and the factors that stand on it: W = base + s·B·A for the methods that move part of W into the
/// factors.
///
/// **Shapes** base out×in, or empty with `base_changed == false` when the layer keeps W itself; A r×in, B out×r.
/// T is what the factors are computed in, `Base` how the base is stored (T, bf16 or f16).
template <Real T, class Base = T>
struct Initialised {
  Matrix<Base> base;
  bool base_changed = false;
  LoraFactors<T> factors;
  InitReport report;
};

/// What the first template argument of an initialiser may be, `pissa<float>(W)`: the scalar of the factors as the
/// weight decides it (`factor_scalar`), spelt out; void leaves it to the weight. The type the base is stored in comes
/// second.
template <class Factor, class X>
concept FactorScalarOf = std::is_void_v<Factor> || std::same_as<Factor, factor_scalar<X>>;

/// What the second template argument of an initialiser that changes the base may be, `pissa<float, bf16>(W)`: the type
/// the base is stored in; void stores it as the factors.
template <class Base, class X>
concept BaseStorageOf = std::is_void_v<Base> || StorageOf<Base, factor_scalar<X>>;

/// What an initialiser makes of the weight X when asked to store the base as `Base`.
template <class X, class Base = void>
using InitialisedFrom = Initialised<factor_scalar<X>, std::conditional_t<std::is_void_v<Base>, factor_scalar<X>, Base>>;

namespace detail {

/// s from the options' rank, alpha and rank_stabilised. Throws unless it is positive and finite, also once it is a T.
template <class T, class Options>
double scale_of(const Options& o) {
  const double s = o.rank_stabilised ? rslora_scale(o.alpha, o.rank) : lora_scale(o.alpha, o.rank);
  if (s > double(std::numeric_limits<T>::max()) || !(T(s) > 0))
    throw ArgumentError(text("scale: alpha ", o.alpha, " and rank ", o.rank, " give s = ", s,
                             ", beyond the range of a scalar of ", 8 * sizeof(T), " bits"));
  return s;
}

/// The seed that was given, else the next of the process.
inline std::uint64_t seed_or_fresh(const std::optional<std::uint64_t>& seed) { return seed ? *seed : fresh_seed(); }

class Stopwatch {
 public:
  [[nodiscard]] double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Rounds the values of m to `storage` and back. Throws when a finite value leaves the type's range.
template <Real T>
void round_to_storage(const char* where, MatrixView<T> m, FactorStorage storage) {
  if (storage == FactorStorage::native) return;
  bool overflow = false;
  for_each_run(m, [&](T* x, Index n) {
    for (Index i = 0; i < n; ++i) {
      const bool was_finite = std::isfinite(x[i]);
      x[i] = storage == FactorStorage::bf16 ? T(float(bf16(x[i]))) : T(float(f16(x[i])));
      overflow = overflow || (was_finite && !std::isfinite(x[i]));
    }
  });
  if (overflow)
    throw ArgumentError(text(where, ": a factor exceeds the range of ", storage == FactorStorage::bf16 ? "bf16" : "f16",
                             "; store it in a wider type"));
}

/// Throws unless C could be a covariance as far as its entries tell: finite, symmetric up to rounding, no negative
/// diagonal, no correlation beyond 1.
template <class T>
void expect_covariance(const char* where, const MatrixView<const T>& C) {
  expect_finite(where, "C", C);
  const double slack = double(std::sqrt(std::numeric_limits<T>::epsilon()));
  for (Index i = 0; i < C.rows(); ++i) {
    if (C(i, i) < 0)
      throw ArgumentError(text(where, ": the diagonal of C must not be negative, got ", double(C(i, i)), " at ", i));
    for (Index j = 0; j < i; ++j) {
      const double most = std::sqrt(double(C(i, i)) * double(C(j, j)));
      if (!(std::abs(double(C(i, j)) - double(C(j, i))) <= slack * most))
        throw ArgumentError(text(where, ": C must be symmetric, got ", double(C(i, j)), " at (", i, ", ", j, ") and ",
                                 double(C(j, i)), " across"));
      if (!(std::abs(double(C(i, j))) <= (1 + slack) * most))
        throw ArgumentError(text(where, ": C_ij must not exceed the root of C_ii*C_jj, ", most, ", got ",
                                 double(C(i, j)), " at (", i, ", ", j, ")"));
    }
  }
}

}  // namespace detail
}  // namespace lowrank

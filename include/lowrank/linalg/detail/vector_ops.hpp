// SPDX-License-Identifier: Apache-2.0
// The vector kernels under the decompositions: dot, axpy, sums of squares in double, and norms that neither overflow
// nor underflow.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "lowrank/core/matrix_view.hpp"
#include "lowrank/core/threads.hpp"
#include "lowrank/linalg/detail/simd.hpp"

namespace lowrank::detail {

/// The sum of all lanes by halving the vector: log2(lanes) dependent additions instead of one a lane.
template <class V>
inline auto sum_pairwise(const V& v) {
  constexpr int N = int(sizeof(V) / sizeof(v[0]));
  if constexpr (N == 1) {
    return v[0];
  } else if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    const auto halves = [&]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, (N / 2 + I)...);
    };
    return sum_pairwise(halves(std::make_integer_sequence<int, N / 2>{}));
  }
}

// Out of line, all of them: inlined, they would be most of what a decomposition compiles to.
// None of these throws; each costs one reading of its operands.

/// Σ x_i·y_i in T, in an order that depends on n alone.
template <class T>
[[gnu::noinline]] T dot(Index n, const T* x, const T* y) {
  constexpr int L = lanes<T>;
  Vec<T> a{}, b{}, c{}, d{};
  Index i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    a += load<Vec<T>>(x + i) * load<Vec<T>>(y + i);
    b += load<Vec<T>>(x + i + L) * load<Vec<T>>(y + i + L);
    c += load<Vec<T>>(x + i + 2 * L) * load<Vec<T>>(y + i + 2 * L);
    d += load<Vec<T>>(x + i + 3 * L) * load<Vec<T>>(y + i + 3 * L);
  }
  for (; i + L <= n; i += L) a += load<Vec<T>>(x + i) * load<Vec<T>>(y + i);
  T sum = sum_pairwise((a + b) + (c + d));
  for (; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

/// y += α·x.
template <class T>
[[gnu::noinline]] void axpy(Index n, T alpha, const T* x, T* y) {
  constexpr int L = lanes<T>;
  Index i = 0;
  for (; i + L <= n; i += L) store(y + i, load<Vec<T>>(y + i) + alpha * load<Vec<T>>(x + i));
  for (; i < n; ++i) y[i] += alpha * x[i];
}

/// Σ f(i) over [0, n) in eight double accumulators: vectorises, and its bits do not depend on threads.
template <class F>
double lane_sum(Index n, F&& f) {
  std::array<double, 8> lane{};
  Index i = 0;
  for (; i + 8 <= n; i += 8)
    for (int l = 0; l < 8; ++l) lane[std::size_t(l)] += f(i + l);
  double sum = 0;
  for (; i < n; ++i) sum += f(i);
  for (const double x : lane) sum += x;
  return sum;
}

/// ‖x − σ·y‖₂ in double.
template <class T>
[[gnu::noinline]] double distance_to_multiple(Index n, const T* x, double sigma, const T* y) {
  return std::sqrt(lane_sum(n, [&](Index j) {
    const double r = double(x[j]) - sigma * double(y[j]);
    return r * r;
  }));
}

/// Σ x_i² in double, of f32, f64, bf16 or f16.
template <class T>
[[gnu::noinline]] double sum_of_squares(Index n, const T* x) {
  if constexpr (std::same_as<T, double>) {
    return dot(n, x, x);
  } else {
    constexpr int L = lanes<double>;
    Vec<double> a{}, b{};
    Index i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
      const auto u = __builtin_convertvector(load_as<float, L>(x + i), Vec<double>);
      const auto v = __builtin_convertvector(load_as<float, L>(x + i + L), Vec<double>);
      a += u * u;
      b += v * v;
    }
    double sum = sum_pairwise(a + b);
    for (; i < n; ++i) sum += double(x[i]) * double(x[i]);
    return sum;
  }
}

/// ‖x‖₂ in double; the squares of doubles near the ends of the range are taken of scaled elements. NaN if any is NaN.
template <class T>
[[gnu::noinline]] double norm2(Index n, const T* x) {
  const double sum = sum_of_squares(n, x);
  if constexpr (std::same_as<T, double>) {
    if (!(sum > 1e-280 && sum < 1e280)) [[unlikely]] {
      if (std::isnan(sum)) return sum;  // std::max below would pass over it, and call NaN among zeros a zero vector
      double largest = 0;
      for (Index i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
      if (largest == 0 || !std::isfinite(largest)) return largest;
      double scaled = 0;
      for (Index i = 0; i < n; ++i) scaled += (x[i] / largest) * (x[i] / largest);
      return largest * std::sqrt(scaled);
    }
  }
  return std::sqrt(sum);
}

/// The order that sorts values descending; equal ones keep theirs.
[[gnu::cold, gnu::noinline]] inline std::vector<Index> descending_order(const std::vector<double>& values) {
  std::vector<Index> order(values.size());
  std::iota(order.begin(), order.end(), Index(0));
  std::sort(order.begin(), order.end(), [&](Index a, Index b) {
    const double x = values[std::size_t(a)], y = values[std::size_t(b)];
    return x > y || (x == y && a < b);
  });
  return order;
}

/// ‖m‖_F² in double; one sum a row (or column, as stored), so that its bits do not depend on threads.
template <class S>
double squared_norm(const MatrixView<S>& m) {
  const auto v = m.is_row_major() ? m : m.transposed();
  std::vector<double> sums(static_cast<std::size_t>(v.rows()));
  parallel_ranges(v.rows(), 1 + 32768 / (v.cols() + 1), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const std::remove_const_t<S>* row = v.data() + i * v.row_stride();
      sums[std::size_t(i)] = sum_of_squares(v.cols(), row);
    }
  });
  double sum = 0;
  for (const double x : sums) sum += x;
  return sum;
}

}  // namespace lowrank::detail

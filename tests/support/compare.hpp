// SPDX-License-Identifier: Apache-2.0
// The comparisons tests share; deviations are relative to the largest entry, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/rng.hpp"

namespace test {

/// max |a − b| / max |b| (max |a − b| when b is zero); infinity when the shapes differ or something is not finite.
template <class A, class B>
double deviation(const A& a, const B& b) {
  const auto x = lowrank::view_of(a);
  const auto y = lowrank::view_of(b);
  if (x.rows() != y.rows() || x.cols() != y.cols()) return INFINITY;
  double worst = 0, largest = 0;
  for (lowrank::Index i = 0; i < x.rows(); ++i)
    for (lowrank::Index j = 0; j < x.cols(); ++j) {
      const double d = std::abs(double(x(i, j)) - double(y(i, j)));
      if (!std::isfinite(d)) return INFINITY;
      worst = std::max(worst, d);
      largest = std::max(largest, std::abs(double(y(i, j))));
    }
  return largest > 0 ? worst / largest : worst;
}

/// Rounding unit of T times a count of operations: what a sum of `n` products may deviate by, relative to its
/// magnitude.
template <class T>
double rounding(double n) {
  return n * double(std::numeric_limits<T>::epsilon());
}

/// Independent normal numbers of deviation `std`: the one random matrix of the tests.
template <class T = float>
lowrank::Matrix<T> random_matrix(lowrank::Index rows, lowrank::Index cols, std::uint64_t seed, double std = 1) {
  lowrank::Matrix<T> m(rows, cols);
  lowrank::CounterRng(seed).fill_normal(m.view(), 0, std);
  return m;
}

/// (f(x + h) − f(x − h)) / 2h with the variable put back: exact up to rounding, about eps·|f|/h, where f is quadratic.
template <class F>
double central_difference(double& x, F&& f, double h = 1e-5) {
  const double keep = x;
  x = keep + h;
  const double up = f();
  x = keep - h;
  const double down = f();
  x = keep;
  return (up - down) / (2 * h);
}

template <class T>
bool same_bits(const lowrank::Matrix<T>& a, const lowrank::Matrix<T>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(T)) == 0);
}

}  // namespace test

// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: element i of a stream is a function of (seed, stream, i), so any thread may make any
// part.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "lowrank/core/matrix_view.hpp"

namespace lowrank {

/// The standard normal quantile Φ⁻¹(p), 0 < p < 1; ±infinity at the ends.
///
/// **Numerics** relative error about 1e-16. **Source** Wichura, Algorithm AS 241 (PPND16), Applied Statistics 37
/// (1988).
inline double normal_quantile(double p) {
  const auto ratio = [](double r, const std::array<double, 8>& n, const std::array<double, 8>& d) {
    double num = n[7], den = d[7];
    for (int i = 6; i >= 0; --i) {
      num = num * r + n[std::size_t(i)];
      den = den * r + d[std::size_t(i)];
    }
    return num / den;
  };
  static constexpr std::array<double, 8> a{3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
                                           1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
                                           3.3430575583588128105e4, 2.5090809287301226727e3};
  static constexpr std::array<double, 8> b{1.0,
                                           4.2313330701600911252e1,
                                           6.8718700749205790830e2,
                                           5.3941960214247511077e3,
                                           2.1213794301586595867e4,
                                           3.9307895800092710610e4,
                                           2.8729085735721942674e4,
                                           5.2264952788528545610e3};
  static constexpr std::array<double, 8> c{
      1.42343711074968357734e0, 4.63033784615654529590e0,  5.76949722146069140550e0,  3.64784832476320460504e0,
      1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4};
  static constexpr std::array<double, 8> d{1.0,
                                           2.05319162663775882187e0,
                                           1.67638483018380384940e0,
                                           6.89767334985100004550e-1,
                                           1.48103976427480074590e-1,
                                           1.51986665636164571966e-2,
                                           5.47593808499534494600e-4,
                                           1.05075007164441684324e-9};
  static constexpr std::array<double, 8> e{
      6.65790464350110377720e0,  5.46378491116411436990e0,  1.78482653991729133580e0,  2.96560571828504891230e-1,
      2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7};
  static constexpr std::array<double, 8> f{1.0,
                                           5.99832206555887937690e-1,
                                           1.36929880922735805310e-1,
                                           1.48753612908506148525e-2,
                                           7.86869131145613259100e-4,
                                           1.84631831751005468180e-5,
                                           1.42151175831644588870e-7,
                                           2.04426310338993978564e-15};
  const double q = p - 0.5;
  if (std::abs(q) <= 0.425) return q * ratio(0.180625 - q * q, a, b);
  const double tail = q < 0 ? p : 1 - p;
  if (!(tail > 0)) return q < 0 ? -INFINITY : INFINITY;
  const double r = std::sqrt(-std::log(tail));
  const double x = r <= 5 ? ratio(r - 1.6, c, d) : ratio(r - 5, e, f);
  return q < 0 ? -x : x;
}

namespace detail {

/// One block of Philox4x32-10: four counter words, two key words, four random words.
constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> x, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t(0xD2511F53U) * x[0], p1 = std::uint64_t(0xCD9E8D57U) * x[2];
    x = {std::uint32_t(p1 >> 32) ^ x[1] ^ key[0], std::uint32_t(p1), std::uint32_t(p0 >> 32) ^ x[3] ^ key[1],
         std::uint32_t(p0)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return x;
}

}  // namespace detail

/// A stream of random numbers addressed by index: Philox4x32-10 keyed by the seed, counting (stream, index).
///
/// The same (seed, stream, index) gives the same bits on every machine and from every thread; normals come from our own
/// quantile transform because `std::normal_distribution` differs between standard libraries.
///
/// **Cost** some 10 ns a number, no state, no allocation.
/// **Source** Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
class CounterRng {
 public:
  explicit constexpr CounterRng(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  /// 64 uniform bits, number `index` of the stream.
  [[nodiscard]] constexpr std::uint64_t bits(std::uint64_t index) const {
    const std::uint64_t counter = index / 2;
    const auto block = detail::philox4x32(
        {std::uint32_t(counter), std::uint32_t(counter >> 32), std::uint32_t(stream_), std::uint32_t(stream_ >> 32)},
        {std::uint32_t(seed_), std::uint32_t(seed_ >> 32)});
    const std::size_t half = 2 * (index % 2);
    return std::uint64_t(block[half]) << 32 | block[half + 1];
  }
  /// Uniform in the open interval (0, 1): (k + 1/2)·2^-52, exactly.
  [[nodiscard]] constexpr double uniform(std::uint64_t index) const { return to_unit(bits(index)); }
  /// Standard normal.
  [[nodiscard]] double normal(std::uint64_t index) const { return normal_quantile(uniform(index)); }
  /// Uniform in {0, …, n-1} (0 for n = 0); the bias of at most n / 2^64 is of no consequence here.
  [[nodiscard]] constexpr std::uint64_t below(std::uint64_t index, std::uint64_t n) const {
    // The upper 64 bits of the product bits·n, from 32-bit halves.
    const std::uint64_t b = bits(index), b1 = b >> 32, b0 = b & 0xffffffffU, n1 = n >> 32, n0 = n & 0xffffffffU;
    const std::uint64_t middle = b1 * n0 + ((b0 * n0) >> 32), carry = (middle & 0xffffffffU) + b0 * n1;
    return b1 * n1 + (middle >> 32) + (carry >> 32);
  }

  /// Fills a view with mean + std · N(0, 1), element (i, j) from index `first + i·cols + j` whatever the order.
  template <class T>
  void fill_normal(const MatrixView<T>& v, double mean = 0, double std = 1, std::uint64_t first = 0) const {
    for (Index i = 0; i < v.rows(); ++i)
      for (Index j = 0; j < v.cols(); ++j) v(i, j) = T(mean + std * normal(first + std::uint64_t(i * v.cols() + j)));
  }
  /// Fills a view with U(low, high), element (i, j) from index `first + i·cols + j` whatever the order.
  template <class T>
  void fill_uniform(const MatrixView<T>& v, double low, double high, std::uint64_t first = 0) const {
    for (Index i = 0; i < v.rows(); ++i)
      for (Index j = 0; j < v.cols(); ++j)
        v(i, j) = T(low + (high - low) * uniform(first + std::uint64_t(i * v.cols() + j)));
  }

 private:
  static constexpr double to_unit(std::uint64_t b) { return (double(b >> 12) + 0.5) * 0x1p-52; }

  std::uint64_t seed_, stream_;
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// Power-law fits recover the exponent of samples drawn from one.
#include "lowrank/spectrum/power_law.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "lowrank/core/rng.hpp"

using namespace lowrank;

namespace {
/// Singular values whose squares follow λ^(−α) above x_min: σ = √(x_min·u^(−1/(α−1))).
std::vector<double> sample(double alpha, double x_min, int n, std::uint64_t seed) {
  std::vector<double> s;
  for (int i = 0; i < n; ++i)
    s.push_back(std::sqrt(x_min * std::pow(CounterRng(seed).uniform(std::uint64_t(i)), -1 / (alpha - 1))));
  std::sort(s.rbegin(), s.rend());
  return s;
}
}  // namespace

TEST_CASE("the exponent of a sample is found within its standard error") {
  for (const double alpha : {1.8, 2.5, 4.0}) {
    const auto s = sample(alpha, 0.7, 4000, 3);
    const auto fit = fit_power_law(s, {.min_tail = 400});
    CHECK(std::abs(fit.alpha - alpha) < 4 * fit.alpha_error);
    CHECK(fit.ks_distance < 1.63 / std::sqrt(double(fit.tail_count)));  // 1 % point of the KS statistic
    CHECK(fit.x_min >= 0.7 * 0.999);
    CHECK(std::abs(hill_estimator(s, 800) - alpha) < 4 * (alpha - 1) / std::sqrt(800.0));
    CHECK(fit.weighted_alpha == doctest::Approx(fit.alpha * 2 * std::log10(s[0])));
  }
}

TEST_CASE("the cut-off is found where the power law begins") {
  auto s = sample(2.5, 1, 1500, 4);
  for (int i = 0; i < 1500; ++i)
    s.push_back(std::sqrt(CounterRng(6).uniform(std::uint64_t(i))));  // a flat bulk below 1
  std::sort(s.rbegin(), s.rend());
  const auto fit = fit_power_law(s, {.max_candidates = 0});
  CHECK(fit.x_min > 0.8);
  CHECK(fit.x_min < 3);
  CHECK(std::abs(fit.alpha - 2.5) < 4 * fit.alpha_error);
}

TEST_CASE("alpha is free of scale and the fit of a subset of cut-offs is close to the full one") {
  const auto s = sample(3, 1, 1200, 5);
  auto t = s;
  for (double& x : t) x *= 1e-3;
  CHECK(fit_power_law(s).alpha == doctest::Approx(fit_power_law(t).alpha).epsilon(1e-9));
  CHECK(fit_power_law(s).ks_distance <= fit_power_law(s, {.max_candidates = 0}).ks_distance + 0.01);
}

TEST_CASE("nothing to fit, nothing claimed") {
  const std::vector<double> few{3, 2, 1}, zeros(20, 0.0), flat(20, 1.0);
  CHECK(fit_power_law(few).alpha == 0);
  CHECK(fit_power_law(zeros).alpha == 0);
  CHECK(fit_power_law(flat).alpha == 0);
  CHECK(fit_power_law(flat).ks_distance == 1);
  CHECK(std::isinf(hill_estimator(flat, 5)));
  CHECK(hill_estimator(few, 2) == doctest::Approx(1 + 2 / (2 * std::log(3.0) + 2 * std::log(2.0))));
  CHECK_THROWS_AS(hill_estimator(few, 3), ArgumentError);
  CHECK_THROWS_AS(hill_estimator(zeros, 3), ArgumentError);
  CHECK_THROWS_AS(fit_power_law(few, {.min_tail = 1}), ArgumentError);
}

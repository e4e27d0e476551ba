// SPDX-License-Identifier: Apache-2.0
// Bounds straight from factors and from truncated SVDs, against all values of the dense matrix in double.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <map>
#include <string>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/truncated_svd.hpp"
#include "lowrank/spectrum/bounds.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {

std::map<std::string, double> by_name(const SpectrumMetrics& m) {
  std::map<std::string, double> all;
  for_each_metric(m, [&](const char* name, auto x) { all[name] = double(x); });
  return all;
}

/// Every metric of the truth lies between the ends, with `slack` for the rounding of the oracle itself.
void check_inside(const SpectrumMetrics& truth, const SpectrumBounds& b, double slack) {
  const auto lower = by_name(b.lower), upper = by_name(b.upper);
  for (const auto& metric : by_name(truth)) {
    const auto& name = metric.first;
    const double exact = metric.second;
    CAPTURE(name);
    CHECK(lower.at(name) <= exact * (1 + slack));
    CHECK(exact <= upper.at(name) * (1 + slack));
  }
}

}  // namespace

TEST_CASE_TEMPLATE("bounds of a product come from its factors and hold for the dense product", T, float, double) {
  for (const auto& sizes : {std::array<Index, 3>{40, 30, 5}, {7, 50, 7}, {25, 9, 1}, {6, 6, 9}}) {
    const Index m = sizes[0], n = sizes[1], r = sizes[2];
    CAPTURE(m);
    CAPTURE(n);
    CAPTURE(r);
    LoraFactors<T> f{Matrix<T>(r, n), Matrix<T>(m, r), T(0.7)};
    CounterRng(1, std::uint64_t(m)).fill_normal(f.A.view());
    CounterRng(2, std::uint64_t(n)).fill_normal(f.B.view());
    Matrix<double> dense(m, n);
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j)
        for (Index k = 0; k < r; ++k) dense(i, j) += double(f.scale) * double(f.B(i, k)) * double(f.A(k, j));
    auto values = test::oracle_singular_values(dense);
    values.resize(
        std::size_t(std::min({m, n, r})));  // the others are zeros: a product's condition is that of its range
    const auto truth = spectrum_metrics(values, m, n);
    const auto sv = singular_values(f);
    const auto b = spectrum_bounds(sv, m, n);
    // Both decompositions err by some units of eps·σ₁, which moves σ_last, and with it the condition, the most.
    check_inside(truth, b, 1e-13 * truth.condition_number);
    CHECK(b.exact(&SpectrumMetrics::energy_rank_90));
    CHECK(b.upper.energy_rank_90 == truth.energy_rank_90);
    CHECK(b.upper.numerical_rank == truth.numerical_rank);
    CHECK(b.upper.effective_rank - b.lower.effective_rank <= 1e-9 * truth.effective_rank);
  }
  // A zero update, and one of rank 0.
  const LoraFactors<T> zero{Matrix<T>(3, 8), Matrix<T>(9, 3), T(1)}, none{Matrix<T>(0, 8), Matrix<T>(9, 0), T(1)};
  CHECK(spectrum_bounds(singular_values(zero), 9, 8).upper.energy_rank_90 == 0);
  CHECK(spectrum_bounds(singular_values(zero), 9, 8).upper.frobenius_norm == 0);
  CHECK(singular_values(none).values.empty());
}

TEST_CASE_TEMPLATE("bounds from a truncated SVD hold the truth, and pin down what it determines", T, float, double) {
  const Index m = 90, n = 70, signal = 6;
  for (const double noise : {0.0, 1e-3, 0.05}) {
    CAPTURE(noise);
    Matrix<T> W(m, n);
    CounterRng(3).fill_normal(W.view(), 0, noise);
    for (Index k = 0; k < signal; ++k)
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < n; ++j)
          W(i, j) += T(std::pow(0.7, double(k)) * CounterRng(4, std::uint64_t(k)).normal(std::uint64_t(i)) *
                       CounterRng(5, std::uint64_t(k)).normal(std::uint64_t(j)));
    const auto truth = spectrum_metrics(test::oracle_singular_values(Matrix<double>(W.view())), m, n);
    for (const Index k : {Index(1), Index(4), Index(12)}) {
      CAPTURE(k);
      const auto t = truncated_svd(W, k, {.energy_tolerance = 0, .residual_tolerance = 1e-4});
      const auto b = spectrum_bounds(t);
      // The oracle and the bound on ‖W‖ are good to double precision; the condition of an exactly singular matrix is
      // whatever rounding makes of it, and its bound is infinite.
      check_inside(truth, b, 1e-9);
      CHECK(b.upper.stable_rank - b.lower.stable_rank <= 1e-3 * truth.stable_rank);
      if (k == 12) {
        CHECK(b.exact(&SpectrumMetrics::energy_rank_90));
        CHECK(b.upper.energy_rank_90 == truth.energy_rank_90);
      }
    }
  }
}

TEST_CASE("a truncated SVD of an operator that does not know its norm bounds nothing") {
  TruncatedSvd<double> t;
  t.U.resize(4, 1);
  t.V.resize(5, 1);
  t.S = {1};
  t.residuals = {0};
  t.total_energy = NAN;
  CHECK_THROWS_AS(spectrum_bounds(t), ArgumentError);
}

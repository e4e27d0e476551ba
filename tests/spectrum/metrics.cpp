// SPDX-License-Identifier: Apache-2.0
// Rank metrics against sums written out in long double, and against values known by hand.
#include "lowrank/spectrum/metrics.hpp"

#include <Eigen/Core>

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/spectrum/bounds.hpp"

using namespace lowrank;

namespace {

/// Spectra of every kind a matrix may have.
using Named = std::pair<std::string, std::vector<double>>;
std::vector<Named> spectra() {
  std::vector<Named> all;
  const auto make = [&](const char* name, int n, auto f) {
    std::vector<double> s;
    for (int i = 0; i < n; ++i) s.push_back(f(i));
    std::sort(s.rbegin(), s.rend());
    all.emplace_back(name, s);
  };
  make("one", 1, [](int) { return 3.5; });
  make("flat", 100, [](int) { return 0.1; });
  make("power", 257, [](int i) { return std::pow(i + 1.0, -0.7); });
  make("geometric", 64, [](int i) { return std::pow(0.5, i); });
  make("low rank", 50, [](int i) { return i < 7 ? 2.0 + i : 0.0; });
  make("random", 300, [](int i) { return CounterRng(5).uniform(std::uint64_t(i)); });
  make("huge", 20, [](int i) { return 1e200 / (i + 1); });
  make("tiny", 20, [](int i) { return 1e-200 / (i + 1); });
  make("spike", 1000, [](int i) { return i == 0 ? 1e6 : 1.0; });
  return all;
}

struct Reference {
  long double one = 0, two = 0, four = 0, entropy = 0;
  explicit Reference(const std::vector<double>& s) {
    for (const double x : s) {
      const long double q = static_cast<long double>(x) / s[0];
      one += q;
      two += q * q;
      four += q * q * q * q;
    }
    for (const double x : s)
      if (x > 0) {
        const long double p = static_cast<long double>(x) / s[0] / one;
        entropy -= p * std::log(p);
      }
  }
};

}  // namespace

// A matrix has data() and size() too; taken for its own singular values it would give numbers that mean nothing.
static_assert(!lowrank::SingularValueList<lowrank::Matrix<float>>);
static_assert(!lowrank::SingularValueList<lowrank::MatrixView<const double>>);
static_assert(!lowrank::SingularValueList<Eigen::MatrixXf>);
static_assert(lowrank::SingularValueList<Eigen::VectorXf>);
static_assert(lowrank::SingularValueList<std::vector<double>>);

TEST_CASE("every metric equals its definition") {
  for (const Named& named : spectra()) {
    const auto& name = named.first;
    const auto& s = named.second;
    CAPTURE(name);
    const Reference r(s);
    const Index n = Index(s.size());
    const auto m = spectrum_metrics(s, n, n + 3);
    const double eps = 4e-16 * double(n + 8);  // n roundings in a sum, a few in each term
    CHECK(m.spectral_norm == s[0]);
    // .scale(0): a relative error, whatever the size of the numbers.
    CHECK(m.frobenius_norm == doctest::Approx(double(std::sqrt(r.two) * s[0])).scale(0).epsilon(eps));
    CHECK(m.nuclear_norm == doctest::Approx(double(r.one * s[0])).scale(0).epsilon(eps));
    CHECK(m.stable_rank == doctest::Approx(double(r.two)).scale(0).epsilon(eps));
    CHECK(m.participation_ratio == doctest::Approx(double(r.two * r.two / r.four)).scale(0).epsilon(4 * eps));
    CHECK(m.effective_rank == doctest::Approx(double(std::exp(r.entropy))).scale(0).epsilon(8 * eps));
    for (const auto& [tau, rank] :
         {std::pair{0.90, m.energy_rank_90}, {0.95, m.energy_rank_95}, {0.99, m.energy_rank_99}}) {
      const auto share = [&](Index k) {
        long double sum = 0;
        for (Index i = 0; i < k; ++i)
          sum += static_cast<long double>(s[std::size_t(i)]) / s[0] * s[std::size_t(i)] / s[0];
        return double(sum / r.two);
      };
      CHECK(share(rank) >= tau - eps);
      CHECK(share(rank - 1) < tau + eps);
      CHECK(rank == energy_rank(s, tau));
    }
    CHECK(m.numerical_rank == std::count_if(s.begin(), s.end(), [&](double x) {
            return x > s[0] * double(n + 3) * double(std::numeric_limits<float>::epsilon());
          }));
    CHECK(m.condition_number == (s.back() > 0 ? s[0] / s.back() : INFINITY));
    // The separate functions are the same numbers.
    CHECK(m.stable_rank == stable_rank(s));
    CHECK(m.effective_rank == effective_rank(s));
    CHECK(m.participation_ratio == participation_ratio(s));
    CHECK(m.nuclear_norm == nuclear_norm(s));
    CHECK(m.frobenius_norm == frobenius_norm(s));
    // Every rank lies between 1 and the number of values, and they are ordered as theory has them.
    CHECK(m.stable_rank <= m.participation_ratio * (1 + eps));
    CHECK(m.participation_ratio <= m.effective_rank * m.effective_rank * (1 + eps));
    CHECK(m.effective_rank <= double(n) * (1 + eps));
    CHECK(m.energy_rank_90 <= m.energy_rank_95);
    CHECK(m.energy_rank_95 <= m.energy_rank_99);
  }
}

TEST_CASE("values known by hand") {
  const std::array<float, 4> s{2, 1, 1, 0};
  CHECK(stable_rank(s) == doctest::Approx(1.5));
  CHECK(participation_ratio(s) == doctest::Approx(36.0 / 18));
  CHECK(effective_rank(s) == doctest::Approx(std::exp(1.5 * std::log(2.0))));
  CHECK(energy_rank(s, 0.5) == 1);
  CHECK(energy_rank(s, 0.7) == 2);
  CHECK(energy_rank(s, 1.0) == 3);
  CHECK(numerical_rank(s, 4, 9) == 3);
  CHECK(std::isinf(condition_number(s)));
  // A flat spectrum is a tie at every step, and exact.
  const std::vector<double> flat(10, 0.1);
  CHECK(energy_rank(flat, 0.9) == 9);
  CHECK(energy_rank(flat, 0.5) == 5);
  CHECK(effective_rank(flat) == doctest::Approx(10));
}

TEST_CASE("ranks do not depend on the scale, norms are proportional to it") {
  const auto s = spectra()[5].second;
  auto t = s;
  for (double& x : t) x *= 0x1p-40;
  const auto a = spectrum_metrics(s, 300, 400), b = spectrum_metrics(t, 300, 400);
  CHECK(a.energy_rank_90 == b.energy_rank_90);
  CHECK(a.effective_rank == b.effective_rank);
  CHECK(a.numerical_rank == b.numerical_rank);
  CHECK(a.frobenius_norm * 0x1p-40 == b.frobenius_norm);
}

TEST_CASE("zero and empty matrices have rank zero") {
  const std::vector<double> zero(5, 0.0), none;
  for (const auto& s : {zero, none}) {
    const auto m = spectrum_metrics(s, 5, 8);
    CHECK(m.energy_rank_90 == 0);
    CHECK(m.numerical_rank == 0);
    CHECK(m.effective_rank == 0);
    CHECK(m.stable_rank == 0);
    CHECK(m.participation_ratio == 0);
    CHECK(m.frobenius_norm == 0);
  }
}

TEST_CASE("bad input is refused and named") {
  const std::vector<double> ascending{1, 2}, negative{1, -1}, nan{1, NAN}, fine{2, 1};
  CHECK_THROWS_AS(effective_rank(ascending), ArgumentError);
  CHECK_THROWS_AS(stable_rank(negative), ArgumentError);
  CHECK_THROWS_AS(energy_rank(nan), NonFiniteError);
  CHECK_THROWS_AS(energy_rank(fine, 0), ArgumentError);
  CHECK_THROWS_AS(energy_rank(fine, 1.5), ArgumentError);
  CHECK_THROWS_AS(energy_rank(fine, NAN), ArgumentError);
  CHECK_THROWS_AS(numerical_rank(fine, 1, 5), ShapeError);
  CHECK_THROWS_AS(numerical_rank(fine, 2, 5, -1), ArgumentError);
  CHECK_THROWS_WITH(effective_rank(ascending),
                    "effective_rank: singular values must descend, but value 1 = 2 follows 1");
}

namespace {

void check_inside(const SpectrumMetrics& truth, const SpectrumBounds& b) {
  std::vector<double> lower, upper, exact;
  std::vector<std::string> names;
  for_each_metric(b.lower, [&](const char*, auto x) { lower.push_back(double(x)); });
  for_each_metric(b.upper, [&](const char*, auto x) { upper.push_back(double(x)); });
  for_each_metric(truth, [&](const char* name, auto x) {
    names.emplace_back(name);
    exact.push_back(double(x));
  });
  for (std::size_t i = 0; i < names.size(); ++i) {
    CAPTURE(names[i]);
    CHECK(lower[i] <=
          exact[i] * (1 + 1e-9));  // 1e-9: far above the rounding of both sums, far below any error injected
    CHECK(exact[i] <= upper[i] * (1 + 1e-9));
  }
}

}  // namespace

TEST_CASE("bounds hold the truth when every value carries an error") {
  for (const Named& named : spectra())
    for (const double relative : {0.0, 1e-9, 1e-4, 0.05}) {
      const auto& name = named.first;
      const auto& s = named.second;
      CAPTURE(name);
      CAPTURE(relative);
      const Index n = Index(s.size());
      const double error = relative * s[0];
      const auto truth = spectrum_metrics(s, n, n);
      for (std::uint64_t draw = 0; draw < 5; ++draw) {
        auto noisy = s;
        for (std::size_t i = 0; i < noisy.size(); ++i)
          noisy[i] = std::max(0.0, noisy[i] + error * (2 * CounterRng(draw).uniform(i) - 1));
        std::sort(noisy.rbegin(), noisy.rend());  // sorting keeps each value within the error of its rank's
        const auto b = spectrum_bounds(noisy, n, n, {.error = error});
        check_inside(truth, b);
        if (b.exact(&SpectrumMetrics::energy_rank_90))
          CHECK(spectrum_metrics(noisy, n, n).energy_rank_90 == truth.energy_rank_90);
      }
      if (relative == 0 && name != "flat") {
        const auto b = spectrum_bounds(s, n, n);
        CHECK(b.exact(&SpectrumMetrics::energy_rank_90));
        CHECK(b.lower.effective_rank == doctest::Approx(truth.effective_rank).scale(0).epsilon(1e-10));
        CHECK(b.upper.stable_rank == doctest::Approx(truth.stable_rank).epsilon(1e-10));
      }
    }
}

TEST_CASE("bounds from the largest values and the norm hold the truth") {
  for (const auto& named : spectra()) {
    const auto& name = named.first;
    const auto& s = named.second;
    for (const std::size_t k : {std::size_t(1), s.size() / 8, s.size() / 2, s.size()}) {
      if (k == 0) continue;
      CAPTURE(name);
      CAPTURE(k);
      const Index n = Index(s.size());
      const std::vector<double> top(s.begin(), s.begin() + Index(k));
      const auto truth = spectrum_metrics(s, n, n);
      const auto b = spectrum_bounds(top, n, n, {.frobenius = truth.frobenius_norm});
      check_inside(truth, b);
      if (truth.energy_rank_90 <= Index(k) && name != "flat") CHECK(b.upper.energy_rank_90 == truth.energy_rank_90);
    }
  }
}

TEST_CASE("bounds refuse what cannot be") {
  const std::vector<double> s{3, 2};
  CHECK_THROWS_AS(spectrum_bounds(s, 4, 4), ArgumentError);                    // two of four, and no norm
  CHECK_THROWS_AS(spectrum_bounds(s, 4, 4, {.frobenius = 3}), ArgumentError);  // the values alone have √13
  CHECK_THROWS_AS(spectrum_bounds(s, 4, 4, {.error = -1, .frobenius = 4}), ArgumentError);
  CHECK_THROWS_AS(spectrum_bounds(s, 1, 4), ShapeError);
}

// SPDX-License-Identifier: Apache-2.0
// Noise floors against published constants, quadrature, and matrices of noise.
#include "lowrank/spectrum/noise.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <numbers>
#include <tuple>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/qr.hpp"
#include "lowrank/spectrum/rounding.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

// doctest's Approx allows epsilon·(scale + |x|) with a scale of 1; .scale(0) makes it a relative error, which small
// numbers need.

TEST_CASE("the rank of pure noise, to the digits published") {
  // Half a unit of the last digit given.
  const std::tuple<Index, Index, double> published[] = {{4096, 4096, .510}, {4096, 11008, .712}, {4096, 32000, .814}};
  for (const auto& [m, n, share] : published) {
    CHECK(std::abs(double(noise_metrics(m, n).energy_rank_90) / double(m) - share) < 5e-4);
    CHECK(noise_metrics(n, m).energy_rank_90 == noise_metrics(m, n).energy_rank_90);
    CHECK(std::abs(MarchenkoPastur::of_shape(double(m), double(n)).energy_rank_share(.9) - share) < 5e-4);
  }
}

TEST_CASE("the edges of the Marchenko-Pastur law") {
  for (const auto& [m, n, std, edge] :
       {std::tuple{4096, 4096, 1.0, 128.0}, {1024, 4096, 0.02, 1.92}, {9, 400, 3.0, 69.0}, {1, 1, 1.0, 2.0}}) {
    CHECK(noise_edge(m, n, std) == doctest::Approx(edge).scale(0).epsilon(1e-15));
    CHECK(noise_edge(n, m, std) == noise_edge(m, n, std));
    // The law's own edge, in its unit of std·√max(m, n).
    const double top = MarchenkoPastur::of_shape(m, n).upper_edge();
    CHECK(std * std::sqrt(std::max(m, n) * top) == doctest::Approx(edge).scale(0).epsilon(1e-14));
  }
  CHECK(MarchenkoPastur(0.25).lower_edge() == 0.25);
  CHECK(MarchenkoPastur(0.25).upper_edge() == 2.25);
  CHECK(MarchenkoPastur(1).lower_edge() == 0);
  CHECK(MarchenkoPastur(1).upper_edge() == 4);
}

TEST_CASE("Gavish and Donoho's coefficients") {
  CHECK(gavish_donoho_lambda(1) == doctest::Approx(4 / std::numbers::sqrt3).epsilon(1e-14));
  CHECK(std::abs(gavish_donoho_omega(1) - 2.858) < 5e-4);
  // Table IV of arXiv 1305.5870, whose own quadrature is good to about 7e-4.
  const std::pair<double, double> table[] = {{.05, 1.5194}, {.1, 1.6089}, {.25, 1.8371}, {.5, 2.1711},
                                             {.75, 2.5011}, {.9, 2.7099}, {1, 2.8582}};
  for (const auto& [beta, omega] : table) CHECK(std::abs(gavish_donoho_omega(beta) - omega) < 7.5e-4);
  // Their approximation, 0.56β³ − 0.95β² + 1.82β + 1.43, which they state to be within 0.02.
  for (double b = 0.01; b <= 1; b += 0.03)
    CHECK(std::abs(gavish_donoho_omega(b) - (0.56 * b * b * b - 0.95 * b * b + 1.82 * b + 1.43)) < 0.02);
}

TEST_CASE("the closed-form law is the integral of its density") {
  for (const double beta : {.02, .37, .9, 1.0}) {
    const MarchenkoPastur law(beta);
    for (const double share : {.1, .5, .8, .99}) {
      const double x = law.lower_edge() + share * (law.upper_edge() - law.lower_edge());
      // Substituting x = middle + half-width·sin t removes both square-root edges; Simpson does the rest.
      const double half = (law.upper_edge() - law.lower_edge()) / 2, mid = law.lower_edge() + half;
      const double a = std::asin((x - mid) / half), b = std::numbers::pi / 2;
      double count = 0, energy = 0;
      const int n = 4000;
      for (int i = 0; i <= n; ++i) {
        const double t = a + (b - a) * i / n, y = mid + half * std::sin(t), w = i == 0 || i == n ? 1 : i % 2 ? 4 : 2;
        const double f = law.density(y) * half * std::cos(t) * w * (b - a) / n / 3;
        count += f;
        energy += f * y;
      }
      CHECK(1 - law.cdf(x) == doctest::Approx(count).epsilon(1e-8));
      CHECK(law.energy_above(x) == doctest::Approx(energy).epsilon(1e-8));
      CHECK(law.quantile(law.cdf(x)) == doctest::Approx(x).epsilon(1e-10));
    }
    CHECK(law.cdf(law.lower_edge()) == 0);
    CHECK(law.cdf(law.upper_edge()) == 1);
    CHECK(law.quantile(0) == doctest::Approx(law.lower_edge()));
    CHECK(law.quantile(1) == doctest::Approx(law.upper_edge()));
  }
  CHECK_THROWS_AS(MarchenkoPastur(0), ArgumentError);
  CHECK_THROWS_AS(MarchenkoPastur(1.01), ArgumentError);
  CHECK_THROWS_AS((void)MarchenkoPastur(.5).quantile(-.1), ArgumentError);
  CHECK_THROWS_AS(MarchenkoPastur::of_shape(0, 4), ShapeError);
}

TEST_CASE("matrices of noise show what their null predicts") {
  for (const auto& shape : {std::pair<Index, Index>{40, 40}, {32, 96}, {150, 60}}) {
    const Index m = shape.first, n = shape.second;
    CAPTURE(m);
    CAPTURE(n);
    const double std = 0.3;
    const auto null = noise_metrics(m, n, std);
    const int draws = 24;
    double rank = 0, effective = 0, participation = 0, top = 0, nuclear = 0;
    for (int d = 0; d < draws; ++d) {
      Matrix<double> W(m, n);
      CounterRng(100 + std::uint64_t(d)).fill_normal(W.view(), 0, std);
      const auto r = spectrum_metrics(test::oracle_singular_values(W), m, n);
      rank += double(r.energy_rank_90) / draws;
      effective += r.effective_rank / draws;
      participation += r.participation_ratio / draws;
      top += r.spectral_norm / draws;
      nuclear += r.nuclear_norm / draws;
    }
    const double N = double(std::min(m, n));
    CHECK(std::abs(rank - double(null.energy_rank_90)) <= 1);
    CHECK(std::abs(effective / null.effective_rank - 1) < 1 / N);
    CHECK(std::abs(participation / null.participation_ratio - 1) < 1 / N);
    CHECK(std::abs(nuclear / null.nuclear_norm - 1) < 1 / N);
    // The mean over 24 draws of a Tracy–Widom variable (standard deviation 1.27) leaves 3·1.27/√24 of its unit.
    const double unit = noise_spectral_norm(m, n, std, 1) - noise_spectral_norm(m, n, std, 0);
    CHECK(std::abs(top - null.spectral_norm) < 0.78 * unit + 0.01 * null.spectral_norm);
    CHECK(null.spectral_norm < noise_edge(m, n, std));
    CHECK(noise_spectral_norm(m, n, std, tracy_widom_99) > noise_edge(m, n, std));
  }
}

TEST_CASE("the noise level under a low-rank signal is found again") {
  const Index m = 120, n = 200;
  Matrix<double> W(m, n);
  CounterRng(7).fill_normal(W.view(), 0, 0.05);
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j)
      for (std::uint64_t k = 0; k < 3; ++k)
        W(i, j) += 0.15 * CounterRng(8, k).normal(std::uint64_t(i)) * CounterRng(9, k).normal(std::uint64_t(j));
  const auto e = estimate_noise(test::oracle_singular_values(W), m, n);
  CHECK(e.std == doctest::Approx(0.05).scale(0).epsilon(0.05));
  CHECK(e.optimal_rank == 3);
  CHECK(e.above_edge >= 3);
  CHECK(e.threshold > e.edge);
  const std::vector<double> few{2, 1};
  CHECK_THROWS_AS(estimate_noise(few, 3, 4), ShapeError);
}

namespace {

/// Noise of deviation 1 and `rank` signals of 2 to 4 times its edge, in orthonormal directions so that each is that
/// large.
std::vector<double> noise_and_signal(Index m, Index n, Index rank, std::uint64_t seed) {
  Matrix<double> W(m, n), U(m, rank), V(n, rank);
  CounterRng(seed).fill_normal(W.view());
  CounterRng(seed, 1).fill_normal(U.view());
  CounterRng(seed, 2).fill_normal(V.view());
  if (rank > 0) {
    orthonormalise(U.view());
    orthonormalise(V.view());
  }
  for (Index k = 0; k < rank; ++k) {
    const double size = noise_edge(m, n, 1) * (2 + 2 * double(k) / double(rank));
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) W(i, j) += size * U(i, k) * V(j, k);
  }
  return test::oracle_singular_values(W);
}

}  // namespace

TEST_CASE("the noise level is found below half of the values and said to be undetermined beyond") {
  for (const auto& shape : {std::pair<Index, Index>{80, 80}, {60, 160}, {300, 40}}) {
    const Index m = shape.first, n = shape.second, N = std::min(m, n);
    CAPTURE(m);
    for (std::uint64_t seed = 1; seed <= 5; ++seed) {
      const auto pure = estimate_noise(noise_and_signal(m, n, 0, seed), m, n);
      CHECK(pure.determined);
      CHECK(pure.reason.empty());
      CHECK(pure.std == doctest::Approx(1).scale(0).epsilon(0.1));
      const auto tenth = estimate_noise(noise_and_signal(m, n, N / 10, seed), m, n);
      CHECK(tenth.determined);
      CHECK(tenth.std == doctest::Approx(1).scale(0).epsilon(0.15));
      CHECK(tenth.optimal_rank == N / 10);
      for (const double share : {0.55, 0.6, 0.7, 0.8}) {
        CAPTURE(share);
        const auto most = estimate_noise(noise_and_signal(m, n, Index(share * double(N)), seed), m, n);
        CHECK_FALSE(most.determined);
        CHECK(most.reason == "more than half of the singular values lie above the noise");
        CHECK(std::isnan(most.std));
        CHECK(std::isnan(most.edge));
        CHECK(std::isnan(most.threshold));
        CHECK(most.above_edge == -1);
        CHECK(most.optimal_rank == -1);
      }
    }
  }
  // Equal values are not the noise of a square matrix; neither are those of rank 3N/4 and nothing else.
  const std::vector<double> equal(50, 3.0);
  CHECK(estimate_noise(equal, 50, 50).reason == "the lower half of the singular values is not that of noise");
  std::vector<double> cut(40, 2.0);
  std::fill(cut.begin() + 30, cut.end(), 0.0);
  CHECK(estimate_noise(cut, 40, 90).reason == "more than half of the singular values lie above the noise");
  // Rank below N/2 without noise: the noise is zero, and that is known.
  std::fill(cut.begin() + 5, cut.end(), 0.0);
  const auto exact = estimate_noise(cut, 40, 90);
  CHECK(exact.determined);
  CHECK(exact.std == 0);
  CHECK(exact.optimal_rank == 5);
  // A handful of values has nothing to check the median with.
  CHECK_FALSE(estimate_noise(std::vector<double>{3, 2, 1}, 3, 4).determined);
}

TEST_CASE("pure noise of any shape is not refused") {
  for (const auto& shape : {std::pair<Index, Index>{10, 10}, {10, 80}, {11, 2000}, {16, 16}, {40, 40}, {24, 300}}) {
    CAPTURE(shape.first);
    CAPTURE(shape.second);
    int refused = 0;
    for (std::uint64_t seed = 1; seed <= 100; ++seed) {
      Matrix<double> W(shape.first, shape.second);
      CounterRng(seed, 77).fill_normal(W.view(), 0, 0.02);
      refused += !estimate_noise(test::oracle_singular_values(W), shape.first, shape.second).determined;
    }
    CHECK(refused == 0);
  }
}

namespace {

/// x rounded to a grid of `bits` explicit bits whose smallest normal number is 2^smallest, in double: neither of our
/// types is asked.
double rounded(double x, int bits, int smallest) {
  if (x == 0) return 0;
  const double spacing = std::ldexp(1.0, std::max(std::ilogb(x), smallest) - bits);
  return std::nearbyint(x / spacing) * spacing;
}

}  // namespace

TEST_CASE("rounding noise over the whole range of bf16 and f16, subnormal numbers included") {
  const auto check = [](auto tag, int bits, int smallest, std::initializer_list<double> deviations) {
    using S = decltype(tag);
    const Index m = 200, n = 500;
    for (const double std : deviations) {
      CAPTURE(std);
      // Quantiles in the middles of equal shares: quadrature of the normal distribution.
      Matrix<double> W(m, n), stored(m, n);
      double sum = 0;
      for (Index i = 0; i < W.size(); ++i) {
        const Index shuffled = (i * 7919) % W.size();
        const double x = std * normal_quantile((double(shuffled) + 0.5) / double(W.size()));
        W.data()[i] = x;
        stored.data()[i] = rounded(x, bits, smallest);
        sum += (x - stored.data()[i]) * (x - stored.data()[i]);
      }
      // Squares of uniform numbers scatter by 0.9 of their mean: half of 0.9/√(mn) for the root, three times that.
      const double truth = std::sqrt(sum / double(W.size())), tolerance = 3 * 0.45 / std::sqrt(double(W.size()));
      const auto by_size = rounding_noise<S>(m, n, std, false);
      CHECK(by_size.std == doctest::Approx(truth).scale(0).epsilon(tolerance));
      CHECK(by_size.edge == doctest::Approx(noise_edge(m, n, by_size.std)).scale(0).epsilon(1e-12));
      CHECK(rounding_noise<S>(m, n, std, true).std ==
            doctest::Approx(by_size.std * std::numbers::sqrt2).scale(0).epsilon(1e-12));
      CHECK(rounding_noise<S>(MatrixView<const double>(W.view()), false).std ==
            doctest::Approx(truth).scale(0).epsilon(tolerance));
      // From what was stored the error is known as long as the spacing is finer than the numbers.
      const double spacing = std::ldexp(1.0, smallest - bits);
      const double from_stored = rounding_noise<S>(MatrixView<const double>(stored.view()), false).std;
      if (std > spacing / 2) CHECK(from_stored == doctest::Approx(truth).scale(0).epsilon(0.02));
      CHECK(from_stored <= std::max(truth * 1.02, spacing / std::sqrt(12.0) * 1.0001));
    }
  };
  check(f16{}, 10, -14,
        {1e-12, 1e-9, 1e-8, 2e-8, 3e-8, 6e-8, 1e-7, 1e-6, 1e-5, 3e-5, 6e-5, 1e-4, 3e-3, 0.02, 0.7, 1e3});
  check(bf16{}, 7, -126, {1e-45, 1e-41, 3e-41, 6e-41, 1e-40, 1e-39, 1e-38, 3e-38, 1e-37, 1e-20, 0.02, 0.7, 1e30});
  CHECK(std::abs(rounding_noise<f16>(64, 64, 1e-5, false).std - 1.7e-8) < 5e-10);
  // What leaves the range has no finite error; zeros alone have none.
  CHECK(std::isinf(rounding_noise<f16>(64, 64, 1e5, false).edge));
  CHECK(std::isinf(rounding_noise<bf16>(64, 64, 1e39, false).edge));
  Matrix<float> W(4, 5);
  CHECK(rounding_noise<f16>(W, false).edge == 0);
  CHECK(rounding_noise<f16>(8, 8, 0, false).edge == 0);
  W(1, 2) = 65519;
  CHECK(std::isfinite(rounding_noise<f16>(W, false).edge));
  W(1, 2) = 65520;
  CHECK(std::isinf(rounding_noise<f16>(W, false).edge));
  CHECK(std::isfinite(rounding_noise<bf16>(W, false).edge));
}

TEST_CASE("rounding to bf16 and f16 has the size predicted, and its spectrum stays below the edge") {
  const auto check = [](auto tag) {
    using S = decltype(tag);
    const Index m = 96, n = 160;
    Matrix<float> W(m, n);
    CounterRng(11).fill_normal(W.view(), 0, 0.02);
    Matrix<double> error(m, n);
    double sum = 0;
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) {
        error(i, j) = double(float(S(W(i, j)))) - double(W(i, j));
        sum += error(i, j) * error(i, j);
      }
    const double measured = std::sqrt(sum / double(m * n)), top = test::oracle_singular_values(error)[0];
    const auto exact = rounding_noise<S>(MatrixView<const float>(W.view()), false);
    const auto rough = rounding_noise<S>(m, n, 0.02, false);
    // mn squares of uniform errors of varying size: their sum scatters by about 1/√(mn)
    CHECK(exact.std == doctest::Approx(measured).scale(0).epsilon(0.03));
    CHECK(rough.std == doctest::Approx(measured).scale(0).epsilon(0.03));
    CHECK(top <= exact.edge);
    CHECK(top > 0.8 * rough.edge);
    CHECK(rounding_noise<S>(MatrixView<const float>(W.view()), true).edge ==
          doctest::Approx(exact.edge * std::sqrt(2.0)).scale(0).epsilon(1e-12));
    // The transposed view is the same matrix.
    CHECK(rounding_noise<S>(MatrixView<const float>(W.view()).transposed(), false).edge ==
          doctest::Approx(exact.edge).scale(0).epsilon(1e-12));
    W(3, 5) = NAN;
    CHECK_THROWS_WITH_AS(rounding_noise<S>(MatrixView<const float>(W.view()), false),
                         "rounding_noise: W holds a value that is not finite, in row 3, column 5", NonFiniteError);
  };
  check(bf16{});
  check(f16{});
  CHECK(std::abs(rounding_noise<bf16>(1, 1, 1.0, false).std - 1.662e-3) < 5e-7);  // half a unit of the last digit given
  CHECK(std::abs(rounding_noise<f16>(1, 1, 1.0, false).std - 2.077e-4) < 5e-8);
  const double c = rounding_noise<bf16>(1, 1, 1.0, false).std;
  CHECK(rounding_noise<bf16>(9, 16, 0.5, true).edge ==
        doctest::Approx(c * 0.5 * 7 * std::numbers::sqrt2).scale(0).epsilon(1e-14));
  CHECK(rounding_noise<bf16>(MatrixView<const float>(), false).edge == 0);
}

TEST_CASE("awkward shapes and arguments") {
  CHECK(noise_metrics(1, 50, 2).energy_rank_90 == 1);
  CHECK(noise_metrics(1, 50, 2).spectral_norm == doctest::Approx(2 * std::sqrt(50.0)).epsilon(0.02));
  CHECK(noise_metrics(50, 1).numerical_rank == 1);
  CHECK(noise_metrics(6, 6, 0).frobenius_norm == 0);
  CHECK_THROWS_AS(noise_edge(0, 4, 1), ShapeError);
  CHECK_THROWS_AS(noise_spectrum(3, 4, -1), ArgumentError);
  CHECK_THROWS_AS(noise_metrics(3, 4, NAN), ArgumentError);
  CHECK_THROWS_AS(gavish_donoho_lambda(0), ArgumentError);
}

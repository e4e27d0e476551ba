// SPDX-License-Identifier: Apache-2.0
#include "lowrank/init/rank_choice.hpp"

#include <doctest/doctest.h>

#include "lowrank/core/rng.hpp"

using namespace lowrank;

TEST_CASE("rank for an energy fraction, from a whole list and from a truncated one") {
  const std::vector<double> s{4, 2, 2, 1};  // energies 16, 4, 4, 1 of 25
  CHECK(rank_for_energy(s, 0.64).rank == 1);
  CHECK(rank_for_energy(s, 0.65).rank == 2);
  CHECK(rank_for_energy(s, 0.8).rank == 2);
  CHECK(rank_for_energy(s, 0.81).rank == 3);
  CHECK(rank_for_energy(s, 1.0).rank == 4);
  CHECK(rank_for_energy(s, 0.8).attained == doctest::Approx(0.8));
  const RankChoice cut = rank_for_energy(std::vector<float>{4, 2}, 0.9, 25.0);
  CHECK_FALSE(cut.reached);
  CHECK(cut.rank == 2);
  CHECK(cut.attained == doctest::Approx(0.8));
  CHECK(rank_for_energy(std::vector<double>{0, 0}, 0.9).rank == 0);
  CHECK(rank_for_energy(std::vector<double>{}, 0.9).reached);
  CHECK_THROWS_AS((void)rank_for_energy(s, 0.0), ArgumentError);
  CHECK_THROWS_AS((void)rank_for_energy(s, 1.5), ArgumentError);
  CHECK_THROWS_AS((void)rank_for_energy(s, 0.5, 10.0), ArgumentError);
  CHECK_THROWS_AS((void)rank_for_energy(std::vector<double>{1, 2}, 0.5), ArgumentError);
  CHECK_THROWS_AS((void)rank_for_energy(std::vector<double>{1, -2}, 0.5), ArgumentError);
  CHECK_THROWS_AS((void)rank_for_energy(std::vector<double>{NAN}, 0.5), NonFiniteError);
}

TEST_CASE("rank for a spectral error is the number of values above it") {
  const std::vector<double> s{4, 2, 2, 1};
  CHECK(rank_for_spectral_error(s, 2.5, 4).rank == 1);
  CHECK(rank_for_spectral_error(s, 2.0, 4).rank == 1);  // σ₂ = 2 ≤ 2: rank 1 already has that error
  CHECK(rank_for_spectral_error(s, 1.5, 4).rank == 3);
  CHECK(rank_for_spectral_error(s, 1.5, 4).attained == 1);
  CHECK(rank_for_spectral_error(s, 0.5, 4).rank == 4);
  CHECK(rank_for_spectral_error(s, 0.5, 4).reached);
  CHECK_FALSE(rank_for_spectral_error(s, 0.5, 9).reached);
  CHECK(rank_for_spectral_error(s, 4, 4).rank == 0);
  CHECK_THROWS_AS((void)rank_for_spectral_error(s, -1, 4), ArgumentError);
  CHECK_THROWS_AS((void)rank_for_spectral_error(s, 1, 3), ArgumentError);
}

TEST_CASE("rank above noise counts what passes the edge") {
  const std::vector<double> s{30, 21, 19, 5};
  CHECK(rank_above_noise(s, 100, 100, 1).rank == 2);  // edge 20
  CHECK(rank_above_noise(s, 100, 100, 0).rank == 4);
  CHECK_FALSE(rank_above_noise(s, 100, 100, 0).reached);
  CHECK_THROWS_AS((void)rank_above_noise(s, 100, 100, -1), ArgumentError);
}

namespace {
/// The best captured energy by trying all ranks.
double exhaustive(const std::vector<BudgetItem>& items, Index budget, std::size_t from = 0) {
  if (from == items.size()) return 0;
  double best = 0, energy = 0;
  for (Index r = 0; r <= Index(items[from].sigma.size()); ++r) {
    const Index cost = r * (items[from].rows + items[from].cols);
    if (cost > budget) break;
    if (r > 0) energy += items[from].sigma[std::size_t(r - 1)] * items[from].sigma[std::size_t(r - 1)];
    best = std::max(best, energy + exhaustive(items, budget - cost, from + 1));
  }
  return best;
}
}  // namespace

TEST_CASE("budget: within it, prefix-greedy, and never worse than its bound says, against exhaustive search") {
  const CounterRng rng(9);
  std::uint64_t at = 0;
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<BudgetItem> items;
    for (int i = 0; i < 4; ++i) {
      BudgetItem item{Index(2 + rng.below(at++, 9)), Index(2 + rng.below(at++, 9)), {}};
      for (int k = 0; k < 5; ++k) item.sigma.push_back(rng.uniform(at++) * 3);
      std::sort(item.sigma.rbegin(), item.sigma.rend());
      items.push_back(std::move(item));
    }
    const Index budget = Index(rng.below(at++, 150));
    const BudgetResult result = ranks_under_budget(items, {.parameters = budget});
    Index spent = 0;
    double captured = 0;
    for (std::size_t i = 0; i < items.size(); ++i) {
      spent += result.ranks[i] * (items[i].rows + items[i].cols);
      for (Index k = 0; k < result.ranks[i]; ++k)
        captured += items[i].sigma[std::size_t(k)] * items[i].sigma[std::size_t(k)];
    }
    REQUIRE(spent <= budget);
    CHECK(spent == result.parameters);
    CHECK(captured == doctest::Approx(result.captured));
    const double optimum = exhaustive(items, budget);
    CHECK(optimum <= result.upper_bound * (1 + 1e-12) + 1e-12);
    CHECK(captured <= optimum * (1 + 1e-12) + 1e-12);
  }
}

TEST_CASE("budget: equal shapes make greedy optimal; min_rank and max_rank hold") {
  const std::vector<BudgetItem> items{{4, 4, {3, 2, 1}}, {4, 4, {2.5, 0.5, 0.1}}, {4, 4, {0.9, 0.8, 0.7}}};
  const BudgetResult free = ranks_under_budget(items, {.parameters = 8 * 4 + 7});
  CHECK(free.ranks == std::vector<Index>{3, 1, 0});
  CHECK(free.captured == doctest::Approx(exhaustive(items, 39)));
  CHECK(free.water_level == doctest::Approx(0.81 / 8));
  CHECK(ranks_under_budget(items, {.parameters = 32, .min_rank = 1}).ranks == std::vector<Index>{2, 1, 1});
  CHECK(ranks_under_budget(items, {.parameters = 32, .max_rank = 1}).ranks == std::vector<Index>{1, 1, 1});
  const BudgetResult all = ranks_under_budget(items, {.parameters = 1000});
  CHECK(all.ranks == std::vector<Index>{3, 3, 3});
  CHECK(all.water_level == 0);
  CHECK(all.upper_bound == doctest::Approx(all.captured));
  CHECK_THROWS_AS((void)ranks_under_budget(items, {.parameters = 23, .min_rank = 1}), ArgumentError);
  CHECK_THROWS_AS((void)ranks_under_budget(items, {.parameters = 100, .min_rank = 2, .max_rank = 1}), ArgumentError);
  CHECK_THROWS_AS((void)ranks_under_budget(items, {.parameters = 1000, .min_rank = 4}), ArgumentError);
  const std::vector<BudgetItem> unsorted{{4, 4, {1, 2}}};
  CHECK_THROWS_AS((void)ranks_under_budget(unsorted, {.parameters = 100}), ArgumentError);
}

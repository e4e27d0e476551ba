// SPDX-License-Identifier: Apache-2.0
// The MPI front end. Every rank runs every test; a failure on any of them fails the run.
#include "lowrank/mpi.hpp"

#include <doctest/doctest.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "lowrank/core/balance.hpp"
#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/singular_values.hpp"

using namespace lowrank;

namespace {

/// MPI can be initialised once in a process, so one world serves all tests.
MpiWorld& world() {
  static MpiWorld w;
  return w;
}

/// Texts of awkward lengths and bytes, different for every rank.
std::string text_of(int rank, int round) {
  switch (round) {
    case 0:
      return {};  // everybody has nothing to say
    case 1:
      return rank % 2 == 0 ? std::string() : std::string("odd");
    case 2:
      return std::string("zero\0inside", 11) + char(rank);
    default:
      return std::string(std::size_t(1000 + 100000 * rank), char('a' + rank));  // eager and rendezvous protocols
  }
}

}  // namespace

TEST_CASE("the world is as large as mpirun was told") {
  int rank = -1, size = -1;
  world();
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  CHECK(world().rank() == rank);
  CHECK(world().size() == size);
  if (const char* ranks = std::getenv("RANKS")) CHECK(std::to_string(size) == ranks);
}

TEST_CASE("gather brings every text to rank 0, whole and in order") {
  for (int round = 0; round < 4; ++round) {
    const auto all = world().gather(text_of(world().rank(), round));
    if (world().rank() != 0) {
      CHECK(all.empty());
      continue;
    }
    REQUIRE(int(all.size()) == world().size());
    for (int r = 0; r < world().size(); ++r) CHECK(all[std::size_t(r)] == text_of(r, round));
  }
}

TEST_CASE("gathers that follow each other at once do not mix") {
  std::vector<std::vector<std::string>> rounds;
  for (int i = 0; i < 50; ++i)
    rounds.push_back(world().gather(std::to_string(world().rank()) + ":" + std::to_string(i)));
  if (world().rank() == 0)
    for (int i = 0; i < 50; ++i)
      for (int r = 0; r < world().size(); ++r)
        CHECK(rounds[std::size_t(i)][std::size_t(r)] == std::to_string(r) + ":" + std::to_string(i));
}

TEST_CASE("a second world neither starts MPI again nor ends it") {
  world();
  { const MpiWorld guest; }
  int done = 1;
  MPI_Finalized(&done);
  CHECK(done == 0);
  CHECK(world().gather("still here").size() == std::size_t(world().rank() == 0 ? world().size() : 0));
}

TEST_CASE("matrices spread by their flops give the values one rank computes, bit for bit") {
  std::vector<std::pair<Index, Index>> shapes;
  std::vector<double> costs;
  for (Index i = 0; i < 11; ++i) {
    shapes.emplace_back(3 + (7 * i) % 23, 4 + (5 * i) % 17);
    costs.push_back(double(shapes.back().first) * double(shapes.back().second));
  }
  const auto values = [&](std::size_t i) {
    Matrix<double> W(shapes[i].first, shapes[i].second);
    CounterRng(42, i).fill_normal(W.view());
    const auto sv = singular_values(W).values;
    return std::string(reinterpret_cast<const char*>(sv.data()), sv.size() * sizeof(sv[0]));
  };
  const auto owner = balance_jobs(costs, world().size());
  std::string mine;
  for (std::size_t i = 0; i < shapes.size(); ++i)
    if (owner[i] == world().rank()) mine += values(i);
  const auto all = world().gather(mine);
  if (world().rank() != 0) return;
  for (int r = 0; r < world().size(); ++r) {
    std::string expected;
    for (std::size_t i = 0; i < shapes.size(); ++i)
      if (owner[i] == r) expected += values(i);
    CHECK(all[std::size_t(r)] == expected);
  }
}

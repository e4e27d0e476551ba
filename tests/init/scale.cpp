// The scale s = alpha/r or alpha/sqrt(r): positive and finite in the scalar it is stored in, or refused.
#include <doctest/doctest.h>

#include "lowrank/init/gaussian.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/pissa.hpp"
#include "support/compare.hpp"

using namespace lowrank;

TEST_CASE("an alpha whose scale the scalar cannot hold is refused, one it can is kept") {
  const Matrix<float> W = test::random_matrix<float>(12, 10, 1);
  for (const double alpha : {1e-60, 2e39, 1e60, 5e-324})  // 2e39/4 is beyond 3.4e38, the largest float
    for (const bool stabilised : {false, true}) {
      CAPTURE(alpha);
      CHECK_THROWS_AS((void)kaiming<float>(12, 10, {.rank = 4, .alpha = alpha, .rank_stabilised = stabilised}),
                      ArgumentError);
      CHECK_THROWS_AS((void)gaussian<float>(12, 10, {.rank = 4, .alpha = alpha, .rank_stabilised = stabilised}),
                      ArgumentError);
      CHECK_THROWS_AS((void)pissa(W, {.rank = 4, .alpha = alpha, .rank_stabilised = stabilised}), ArgumentError);
    }
  for (const double alpha : {1e-30, 1e38}) {
    CHECK(kaiming<float>(12, 10, {.rank = 4, .alpha = alpha}).factors.scale == float(alpha / 4));
    CHECK(kaiming<double>(12, 10, {.rank = 4, .alpha = alpha * alpha}).factors.scale == alpha * alpha / 4);
  }
}

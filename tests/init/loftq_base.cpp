// SPDX-License-Identifier: Apache-2.0
// Quantised bases of other initialisers: codes of the base they leave, errors of the whole.
#include "lowrank/init/quantise_base.hpp"

#include <doctest/doctest.h>

#include <algorithm>

#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/milora.hpp"
#include "lowrank/init/olora.hpp"
#include "lowrank/init/pissa.hpp"
#include "support/compare.hpp"

using namespace lowrank;

TEST_CASE_TEMPLATE("the residual base of any initialiser as codes", T, float, double) {
  const Matrix<T> W = test::random_matrix<T>(40, 64, 1, 0.05);
  const auto check = [&](const auto& init) {
    CAPTURE(init.report.method);
    const auto q = quantise_base(W, init, {.codebook = Codebook::nf3()});
    const Matrix<T>& base = init.base_changed ? init.base : W;
    CHECK(std::ranges::equal(q.base.codes(), quantise(base, {.codebook = Codebook::nf3()}).codes()));
    const Matrix<T> values = q.base.dequantise();
    double sum = 0;
    for (Index i = 0; i < 40; ++i)
      for (Index j = 0; j < 64; ++j) {
        double e = double(W(i, j)) - double(values(i, j));
        for (Index k = 0; k < init.factors.rank(); ++k)
          e -= double(init.factors.scale) * double(init.factors.B(i, k)) * double(init.factors.A(k, j));
        sum += e * e;
      }
    CHECK(q.report.result().frobenius == doctest::Approx(std::sqrt(sum)).epsilon(1e-4));
    CHECK(q.report.method == "q" + init.report.method);
  };
  check(pissa(W, {.rank = 4}));
  check(milora(W, {.rank = 4}));
  check(olora(W, {.rank = 4}));
  const auto plain = kaiming<T>(40, 64, {.rank = 4});
  check(plain);
  CHECK(quantise_base(W, plain).report.error_reduction() == doctest::Approx(0).epsilon(1e-6));
  const Matrix<T> other = test::random_matrix<T>(40, 63, 1);
  CHECK_THROWS_AS(quantise_base(other, plain), ShapeError);
}

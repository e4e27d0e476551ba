// SPDX-License-Identifier: Apache-2.0
// A stranger's file, compiled with the stranger's warnings as errors and no flag of ours: decompositions, intruders,
// GPTQ.
#include "lowrank/lowrank.hpp"

#include <cstdio>

int main() {
  using lowrank::Index;
  using lowrank::Matrix;
  constexpr Index m = 64, n = 128;
  Matrix<float> W(m, n), X(2 * n, n);
  lowrank::CounterRng(1).fill_normal(W.view());
  lowrank::CounterRng(2).fill_normal(X.view());
  Matrix<float> tuned(W.view());
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) tuned(i, j) += 3.F * float(i % 2);  // one strong new direction

  const auto full = lowrank::svd(W);
  const auto values = lowrank::singular_values(W).values;
  const auto leading = lowrank::truncated_svd(W, 4);
  const auto intruders = lowrank::find_intruders(W, tuned, {.k = 4});
  Matrix<float> H(n, n);
  lowrank::gemm(1.F, X.view().transposed(), X.view(), H.view());
  const auto packed = lowrank::gptq(W, H);
  std::printf("%g %g %g, %d intruders, error %g where rounding has %g\n", double(full.S[0]), double(values[0]),
              double(leading.S[0]), int(intruders.intruders().size()), packed.report.weighted,
              packed.report.plain_weighted);
  return intruders.intruders().size() >= 1 && packed.report.weighted < packed.report.plain_weighted ? 0 : 1;
}

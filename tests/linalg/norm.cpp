// The norm of a matrix in memory, the check that it is finite, and the rows of s·B·A one by one.
#include "lowrank/linalg/norm.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "lowrank/core/half.hpp"
#include "lowrank/linalg/update_rows.hpp"
#include "support/compare.hpp"

using namespace lowrank;
using test::random_matrix;

TEST_CASE_TEMPLATE("the Frobenius norm of any storage, order and stride", S, float, double, bf16, f16) {
  const Matrix<float> numbers = random_matrix<float>(7, 11, 1);
  const Matrix<S> wide(numbers.view());
  const MatrixView<const S> part = wide.view().block(1, 2, 5, 8);
  double square = 0;
  for (Index i = 0; i < 5; ++i)
    for (Index j = 0; j < 8; ++j) square += double(part(i, j)) * double(part(i, j));
  CHECK(frobenius_norm(part) == doctest::Approx(std::sqrt(square)).epsilon(1e-14));
  CHECK(frobenius_norm(part.transposed()) == doctest::Approx(std::sqrt(square)).epsilon(1e-14));
  CHECK(frobenius_norm(wide.view().block(0, 0, 0, 3)) == 0);
  CHECK_NOTHROW(require_finite("here", "W", part));
}

TEST_CASE("squares beyond the range of double, and what is not finite") {
  Matrix<double> M(2, 3);
  for (Index i = 0; i < 6; ++i) M.data()[i] = 3e200;
  CHECK(frobenius_norm(M.view()) == doctest::Approx(3e200 * std::sqrt(6.0)).epsilon(1e-14));
  for (Index i = 0; i < 6; ++i) M.data()[i] = 3e-200;
  CHECK(frobenius_norm(M.view()) == doctest::Approx(3e-200 * std::sqrt(6.0)).epsilon(1e-14));
  M(1, 2) = std::numeric_limits<double>::infinity();
  CHECK(std::isinf(frobenius_norm(M.view())));
  CHECK_THROWS_WITH_AS(require_finite("here", "W", M.view()), "here: W must be finite, got inf at (1, 2)",
                       NonFiniteError);
  M(0, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(frobenius_norm(M.view())));
  CHECK_THROWS_WITH_AS(require_finite("here", "W", M.view()), "here: W must be finite, got nan at (0, 1)",
                       NonFiniteError);
}

TEST_CASE("every row of an update comes once, whatever the number of panels") {
  for (const Index m : {Index(1), Index(256), Index(515)}) {
    const LoraFactors<float> f{random_matrix<float>(3, 9, 2), random_matrix<float>(m, 3, 3), -0.75F};
    std::vector<int> seen(std::size_t(m), 0);
    Matrix<float> got(m, 9), want(m, 9);
    for_update_rows(f, [&](Index i, std::span<const float> row) {
      ++seen[std::size_t(i)];
      for (std::size_t j = 0; j < row.size(); ++j) got(i, Index(j)) = row[j];
    });
    for (Index i = 0; i < m; ++i) {
      CHECK(seen[std::size_t(i)] == 1);
      for (Index j = 0; j < 9; ++j) {
        double sum = 0;
        for (Index k = 0; k < 3; ++k) sum += double(f.B(i, k)) * double(f.A(k, j));
        want(i, j) = float(-0.75 * sum);
      }
    }
    CHECK(test::deviation(got, want) < test::rounding<float>(10));
    CHECK_THROWS_AS(for_update_rows(f, [](Index, std::span<const float>) { throw ShapeError("of a row"); }),
                    ShapeError);
  }
  CHECK_THROWS_AS(for_update_rows(LoraFactors<float>{Matrix<float>(2, 3), Matrix<float>(4, 3), 1.F},
                                  [](Index, std::span<const float>) {}),
                  ShapeError);
}

// Merging: the dense product, restore to the very bits, every storage.
#include "lowrank/adapter/merge.hpp"

#include <doctest/doctest.h>

#include "support/compare.hpp"

using namespace lowrank;
using test::random_matrix;

TEST_CASE_TEMPLATE("merge then restore gives back the very bits", S, float, bf16, f16) {
  const LoraFactors<float> f{random_matrix<float>(4, 30, 2), random_matrix<float>(20, 4, 3), 2.5F};
  for (const Order order : {Order::row_major, Order::col_major}) {
    Buffer<S> memory(20 * 30);
    const auto W = view_of(memory.data(), 20, 30, order);
    const Matrix<float> wide = random_matrix<float>(20, 30, 1);
    for (Index i = 0; i < 20; ++i)
      for (Index j = 0; j < 30; ++j) W(i, j) = S(wide(i, j));
    const Matrix<S> before{MatrixView<const S>(W)};
    auto merged = merge_into(W, f);
    double change = 0;
    for (Index i = 0; i < 20; ++i)
      for (Index j = 0; j < 30; ++j) {
        double exact = double(before(i, j));
        for (Index k = 0; k < 4; ++k) exact += 2.5 * double(f.B(i, k)) * double(f.A(k, j));
        const double unit = sizeof(S) == 4 ? 1e-6 : (std::is_same_v<S, bf16> ? 0x1p-8 : 0x1p-11);
        CHECK(std::abs(double(W(i, j)) - exact) <= unit * std::abs(exact) + 1e-5);
        change += std::abs(double(W(i, j)) - double(before(i, j)));
      }
    CHECK(change > 100);  // it did merge
    CHECK(merged.merged());
    merged.restore();
    merged.restore();
    CHECK_FALSE(merged.merged());
    CHECK(test::same_bits(Matrix<S>{MatrixView<const S>(W)}, before));
  }
}

TEST_CASE("delta_weight is the dense product and wrong shapes are refused") {
  const LoraFactors<double> f{random_matrix<double>(2, 4, 2), random_matrix<double>(3, 2, 3), 0.5};
  const Matrix<double> d = delta_weight(f);
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 4; ++j)
      CHECK(d(i, j) == doctest::Approx(0.5 * (f.B(i, 0) * f.A(0, j) + f.B(i, 1) * f.A(1, j))));
  Matrix<double> W = random_matrix<double>(4, 3, 1);
  const Matrix<double> before(W.view());
  CHECK_THROWS_AS((void)merged_weight<double>(W, f), ShapeError);
  CHECK_THROWS_AS((void)merge_into(W, f), ShapeError);
  CHECK(test::same_bits(W, before));
  LoraFactors<double> bad{Matrix<double>(2, 4), Matrix<double>(3, 1), 1};
  CHECK_THROWS_AS((void)delta_weight(bad), ShapeError);
}

TEST_CASE_TEMPLATE("a merge that leaves the storage's range is refused and W keeps its bits", S, f16, bf16, float) {
  // One element of 0.9·max + 0.2·max beyond the largest number of the storage, the others harmless.
  const float most = std::is_same_v<S, f16> ? 65504.F : std::is_same_v<S, bf16> ? 0x1.FEp127F : 0x1.FFFFFEp127F;
  for (const float sign : {1.F, -1.F}) {
    Matrix<S> W(3, 4);
    W(1, 2) = S(sign * 0.9F * most);
    const Matrix<S> before(W.view());
    LoraFactors<float> f{Matrix<float>(1, 4), Matrix<float>(3, 1), 0.5F};
    f.A(0, 2) = sign * 0.4F * most;
    f.B(1, 0) = 1;
    CHECK_THROWS_AS((void)merge_into(W, f), ArgumentError);
    CHECK(test::same_bits(W, before));
    f.A(0, 2) = sign * 0.1F * most;  // 0.95·max fits
    auto merged = merge_into(W, f);
    CHECK(float(W(1, 2)) == doctest::Approx(sign * 0.95F * most).epsilon(0x1p-8));
    merged.restore();
    CHECK(test::same_bits(W, before));
  }
  Matrix<S> W(3, 4);
  W(0, 1) = S(std::numeric_limits<float>::quiet_NaN());
  const LoraFactors<float> f{random_matrix<float>(1, 4, 2), random_matrix<float>(3, 1, 3), 1.F};
  CHECK_THROWS_AS((void)merge_into(W, f), NonFiniteError);
}

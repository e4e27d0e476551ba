// SPDX-License-Identifier: Apache-2.0
// The merge report against sums over everything, and the refusal.
#include "lowrank/quant/merge.hpp"

#include <doctest/doctest.h>

#include <cstring>
#include <numeric>
#include <span>

#include "lowrank/linalg/update_rows.hpp"
#include "support/compare.hpp"

using namespace lowrank;

namespace {

LoraFactors<float> update(Index out, Index in, double size) {
  return {test::random_matrix<float>(4, in, 11, std::sqrt(size)),
          test::random_matrix<float>(out, 4, 12, std::sqrt(size)), 0.5F};
}

/// ΔW entry by entry.
double delta(const LoraFactors<float>& f, Index i, Index j) {
  double sum = 0;
  for (Index k = 0; k < f.rank(); ++k) sum += double(f.B(i, k)) * double(f.A(k, j));
  return double(f.scale) * sum;
}

struct Sums {
  double intended = 0, effective = 0, both = 0, lost = 0, changed = 0;
  void add(double want, double got, bool differs) {
    intended += want * want;
    effective += got * got;
    both += want * got;
    lost += (got - want) * (got - want);
    changed += differs;
  }
  void check(const MergeReport& r, double n) const {
    CHECK(r.intended_norm == doctest::Approx(std::sqrt(intended)).epsilon(1e-5));
    CHECK(r.effective_norm == doctest::Approx(std::sqrt(effective)).epsilon(1e-5));
    CHECK(r.lost == doctest::Approx(std::sqrt(lost / intended)).epsilon(1e-5));
    CHECK(r.changed_share == doctest::Approx(changed / n));
    if (effective > 0) CHECK(r.correlation == doctest::Approx(both / std::sqrt(intended * effective)).epsilon(1e-5));
  }
};

}  // namespace

TEST_CASE("requantising a merge: the report is what happened") {
  const Index out = 60, in = 192;
  const auto base = quantise(test::random_matrix<float>(out, in, 1).view());
  const Matrix<float> before = base.dequantise();
  for (const double size : {1e-4, 0.02, 1.0}) {
    CAPTURE(size);
    const auto f = update(out, in, size);
    const auto merged = requantise_merge(base, f, {.allow_lossy = true});
    const Matrix<float> after = merged.base.dequantise();
    Sums sums;
    for (Index i = 0; i < out; ++i)
      for (Index j = 0; j < in; ++j)
        sums.add(delta(f, i, j), double(after(i, j)) - double(before(i, j)), merged.base.code(i, j) != base.code(i, j));
    sums.check(merged.report, double(out * in));
    CHECK(merged.report.weight_norm ==
          doctest::Approx(
              std::sqrt(double(std::inner_product(before.data(), before.data() + before.size(), before.data(), 0.0))))
              .epsilon(1e-5));
    // The merged base is quantise(dequantised + ΔW).
    Matrix<float> sum = before;
    gemm(f.scale, f.B.view(), f.A.view(), sum.view(), Update::accumulate);
    const auto direct = quantise(sum);
    CHECK(std::ranges::equal(direct.codes(), merged.base.codes()));
  }
}

TEST_CASE("small updates vanish in four bits and are refused; larger ones pass") {
  const auto base = quantise(test::random_matrix<float>(64, 256, 1).view());
  const auto small = update(64, 256, 1e-3), large = update(64, 256, 1.0);
  CHECK_THROWS_AS(requantise_merge(base, small), MergeRefused);
  try {
    requantise_merge(base, small);
  } catch (const MergeRefused& e) {
    CHECK(e.report().correlation < 0.9);
    CHECK(e.report().changed_share < 0.05);
    CHECK(e.report().suggestion == "f16");  // 1e-3 of the weight: below a bf16 step, above an f16 one
    CHECK(std::string(e.what()).find("f16") != std::string::npos);
  }
  CHECK_NOTHROW(requantise_merge(base, small, {.allow_lossy = true}));
  CHECK_NOTHROW(requantise_merge(base, small, {.min_correlation = -1}));
  const auto merged = requantise_merge(base, large);
  CHECK(merged.report.correlation > 0.99);
  CHECK(merged.report.suggestion.empty());
  // Nothing to merge is a perfect merge: quantising what was dequantised changes nothing.
  auto nothing = small;
  nothing.B.set_zero();
  const auto same = requantise_merge(base, nothing);
  CHECK(same.report.correlation == 1);
  CHECK(same.report.changed_share == 0);
  CHECK(same.report.lost == 0);
}

TEST_CASE_TEMPLATE("narrow targets", S, bf16, f16, float) {
  const Index out = 40, in = 96;
  const Matrix<float> exact = test::random_matrix<float>(out, in, 1);
  Matrix<S> W(out, in);
  for (Index i = 0; i < W.size(); ++i) W.data()[i] = S(exact.data()[i]);
  for (const double size : {1e-6, 1e-3, 0.1}) {
    CAPTURE(size);
    const auto f = update(out, in, size);
    const MergeReport report = merge_report<float>(W, f);
    Matrix<S> merged = W;
    const MergeReport done = checked_merge<float>(merged, f, {.allow_lossy = true});
    CHECK(done.correlation == report.correlation);
    Sums sums;
    for (Index i = 0; i < out; ++i)
      for (Index j = 0; j < in; ++j)
        sums.add(delta(f, i, j), double(merged(i, j)) - double(W(i, j)), float(merged(i, j)) != float(W(i, j)));
    sums.check(report, double(out * in));
  }
  Matrix<S> target = W;
  const auto tiny = update(out, in, std::is_same_v<S, float> ? 1e-9 : 1e-6);
  CHECK_THROWS_AS(checked_merge<float>(target, tiny), MergeRefused);
  CHECK(std::memcmp(target.data(), W.data(), std::size_t(W.size()) * sizeof(S)) == 0);  // untouched
}

TEST_CASE("a merge of one's own, tallied, is reported as ours") {
  const Index out = 37, in = 53;
  const Matrix<float> exact = test::random_matrix<float>(out, in, 1);
  Matrix<bf16> W(out, in);
  for (Index i = 0; i < W.size(); ++i) W.data()[i] = bf16(exact.data()[i]);
  const auto f = update(out, in, 1e-3);
  MergeTally tally(out, in), codes(out, in);
  for_update_rows(f, [&](Index i, std::span<const float> delta) {
    for (Index j = 0; j < in; ++j) {
      const double before = double(W(i, j)), change = double(delta[std::size_t(j)]);
      const double after = double(bf16(float(W(i, j)) + delta[std::size_t(j)]));
      tally.add(i, before, after, change);
      codes.add_value(i, before, after, change);
    }
    codes.count_changed(i, 3);
  });
  const MergeReport ours = merge_report<float>(W, f), theirs = tally.report();
  CHECK(theirs.changed_share == ours.changed_share);
  CHECK(theirs.correlation == doctest::Approx(ours.correlation).scale(0).epsilon(1e-12));
  CHECK(theirs.lost == doctest::Approx(ours.lost).scale(0).epsilon(1e-12));
  CHECK(theirs.intended_norm == doctest::Approx(ours.intended_norm).scale(0).epsilon(1e-12));
  CHECK(theirs.effective_norm == doctest::Approx(ours.effective_norm).scale(0).epsilon(1e-12));
  CHECK(theirs.weight_norm == doctest::Approx(ours.weight_norm).scale(0).epsilon(1e-12));
  CHECK(theirs.suggestion.empty());
  CHECK(codes.report().changed_share == doctest::Approx(3.0 / double(in)));
  CHECK(codes.report().lost == doctest::Approx(ours.lost).scale(0).epsilon(1e-12));

  // Nothing tallied is a merge of nothing; an update of which nothing is stored is wholly lost.
  CHECK(MergeTally(0, 5).report().correlation == 1);
  MergeTally still(1, 2);
  still.add(0, 1, 1, 1e-9);
  CHECK(still.report().correlation == 0);
  CHECK(still.report().lost == 1);
  CHECK(still.report().changed_share == 0);
  CHECK_THROWS_WITH_AS(MergeTally(-1, 5), "MergeTally: sizes must not be negative, got -1x5", ShapeError);

  CHECK_THROWS_WITH_AS(refuse_if_lost("mine", still.report(), {.min_correlation = 0.5}),
                       "mine: the stored update would correlate 0 with the intended one, less than 0.5 (0 % of the "
                       "stored codes or values change, lost norm 1), or set allow_lossy",
                       MergeRefused);
  CHECK_NOTHROW(refuse_if_lost("mine", still.report(), {.min_correlation = 0.5, .allow_lossy = true}));
  CHECK_NOTHROW(refuse_if_lost("mine", still.report(), {.min_correlation = 0}));
}

TEST_CASE("bad merges") {
  const auto base = quantise(test::random_matrix<float>(64, 256, 1).view());
  CHECK_THROWS_AS(requantise_merge(base, update(63, 256, 1)), ShapeError);
  CHECK_THROWS_AS(requantise_merge(base, update(64, 255, 1)), ShapeError);
  CHECK_THROWS_AS(requantise_merge(base, update(64, 256, 1), {.min_correlation = 2}), ArgumentError);
  CHECK_THROWS_AS(requantise_merge(base, update(64, 256, 1), {.min_correlation = NAN}), ArgumentError);
  auto f = update(64, 256, 1);
  f.scale = INFINITY;
  CHECK_THROWS_AS(requantise_merge(base, f), ArgumentError);
  f = update(64, 256, 1);
  f.B(3, 2) = NAN;
  CHECK_THROWS_AS(requantise_merge(base, f), NonFiniteError);
  Matrix<f16> W(64, 256);
  f = update(64, 256, 1);
  f.scale = 1e6F;
  CHECK_THROWS_AS(checked_merge<float>(W, f, {.allow_lossy = true}), NonFiniteError);
}

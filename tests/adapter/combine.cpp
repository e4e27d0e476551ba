// SPDX-License-Identifier: Apache-2.0
// Combining, resizing, undoing and extracting adapters, against dense sums and Eigen's SVD in double.
#include "lowrank/adapter/combine.hpp"

#include <doctest/doctest.h>

#include "init/support.hpp"
#include "lowrank/adapter/combine_sparse.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {

template <class T>
LoraFactors<T> adapter(Index m, Index n, Index r, std::uint64_t seed, T scale) {
  return {test::random_matrix<T>(r, n, seed), test::random_matrix<T>(m, r, seed + 1000), scale};
}

template <class T>
Matrix<double> weighted_sum(const std::vector<Weighted<T>>& list) {
  Matrix<double> sum(list.front().adapter.out_features(), list.front().adapter.in_features());
  for (const auto& [f, w] : list) sum = test::plus(sum, test::update(f), w);
  return sum;
}

double tail(const std::vector<double>& S, Index r) {
  double sum = 0;
  for (std::size_t i = std::size_t(r); i < S.size(); ++i) sum += S[i] * S[i];
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE_TEMPLATE("cat is the weighted sum, exactly; svd is its best approximation", T, float, double) {
  const double eps = std::numeric_limits<T>::epsilon();
  const auto a = adapter<T>(30, 20, 3, 1, T(0.5)), b = adapter<T>(30, 20, 5, 2, T(2)),
             c = adapter<T>(30, 20, 1, 3, T(1));
  const std::vector<Weighted<T>> list{{a, 0.7}, {b, -0.3}, {c, 0}};
  const Matrix<double> sum = weighted_sum(list);
  const auto cat = combine_cat(list);
  CHECK(cat.factors.rank() == 9);
  CHECK(cat.factors.scale == T(1));
  CHECK(test::norm(test::plus(test::update(cat.factors), sum, -1)) < 30 * eps * test::norm(sum));
  CHECK(cat.sum_norm == doctest::Approx(test::norm(sum)).epsilon(1e-6));
  CHECK(cat.distance < 30 * eps * test::norm(sum));

  const auto oracle = test::oracle_singular_values(sum);
  for (const Index r : {1, 4, 8}) {
    CAPTURE(r);
    const auto cut = combine_svd(list, r);
    CHECK(cut.factors.rank() == r);
    CHECK(cut.distance == doctest::Approx(tail(oracle, r)).epsilon(1e-5));
    const double measured = test::norm(test::plus(test::update(cut.factors), sum, -1));
    CHECK(std::abs(measured - tail(oracle, r)) < 100 * eps * test::norm(sum));
  }
  CHECK_THROWS_AS((void)combine_svd(list, 0), ArgumentError);
  CHECK_THROWS_AS((void)combine_svd(list, 10), ArgumentError);
}

TEST_CASE_TEMPLATE("linear has cross terms and says how large", T, float, double) {
  const auto a = adapter<T>(30, 20, 4, 1, T(0.5)), b = adapter<T>(30, 20, 4, 2, T(2));
  const std::vector<Weighted<T>> list{{a, 0.7}, {b, -0.3}};
  const auto linear = combine_linear(list);
  // (√.35·B_a − √.6·B_b)·(√.35·A_a + √.6·A_b), entry by entry.
  const double ra = std::sqrt(0.35), rb = std::sqrt(0.6);
  Matrix<double> expected(30, 20);
  for (Index i = 0; i < 30; ++i)
    for (Index j = 0; j < 20; ++j)
      for (Index k = 0; k < 4; ++k)
        expected(i, j) +=
            (ra * double(a.B(i, k)) - rb * double(b.B(i, k))) * (ra * double(a.A(k, j)) + rb * double(b.A(k, j)));
  CHECK(test::deviation(test::update(linear.factors), expected) < 1e-5);
  const double off = test::norm(test::plus(expected, weighted_sum(list), -1));
  CHECK(linear.distance == doctest::Approx(off).epsilon(1e-5));
  CHECK(linear.distance > 0.5 * linear.sum_norm);  // of the size of the updates themselves
  CHECK(linear.notes.find("cross terms") != std::string::npos);
  // One adapter alone has none.
  const std::vector<Weighted<T>> one{{a, 0.7}};
  CHECK(combine_linear(one).distance < 1e-5 * combine_linear(one).sum_norm);
  const auto other_rank = adapter<T>(30, 20, 5, 2, T(2));
  CHECK_THROWS_AS((void)combine_linear<T>({{a, 1}, {other_rank, 1}}), ShapeError);
}

TEST_CASE("combinations of extreme shapes") {
  const auto row = adapter<double>(1, 9, 1, 4, 3.0), row2 = adapter<double>(1, 9, 1, 5, 1.0);
  const auto sum = combine_svd<double>({{row, 1}, {row2, 1}}, 1);  // rank of a row is 1: nothing is lost
  CHECK(sum.distance < 1e-13 * sum.sum_norm);
  CHECK_THROWS_AS((void)combine_svd<double>({{row, 1}, {row2, 1}}, 2), ArgumentError);
  const auto cancel = combine_cat<double>({{row, 1}, {row, -1}});
  CHECK(cancel.sum_norm < 1e-14);
  CHECK(cancel.factors.rank() == 2);
}

TEST_CASE("bad combinations") {
  const auto a = adapter<float>(6, 5, 2, 1, 1.0F), wider = adapter<float>(6, 7, 2, 1, 1.0F);
  CHECK_THROWS_AS((void)combine_cat<float>({}), ArgumentError);
  CHECK_THROWS_AS((void)combine_cat<float>({{a, 1}, {wider, 1}}), ShapeError);
  CHECK_THROWS_AS((void)combine_cat<float>({{a, NAN}}), ArgumentError);
  auto bad = a;
  bad.A(0, 0) = INFINITY;
  CHECK_THROWS_AS((void)combine_cat<float>({{bad, 1}}), NonFiniteError);
  CHECK_THROWS_AS((void)combine_linear<float>({{bad, 1}}), NonFiniteError);
  bad = a;
  bad.B = Matrix<float>(6, 3);
  CHECK_THROWS_AS((void)combine_cat<float>({{bad, 1}}), ShapeError);
}

namespace {

/// TIES and its kin written out plainly: trim or drop every matrix, elect, merge.
Matrix<double> naive_sparse(std::vector<Matrix<double>> tasks, const std::vector<double>& weights,
                            const SparseCombineOptions& o, std::uint64_t stream0 = 0) {
  const bool random = o.method == SparseMethod::dare_linear || o.method == SparseMethod::dare_ties;
  const bool elect = o.method == SparseMethod::ties || o.method == SparseMethod::dare_ties;
  for (std::size_t t = 0; t < tasks.size(); ++t) {
    Matrix<double>& x = tasks[t];
    if (random) {
      for (Index i = 0; i < x.size(); ++i)
        x.data()[i] *= CounterRng(o.seed, stream0 + t).uniform(std::uint64_t(i)) < o.density ? 1 / o.density : 0;
    } else {
      std::vector<double> sizes;
      for (Index i = 0; i < x.size(); ++i) sizes.push_back(std::abs(x.data()[i]));
      std::sort(sizes.rbegin(), sizes.rend());
      const double least = sizes[std::max<std::size_t>(1, std::size_t(o.density * double(sizes.size()))) - 1];
      for (Index i = 0; i < x.size(); ++i)
        if (std::abs(x.data()[i]) < least) x.data()[i] = 0;
    }
  }
  Matrix<double> out(tasks[0].rows(), tasks[0].cols());
  for (Index i = 0; i < out.size(); ++i) {
    double vote = 0, sum = 0;
    int n = 0;
    for (const auto& x : tasks) {
      const double v = x.data()[i];
      vote += o.election == SignElection::total ? v : double((v > 0) - (v < 0));
    }
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      const double v = tasks[t].data()[i];
      const bool agrees = v != 0 && (v > 0) == (vote >= 0);
      if (elect && !agrees) continue;
      sum += weights[t] * v;
      ++n;
    }
    out.data()[i] = elect ? (n > 0 ? sum / n : 0) : sum;
  }
  return out;
}

}  // namespace

TEST_CASE("sparse combinations of updates, against the rule written out and Eigen's SVD") {
  const auto a = adapter<double>(18, 14, 3, 1, 0.5), b = adapter<double>(18, 14, 4, 2, 1.5),
             c = adapter<double>(18, 14, 2, 3, 1);
  const std::vector<Weighted<double>> list{{a, 0.7}, {b, 0.4}, {c, 1}};
  for (const auto method :
       {SparseMethod::ties, SparseMethod::magnitude_prune, SparseMethod::dare_linear, SparseMethod::dare_ties})
    for (const auto election : {SignElection::total, SignElection::frequency}) {
      CAPTURE(int(method));
      const SparseCombineOptions o{.method = method, .density = 0.3, .election = election, .rank = 6, .seed = 9};
      const auto got = combine_sparse(list, o);
      const Matrix<double> merged = naive_sparse({test::update(a), test::update(b), test::update(c)}, {0.7, 0.4, 1}, o);
      CHECK(got.merged_norm == doctest::Approx(test::norm(merged)).epsilon(1e-12));
      const double best = tail(test::oracle_singular_values(merged), 6);
      const double measured = test::norm(test::plus(test::update(got.factors), merged, -1));
      CHECK(got.truncation_error == doctest::Approx(measured).epsilon(1e-6));
      CHECK(measured * measured < best * best + 2e-5 * got.merged_norm * got.merged_norm);
      CHECK(got.sum_norm == doctest::Approx(test::norm(weighted_sum(list))));
      CHECK(got.distance == doctest::Approx(test::norm(test::plus(test::update(got.factors), weighted_sum(list), -1))));
    }
}

TEST_CASE("sparse combinations of factors, as PEFT's methods without _svd do") {
  const auto a = adapter<double>(18, 14, 3, 1, 0.5), b = adapter<double>(18, 14, 3, 2, 1.5);
  const std::vector<Weighted<double>> list{{a, 0.7}, {b, 0.4}};
  const std::vector<double> roots{std::sqrt(0.35), std::sqrt(0.6)};
  for (const auto method : {SparseMethod::ties, SparseMethod::dare_ties, SparseMethod::dare_linear}) {
    const SparseCombineOptions o{.method = method, .density = 0.4, .space = SparseSpace::factors, .seed = 5};
    const auto got = combine_sparse(list, o);
    CHECK(test::deviation(got.factors.A, naive_sparse({a.A, b.A}, roots, o, 0)) < 1e-14);
    CHECK(test::deviation(got.factors.B, naive_sparse({a.B, b.B}, roots, o, 2)) < 1e-14);
  }
  const auto other_rank = adapter<double>(18, 14, 4, 2, 1.5);
  const SparseCombineOptions o{.space = SparseSpace::factors};
  CHECK_THROWS_AS((void)combine_sparse<double>({{a, 1}, {other_rank, 1}}, o), ShapeError);
  CHECK_THROWS_AS((void)combine_sparse<double>({{a, 1}, {b, -1}}, o), ArgumentError);
}

TEST_CASE("sparse combinations: density 1 drops nothing; dare keeps the expectation; bad density") {
  const auto a = adapter<float>(60, 50, 4, 1, 0.5F), b = adapter<float>(60, 50, 4, 2, 1.0F);
  const std::vector<Weighted<float>> list{{a, 0.5}, {b, 0.5}};
  const auto all = combine_sparse(list, {.method = SparseMethod::magnitude_prune, .density = 1, .rank = 8});
  CHECK(all.distance < 1e-5 * all.sum_norm);
  // Mean over many seeds of a DARE merge tends to the sum: error √((1−p)/p/seeds) of each entry's size.
  Matrix<double> mean(60, 50);
  for (std::uint64_t seed = 0; seed < 40; ++seed)
    mean = test::plus(
        mean,
        test::update(
            combine_sparse(list, {.method = SparseMethod::dare_linear, .density = 0.5, .rank = 50, .seed = seed})
                .factors),
        1.0 / 40);
  const double off = test::norm(test::plus(mean, weighted_sum(list), -1)) / all.sum_norm;
  CHECK(off < 1.5 * std::sqrt(1.0 / 40) * 1.5);
  CHECK(off > 0.02);
  for (const double density : {0.0, -0.1, 1.1, double(NAN)})
    CHECK_THROWS_AS((void)combine_sparse(list, {.density = density, .rank = 4}), ArgumentError);
  CHECK_THROWS_AS((void)combine_sparse(list, {.rank = 51}), ArgumentError);
}

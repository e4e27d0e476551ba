// SPDX-License-Identifier: Apache-2.0
// Intruder verdicts against both full decompositions by Eigen, on hundreds of random and adversarial pairs; and the
// certificates by themselves.
#include "lowrank/spectrum/intruders.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <map>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/qr.hpp"
#include "support/oracle.hpp"

using namespace lowrank;

namespace {

struct Numbers {
  CounterRng rng;
  std::uint64_t at = 0;
  explicit Numbers(std::uint64_t seed) : rng(seed) {}
  double uniform() { return rng.uniform(at++); }
  double normal() { return rng.normal(at++); }
  Index between(Index low, Index high) { return low + Index(uniform() * double(high - low + 1)); }
};

Matrix<double> basis(Numbers& x, Index m, Index k) {
  Matrix<double> U(m, k);
  for (Index i = 0; i < U.size(); ++i) U.data()[i] = x.normal();
  orthonormalise(U.view());
  return U;
}

/// U·diag(s)·Vᵀ added to W.
void add(Matrix<double>& W, const Matrix<double>& U, const std::vector<double>& s, const Matrix<double>& V) {
  for (Index i = 0; i < W.rows(); ++i)
    for (Index j = 0; j < W.cols(); ++j)
      for (std::size_t k = 0; k < s.size(); ++k) W(i, j) += U(i, Index(k)) * s[k] * V(j, Index(k));
}

struct Pair {
  Matrix<double> base, tuned;
  double epsilon = 0.5;
  const char* kind = "";
};

Pair make_pair(std::uint64_t seed) {
  Numbers x(1000 + seed);
  Index m = x.between(6, 56), n = x.between(6, 56);
  const Index N = std::min(m, n);
  Pair p{Matrix<double>(m, n), {}, seed % 5 == 4 ? 0.3 + 0.5 * x.uniform() : 0.5, ""};
  const auto gaussian = [&](double std) {
    for (Index i = 0; i < p.base.size(); ++i) p.base.data()[i] += std * x.normal();
  };
  const auto spectrum = [&](auto f) {
    std::vector<double> s;
    for (Index i = 0; i < N; ++i) s.push_back(f(i));
    const auto U = basis(x, m, N), V = basis(x, n, N);
    add(p.base, U, s, V);
    return std::pair(U, V);
  };
  const auto random_update = [&](double size) {
    const Index r = x.between(1, std::min<Index>(4, N));
    std::vector<double> s;
    for (Index i = 0; i < r; ++i) s.push_back(size * (1 + x.uniform()));
    add(p.tuned, basis(x, m, r), s, basis(x, n, r));
  };
  switch (seed % 8) {
    case 0:
      p.kind = "noise, strong update";
      gaussian(0.1);
      p.tuned = p.base;
      random_update(4);
      break;
    case 1:
      p.kind = "noise, weak update";
      gaussian(0.1);
      p.tuned = p.base;
      random_update(0.3);
      break;
    case 2:
      p.kind = "decaying spectrum";
      spectrum([](Index i) { return std::pow(double(i) + 1, -0.7); });
      p.tuned = p.base;
      random_update(0.6);
      break;
    case 3: {  // a direction of W turned to a cosine close to the threshold
      p.kind = "planted at the threshold";
      const auto [U, V] = spectrum([](Index i) { return 0.5 + 1.0 / double(i + 2); });
      p.tuned = p.base;
      Matrix<double> u = basis(x, m, 1), v = basis(x, n, 1);
      const Index from = x.between(0, N - 1);
      const double c = p.epsilon + 0.1 * (x.uniform() - 0.5);
      double inner = 0, norm = 0;
      for (Index i = 0; i < m; ++i) inner += u(i, 0) * U(i, from);
      for (Index i = 0; i < m; ++i) norm += std::pow(u(i, 0) - inner * U(i, from), 2);
      for (Index i = 0; i < m; ++i)
        u(i, 0) = c * U(i, from) + std::sqrt(1 - c * c) * (u(i, 0) - inner * U(i, from)) / std::sqrt(norm);
      add(p.tuned, u, {20}, v);
      break;
    }
    case 4: {
      p.kind = "rank-deficient base";
      const Index r = std::max<Index>(1, N / 3);
      std::vector<double> s;
      for (Index i = 0; i < r; ++i) s.push_back(1 + 0.1 * double(r - i));
      add(p.base, basis(x, m, r), s, basis(x, n, r));
      p.tuned = p.base;
      random_update(3);
      break;
    }
    case 5: {  // an even mix of q singular vectors: cosine 1/√q with each, an intruder from q = 5 on
      p.kind = "even mix";
      const auto [U, V] = spectrum([&](Index i) { return 1 + 0.5 * double(N - i) / double(N); });
      p.tuned = p.base;
      const Index q = std::min<Index>(N, x.between(2, 7));
      Matrix<double> u(m, 1);
      for (Index k = 0; k < q; ++k)
        for (Index i = 0; i < m; ++i) u(i, 0) += U(i, N - 1 - k) / std::sqrt(double(q));
      add(p.tuned, u, {50}, basis(x, n, 1));
      break;
    }
    case 6:
      p.kind = "no update, or a rescaling";
      gaussian(1);
      p.tuned = p.base;
      if (x.uniform() < 0.5)
        for (Index i = 0; i < p.tuned.size(); ++i) p.tuned.data()[i] *= 1.7;
      break;
    default:
      p.kind = "ill-conditioned";
      spectrum([](Index i) { return std::pow(0.6, double(i)); });
      p.tuned = p.base;
      random_update(0.05);
      break;
  }
  return p;
}

/// What the two decompositions say: for each of the k leading vectors the largest |cos|, or −1 where the matrices do
/// not determine it: a vector in a cluster of singular values, or in a null space, is any of a circle of them.
std::vector<double> two_svd_cosines(const test::OracleSvd& b, const test::OracleSvd& t, Index k, double cluster) {
  const auto isolated = [cluster](const std::vector<double>& s, std::size_t i) {
    const double gap = cluster * s[0];
    return (i == 0 || s[i - 1] - s[i] > gap) && (i + 1 == s.size() ? s[i] > gap : s[i] - s[i + 1] > gap);
  };
  std::vector<double> out;
  for (Index i = 0; i < std::min(k, Index(t.S.size())); ++i) {
    double best = 0, undetermined = 0;
    for (Index j = 0; j < Index(b.S.size()); ++j) {
      double c = 0;
      for (Index r = 0; r < b.U.rows(); ++r) c += b.U(r, j) * t.U(r, i);
      if (isolated(b.S, std::size_t(j)))
        best = std::max(best, std::abs(c));
      else
        undetermined += c * c;
    }
    // Whatever basis a decomposition picks inside the clusters, no cosine there exceeds this.
    const bool known = isolated(t.S, std::size_t(i)) && std::sqrt(undetermined) <= std::max(best, 0.2);
    out.push_back(known ? best : -1);
  }
  return out;
}

template <class T>
void compare(int cases, double cluster, double margin) {
  std::map<std::string, int> proofs;
  int judged = 0, left_out = 0;
  for (int c = 0; c < cases; ++c) {
    const Pair p = make_pair(std::uint64_t(c));
    const Matrix<T> W(p.base.view()), W1(p.tuned.view());
    const Index k = 6;
    CAPTURE(c);
    CAPTURE(p.kind);
    CAPTURE(W.rows());
    CAPTURE(W.cols());
    const auto report = find_intruders(W, W1, {.k = k, .epsilon = p.epsilon});
    const auto truth = two_svd_cosines(test::oracle_svd(W), test::oracle_svd(W1), k, cluster);
    REQUIRE(report.vectors.size() == truth.size());
    double energy = 0, total = 0;
    for (Index i = 0; i < W1.size(); ++i) total += double(W1.data()[i]) * double(W1.data()[i]);
    for (std::size_t i = 0; i < truth.size(); ++i) {
      const auto& v = report.vectors[i];
      if (v.intruder) energy += v.singular_value * v.singular_value;
      if (truth[i] < 0 || std::abs(truth[i] - p.epsilon) < margin) {
        ++left_out;
        continue;
      }
      ++judged;
      ++proofs[proof_name(v.proof)];
      CAPTURE(i);
      CAPTURE(truth[i]);
      CAPTURE(proof_name(v.proof));
      CHECK(v.intruder == (truth[i] < p.epsilon));
      if (!v.intruder) CHECK(v.cosine <= truth[i] + 0.05);
    }
    CHECK(report.energy_share == doctest::Approx(total > 0 ? energy / total : 0).epsilon(1e-3));
  }
  CHECK(judged > 5 * left_out);
  // Every certificate has had its turn.
  for (const char* proof : {"similar vector", "little left", "Christoffel bound"}) {
    CAPTURE(proof);
    CHECK(proofs[proof] > 0);
  }
}

}  // namespace

TEST_CASE("500 pairs in double: never another answer than the two full decompositions") {
  compare<double>(500, 1e-6, 1e-6);
}
TEST_CASE("200 pairs in float") { compare<float>(200, 1e-4, 1e-3); }

namespace {

/// A base of 200 and more values, far more than the Lanczos steps allowed, and a tuned weight whose first left singular
/// vector is chosen: W' = 4σ₁·t·xᵀ + (I − t·tᵀ)·W·(I − x·xᵀ).
struct LargePair {
  Matrix<double> base, tuned;
  Matrix<double> U;     // left singular vectors of the base
  test::OracleSvd svd;  // the base's, found again

  /// Values k^−0.4 up to `rank`, but for value 100, which is nearer to value 99 by `twin`, relatively.
  LargePair(Index m, Index n, Index rank, std::uint64_t seed, double twin = 0) {
    Matrix<double> noise(m, n);
    CounterRng(seed).fill_normal(noise.view());
    const auto d = test::oracle_svd(noise);
    U = d.U;
    base = Matrix<double>(m, n);
    for (Index k = 0; k < rank; ++k) {
      const double s = k == 100 && twin > 0 ? std::pow(100.0, -0.4) * (1 - twin) : std::pow(double(k + 1), -0.4);
      for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < n; ++j) base(i, j) += s * U(i, k) * d.V(j, k);
    }
    svd = test::oracle_svd(base);
  }
  /// t = Σ c_k·w_k of the base's left vectors, scaled to length 1.
  void set_first(std::vector<double> t, std::uint64_t seed) {
    const Index m = base.rows(), n = base.cols();
    const auto scale_to_one = [](std::vector<double>& v) {
      double sum = 0;
      for (const double e : v) sum += e * e;
      for (double& e : v) e /= std::sqrt(sum);
    };
    scale_to_one(t);
    std::vector<double> x(static_cast<std::size_t>(n)), tW(x), Wx(static_cast<std::size_t>(m));
    CounterRng(seed).fill_normal(MatrixView<double>(x.data(), 1, n, n, 1));
    scale_to_one(x);
    double tWx = 0;
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j) {
        tW[std::size_t(j)] += t[std::size_t(i)] * base(i, j);
        Wx[std::size_t(i)] += base(i, j) * x[std::size_t(j)];
        tWx += t[std::size_t(i)] * base(i, j) * x[std::size_t(j)];
      }
    tuned = base;
    for (Index i = 0; i < m; ++i)
      for (Index j = 0; j < n; ++j)
        tuned(i, j) += (4 + tWx) * t[std::size_t(i)] * x[std::size_t(j)] - t[std::size_t(i)] * tW[std::size_t(j)] -
                       Wx[std::size_t(i)] * x[std::size_t(j)];
  }
  /// A direction with the given cosines to some left vectors of the base, and the rest of its length in `others`.
  [[nodiscard]] std::vector<double> direction(const std::vector<std::pair<Index, double>>& cosines, Index from,
                                              Index to, std::uint64_t seed) const {
    const CounterRng rng(seed);
    std::vector<double> c(static_cast<std::size_t>(U.cols()));
    double given = 0, spread = 0;
    for (Index k = from; k < to; ++k) c[std::size_t(k)] = 0.5 + rng.uniform(std::uint64_t(k));
    for (const auto& [k, cosine] : cosines) c[std::size_t(k)] = 0;
    for (const double e : c) spread += e * e;
    for (const auto& [k, cosine] : cosines) given += cosine * cosine;
    for (double& e : c) e *= spread > 0 ? std::sqrt((1 - given) / spread) : 0;
    for (const auto& [k, cosine] : cosines) c[std::size_t(k)] = cosine;
    std::vector<double> t(static_cast<std::size_t>(U.rows()));
    for (Index i = 0; i < U.rows(); ++i)
      for (Index k = 0; k < U.cols(); ++k) t[std::size_t(i)] += U(i, k) * c[std::size_t(k)];
    return t;
  }
};

template <class T>
void judge_first(LargePair& p, const std::vector<double>& t, IntruderProof expected, IntruderOptions o = {.k = 4}) {
  p.set_first(t, 77);
  const Matrix<T> W(p.base.view()), W1(p.tuned.view());
  CAPTURE(proof_name(expected));
  const auto report = find_intruders(W, W1, o);
  // The base's own vectors, also for float: its rounding turns them by some 1e-5, and no cosine here is that near to ε.
  const auto truth = two_svd_cosines(p.svd, test::oracle_svd(W1), o.k, 1e-6);
  REQUIRE(report.vectors.size() == truth.size());
  const auto& first = report.vectors[0];
  CHECK(std::string(proof_name(first.proof)) == proof_name(expected));
  CHECK(first.singular_value == doctest::Approx(4).epsilon(1e-6));
  REQUIRE(truth[0] >= 0);
  for (std::size_t i = 0; i < truth.size(); ++i)
    if (truth[i] >= 0) CHECK(report.vectors[i].intruder == (truth[i] < o.epsilon));
  // Not because Lanczos had run out of directions.
  CHECK(first.steps <= o.max_steps);
  CHECK(o.max_steps < std::min(W.rows(), W.cols()));
  CHECK(report.used_full_svd == (std::any_of(report.vectors.begin(), report.vectors.end(),
                                             [](const auto& v) { return v.proof == IntruderProof::full_svd; })));
}

}  // namespace

TEST_CASE_TEMPLATE("200 and more values: every certificate, against the two decompositions", T, float, double) {
  for (const auto& [m, n] : {std::pair<Index, Index>{200, 230}, {240, 200}}) {
    CAPTURE(m);
    CAPTURE(n);
    LargePair p(m, n, std::min(m, n), 5);
    judge_first<T>(p, p.direction({{1, 0.9}}, 20, 200, 1), IntruderProof::similar_vector);
    judge_first<T>(p, p.direction({}, 0, 9, 2), IntruderProof::little_left);
    judge_first<T>(p, p.direction({}, 0, 200, 3), IntruderProof::christoffel);
    // The cosine is large with a vector far beyond those computed for comparison.
    judge_first<T>(p, p.direction({{150, 0.8}, {90, 0.6}}, 0, 0, 4), IntruderProof::ritz_pair);
    judge_first<T>(p, p.direction({{120, 0.7}}, 60, 64, 4), IntruderProof::ritz_pair);
    // The same, but no step in which a pair could converge.
    judge_first<T>(p, p.direction({{150, 0.8}}, 60, 200, 4), IntruderProof::full_svd, {.k = 4, .max_steps = 3});
  }
}

TEST_CASE("200 values: what only the two decompositions can tell, and do") {
  // Two values that agree to 1e-4 share what u has there: .4 and .4 is an intruder, as one of .57 would not be. More
  // steps than are allowed would be needed to see two.
  LargePair twins(200, 230, 200, 6, 1e-4);
  judge_first<double>(twins, twins.direction({{99, 0.4}, {100, 0.4}}, 20, 200, 1), IntruderProof::full_svd);
  LargePair deficient(240, 200, 180, 7);  // no bound for the energy at zero: WᵀW has no inverse
  judge_first<double>(deficient, deficient.direction({}, 0, 150, 3), IntruderProof::full_svd);
  judge_first<double>(deficient, deficient.direction({{120, 0.7}}, 60, 64, 3), IntruderProof::full_svd);
}

TEST_CASE("factors, storages and orders give the verdicts of the dense matrices") {
  const Index m = 48, n = 40, r = 3;
  Matrix<float> W(m, n), W1(m, n);
  CounterRng(1).fill_normal(W.view(), 0, 0.1);
  LoraFactors<float> f{Matrix<float>(r, n), Matrix<float>(m, r), 0.5F};
  CounterRng(2).fill_normal(f.A.view());
  CounterRng(3).fill_normal(f.B.view());
  W1 = W;
  gemm(f.scale, f.B.view(), f.A.view(), W1.view(), Update::accumulate);
  const auto dense = find_intruders(W, W1), factored = find_intruders(W, f);
  CHECK(dense.intruders() == factored.intruders());
  CHECK(dense.intruders().size() >= 3);
  CHECK(dense.energy_share == doctest::Approx(factored.energy_share).epsilon(1e-4));

  Matrix<float> transposed(n, m), transposed1(n, m);
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < n; ++j) {
      transposed(j, i) = W(i, j);
      transposed1(j, i) = W1(i, j);
    }
  const MatrixView<const float> column_major = transposed.view(), column_major1 = transposed1.view();
  CHECK(find_intruders(column_major.transposed(), column_major1.transposed()).intruders() == dense.intruders());
  const Matrix<bf16> narrow(W.view()), narrow1(W1.view());
  const Matrix<float> widened(narrow.view()), widened1(narrow1.view());
  CHECK(find_intruders(narrow, narrow1).intruders() == find_intruders(widened, widened1).intruders());
}

TEST_CASE("awkward shapes and bad arguments") {
  Matrix<double> row(1, 9), column(9, 1), one(1, 1);
  CounterRng(4).fill_normal(row.view());
  CounterRng(5).fill_normal(column.view());
  one(0, 0) = -2;
  CHECK(find_intruders(row, row).intruders().empty());
  CHECK(find_intruders(column, column).intruders().empty());
  CHECK(find_intruders(one, one, {.k = 99}).vectors.size() == 1);
  Matrix<double> other = column;
  for (Index i = 0; i < 9; ++i) other(i, 0) = i == 0 ? column(1, 0) : i == 1 ? -column(0, 0) : 0;
  CHECK(find_intruders(column, other).intruders() == std::vector<Index>{0});
  CHECK_THROWS_AS(find_intruders(row, column), ShapeError);
  CHECK_THROWS_AS(find_intruders(Matrix<double>(), Matrix<double>()), ShapeError);
  CHECK_THROWS_AS(find_intruders(row, row, {.k = 0}), ArgumentError);
  CHECK_THROWS_AS(find_intruders(row, row, {.epsilon = 0}), ArgumentError);
  CHECK_THROWS_AS(find_intruders(row, row, {.epsilon = 1.5}), ArgumentError);
  row(0, 3) = NAN;
  CHECK_THROWS_AS(find_intruders(row, row), NonFiniteError);
}

TEST_CASE("the Christoffel bound holds every atom of a measure, and is tight once Lanczos has run out") {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Numbers x(seed);
    const Index d = x.between(3, 30);
    std::vector<double> points, mass;
    double sum = 0;
    for (Index i = 0; i < d; ++i) {
      points.push_back(x.uniform() * 10);
      mass.push_back(seed % 2 == 0 ? x.uniform() : std::pow(x.uniform(), 8));
      sum += mass.back();
    }
    Matrix<double> W(d, d), start(1, d);  // W·Wᵀ = diag(points)
    double heaviest = 0;
    for (Index i = 0; i < d; ++i) {
      W(i, i) = std::sqrt(points[std::size_t(i)]);
      mass[std::size_t(i)] /= sum;
      start(0, i) = std::sqrt(mass[std::size_t(i)]);
      heaviest = std::max(heaviest, mass[std::size_t(i)]);
    }
    detail::LanczosBatch<double> batch(W.view(), false, start, d);
    for (Index step = 1; step <= d && !batch.exhausted(0); ++step) {
      batch.step({0});
      const auto m = batch.measure(0);
      double weights = 0;
      for (const double w : m.weights) weights += w;
      CHECK(weights == doctest::Approx(1));
      CHECK_FALSE(no_atom_above(m, heaviest * (1 - 1e-9)));  // a proof of this would be a proof of what is false
    }
    if (batch.exhausted(0)) {
      const auto m = batch.measure(0);
      CHECK(*std::max_element(m.weights.begin(), m.weights.end()) == doctest::Approx(heaviest).epsilon(1e-6));
      for (const double r : m.residuals) CHECK(r == 0);
    }
  }
}

TEST_CASE("the bound of the Christoffel function never claims less than its values") {
  LanczosMeasure m;  // three nodes whose function is known by hand: 1/λ = Σ ℓ_i²/w_i
  m.nodes = {3, 1, 0};
  m.weights = {0.2, 0.5, 0.3};
  m.residuals = {1, 1, 1};
  const auto inverse = [&](double x) {
    double sum = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      double l = 1;
      for (std::size_t j = 0; j < 3; ++j)
        if (j != i) l *= (x - m.nodes[j]) / (m.nodes[i] - m.nodes[j]);
      sum += l * l / m.weights[i];
    }
    return sum;
  };
  detail::ChristoffelBound bound(m);
  double sup = 0;
  for (double x = 0; x <= 3; x += 1e-4) sup = std::max(sup, 1 / inverse(x));
  for (double a = 0; a < 3; a += 0.05) {
    const double b = a + 0.05;
    if ((a < 1 && b > 1) || b > 3) continue;
    double least = INFINITY;
    for (double x = a; x <= b; x += 1e-3) least = std::min(least, inverse(x));
    CHECK(bound.inverse_lower(a, b) <= least * (1 + 1e-9));
    CHECK(bound.inverse_lower(a, a) == doctest::Approx(inverse(a)).epsilon(1e-6));
  }
  CHECK(no_atom_above(m, sup * 1.01));
  CHECK_FALSE(no_atom_above(m, sup * 0.999));
}

TEST_CASE("the smallest singular value is bounded from below, and closely") {
  for (const auto& [m, n] : {std::pair<Index, Index>{90, 20}, {200, 70}, {30, 30}}) {
    Matrix<float> W(m, n);
    CounterRng(std::uint64_t(n)).fill_normal(W.view());
    const double s = test::oracle_singular_values(W).back(), bound = detail::smallest_squared_value<float>(W.view());
    CHECK(bound <= s * s);
    CHECK(bound >= 0.05 * s * s);
  }
  Matrix<float> deficient(20, 5);
  for (Index i = 0; i < 20; ++i) deficient(i, 0) = deficient(i, 3) = 1;
  CHECK(detail::smallest_squared_value<float>(deficient.view()) == 0);
}

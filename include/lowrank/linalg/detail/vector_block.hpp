// SPDX-License-Identifier: Apache-2.0
// Orthonormal blocks of vectors that lie in rows: what a Krylov basis is built of.
#pragma once

#include <cmath>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/detail/cholesky.hpp"
#include "lowrank/linalg/detail/streamed_pass.hpp"
#include "lowrank/linalg/detail/vector_ops.hpp"
#include "lowrank/linalg/qr.hpp"

namespace lowrank::detail {

/// Σ x_i·y_i in double.
template <class T>
[[gnu::noinline]] double dot_in_double(Index n, const T* x, const T* y) {
  constexpr int L = lanes<double>;
  const auto wide = [](const T* p) { return __builtin_convertvector(load_as<T, L>(p), Vec<double>); };
  Vec<double> a{}, b{};
  Index k = 0;
  for (; k + 2 * L <= n; k += 2 * L) {
    a += wide(x + k) * wide(y + k);
    b += wide(x + k + L) * wide(y + k + L);
  }
  double sum = sum_lanes<double>(a + b);
  for (; k < n; ++k) sum += double(x[k]) * double(y[k]);
  return sum;
}

/// G = X·Xᵀ in double for vectors in rows.
template <class T>
void gram_of_vectors(MatrixView<const T> X, MatrixView<double> G) {
  const Index b = X.rows();
  // Rows of the triangle in pairs from both ends have equal work.
  parallel_ranges((b + 1) / 2, std::max<Index>(1, 65536 / std::max<Index>(1, b * X.cols())), [&](Index p0, Index p1) {
    for (Index p = p0; p < p1; ++p)
      for (const Index i : {p, b - 1 - p}) {
        for (Index j = 0; j <= i; ++j) G(i, j) = G(j, i) = dot_in_double(X.cols(), &X(i, 0), &X(j, 0));
        if (p == b - 1 - p) break;
      }
  });
}

/// X ← L⁻¹·X for vectors in rows, in strips that stay in cache.
template <class T>
void solve_lower(MatrixView<const double> L, MatrixView<T> X) {
  constexpr Index strip = 512;
  const Index n = X.cols();
  parallel_ranges((n + strip - 1) / strip, 4, [&](Index s0, Index s1) {
    for (Index s = s0; s < s1; ++s) {
      const Index j0 = s * strip, width = std::min(strip, n - j0);
      for (Index i = 0; i < X.rows(); ++i) {
        T* x = &X(i, j0);
        for (Index k = 0; k < i; ++k) axpy(width, T(-L(i, k)), &X(k, j0), x);
        const T inverse = T(1 / L(i, i));
        for (Index j = 0; j < width; ++j) x[j] *= inverse;
      }
    }
  });
}

/// Vectors in rows that are orthonormal to some digits become so to eps.
template <class T>
void refresh_orthonormal(MatrixView<T> X) {
  Matrix<double> G(X.rows(), X.rows());
  gram_of_vectors<T>(X, G.view());
  if (cholesky(G.view(), 0.25))
    solve_lower<T>(G.view(), X);
  else
    orthonormalise(X.transposed());
}

/// An orthonormal set of vectors in the rows of a matrix that grows block by block.
template <class T>
class OrthonormalRows {
 public:
  /// Room for `capacity` vectors of `length` scalars.
  OrthonormalRows(Index capacity, Index length, CounterRng rng) : rng_(rng) { rows_.resize(capacity, length); }

  [[nodiscard]] Index count() const noexcept { return count_; }
  [[nodiscard]] Index length() const noexcept { return rows_.cols(); }
  [[nodiscard]] MatrixView<const T> view() const { return rows_.view().middle_rows(0, count_); }
  [[nodiscard]] MatrixView<const T> rows(Index first, Index n) const { return rows_.view().middle_rows(first, n); }
  /// The rows after the last: where the next block is put before `accept`.
  [[nodiscard]] MatrixView<T> next(Index n) { return rows_.view().middle_rows(count_, n); }
  /// The first `count` rows are the set now, whatever it was.
  void resize(Index count) { count_ = count; }
  /// Rows [0, n) ← Q·rows, Q n×count.
  [[gnu::cold]] void rotate(MatrixView<const T> Q) {
    Matrix<T> rotated(Q.rows(), length());
    gemm(T(1), Q, view(), rotated.view());
    std::copy_n(rotated.data(), rotated.size(), rows_.data());
    count_ = Q.rows();
  }

  /// Orthonormalises the b vectors waiting in next(b) against the set and each other and adds them.
  ///
  /// On entry the block is Z; on return Z = C·(old set) + L·(new rows), C b×count, L b×b lower triangular, both in
  /// double and added to. A vector with nothing left of it is replaced by a random direction, and its part of L is
  /// zero. The first round looks only at the vectors from `local` on, for a Z that is orthogonal to those before up to
  /// rounding.
  [[gnu::cold]] void accept(Index b, MatrixView<double> C, MatrixView<double> L, Index local = 0) {
    const MatrixView<T> Z = next(b);
    Matrix<double> sizes(b, 1), S(b, b), G(b, b);
    for (Index i = 0; i < b; ++i) {
      sizes(i, 0) = norm2(length(), &Z(i, 0));
      S(i, i) = 1;
    }
    // Twice is enough: the second round removes what rounding left of the old set, and makes the block orthonormal to
    // eps.
    for (int round = 0; round < 2; ++round) {
      project(Z, S.view(), C, round == 0 ? local : 0);
      gram_of_vectors<T>(Z, G.view());
      // The second round begins with unit vectors; one that shrinks there was made of rounding along the old set.
      bool good = true;
      for (Index i = 0; i < b; ++i) good = good && std::sqrt(G(i, i)) > (round == 0 ? lost * sizes(i, 0) : 0.5);
      if (!good || !cholesky(G.view(), round == 0 ? 1e-4 : 0.25)) return accept_one_by_one(b, S.view(), C, L);
      solve_lower<T>(G.view(), Z);
      multiply_lower(S.view(), G.view());
    }
    for (Index i = 0; i < b; ++i)
      for (Index j = 0; j <= i; ++j) L(i, j) += S(i, j);
    count_ += b;
  }

  /// Adds b random vectors.
  [[gnu::cold]] void add_random(Index b) {
    const MatrixView<T> Z = next(b);
    for (Index i = 0; i < b; ++i) fill_random(&Z(i, 0));
    Matrix<double> C(b, count_), L(b, b);
    accept(b, C.view(), L.view());
  }

 private:
  /// A vector that keeps less than this of its length after projection is mostly rounding.
  static constexpr double lost = std::same_as<T, float> ? 1e-3 : 1e-8;
  static constexpr double noise = 32 * double(std::numeric_limits<T>::epsilon());

  [[gnu::noinline]] void fill_random(T* z) {
    // Philox gives any thread any element; the quantile transform is what costs.
    const std::uint64_t first = drawn_;
    parallel_ranges(length(), 4096, [&](Index j0, Index j1) {
      for (Index j = j0; j < j1; ++j) z[j] = T(rng_.normal(first + std::uint64_t(j)));
    });
    drawn_ += std::uint64_t(length());
  }

  /// Z ← Z − (Z·Vᵀ)·V; C += S·(Z·Vᵀ); V the vectors from `first` on.
  [[gnu::noinline]] void project(MatrixView<T> Z, MatrixView<const double> S, MatrixView<double> C, Index first = 0) {
    const Index n = count_ - first;
    if (n == 0) return;
    const Index b = Z.rows();
    coefficients_.resize(b, n);
    projections_.resize(b, length());
    const MatrixView<T> c = coefficients_.view(), p = projections_.view();
    // One reading of V for both products.
    streamed_pass<Pass::gram, T>(DenseRows<T>{rows(first, n)}, MatrixView<const T>(Z), c, p);
    parallel_ranges(length(), 4096, [&](Index j0, Index j1) {
      for (Index i = 0; i < b; ++i)
        for (Index j = j0; j < j1; ++j) Z(i, j) -= p(i, j);
    });
    for (Index i = 0; i < b; ++i)
      for (Index k = 0; k < b; ++k)
        if (S(i, k) != 0)
          for (Index j = 0; j < n; ++j) C(i, first + j) += S(i, k) * double(c(k, j));
  }

  /// S ← S·L for lower triangular S and L.
  static void multiply_lower(MatrixView<double> S, MatrixView<const double> L) {
    for (Index i = 0; i < S.rows(); ++i)
      for (Index j = 0; j <= i; ++j) {
        double sum = 0;
        for (Index k = j; k <= i; ++k) sum += S(i, k) * L(k, j);
        S(i, j) = sum;
      }
  }

  /// Gram–Schmidt vector by vector with as many rounds as it takes; the block so far is Z = S⁻¹·(what came, projected).
  [[gnu::cold, gnu::noinline]] void accept_one_by_one(Index b, MatrixView<const double> S, MatrixView<double> C,
                                                      MatrixView<double> L) {
    const Index old = count_;
    Matrix<double> R(b, b);  // row i: the vector i in terms of the new rows
    for (Index i = 0; i < b; ++i) {
      T* const z = &next(1)(0, 0);
      const MatrixView<T> Z = next(1);
      const double size = norm2(length(), z);
      Matrix<double> c(1, count_), one(1, 1);
      one(0, 0) = 1;
      double norm = size;
      bool dead = size == 0;
      for (int round = 0; round < 4 && !dead; ++round) {
        const double before = norm;
        project(Z, one.view(), c.view());
        norm = norm2(length(), z);
        dead = norm <= noise * size;
        if (norm > 0.5 * before) break;
      }
      if (dead) {
        // Nothing of this vector is left: any direction orthogonal to the set does, and it takes no part in Z.
        norm = 0;
        for (int tries = 0; tries < 8; ++tries) {
          fill_random(z);
          double left = norm2(length(), z);
          Matrix<double> ignored(1, count_);
          for (int round = 0; round < 3; ++round) {
            for (Index j = 0; j < length(); ++j) z[j] = T(double(z[j]) / left);
            project(Z, one.view(), ignored.view());
            left = norm2(length(), z);
          }
          if (left > 0.5) {
            for (Index j = 0; j < length(); ++j) z[j] = T(double(z[j]) / left);
            break;
          }
        }
      } else {
        for (Index j = 0; j < length(); ++j) z[j] = T(double(z[j]) / norm);
      }
      for (Index k = 0; k < b; ++k) {
        // What came, row k, holds S(k, i) of this vector.
        if (S(k, i) == 0) continue;
        for (Index j = 0; j < old; ++j) C(k, j) += S(k, i) * c(0, j);
        for (Index j = old; j < count_; ++j) L(k, j - old) += S(k, i) * c(0, j);
        L(k, i) += S(k, i) * norm;
      }
      ++count_;
    }
  }

  Matrix<T> rows_, coefficients_, projections_;
  CounterRng rng_;
  std::uint64_t drawn_ = 0;
  Index count_ = 0;
};

}  // namespace lowrank::detail

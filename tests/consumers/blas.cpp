// SPDX-License-Identifier: Apache-2.0
// The products that go to BLAS against plain sums, and the SVD that goes to LAPACK against what an SVD is.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "lowrank/adapter/linear.hpp"
#include "lowrank/adapter/lora.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/svd.hpp"

#if !defined(LOWRANK_USE_BLAS) || !defined(LOWRANK_USE_LAPACK)
#error "the package does not pass on that it was built to use BLAS and LAPACK"
#endif

using namespace lowrank;

namespace {

/// max |C - A*B| over max |A*B|, A*B by plain sums in double.
template <class T>
double deviation(MatrixView<const T> C, MatrixView<const T> A, MatrixView<const T> B) {
  Matrix<double> ours(C.rows(), C.cols());
  for (Index i = 0; i < A.rows(); ++i)
    for (Index k = 0; k < A.cols(); ++k)
      for (Index j = 0; j < B.cols(); ++j) ours(i, j) += double(A(i, k)) * double(B(k, j));
  double worst = 0, largest = 0;
  for (Index i = 0; i < C.rows(); ++i)
    for (Index j = 0; j < C.cols(); ++j) {
      worst = std::max(worst, std::abs(double(C(i, j)) - ours(i, j)));
      largest = std::max(largest, std::abs(ours(i, j)));
    }
  return worst / largest;
}

int failures = 0;
void expect(const char* what, double error, double limit) {
  std::printf("%-44s %.2e (at most %.2e)\n", what, error, limit);
  if (!(error <= limit)) ++failures;
}

template <class T>
Matrix<T> random(Index rows, Index cols, std::uint64_t seed) {
  Matrix<T> m(rows, cols);
  CounterRng(seed).fill_normal(m.view());
  return m;
}

template <class T>
void layers() {
  constexpr Index tokens = 260, in = 270, out = 280, r = 8;  // 2e7 terms: above the 2^24 from which BLAS is asked
  const double eps = double(std::numeric_limits<T>::epsilon());
  const Matrix<T> W = random<T>(out, in, 1), X = random<T>(tokens, in, 2), G = random<T>(tokens, out, 3);
  LoraWorkspace<T> ws;
  Matrix<T> Y(tokens, out), dX(tokens, in);
  FullLinear<T> full(W);
  full.forward(X, Y, ws);
  full.backward(X, G, ws, dX);
  expect("full: Y", deviation<T>(Y.view(), X.view(), W.view().transposed()), in * eps);
  expect("full: dX", deviation<T>(dX.view(), G.view(), W.view()), out * eps);
  expect("full: dW", deviation<T>(full.parameters().gradient(0), G.view().transposed(), X.view()), tokens * eps);
  Matrix<T> columns(out, tokens);  // the other storage order
  full.forward(X, columns.view().transposed(), ws);
  expect("full: Y by columns", deviation<T>(columns.view().transposed(), X.view(), W.view().transposed()), in * eps);
  // LoRA on W is the frozen layer on W + s*B*A, both ways.
  const LoraFactors<T> f{random<T>(r, in, 4), random<T>(out, r, 5), T(0.5)};
  Matrix<T> merged(W.view());
  gemm(f.scale, f.B.view(), f.A.view(), merged.view(), Update::accumulate);
  LoraLinear<T> lora(DenseBase<T>(W.view()), f);
  lora.forward(X, Y, ws);
  lora.backward(X, G, ws, dX);
  expect("LoRA: Y", deviation<T>(Y.view(), X.view(), merged.view().transposed()), (in + r) * eps);
  expect("LoRA: dX", deviation<T>(dX.view(), G.view(), merged.view()), (out + r) * eps);
}

template <class T>
void decompositions() {
  constexpr Index m = 130, n = 100;  // above the width up to which our own SVD in double is taken
  const double eps = double(std::numeric_limits<T>::epsilon());
  for (const bool wide : {false, true}) {
    const Matrix<T> A = wide ? random<T>(n, m, 7) : random<T>(m, n, 6);
    const Svd<T> d = svd(A);
    Matrix<T> scaled(d.U.view()), one(n, n);
    for (Index j = 0; j < n; ++j) {
      one(j, j) = 1;
      for (Index i = 0; i < scaled.rows(); ++i) scaled(i, j) *= d.S[std::size_t(j)];
    }
    // Backward stable: errors of a small multiple of eps times the norm, 4n*eps generously.
    const double limit = 4 * n * eps;
    expect("SVD: A - U*S*V'", deviation<T>(A.view(), scaled.view(), d.V.view().transposed()), limit);
    expect("SVD: I - U'*U", deviation<T>(one.view(), d.U.view().transposed(), d.U.view()), limit);
    expect("SVD: I - V'*V", deviation<T>(one.view(), d.V.view().transposed(), d.V.view()), limit);
    const auto values = singular_values(A).values;
    double worst = 0;
    for (std::size_t i = 0; i < values.size(); ++i) worst = std::max(worst, std::abs(values[i] - double(d.S[i])));
    expect("singular values alone", worst / double(d.S[0]), limit);
  }
}

}  // namespace

int main() {
  layers<float>();
  layers<double>();
  decompositions<float>();
  decompositions<double>();
  return failures == 0 ? 0 : 1;
}

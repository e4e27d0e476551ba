// SPDX-License-Identifier: Apache-2.0
// All singular values and full thin SVD, ours beside LAPACK's gesdd in the same process, in turn; error beside time.
//
//   benchmark_singular_values              sizes up to 2048, in about a minute
//   benchmark_singular_values --big        4096x4096 and 4096x11008
//   benchmark_singular_values --smoke      a second
//   benchmark_singular_values --file F m n float32 row-major from F: prints ms, writes F.values (singular_values.py)
//
// Configure with -DLOWRANK_WITH_LAPACK=ON for the comparison; unset OPENBLAS_CORETYPE when it is set, or LAPACK is
// slow.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "lowrank/core/rng.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/linalg/svd.hpp"

#if defined(LOWRANK_USE_LAPACK)
#include "lowrank/linalg/detail/lapack.hpp"
#endif

using namespace lowrank;

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
template <class F>
double best_of(int repeats, F&& f) {
  double best = 1e30;
  for (int k = 0; k < repeats; ++k) {
    const double start = now();
    f();
    best = std::min(best, now() - start);
  }
  return best;
}

/// 0.02·N(0, 1); with `decaying`, plus U·diag(8·k^-0.7, k ≤ min(m, n)/8)·Vᵀ of random orthonormal U, V.
Matrix<float> test_matrix(Index m, Index n, bool decaying) {
  Matrix<float> W(m, n);
  CounterRng(1).fill_normal(W.view(), 0, 0.02);
  if (!decaying) return W;
  const Index k = std::max<Index>(1, std::min(m, n) / 8);
  Matrix<float> U(m, k), V(n, k);
  CounterRng(2).fill_normal(U.view());
  CounterRng(3).fill_normal(V.view());
  orthonormalise(U.view());
  orthonormalise(V.view());
  for (Index i = 0; i < m; ++i)
    for (Index j = 0; j < k; ++j) U(i, j) *= float(8 * std::pow(double(j + 1), -0.7));
  gemm(1.0F, U.view(), V.view().transposed(), W.view(), Update::accumulate);
  return W;
}

/// Lets the other library's threads, which spin for a while after their last task, go to sleep.
void settle() { std::this_thread::sleep_for(std::chrono::milliseconds(200)); }

double worst(const std::vector<double>& a, const std::vector<double>& exact) {
  double e = 0;
  for (std::size_t i = 0; i < a.size(); ++i) e = std::max(e, std::abs(a[i] - exact[i]));
  return exact.empty() ? 0 : e / exact[0];
}

void values(Index m, Index n, bool decaying, int repeats, bool reference) {
  const Matrix<float> W = test_matrix(m, n, decaying);
  SingularValues ours;
  double t_ours = 1e30;
  std::printf("values   %5td x %-5td %-8s ", m, n, decaying ? "decaying" : "flat");
#if defined(LOWRANK_USE_LAPACK)
  std::vector<float> theirs(std::size_t(std::min(m, n)));
  double t_theirs = 1e30;
  for (int k = 0; k < repeats; ++k) {
    settle();
    t_ours = std::min(t_ours, best_of(1, [&] { ours = singular_values(W); }));
    Matrix<float> copy = W;
    settle();
    t_theirs = std::min(t_theirs, best_of(1, [&] {
                          detail::lapack_svd<float>('N', copy.view().transposed(), theirs.data(), nullptr, nullptr,
                                                    "benchmark");
                        }));
  }
  const std::vector<double> wide(theirs.begin(), theirs.end());
  std::printf("ours %8.1f ms  sgesdd('N') %8.1f ms  ratio %.3f", t_ours * 1e3, t_theirs * 1e3, t_ours / t_theirs);
  if (reference) {
    Matrix<double> copy(W);
    const std::vector<double> exact = detail::lapack_singular_values(copy.view(), "benchmark");
    std::printf("  error/s1: ours %.1e (bound %.1e)  sgesdd %.1e\n", worst(ours.values, exact),
                ours.absolute_error / exact[0], worst(wide, exact));
  } else {
    std::printf("  |ours - sgesdd|/s1 %.1e (bound of ours %.1e)\n", worst(wide, ours.values),
                ours.absolute_error / ours.values[0]);
  }
#else
  t_ours = best_of(repeats, [&] { ours = singular_values(W); });
  const SingularValues exact = reference ? singular_values(W, {.accuracy = 1e-12}) : ours;
  std::printf("ours %8.1f ms  error/s1 against bidiagonalisation %.1e (bound %.1e)  no LAPACK in this build\n",
              t_ours * 1e3, worst(ours.values, exact.values), ours.absolute_error / ours.values[0]);
#endif
  std::fflush(stdout);
}

/// ‖W − U·S·Vᵀ‖_F/σ₁ and the larger max |QᵀQ − I| of U and V.
template <class T>
void print_quality(const Matrix<float>& W, const Svd<T>& f) {
  const Index k = Index(f.S.size());
  Matrix<double> US(f.U), V(f.V), E(W), G(k, k);
  for (Index i = 0; i < US.rows(); ++i)
    for (Index j = 0; j < k; ++j) US(i, j) *= double(f.S[std::size_t(j)]);
  gemm(-1.0, US.view(), V.view().transposed(), E.view(), Update::accumulate);
  double orthogonality = 0;
  const auto check = [&](const Matrix<double>& Q) {
    gemm(1.0, Q.view().transposed(), Q.view(), G.view());
    for (Index i = 0; i < k; ++i)
      for (Index j = 0; j < k; ++j) orthogonality = std::max(orthogonality, std::abs(G(i, j) - (i == j ? 1.0 : 0.0)));
  };
  check(V);
  const Matrix<double> U(f.U);
  check(U);
  std::printf("(residual %.1e, orthogonality %.1e)", detail::norm2(E.size(), E.data()) / double(f.S[0]), orthogonality);
}

void full(Index m, Index n, bool decaying, int repeats) {
  const Matrix<float> W = test_matrix(m, n, decaying);
  Svd<float> ours;
  double t_ours = 1e30;
  const auto run_ours = [&] {
    settle();
    Matrix<float> copy = W;
    t_ours =
        std::min(t_ours, best_of(1, [&] { ours = detail::bidiagonal_svd<float, float>(copy.view(), "benchmark"); }));
  };
#if defined(LOWRANK_USE_LAPACK)
  Svd<float> theirs;
  double t_theirs = 1e30;
  for (int k = 0; k < repeats; ++k) {
    run_ours();
    settle();
    Matrix<float> copy = W;
    t_theirs = std::min(t_theirs, best_of(1, [&] { theirs = detail::dense_svd<float>(copy.view(), "benchmark"); }));
  }
#else
  for (int k = 0; k < repeats; ++k) run_ours();
#endif
  std::printf("full svd %5td x %-5td %-8s ours %8.1f ms ", m, n, decaying ? "decaying" : "flat", t_ours * 1e3);
  print_quality(W, ours);
#if defined(LOWRANK_USE_LAPACK)
  std::printf("  sgesdd('S') %8.1f ms ", t_theirs * 1e3);
  print_quality(W, theirs);
  std::printf("  ratio %.3f", t_ours / t_theirs);
#endif
  std::printf("\n");
  std::fflush(stdout);
}

void factors(Index m, Index n, Index r, int repeats) {
  LoraFactors<float> f{Matrix<float>(r, n), Matrix<float>(m, r), 0.5F};
  CounterRng(4).fill_normal(f.A.view());
  CounterRng(5).fill_normal(f.B.view());
  Svd<float> s;
  double norm = 0;
  const double t = best_of(repeats, [&] { s = svd(f); });
  const double tn = best_of(repeats, [&] { norm = frobenius_norm(f); });
  double energy = 0;
  for (const float x : s.S) energy += double(x) * double(x);
  std::printf("factors  %5td x %-5td r = %-3td  svd %.2f ms  norm %.2f ms  |norm - |S||/norm %.1e\n", m, n, r, t * 1e3,
              tn * 1e3, std::abs(norm - std::sqrt(energy)) / norm);
}

/// One weight from a file, for the comparison with NumPy and PyTorch: milliseconds on stdout, values beside the file.
int from_file(const std::string& path, Index m, Index n) {
  Matrix<float> W(m, n);
  std::FILE* in = std::fopen(path.c_str(), "rb");
  if (in == nullptr || std::fread(W.data(), sizeof(float), std::size_t(W.size()), in) != std::size_t(W.size()))
    return 1;
  std::fclose(in);
  SingularValues s;
  std::printf("%.3f\n", 1e3 * best_of(2, [&] { s = singular_values(W); }));
  std::FILE* out = std::fopen((path + ".values").c_str(), "wb");
  if (out == nullptr || std::fwrite(s.values.data(), sizeof(double), s.values.size(), out) != s.values.size()) return 1;
  return std::fclose(out);
}

}  // namespace

int main(int argc, char** argv) {
  const bool smoke = argc > 1 && std::strcmp(argv[1], "--smoke") == 0;
  const bool big = argc > 1 && std::strcmp(argv[1], "--big") == 0;
  if (argc == 5 && std::strcmp(argv[1], "--file") == 0)
    return from_file(argv[2], std::atol(argv[3]), std::atol(argv[4]));
  std::printf("threads %d, float32, best of the repeats, ours and LAPACK's in turn in one process\n", max_threads());
  if (smoke) {
    values(256, 256, true, 1, true);
    full(200, 150, true, 1);
    factors(512, 700, 16, 1);
    return 0;
  }
  if (big) {
    values(4096, 4096, true, 1, false);
    values(4096, 11008, true, 1, false);
    return 0;
  }
  factors(4096, 11008, 16, 5);
  factors(4096, 11008, 64, 5);
  values(1024, 1024, true, 3, true);
  values(2048, 2048, true, 3, true);
  values(2048, 2048, false, 3, true);
  values(1024, 4096, true, 3, true);
  full(1024, 1024, true, 2);
  full(2048, 2048, true, 2);
}

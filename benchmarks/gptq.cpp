// SPDX-License-Identifier: Apache-2.0
// GPTQ beside rounding to nearest and the scale search: what each leaves of a layer's outputs at the same bits, and in
// what time; the peer is the algorithm as its authors' code runs it (inverse by Cholesky, column loop, lazy batches of
// 128), with Eigen for the linear algebra.
//
//   benchmark_gptq [--smoke] [size]
#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "lowrank/quant/gptq.hpp"

using namespace lowrank;

namespace {

/// XᵀX/tokens for X = Z·diag(k^−0.35)·C, Z and C normal: inputs as correlated as those of a middle layer.
Matrix<float> activation_gram(Index n, Index tokens) {
  Matrix<float> Z(tokens, n), C(n, n), X(tokens, n), H(n, n);
  CounterRng(7).fill_normal(Z.view(), 0, 1);
  CounterRng(8).fill_normal(C.view(), 0, 1 / std::sqrt(double(n)));
  for (Index t = 0; t < tokens; ++t)
    for (Index k = 0; k < n; ++k) Z(t, k) *= float(std::pow(double(k + 1), -0.35));
  gemm(1.0F, Z.view(), C.view(), X.view());
  gemm(1 / float(tokens), X.view().transposed(), X.view(), H.view());
  return H;
}

double seconds_since(std::chrono::steady_clock::time_point t) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count();
}

/// Returns Q, dense; blocks of 64 along rows.
Eigen::MatrixXf peer(const Eigen::MatrixXf& weight, const Eigen::MatrixXf& H, const Codebook& book) {
  constexpr Index batch = 128, group = 64;
  const Index m = weight.rows(), n = weight.cols();
  Eigen::MatrixXf damped = H;
  damped.diagonal().array() += 0.01F * H.diagonal().mean();
  const Eigen::MatrixXf inverse = damped.llt().solve(Eigen::MatrixXf::Identity(n, n));
  const Eigen::MatrixXf U = inverse.llt().matrixU();
  Eigen::MatrixXf W = weight, Q(m, n), errors(m, batch);
  Eigen::ArrayXf scale(m);
  const auto thresholds = book.thresholds();
  for (Index b = 0; b < n; b += batch) {
    const Index width = std::min(batch, n - b);
    for (Index j = 0; j < width; ++j) {
      const Index k = b + j;
      if (k % group == 0) scale = W.middleCols(k, std::min(group, n - k)).cwiseAbs().rowwise().maxCoeff();
      for (Index i = 0; i < m; ++i) {
        const float x = W(i, k) / scale(i);
        int rank = 0;
        for (const float t : thresholds) rank += x > t;
        Q(i, k) = book.values()[book.order()[std::size_t(rank)]] * scale(i);
      }
      errors.col(j) = (W.col(k) - Q.col(k)) / U(k, k);
      W.middleCols(k, width - j).noalias() -= errors.col(j) * U.row(k).segment(k, width - j);
    }
    const Index rest = n - b - width;
    if (rest > 0) W.rightCols(rest).noalias() -= errors.leftCols(width) * U.block(b, b + width, width, rest);
  }
  return Q;
}

void row(const char* book, double bits, const char* method, double seconds, double weighted, double frobenius) {
  std::printf("| %s | %.2f | %s | %.3f | %.4f | %.4f |\n", book, bits, method, seconds, weighted, frobenius);
}

void compare(const Codebook& book, const Matrix<float>& W, const Matrix<float>& H, int repeats) {
  using Map = Eigen::Map<const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>;
  const Map w(W.data(), W.rows(), W.cols()), h(H.data(), H.rows(), H.cols());
  const double norm = double(w.norm());
  Eigen::MatrixXf D = h;
  D.diagonal().array() += 0.01F * h.diagonal().mean();
  const double output = std::sqrt(double((w * D).cwiseProduct(w).sum()));
  const char* name = book.name().c_str();
  double bits = 0;
  const auto plain = [&](const char* method, int search, double weighted, double frobenius) {
    double best = 1e9;
    for (int i = 0; i < repeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      bits = quantise(W, {.codebook = book, .scale_search = search}).bits_per_weight();
      best = std::min(best, seconds_since(start));
    }
    row(name, bits, method, best, weighted / output, frobenius / norm);
  };
  const auto ours = [&](const char* method, const GptqOptions& options) {
    GptqReport best;
    best.seconds = 1e9;
    for (int i = 0; i < repeats; ++i)
      if (const auto r = gptq(W, H, options); r.report.seconds < best.seconds) best = r.report;
    row(name, bits, method, best.seconds, best.weighted / output, best.frobenius / norm);
    return best.seconds;
  };
  const GptqOptions absmax{.quantise = {.codebook = book}},
      searched{.quantise = {.codebook = book, .scale_search = 16}};
  const GptqReport a = gptq(W, H, absmax).report, b = gptq(W, H, searched).report;
  plain("nearest", 0, a.plain_weighted, a.plain_frobenius);
  plain("nearest, scale search", 16, b.plain_weighted, b.plain_frobenius);
  GptqOptions alone = absmax;
  alone.compare_plain = false;
  const double own = ours("gptq, nothing compared", alone);
  ours("gptq", absmax);
  ours("gptq, fixed scales, by activation",
       {.quantise = {.codebook = book}, .fixed_scales = true, .by_activation = true});
  ours("gptq, scale search", searched);
  const Eigen::MatrixXf cw = w, ch = h;
  double theirs = 1e9;
  Eigen::MatrixXf E;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    E = peer(cw, ch, book);
    theirs = std::min(theirs, seconds_since(start));
  }
  E = cw - E;
  row(name, bits, "gptq in Eigen (peer)", theirs, std::sqrt(double((E * D).cwiseProduct(E).sum())) / output,
      double(E.norm()) / norm);
  std::printf("# %s: peer / ours, nothing compared: %.1fx\n", name, theirs / own);
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const bool smoke = argc > 1 && std::string(argv[1]) == "--smoke";
  const Index n = smoke ? 256 : argc > 1 ? std::atol(argv[1]) : 2048;
  const int repeats = smoke ? 1 : 3;
  if (n < 64 || n % 64 != 0) return std::fprintf(stderr, "size must be a multiple of 64, got %td\n", n), 2;
  std::printf("# %td x %td float, blocks of 64, damping 0.01, %d threads, best of %d, time with the factor of H\n", n,
              n, max_threads(), repeats);
  std::printf("# Eigen %d.%d.%d\n", EIGEN_WORLD_VERSION, EIGEN_MAJOR_VERSION, EIGEN_MINOR_VERSION);
  std::printf(
      "| codebook | bits | method | s | weighted error / output norm | Frobenius error / norm |\n"
      "|---|---|---|---|---|---|\n");
  Matrix<float> W(n, n);
  CounterRng(1).fill_normal(W.view(), 0, 0.02);
  const Matrix<float> H = activation_gram(n, 2 * n);
  for (const Codebook& book : {Codebook::nf2(), Codebook::nf3(), Codebook::nf4()}) compare(book, W, H, repeats);
}

// SPDX-License-Identifier: Apache-2.0
// The initialisers behind `lowrank init`.
#include "init_methods.hpp"

#include <lowrank/init/gaussian.hpp>
#include <lowrank/init/kaiming.hpp>
#include <lowrank/init/loftq.hpp>
#include <lowrank/init/milora.hpp>
#include <lowrank/init/olora.hpp>
#include <lowrank/init/orthogonal.hpp>
#include <lowrank/init/pissa.hpp>
#include <lowrank/init/qpissa.hpp>

namespace lowrank::tool {
namespace {

FactorStorage factor_storage(const std::string& dtype) {
  return dtype == "bf16" ? FactorStorage::bf16 : dtype == "f16" ? FactorStorage::f16 : FactorStorage::native;
}

Codebook codebook(int bits) {
  return bits == 2   ? Codebook::nf2()
         : bits == 3 ? Codebook::nf3()
         : bits == 4 ? Codebook::nf4()
                     : Codebook::uniform(bits);
}

/// Widening everything to float keeps the number of instantiations small; the one case that matters for time and
/// memory, PiSSA of a bf16 checkpoint, is read in place.
template <class Base, class S>
Outcome split(const MethodOptions& o, MatrixView<const S> W, std::uint64_t seed) {
  const auto finish = [](auto&& result) {
    Outcome out;
    out.factors = std::move(result.factors);
    out.report = std::move(result.report);
    out.base = std::move(result.base);
    return out;
  };
  const FactorStorage storage = factor_storage(o.dtype);
  if constexpr (std::is_same_v<S, float>) {
    if (o.method == "milora")
      return finish(
          milora<Base>(W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage}));
    if (o.method == "olora")
      return finish(
          olora<Base>(W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage}));
  }
  PissaOptions p{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage};
  p.svd.seed = seed;
  return finish(pissa<Base>(W, p));
}

template <class S>
Matrix<S> narrowed(const Matrix<float>& m) {
  Matrix<S> out;
  out.resize(m.rows(), m.cols());
  lowrank::detail::parallel_ranges(m.size(), 1 << 16, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) out.data()[i] = S(m.data()[i]);
  });
  return out;
}

Outcome quantised(const MethodOptions& o, MatrixView<const float> W, io::Dtype stored, std::uint64_t seed) {
  LoftqOptions l{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora};
  l.quantise.codebook = codebook(o.bits);
  l.quantise.block_size = o.block_size;
  l.quantise.double_quantise = o.double_quantise;
  l.iterations = o.iterations;
  l.factor_storage = factor_storage(o.dtype);
  l.seed = seed;
  auto q = o.method == "loftq" ? loftq(W, l) : qpissa(W, l);
  Outcome out;
  out.factors = std::move(q.factors);
  out.report.method = o.method;
  out.report.seconds = q.report.seconds;
  out.plain_error = q.report.plain.frobenius;
  out.error = q.report.steps.at(std::size_t(q.report.best)).frobenius;
  out.report.residual_norm = out.error;
  for (const LoftqStep& s : q.report.steps) out.report.passes += s.passes;
  out.quantised = std::move(q.base);
  Matrix<float> dense = out.quantised.dequantise();
  switch (stored) {
    case io::Dtype::BF16:
      out.base = narrowed<bf16>(dense);
      break;
    case io::Dtype::F16:
      out.base = narrowed<f16>(dense);
      break;
    case io::Dtype::F64:
      out.base = Matrix<double>(dense);
      break;
    default:
      out.base = std::move(dense);
  }
  return out;
}

Matrix<float> as_float(const io::TensorView& weight, bool transposed) {
  Matrix<float> W = weight.to_matrix<float>();
  return transposed ? Matrix<float>(W.view().transposed()) : std::move(W);
}

Outcome changed(const MethodOptions& o, const io::TensorView& weight, bool transposed, std::uint64_t seed) {
  if (weight.dtype() == io::Dtype::BF16 && o.method == "pissa" && !transposed)
    return with_weight(weight, [&]<class S>(MatrixView<const S> W) -> Outcome {
      if constexpr (std::is_same_v<S, bf16>)
        return split<bf16>(o, W, seed);
      else
        throw ArgumentError("lowrank init: unreachable, the weight is bf16");
    });
  const Matrix<float> W = as_float(weight, transposed);
  if (quantises(o.method)) return quantised(o, W.view(), weight.dtype(), seed);
  switch (weight.dtype()) {
    case io::Dtype::BF16:
      return split<bf16>(o, W.view(), seed);
    case io::Dtype::F16:
      return split<f16>(o, W.view(), seed);
    case io::Dtype::F32:
      return split<float>(o, W.view(), seed);
    default:
      break;
  }
  // f64: the factors are found and stored in float at most, the base is formed from them in double.
  Outcome out = split<float>(o, W.view(), seed);
  const LoraFactors<double> exact{Matrix<double>(out.factors.A), Matrix<double>(out.factors.B),
                                  double(out.factors.scale)};
  Matrix<double> base = weight.to_matrix<double>();
  if (transposed) base = Matrix<double>(base.view().transposed());
  const ResidualNorms norms = residual_base(MatrixView<const double>(base.view()), exact, base.view());
  out.report.residual_norm = norms.residual;
  out.report.storage_error = norms.storage_error;
  out.base = std::move(base);
  return out;
}

}  // namespace

bool quantises(const std::string& method) { return method == "loftq" || method == "qpissa"; }
bool changes_base(const std::string& method) {
  return quantises(method) || method == "pissa" || method == "milora" || method == "olora";
}

Outcome initialise(const MethodOptions& o, const io::TensorView& weight, const ModuleInfo& info, bool transposed,
                   std::uint64_t seed) {
  if (changes_base(o.method)) return changed(o, weight, transposed, seed);
  const auto take = [](auto&& result) {
    Outcome out;
    out.factors = std::move(result.factors);
    out.report = std::move(result.report);
    return out;
  };
  const Index out = transposed ? info.cols : info.rows, in = transposed ? info.rows : info.cols;
  if (info.kind == ModuleKind::embedding)  // stored vocab×dim; A is r×vocab, zero, and B dim×r, normal
    return take(gaussian_embedding<float>(
        info.cols, info.rows, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  if (o.method == "kaiming")
    return take(kaiming<float>(out, in, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  if (o.method == "gaussian")
    return take(
        gaussian<float>(out, in, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  if (o.method == "orthogonal")
    return take(
        orthogonal<float>(out, in, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .seed = seed}));
  const Matrix<float> W = as_float(weight, transposed);
  return take(mica(W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora}));
}

std::vector<float> row_norms(const io::TensorView& weight, bool transposed) {
  return with_weight(weight, [&](auto W) {
    if (transposed) W = W.transposed();
    std::vector<float> norms;
    for (Index i = 0; i < W.rows(); ++i) {
      double sum = 0;
      for (Index j = 0; j < W.cols(); ++j) sum += double(W(i, j)) * double(W(i, j));
      norms.push_back(float(std::sqrt(sum)));
    }
    return norms;
  });
}

}  // namespace lowrank::tool

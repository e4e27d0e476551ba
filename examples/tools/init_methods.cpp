// SPDX-License-Identifier: Apache-2.0
// The initialisers behind `lowrank init`.
#include "init_methods.hpp"

#include <lowrank/adapter/dora_merge.hpp>
#include <lowrank/init/corda.hpp>
#include <lowrank/init/gaussian.hpp>
#include <lowrank/init/kaiming.hpp>
#include <lowrank/init/loftq.hpp>
#include <lowrank/init/lora_ga.hpp>
#include <lowrank/init/milora.hpp>
#include <lowrank/init/olora.hpp>
#include <lowrank/init/orthogonal.hpp>
#include <lowrank/init/pissa.hpp>
#include <lowrank/init/qpissa.hpp>
#include <lowrank/linalg/norm.hpp>

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
      return finish(milora<float, Base>(W, {.rank = o.rank,
                                            .alpha = o.alpha,
                                            .rank_stabilised = o.rslora,
                                            .factor_storage = storage,
                                            .svd = {.seed = seed}}));
    if (o.method == "olora")
      return finish(olora<float, Base>(
          W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage}));
  }
  PissaOptions p{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .factor_storage = storage};
  p.svd.seed = seed;
  return finish(pissa<float, Base>(W, p));
}

template <class S>
Matrix<S> narrowed(const Matrix<float>& m) {
  Matrix<S> out;
  out.resize(m.rows(), m.cols());
  io::convert_to(io::dtype_of<S>(), m.data(), m.size(), reinterpret_cast<std::byte*>(out.data()));
  return out;
}

Outcome quantised(const MethodOptions& o, MatrixView<const float> W, io::Dtype stored, std::uint64_t seed) {
  LoftqOptions l{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora};
  l.quantise.codebook = codebook(o.bits);
  l.quantise.block_size = o.block_size;
  l.quantise.double_quantise = o.double_quantise;
  l.quantise.scale_search = o.scale_search;
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

/// W − s·B·A in the type W is stored as, from the weight as it is stored.
void form_base_as_stored(const io::TensorView& weight, bool transposed, Outcome& out) {
  with_weight(weight, [&]<class S>(MatrixView<const S> W) {
    using T = arithmetic_of<S>;
    if (transposed) W = W.transposed();
    const LoraFactors<T> factors{Matrix<T>(out.factors.A), Matrix<T>(out.factors.B), T(out.factors.scale)};
    Matrix<S> base;
    base.resize(W.rows(), W.cols());
    const ResidualNorms norms = residual_base(W, factors, base.view());
    out.report.residual_norm = norms.residual;
    out.report.storage_error = norms.storage_error;
    out.base = std::move(base);
  });
}

/// Runs f; an error of the library then says whose data it was.
template <class F>
auto named(const ModuleData& data, const std::string& name, F&& f) {
  try {
    return f();
  } catch (const IoError&) {
    throw;
  } catch (const Error& e) {
    throw IoError(data.path(), name, e.what());
  }
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
  form_base_as_stored(weight, transposed, out);
  return out;
}

/// CorDA and LoRA-GA.
Outcome from_data(const MethodOptions& o, const io::TensorView& weight, const ModuleInfo& info, bool transposed,
                  std::uint64_t seed) {
  const Matrix<float> W = as_float(weight, transposed);
  expect_finite_weight(weight);  // what is wrong after this is wrong with the data
  const auto take = [&](auto&& result) {
    Outcome out;
    out.factors = std::move(result.factors);
    out.report = std::move(result.report);
    if (weight.dtype() == io::Dtype::F32)
      out.base = std::move(result.base);
    else
      form_base_as_stored(weight, transposed, out);
    return out;
  };
  const FactorStorage storage = factor_storage(o.dtype);
  if (o.method == "lora_ga") {
    const std::string name = find_gradient(*o.data, info);
    Matrix<float> G = o.data->matrix(name);
    LoraGaOptions l{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .gamma = o.gamma};
    l.factor_storage = storage;
    l.svd.seed = seed;
    return named(*o.data, name, [&] { return take(lora_ga(W, transposed ? G.view().transposed() : G.view(), l)); });
  }
  const ActivationEntry entry = find_activations(*o.data, info.name, W.cols());
  const Matrix<float> X = o.data->matrix(entry.name);
  CordaOptions c{.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora};
  c.mode = o.corda_mode == "knowledge" ? CordaMode::knowledge : CordaMode::instruction;
  c.damping = o.damping;
  c.factor_storage = storage;
  c.svd.seed = seed;
  return named(*o.data, entry.name, [&] {
    if (entry.covariance) return take(corda(W, ActivationCovariance<float>::from_mean(X, 1), c));
    ActivationCovariance<float> covariance(W.cols());
    covariance.add(X.view());
    return take(corda(W, covariance, c));
  });
}

}  // namespace

bool quantises(const std::string& method) { return method == "loftq" || method == "qpissa"; }
bool changes_base(const std::string& method) {
  return quantises(method) || needs_gradients(method) || method == "corda" || method == "pissa" || method == "milora" ||
         method == "olora";
}
bool reads_weights(const std::string& method) { return changes_base(method) || method == "mica"; }
bool needs_activations(const std::string& method) { return method == "corda" || method == "eva"; }
bool needs_gradients(const std::string& method) { return method == "lora_ga"; }

EvaPlan plan_eva(const MethodOptions& o, const Modules& modules, const std::vector<std::size_t>& selected,
                 std::uint64_t seed) {
  EvaPlan plan;
  std::vector<std::vector<double>> explained;
  for (const std::size_t i : selected) {
    throw_if_interrupted();
    const ModuleInfo& info = modules.infos[i];
    const Index in = info.in_by_out ? info.rows : info.cols;
    const ActivationEntry entry = find_activations(*o.data, info.name, in);
    ActivationSvdOptions a;
    a.components = std::min({in, info.rows, info.cols, Index(std::ceil(o.rho * double(o.rank)))});
    a.centre = o.centre && !entry.covariance;
    a.seed = CounterRng(seed, 1).bits(module_stream(info.name));
    const Matrix<float> X = o.data->matrix(entry.name);
    plan.inputs.push_back(named(*o.data, entry.name, [&] {
      if (entry.covariance) return ActivationSvd<float>::from_covariance(X, 1, a);
      ActivationSvd<float> inputs(in, a);
      inputs.add(X.view());
      return inputs;
    }));
    if (o.rho == 1 && plan.inputs.back().directions().cols() < o.rank)
      o.data->fail(entry.name, common::text("has ", X.rows(), " tokens, too few for rank ", o.rank));
    explained.push_back(plan.inputs.back().explained());
  }
  plan.ranks = eva_ranks(explained, o.rank * Index(selected.size()));
  return plan;
}

Outcome initialise_eva(const MethodOptions& o, const EvaPlan& plan, std::size_t k, Index out) {
  const double r = double(plan.ranks[k]), nominal = double(o.rank);
  // The scale stays what alpha and the nominal rank make it, whatever rank the module got.
  const double alpha = o.alpha * (o.rslora ? std::sqrt(r / nominal) : r / nominal);
  Outcome result;
  auto init = eva(out, plan.inputs[k],
                  {.rank = plan.ranks[k], .alpha = alpha, .rank_stabilised = o.rslora, .whiten = o.whiten});
  result.factors = std::move(init.factors);
  result.report = std::move(init.report);
  return result;
}

namespace {

Outcome initialised(const MethodOptions& o, const io::TensorView& weight, const ModuleInfo& info, std::uint64_t seed) {
  const bool transposed = info.in_by_out;
  if (o.data) return from_data(o, weight, info, transposed, seed);
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
  return take(mica(W, {.rank = o.rank, .alpha = o.alpha, .rank_stabilised = o.rslora, .svd = {.seed = seed}}));
}

}  // namespace

Outcome initialise(const MethodOptions& o, const io::TensorView& weight, const ModuleInfo& info, std::uint64_t seed) {
  try {
    if (!reads_weights(o.method)) expect_finite_weight(weight);  // an adapter of a broken base is of no use either
    return initialised(o, weight, info, seed);
  } catch (const IoError&) {
    throw;  // says already what it is about
  } catch (const NonFiniteError& e) {
    expect_finite_weight(weight);  // names the element, if it is one of the weight's
    weight.fail(e.what());
  } catch (const Error& e) {
    weight.fail(e.what());
  }
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

std::vector<float> row_norms(const BaseStorage& base, const LoraFactors<float>& factors) {
  std::vector<float> norms;
  std::visit(
      [&]<class M>(const M& W) {
        if constexpr (!std::is_same_v<M, std::monostate>) {
          const std::vector<double> exact = dora_row_norms<float>(W, factors);
          norms.assign(exact.begin(), exact.end());
        }
      },
      base);
  return norms;
}

}  // namespace lowrank::tool

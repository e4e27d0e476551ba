// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <algorithm>
#include <cmath>

#include "common/errors.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/olora.hpp"
#include "lowrank/init/pissa.hpp"
#include "lowrank/model/targets.hpp"

namespace llama {

const std::vector<MethodInfo>& known_methods() {
  static const std::vector<MethodInfo> methods{
      {"full", "every weight trained", 5e-3},
      {"lora", "A uniform, B zero", 1e-2},
      {"pissa", "A and B hold the top of W's spectrum, the base the rest", 5e-3},
      {"olora", "A and B from a QR of W, the base the rest", 5e-3},
      {"qlora4", "LoRA on a base in 4 bits (NF4)", 1e-2},
      {"loftq4", "the same, A and B start as the correction of the rounding", 1e-2},
      {"qpissa4", "PiSSA whose base is then rounded to 4 bits", 1e-2},
      {"qlora2", "LoRA on a base in 2 bits (NF2)", 1e-2},
      {"loftq2", "LoftQ in 2 bits", 1e-2},
      {"qpissa2", "QPiSSA in 2 bits", 1e-2},
  };
  return methods;
}

const MethodInfo* find_method(const std::string& name) {
  for (const MethodInfo& m : known_methods())
    if (m.name == name) return &m;
  return nullptr;
}

int MethodInfo::stored_bits(const std::string& name) {
  return name.ends_with('4') || name.ends_with('2') ? name.back() - '0' : 0;
}

double default_rate(const MethodInfo& method, Index parameters) {
  constexpr double demo = 804e3, large = 7e9;
  const double larger = double(parameters) / demo;
  if (larger <= 1) return method.learning_rate;
  const double at_large = method.adapts() ? method.learning_rate / 50 : 2e-5;
  const double power = std::log(at_large / method.learning_rate) / std::log(large / demo);
  const double rate = method.learning_rate * std::pow(larger, power);
  const double unit = std::pow(10, std::floor(std::log10(rate)) - 1);  // two digits: what is printed is what is used
  return std::round(rate / unit) * unit;
}

std::uint64_t stream_of(const std::string& module) { return hash_bytes(module); }

Recipe<float> train_everything() {
  return {.linear = [](const std::string&, const lowrank::Matrix<float>& W) -> LinearLayer<float> {
            return lowrank::FullLinear<float>(W);
          },
          .embedding = [](const std::string&, const lowrank::Matrix<float>& W) -> EmbeddingLayer<float> {
            return lowrank::FullEmbedding<float>(W);
          },
          .train_norm = [](const std::string&) { return true; }};
}

Adaptation::Adaptation(const ModelConfig& config, const Weights<float>& base, const std::string& method,
                       const MethodOptions& options)
    : config_(config), base_(&base), method_(method), options_(options) {
  if (find_method(method) == nullptr) {
    std::vector<std::string> names;
    for (const MethodInfo& m : known_methods()) names.push_back(m.name);
    throw lowrank::ArgumentError(common::unknown("method", method, names));
  }
  bits_ = MethodInfo::stored_bits(method_);
  if (method_ == "full") {
    summary_ = "training every weight";
    return;
  }
  std::vector<lowrank::ModuleInfo> modules;
  for_each_weight(config_, [&](const std::string& module, Index rows, Index cols) {
    const bool norm = module.find("norm") != std::string::npos;
    modules.push_back({module,
                       norm                               ? lowrank::ModuleKind::other
                       : module.ends_with("embed_tokens") ? lowrank::ModuleKind::embedding
                                                          : lowrank::ModuleKind::linear,
                       rows, cols});
  });
  if (config_.tie_word_embeddings)
    modules.push_back({"lm_head", lowrank::ModuleKind::linear, config_.vocab_size, config_.hidden_size});
  const lowrank::TargetSelection selection = lowrank::select_targets(modules, {.targets = options.targets});
  for (const std::size_t i : selection.selected) {
    const lowrank::ModuleInfo& m = modules[i];
    if (options.rank < 1 || options.rank > std::min(m.rows, m.cols))
      throw lowrank::ArgumentError(
          message("rank must lie in [1, min(", m.rows, ", ", m.cols, ")] for ", m.name, ", got ", options.rank));
    targets_.insert(m.name);
  }
  summary_ = selection.summary();
  for (const std::string& kind : options_.train_fully)
    if (std::none_of(modules.begin(), modules.end(), [&](const auto& m) { return kind_of(m.name) == kind; }))
      throw lowrank::ArgumentError("no module is called '" + kind +
                                   "', names are like 'norm', 'embed_tokens', 'q_proj'");
}

bool Adaptation::trains_fully(const std::string& module) const {
  return method_ == "full" || std::find(options_.train_fully.begin(), options_.train_fully.end(), kind_of(module)) !=
                                  options_.train_fully.end();
}

LinearLayer<float> Adaptation::adapt(const std::string& module, const lowrank::Matrix<float>& W) {
  using lowrank::DenseBase, lowrank::LoraLinear;
  const lowrank::LoraLinearOptions layer_options{.dropout = options_.dropout,
                                                 .seed = options_.seed ^ stream_of(module)};
  if (method_ == "lora") {
    const auto init = lowrank::kaiming<float>(W.rows(), W.cols(),
                                              {.rank = options_.rank,
                                               .alpha = options_.alpha,
                                               .rank_stabilised = options_.rank_stabilised,
                                               .seed = options_.seed ^ stream_of(module)});
    return LoraLinear<float>(DenseBase<float>(W.view()), init.factors, layer_options);
  }
  if (quantises()) return adapt_quantised(module, W);
  // Methods that move part of W into the factors: the layer owns the changed base, we remember where the factors
  // started.
  lowrank::Initialised<float> init =
      method_ == "pissa"
          ? lowrank::pissa(W, {.rank = options_.rank,
                               .alpha = options_.alpha,
                               .rank_stabilised = options_.rank_stabilised,
                               .svd = {.seed = options_.seed}})
          : lowrank::olora(
                W, {.rank = options_.rank, .alpha = options_.alpha, .rank_stabilised = options_.rank_stabilised});
  LoraLinear<float> layer(DenseBase<float>(std::move(init.base)), init.factors, layer_options);
  start_.insert_or_assign(module, std::move(init.factors));
  return layer;
}

Recipe<float> Adaptation::recipe() {
  return {.linear = [this](const std::string& module, const lowrank::Matrix<float>& W) -> LinearLayer<float> {
            if (trains_fully(module)) return lowrank::FullLinear<float>(W);
            if (targets_.count(module) > 0) return adapt(module, W);
            return lowrank::FrozenLinear<float>(lowrank::DenseBase<float>(W.view()));
          },
          .embedding = [this](const std::string& module, const lowrank::Matrix<float>& W) -> EmbeddingLayer<float> {
            if (trains_fully(module)) return lowrank::FullEmbedding<float>(W);
            if (targets_.count(module) == 0) return FrozenEmbedding<float>(W.view());
            // PEFT starts an embedding's A at zero and B normal: kaiming's factors with the roles swapped.
            lowrank::LoraFactors<float> f;
            f.scale = float(options_.rank_stabilised ? lowrank::rslora_scale(options_.alpha, options_.rank)
                                                     : lowrank::lora_scale(options_.alpha, options_.rank));
            f.A = lowrank::Matrix<float>(options_.rank, W.rows());
            f.B = lowrank::Matrix<float>(W.cols(), options_.rank);
            lowrank::CounterRng(options_.seed, stream_of(module)).fill_normal(f.B.view());
            return lowrank::LoraEmbedding<float>(lowrank::DenseBase<float>(W.view()), f);
          },
          .train_norm = [this](const std::string& module) { return trains_fully(module); }};
}

}  // namespace llama

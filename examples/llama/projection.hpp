// SPDX-License-Identifier: Apache-2.0
// Where this model and lowrank meet: a weight of the model as one of lowrank's layers.
//
// This is the file to read when you want to put adapters into a trainer of your own. A projection of the transformer is
// a matrix product y = x·Wᵀ. Here W is held by whichever layer the *recipe* chose for it:
//
//   FrozenLinear     W as it came, no gradient                       (what stays of the base model)
//   FullLinear       W itself trained                                (full fine-tuning)
//   LoraLinear       W frozen in f32, plus s·B·A trained             (LoRA, PiSSA, OLoRA, …: only the start differs)
//   LoraLinear over a QuantisedMatrix                                (QLoRA, LoftQ: the base in 4 or 2 bits)
//
// All have the same interface, so a variant and std::visit are all the machinery there is. Activations are the model's
// own Eigen matrices; lowrank looks at them in place.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <variant>

#include "config.hpp"
#include "lowrank/adapter/embedding.hpp"
#include "lowrank/adapter/linear.hpp"
#include "lowrank/adapter/lora.hpp"
#include "lowrank/adapter/merge.hpp"
#include "lowrank/eigen.hpp"
#include "lowrank/quant/quantised_matrix.hpp"

namespace llama {

/// A weight by the name it has in a checkpoint without ".weight"; a norm's has one row. Owned by whoever loaded or
/// trained it; frozen layers look at it, so it must outlive the model.
template <class T>
using Weights = std::map<std::string, lowrank::Matrix<T>>;

template <class T>
const lowrank::Matrix<T>& weight_at(const Weights<T>& weights, const std::string& module) {
  const auto found = weights.find(module);
  if (found == weights.end())
    throw lowrank::ArgumentError("llama: the checkpoint has no weight '" + module + ".weight'");
  return found->second;
}

template <class T>
using LinearLayer = std::variant<lowrank::FrozenLinear<T>, lowrank::FullLinear<T>, lowrank::LoraLinear<T>,
                                 lowrank::LoraLinear<T, lowrank::QuantisedMatrix<T>>>;

/// A weight of the transformer, whatever became of it.
template <class T>
class Projection {
 public:
  explicit Projection(LinearLayer<T> layer) : layer_(std::move(layer)) {}

  /// y = x·W'ᵀ with W' the weight as it now is, adapter included.
  void forward(const Mat<T>& x, Mat<T>& y, lowrank::Phase phase) {
    std::visit(
        [&](auto& layer) {
          y.resize(x.rows(), layer.out_features());
          layer.forward(x, y, workspace_, phase);
        },
        layer_);
  }
  /// Adds to the gradients of what is trainable here; dx = g·W', or dx += g·W' when several projections share x.
  void backward(const Mat<T>& x, const Mat<T>& g, Mat<T>& dx, lowrank::Update update = lowrank::Update::assign) {
    std::visit(
        [&](auto& layer) {
          dx.resize(x.rows(), x.cols());
          layer.backward(x, g, workspace_, dx, {.dx = update});
        },
        layer_);
  }
  /// The same where nothing below is trainable and nobody asks for dx.
  void backward(const Mat<T>& x, const Mat<T>& g) {
    std::visit([&](auto& layer) { layer.backward(x, g, workspace_); }, layer_);
  }

  [[nodiscard]] lowrank::Parameters<T>& parameters() {
    return std::visit([](auto& layer) -> lowrank::Parameters<T>& { return layer.parameters(); }, layer_);
  }
  [[nodiscard]] LinearLayer<T>& layer() { return layer_; }
  /// Where a resumed run goes on: each training pass draws a dropout mask of its own.
  void set_training_passes(Index count) { workspace_.call = std::uint64_t(count); }
  /// The adapter, when there is one.
  [[nodiscard]] std::optional<lowrank::LoraFactors<T>> factors() const {
    return std::visit(
        [](const auto& layer) -> std::optional<lowrank::LoraFactors<T>> {
          if constexpr (requires { layer.factors(); })
            return layer.factors();
          else
            return std::nullopt;
        },
        layer_);
  }
  /// W' as a matrix of its own.
  [[nodiscard]] lowrank::Matrix<T> weight() const {
    return std::visit(
        [](const auto& layer) {
          if constexpr (requires { layer.base().dequantise(); })
            return lowrank::merged_weight<T>(layer.base().dequantise().view(), layer.factors());
          else if constexpr (requires { layer.factors(); })
            return lowrank::merged_weight<T>(layer.base().weight(), layer.factors());
          else if constexpr (requires { layer.weight(); })
            return lowrank::Matrix<T>(layer.weight());
          else
            return lowrank::Matrix<T>(layer.base().weight());
        },
        layer_);
  }

 private:
  LinearLayer<T> layer_;
  lowrank::LoraWorkspace<T> workspace_;  // what forward keeps for backward; grows once, then no step allocates
};

/// Throws ArgumentError unless every id lies in [0, vocabulary).
inline void check_tokens(const char* where, std::span<const Token> ids, Index vocabulary) {
  for (std::size_t t = 0; t < ids.size(); ++t)
    if (ids[t] < 0 || ids[t] >= vocabulary)
      throw lowrank::ArgumentError(message(where, ": token ", t, " must lie in [0, ", vocabulary, "), got ", ids[t]));
}

/// A frozen embedding table; lowrank has the two trainable ones.
template <class T>
class FrozenEmbedding {
 public:
  explicit FrozenEmbedding(lowrank::MatrixView<const T> table) : table_(table) {}

  [[nodiscard]] lowrank::MatrixView<const T> weight() const { return table_; }
  [[nodiscard]] lowrank::Parameters<T>& parameters() { return parameters_; }
  void forward(std::span<const Token> ids, Mat<T>& y, lowrank::LoraWorkspace<T>& /*ws*/) const {
    check_tokens("FrozenEmbedding::forward", ids, table_.rows());
    for (Index t = 0; t < y.rows(); ++t) std::copy_n(&table_(ids[std::size_t(t)], 0), table_.cols(), &y(t, 0));
  }
  void backward(std::span<const Token> /*ids*/, const Mat<T>& /*g*/, lowrank::LoraWorkspace<T>& /*ws*/) {}

 private:
  lowrank::MatrixView<const T> table_;
  lowrank::Parameters<T> parameters_;
};

template <class T>
using EmbeddingLayer = std::variant<FrozenEmbedding<T>, lowrank::FullEmbedding<T>, lowrank::LoraEmbedding<T>>;

/// ΔW of an embedding adapter is s·(B·A)ᵀ: PEFT stores the factors of the transposed table.
template <class T>
lowrank::Matrix<T> embedding_weight(const EmbeddingLayer<T>& embedding) {
  return std::visit(
      [](const auto& layer) {
        if constexpr (requires { layer.factors(); }) {
          lowrank::Matrix<T> merged(layer.base().weight());
          const lowrank::LoraFactors<T> f = layer.factors();
          lowrank::gemm(f.scale, f.A.view().transposed(), f.B.view().transposed(), merged.view(),
                        lowrank::Update::accumulate);
          return merged;
        } else {
          return lowrank::Matrix<T>(layer.weight());
        }
      },
      embedding);
}

/// Which layer each weight becomes. The model asks this once for every weight and knows no method by name, so a new
/// method is a new recipe.
template <class T>
struct Recipe {
  std::function<LinearLayer<T>(const std::string& module, const lowrank::Matrix<T>& W)> linear;
  std::function<EmbeddingLayer<T>(const std::string& module, const lowrank::Matrix<T>& W)> embedding;
  std::function<bool(const std::string& module)> train_norm;
};

}  // namespace llama

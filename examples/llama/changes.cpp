// SPDX-License-Identifier: Apache-2.0
// What training did to the weights: ΔW of adapters from their factors, of fully trained weights from the difference.
#include <cstdio>

#include "lowrank/adapter/undo.hpp"
#include "lowrank/linalg/factor_svd.hpp"
#include "lowrank/linalg/singular_values.hpp"
#include "lowrank/spectrum/tracker.hpp"
#include "methods.hpp"

namespace llama {

std::map<std::string, lowrank::LoraFactors<float>> Adaptation::factors(Model<float>& model) const {
  std::map<std::string, lowrank::LoraFactors<float>> all;
  model.for_each_projection([&](const std::string& module, Projection<float>& projection) {
    if (auto trained = projection.factors()) {
      const auto start = start_.find(module);
      all.emplace(module, start == start_.end() ? std::move(*trained)
                                                : lowrank::undo_residual(*trained, start->second).factors);
    }
  });
  return all;
}

void Adaptation::watch(lowrank::Tracker<float>& tracker, Model<float>& model) const {
  model.for_each_projection([&](const std::string& module, Projection<float>& projection) {
    const std::string name = method_ + "/" + module;
    std::visit(
        [&](const auto& layer) {
          if constexpr (requires { layer.factors(); }) {
            if (const auto start = start_.find(module); start != start_.end())
              tracker.watch(name, layer.A(), layer.B(), layer.scale(), start->second);
            else
              tracker.watch(name, layer.A(), layer.B(), layer.scale());
          } else if constexpr (requires { layer.weight(); }) {
            tracker.watch(name, layer.weight());
          }
        },
        projection.layer());
  });
}

TrainResult train_tracked(const Adaptation& adaptation, Model<float>& model, const std::vector<Token>& tokens,
                          TrainOptions options, const std::string& file) {
  lowrank::Tracker<float> tracker(file);
  adaptation.watch(tracker, model);
  options.after_step = [&] { tracker.step(); };
  TrainResult result = train(model, tokens, options);
  std::fprintf(stderr, "%s: %td records of its updates took %.2f %% of the training's time\n",
               adaptation.method().c_str(), tracker.records(), 100 * tracker.seconds_spent() / result.seconds);
  tracker.record();  // how it ended, whatever the budget says
  return result;
}

std::vector<Adaptation::Change> Adaptation::changes(Model<float>& model) const {
  std::vector<Change> changes;
  const auto adapters = factors(model);
  const Weights<float> now = model.weights();
  for (const auto& [module, W] : now) {
    const auto& before = weight_at(*base_, base_->count(module) > 0 ? module : "model.embed_tokens");
    Change c{module, kind_of(module), W.rows(), W.cols(), {}, 0};
    if (const auto at = adapters.find(module); at != adapters.end()) {
      c.sigma =
          lowrank::singular_values(at->second).values;  // from the factors: exact, and the product is never formed
    } else if (trains_fully(module) || targets_.count(module) > 0) {
      lowrank::Matrix<float> delta(W.rows(), W.cols());
      for (Index i = 0; i < W.size(); ++i) delta.data()[i] = W.data()[i] - before.data()[i];
      c.sigma = lowrank::singular_values(delta.view()).values;
    } else {
      continue;
    }
    double change = 0, all = 0;
    for (const double s : c.sigma) change += s * s;
    for (Index i = 0; i < before.size(); ++i) all += double(before.data()[i]) * double(before.data()[i]);
    c.relative_norm = std::sqrt(change / all);
    changes.push_back(std::move(c));
  }
  return changes;
}

}  // namespace llama

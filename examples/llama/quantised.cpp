// SPDX-License-Identifier: Apache-2.0
// QLoRA, LoftQ and QPiSSA: the base of an adapted module in 4 or 2 bits. Three ways to start, one kind of layer.
#include "lowrank/init/kaiming.hpp"
#include "lowrank/init/loftq.hpp"
#include "lowrank/init/qpissa.hpp"
#include "methods.hpp"

namespace llama {

LinearLayer<float> Adaptation::adapt_quantised(const std::string& module, const lowrank::Matrix<float>& W) {
  using Base = lowrank::QuantisedMatrix<float>;
  const lowrank::LoraLinearOptions layer_options{.dropout = options_.dropout,
                                                 .seed = options_.seed ^ stream_of(module)};
  const lowrank::QuantiseOptions storage{.codebook = lowrank::Codebook::normal_float(bits_), .block_size = 64};
  Base base;
  lowrank::LoraFactors<float> factors;
  if (method_.starts_with("qlora")) {
    base = lowrank::quantise(W, storage);
    factors = lowrank::kaiming<float>(W.rows(), W.cols(),
                                      {.rank = options_.rank,
                                       .alpha = options_.alpha,
                                       .rank_stabilised = options_.rank_stabilised,
                                       .seed = options_.seed ^ stream_of(module)})
                  .factors;
  } else {
    const lowrank::LoftqOptions options{.rank = options_.rank,
                                        .alpha = options_.alpha,
                                        .rank_stabilised = options_.rank_stabilised,
                                        .quantise = storage,
                                        .seed = options_.seed};
    auto init = method_.starts_with("loftq") ? lowrank::loftq(W, options) : lowrank::qpissa(W, options);
    base = std::move(init.base);
    factors = init.factors;
    start_.insert_or_assign(module, std::move(init.factors));
  }
  bytes_ += base.bits_per_weight() / 8 * double(W.size());
  weights_ += double(W.size());
  return lowrank::LoraLinear<float, Base>(std::move(base), factors, layer_options);
}

}  // namespace llama

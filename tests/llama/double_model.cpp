// SPDX-License-Identifier: Apache-2.0
// The example instantiates its model for float; finite differences want double.
#include "../../examples/llama/model.cpp"

template class llama::Model<double>;
template llama::Weights<double> llama::random_weights<double>(const llama::ModelConfig&, std::uint64_t);

// SPDX-License-Identifier: Apache-2.0
// The initialisers behind `lowrank init`, for weights of any stored type. Compiled apart from the command line.
#pragma once

#include <lowrank/init/eva.hpp>
#include <lowrank/init/initialised.hpp>
#include <lowrank/quant/quantised_matrix.hpp>
#include <variant>

#include "models.hpp"
#include "module_data.hpp"

namespace lowrank::tool {

struct MethodOptions {
  std::string method;
  Index rank = 16;
  double alpha = 16;
  bool rslora = false;
  std::string dtype = "f32";  ///< of the stored factors
  int bits = 4, iterations = 5;
  Index block_size = 64;
  bool double_quantise = false;
  int scale_search = 0;
  /// corda and eva: --activations; lora_ga: --gradients.
  std::shared_ptr<const ModuleData> data = nullptr;
  std::string corda_mode = "instruction";
  double damping = 0.01, gamma = 16;
  /// eva: directions kept for each module, in multiples of the rank; above 1 the ranks move to where they explain most.
  double rho = 2;
  bool whiten = false, centre = true;
};

/// Whether the method looks at activations or at gradients.
bool needs_activations(const std::string& method);
bool needs_gradients(const std::string& method);
/// Whether the method replaces W by another base, and whether that base is quantised.
bool changes_base(const std::string& method);
bool quantises(const std::string& method);
/// Whether the method looks at the values of a weight, and not only at its shape.
bool reads_weights(const std::string& method);

/// The new base in the weight's own storage.
using BaseStorage = std::variant<std::monostate, Matrix<float>, Matrix<double>, Matrix<bf16>, Matrix<f16>>;

/// One module's adapter at the start, and its base where the method changes it.
struct Outcome {
  LoraFactors<float> factors;
  InitReport report;
  BaseStorage base;                   ///< out×in
  QuantisedMatrix<float> quantised;   ///< loftq, qpissa
  double plain_error = 0, error = 0;  ///< of plain quantisation, and of Q + s·B·A
};

/// EVA looks at the inputs of all modules before it knows the rank of one.
struct EvaPlan {
  std::vector<ActivationSvd<float>> inputs;  ///< one for each selected module
  std::vector<Index> ranks;                  ///< 0: the module gets no adapter
};
EvaPlan plan_eva(const MethodOptions& o, const Modules& modules, const std::vector<std::size_t>& selected,
                 std::uint64_t seed);
/// EVA's factors of the selected module k, with `out` outputs, at the scale of the nominal rank.
Outcome initialise_eva(const MethodOptions& o, const EvaPlan& plan, std::size_t k, Index out);

/// Runs the method (any but eva) on a module's weight.
/// **Throws** IoError naming the weight, and the element where that is not finite.
Outcome initialise(const MethodOptions& o, const io::TensorView& weight, const ModuleInfo& info, std::uint64_t seed);

/// DoRA's magnitudes at the start, where base + s·B·A = W: the row norms of W.
std::vector<float> row_norms(const io::TensorView& weight, bool transposed);
/// The same where base + s·B·A is not W, because the base is quantised: the row norms of that sum.
std::vector<float> row_norms(const BaseStorage& base, const LoraFactors<float>& factors);

}  // namespace lowrank::tool

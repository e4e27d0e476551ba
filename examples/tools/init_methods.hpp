// SPDX-License-Identifier: Apache-2.0
// The initialisers behind `lowrank init`, for weights of any stored type. Compiled apart from the command line.
#pragma once

#include <lowrank/init/initialised.hpp>
#include <lowrank/quant/quantized_matrix.hpp>
#include <variant>

#include "models.hpp"

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
};

/// Whether the method replaces W by another base, and whether that base is quantised.
bool changes_base(const std::string& method);
bool quantises(const std::string& method);

/// The new base in the weight's own storage.
using BaseStorage = std::variant<std::monostate, Matrix<float>, Matrix<double>, Matrix<bf16>, Matrix<f16>>;

/// One module's adapter at the start, and its base where the method changes it.
struct Outcome {
  LoraFactors<float> factors;
  InitReport report;
  BaseStorage base;                   ///< out×in
  QuantizedMatrix<float> quantised;   ///< loftq, qpissa
  double plain_error = 0, error = 0;  ///< of plain quantisation, and of Q + s·B·A
};

/// Runs the method on a module's weight. `transposed`: the file stores in×out.
Outcome initialise(const MethodOptions& o, const io::TensorView& weight, const ModuleInfo& info, bool transposed,
                   std::uint64_t seed);

/// DoRA's magnitudes at the start, where base + s·B·A = W: the row norms of W.
std::vector<float> row_norms(const io::TensorView& weight, bool transposed);

}  // namespace lowrank::tool

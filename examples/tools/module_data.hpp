// SPDX-License-Identifier: Apache-2.0
// What data-driven initialisers are given beside the weights: one matrix a module, from a .safetensors or .npz file.
#pragma once

#include <memory>
#include <optional>
#include <variant>

#include "lowrank/io/npz.hpp"
#include "models.hpp"

namespace lowrank::tool {

/// A file of matrices named after modules: activations or gradients.
class ModuleData {
 public:
  /// **Throws** IoError: not a .safetensors file, nor a .npz archive.
  explicit ModuleData(const std::string& path);

  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] bool contains(const std::string& name) const;
  /// The matrix of that name, widened. **Throws** IoError: absent, no matrix, no floats.
  [[nodiscard]] Matrix<float> matrix(const std::string& name) const;
  /// Its shape, without reading it. **Throws** as matrix().
  [[nodiscard]] std::pair<Index, Index> shape(const std::string& name) const;
  [[noreturn]] void fail(const std::string& name, const std::string& what) const;

 private:
  std::string path_;
  std::variant<std::unique_ptr<io::SafeTensors>, std::unique_ptr<io::NpzFile>> file_;
};

/// The name under which the file holds the inputs of a module, and what is there: `<module>`, tokens×in, or
/// `<module>.covariance`, in×in.
struct ActivationEntry {
  std::string name;
  bool covariance = false;
};

/// Finds and checks the inputs of a module with `in` inputs.
/// **Throws** IoError: neither or both are there, another shape, no tokens.
ActivationEntry find_activations(const ModuleData& data, const std::string& module, Index in);

/// Finds and checks the gradient of a module's weight, of the shape the weight is stored in: `<module>` or
/// `<module>.weight`.
/// **Throws** IoError: absent, another shape.
std::string find_gradient(const ModuleData& data, const ModuleInfo& module);

}  // namespace lowrank::tool

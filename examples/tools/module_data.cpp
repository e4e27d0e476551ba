// SPDX-License-Identifier: Apache-2.0
// Activations and gradients by module.
#include "module_data.hpp"

namespace lowrank::tool {

ModuleData::ModuleData(const std::string& path) : path_(path) {
  if (path.ends_with(".npz"))
    file_ = std::make_unique<io::NpzFile>(path);
  else if (path.ends_with(".safetensors"))
    file_ = std::make_unique<io::SafeTensors>(path);
  else
    throw IoError(path, "must be a .safetensors or a .npz file, with one matrix for each module");
}

bool ModuleData::contains(const std::string& name) const {
  if (const auto* tensors = std::get_if<0>(&file_)) return (*tensors)->find(name) != nullptr;
  return std::get<1>(file_)->arrays().contains(name);
}

Matrix<float> ModuleData::matrix(const std::string& name) const {
  (void)shape(name);
  if (const auto* tensors = std::get_if<0>(&file_)) {
    const io::TensorView t = (**tensors)[name];
    Matrix<float> m = t.to_matrix<float>();
    t.drop();  // a model's activations may be larger than memory
    return m;
  }
  return (*std::get<1>(file_))[name].to_matrix<float>();
}

std::pair<Index, Index> ModuleData::shape(const std::string& name) const {
  const auto of = [&](const io::Shape& s) {
    if (s.size() != 2) fail(name, "has shape " + io::shape_text(s) + ", expected a matrix");
    constexpr auto most = std::uint64_t(std::numeric_limits<Index>::max());
    if (s[0] > most || s[1] > most) fail(name, "has an extent beyond what can be addressed");
    return std::pair(Index(s[0]), Index(s[1]));
  };
  if (const auto* tensors = std::get_if<0>(&file_)) return of((**tensors)[name].shape());
  return of((*std::get<1>(file_))[name].shape());
}

void ModuleData::fail(const std::string& name, const std::string& what) const { throw IoError(path_, name, what); }

ActivationEntry find_activations(const ModuleData& data, const std::string& module, Index in) {
  const std::string covariance = module + ".covariance";
  const bool inputs = data.contains(module), squares = data.contains(covariance);
  if (inputs == squares)
    data.fail(module, inputs ? "has activations and a covariance; which of them counts?"
                             : "no such tensor, nor \"" + covariance + "\": the module's inputs are missing");
  const std::string& name = inputs ? module : covariance;
  const auto [rows, cols] = data.shape(name);
  if (cols != in || (squares && rows != in))
    data.fail(name, common::text("is ", common::shape_text(rows, cols), ", expected ",
                                 squares ? common::shape_text(in, in) : common::text("tokens x ", in)));
  if (rows == 0) data.fail(name, "holds no tokens");
  return {name, squares};
}

std::string find_gradient(const ModuleData& data, const ModuleInfo& module) {
  const std::string weight = module.name + ".weight";
  const bool plain = data.contains(module.name), suffixed = data.contains(weight);
  if (plain == suffixed)
    data.fail(module.name, plain ? "and \"" + weight + "\" are both there; which of them counts?"
                                 : "no such tensor, nor \"" + weight + "\": the gradient is missing");
  const std::string& name = plain ? module.name : weight;
  const auto [rows, cols] = data.shape(name);
  if (rows != module.rows || cols != module.cols)
    data.fail(name, common::text("is ", common::shape_text(rows, cols), ", the weight is ",
                                 common::shape_text(module.rows, module.cols)));
  return name;
}

}  // namespace lowrank::tool

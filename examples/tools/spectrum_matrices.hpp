// SPDX-License-Identifier: Apache-2.0
// The matrices of a checkpoint as scans see them: what is one, what its values are, and which belong to each other.
#pragma once

#include <string>
#include <vector>

#include "lowrank/io/bitsandbytes.hpp"
#include "lowrank/io/bitsandbytes_int8.hpp"
#include "lowrank/io/float8.hpp"
#include "models.hpp"

namespace lowrank::tool {

/// Why something was left out. What is no matrix is left out of any scan; the rest are faults: the inputs do not fit
/// each other, or a matrix could not be analysed.
enum class SkipReason {
  vector,       ///< fewer than two dimensions
  type,         ///< stored as what is no number to analyse
  empty,        ///< no elements
  twice,        ///< one name for two matrices
  missing,      ///< one side lacks it
  shape,        ///< another shape on the other side
  unsupported,  ///< an adapter that the command cannot judge
  failed        ///< NaN, a damaged description
};

/// A tensor left out, and why, for the program and for a reader.
struct Skipped {
  std::string name;
  SkipReason why;
  std::string reason;
  /// Whether the exit code is to be 1 for it.
  [[nodiscard]] bool is_fault() const {
    return why != SkipReason::vector && why != SkipReason::type && why != SkipReason::empty;
  }
};

/// One matrix of a checkpoint: a tensor of two dimensions, one of more with all but the first folded, or a slice of a
/// stack of experts. Quantised weights are dequantised when their values are asked for.
struct MatrixTensor {
  enum class Storage { plain, bitsandbytes4, bitsandbytes8, float8 };

  std::string name;  ///< with "[e]" for a slice
  io::TensorView tensor;
  Index rows = 0, cols = 0, slice = 0;
  Storage storage = Storage::plain;
  const io::Checkpoint* checkpoint = nullptr;  ///< where the other parts of a quantised weight are
  std::string type = {};                       ///< "nf4", "fp4"; empty for all but 4 bits
  std::string problem = {};                    ///< why it cannot be read; its shape is then unknown

  [[nodiscard]] std::uint64_t bytes() const {
    return std::uint64_t(rows) * std::uint64_t(cols) * std::uint64_t(io::dtype_bits(tensor.dtype())) /
           (storage == Storage::bitsandbytes4 ? 16 : 8);
  }
  [[nodiscard]] std::string stored_as() const {
    return type.empty() ? std::string(io::dtype_name(tensor.dtype())) : type;
  }
  /// 4 or 8 for a quantised weight, 0 for any other.
  [[nodiscard]] int quantised_bits() const {
    return storage == Storage::plain ? 0 : storage == Storage::bitsandbytes4 ? 4 : 8;
  }
  [[nodiscard]] bool is_double() const { return storage == Storage::plain && tensor.dtype() == io::Dtype::F64; }
  [[nodiscard]] bool is_16_bit() const { return tensor.dtype() == io::Dtype::BF16 || tensor.dtype() == io::Dtype::F16; }
};

/// All matrices by name; what is none goes to `skipped`. A quantised weight whose description is damaged is in the list
/// with its `problem`.
std::vector<MatrixTensor> matrices_of(const io::Checkpoint& checkpoint, std::vector<Skipped>& skipped);
const MatrixTensor* find_matrix(const std::vector<MatrixTensor>& list, const std::string& name);
/// Whether name contains the filter (empty: everything).
bool selected(const std::string& name, const std::string& filter);

/// The matrix of the same name and shape; null, and a line in `skipped`, where there is none. `where` is what messages
/// call the list: "the base".
const MatrixTensor* partner_of(const MatrixTensor& x, const std::vector<MatrixTensor>& list, const std::string& where,
                               std::vector<Skipped>& skipped);

/// What belongs to each other in two checkpoints, by the order of the first.
struct MatrixPair {
  const MatrixTensor *first, *second;
  [[nodiscard]] bool is_double() const { return first->is_double() || second->is_double(); }
  [[nodiscard]] std::uint64_t bytes() const { return first->bytes() + second->bytes(); }
};
/// The pairs of the selected matrices; what has no partner in either is listed. `where`: what messages call `second`.
std::vector<MatrixPair> pairs_of(const std::vector<MatrixTensor>& first, const std::vector<MatrixTensor>& second,
                                 const std::string& where, const std::string& filter, std::vector<Skipped>& skipped);

/// A module of an adapter and the weight it updates.
struct ModulePair {
  const io::AdapterModule* module;
  const MatrixTensor* weight;
  bool transposed;  ///< the weight is stored as the transpose of the update
};
/// The selected modules with their weights; what has none, or one of another shape, is listed.
std::vector<ModulePair> pairs_of(const io::PeftAdapter& adapter, const std::vector<MatrixTensor>& weights,
                                 const std::string& filter, std::vector<Skipped>& skipped);
/// The modules two adapters share.
std::vector<std::pair<const io::AdapterModule*, const io::AdapterModule*>> pairs_of(const io::PeftAdapter& first,
                                                                                    const io::PeftAdapter& second,
                                                                                    const std::string& where,
                                                                                    const std::string& filter,
                                                                                    std::vector<Skipped>& skipped);

/// Whether a path is a PEFT adapter's directory.
bool is_adapter(const std::string& path);

template <class List>
std::vector<std::string> names_of(const List& list) {
  std::vector<std::string> names;
  for (const auto& x : list) names.push_back(x.name);
  return names;
}

/// Says in the entry of a report how its matrices are stored: "dequantised", and for 8-bit ones under the key given
/// what their scales are ("none" where there is none). A null matrix is passed over.
void say_storage(Json& j, std::initializer_list<std::pair<const char*, const MatrixTensor*>> matrices);
/// Notes on stderr how many matrices are dequantised, and how many have 8 bits without a scale.
void note_quantised(const Common& common, std::initializer_list<const std::vector<MatrixTensor>*> lists);

/// Throws NonFiniteError naming file, matrix and the first value that is not finite.
template <Real T>
void expect_finite(const MatrixTensor& m, const Matrix<T>& values) {
  bool good = true;
  for (Index i = 0; i < values.size(); ++i) good &= std::isfinite(values.data()[i]);
  if (good) return;
  for (Index i = 0; i < m.rows; ++i)
    for (Index j = 0; j < m.cols; ++j)
      if (!std::isfinite(values(i, j)))
        throw NonFiniteError(text(m.tensor.file().path(), ": '", m.name, "': holds ", double(values(i, j)), " in row ",
                                  i, ", column ", j));
}

/// The values of a matrix as T, copied. Throws NonFiniteError naming the first value that is not finite, IoError where
/// the weight has a problem.
template <Real T>
Matrix<T> values_of(const MatrixTensor& m) {
  using Storage = MatrixTensor::Storage;
  if (!m.problem.empty()) throw Error(m.problem);
  Matrix<T> out;
  if (m.storage == Storage::bitsandbytes4) {
    out = io::read_bitsandbytes<T>(*m.checkpoint, m.name).dequantise();
  } else if (m.storage == Storage::bitsandbytes8) {
    out = io::read_bitsandbytes_int8<T>(*m.checkpoint, m.name);
  } else if (m.storage == Storage::float8) {
    out = io::read_float8<T>(*m.checkpoint, m.tensor, m.slice);
  } else {
    out.resize(m.rows, m.cols);
    m.tensor.copy_to(out.data(), m.slice * m.rows * m.cols, m.rows * m.cols);
  }
  expect_finite(m, out);
  return out;
}

/// Calls f with a value of the type to compute in: double where the weights are kept in it, else float.
template <class F>
auto with_precision(bool is_double, F&& f) {
  return is_double ? f(double{}) : f(float{});
}

/// Factors in T.
template <Real T>
LoraFactors<T> factors_as(const LoraFactors<float>& f) {
  return {Matrix<T>(f.A.view()), Matrix<T>(f.B.view()), T(f.scale)};
}

}  // namespace lowrank::tool

// SPDX-License-Identifier: Apache-2.0
// Trainable values as one contiguous block, gradients as its twin, and a table that says what lies where.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/core/matrix.hpp"
#include "lowrank/core/scalar.hpp"

namespace lowrank {

/// One named matrix inside a block: `rows × cols` scalars, row-major, from `offset`.
struct ParameterInfo {
  std::string name;
  Index rows = 0, cols = 0, offset = 0;

  [[nodiscard]] Index size() const noexcept { return rows * cols; }
};

/// A layer's trainable values and their gradients.
///
/// A layer that stands alone owns its two blocks. FlatParameters::pack() moves the contents of many layers into two
/// blocks of its own and points the layers there, so that an optimizer, an all-reduce or a checkpoint of the whole
/// model is one pointer and one length. Views taken before a pack() are stale after it.
template <Real T>
class Parameters {
 public:
  /// Blocks of zeros for the named shapes, in this order. **Throws** ShapeError on a negative size.
  explicit Parameters(std::vector<ParameterInfo> table = {}) : table_(std::move(table)) {
    for (ParameterInfo& p : table_) {
      if (p.rows < 0 || p.cols < 0)
        throw ShapeError(detail::text("Parameters: '", p.name, "' has shape ", detail::shape_text(p.rows, p.cols)));
      p.offset = size_;
      size_ += p.size();
    }
    own_.resize(2 * size_);
    std::fill(own_.begin(), own_.end(), T(0));
    values_ = own_.data();
    gradients_ = own_.data() + size_;
  }
  Parameters(Parameters&&) noexcept = default;
  Parameters& operator=(Parameters&&) noexcept = default;
  Parameters(const Parameters&) = delete;  // two layers writing one block would be a surprise
  Parameters& operator=(const Parameters&) = delete;

  [[nodiscard]] Index size() const noexcept { return size_; }
  /// The layer's name in the FlatParameters that packed it, empty before; masks of dropout depend on it.
  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] const std::vector<ParameterInfo>& table() const noexcept { return table_; }
  [[nodiscard]] std::span<T> values() noexcept { return {values_, std::size_t(size_)}; }
  [[nodiscard]] std::span<const T> values() const noexcept { return {values_, std::size_t(size_)}; }
  [[nodiscard]] std::span<T> gradients() noexcept { return {gradients_, std::size_t(size_)}; }
  [[nodiscard]] std::span<const T> gradients() const noexcept { return {gradients_, std::size_t(size_)}; }

  /// Entry i of the table as a matrix.
  [[nodiscard]] MatrixView<T> value(std::size_t i) noexcept { return at(values_, i); }
  [[nodiscard]] MatrixView<const T> value(std::size_t i) const noexcept { return at(values_, i); }
  [[nodiscard]] MatrixView<T> gradient(std::size_t i) noexcept { return at(gradients_, i); }
  [[nodiscard]] MatrixView<const T> gradient(std::size_t i) const noexcept { return at(gradients_, i); }

  /// Copies the contents to other memory, of size() scalars each, and uses that from now on.
  void relocate(T* values, T* gradients) {
    if (size_ > 0) {
      std::memmove(values, values_, std::size_t(size_) * sizeof(T));
      std::memmove(gradients, gradients_, std::size_t(size_) * sizeof(T));
    }
    values_ = values;
    gradients_ = gradients;
    own_ = Buffer<T>();
    relocated_ = true;
  }
  /// Whether relocate() has moved the contents out of this object's own memory.
  [[nodiscard]] bool relocated() const noexcept { return relocated_; }
  void set_name(std::string name) noexcept { name_ = std::move(name); }

 private:
  [[nodiscard]] MatrixView<T> at(T* base, std::size_t i) const noexcept {
    const ParameterInfo& p = table_[i];
    return view_of(base + p.offset, p.rows, p.cols);
  }

  std::string name_;
  std::vector<ParameterInfo> table_;
  Index size_ = 0;
  bool relocated_ = false;
  Buffer<T> own_;
  T *values_ = nullptr, *gradients_ = nullptr;
};

/// The trainable values of a whole model in one block, their gradients in another.
///
///     FlatParameters<float> flat;
///     flat.add("layers.0.q_proj", q.parameters());    // names become "layers.0.q_proj.lora_A", …
///     flat.pack();                                    // the layers now live in flat's blocks
///     my_optimizer(flat.values().data(), flat.gradients().data(), flat.size());
///
/// Must outlive the use of the layers it packed.
template <Real T>
class FlatParameters {
 public:
  /// Registers a layer's parameters; their names get `prefix` and a dot in front. Takes effect with pack().
  /// **Throws** ArgumentError after pack(), for a layer that was added already or lives in another's blocks, and for a
  /// name that is taken. **Cost** a comparison with every name so far.
  void add(const std::string& prefix, Parameters<T>& parameters) {
    constexpr const char* where = "FlatParameters::add: ";
    if (packed_) throw ArgumentError(detail::text(where, "'", prefix, "' comes after pack()"));
    if (parameters.relocated())
      throw ArgumentError(detail::text(where, "'", prefix, "' is packed already, as '", parameters.name(), "'"));
    for (const auto& [name, part] : parts_)
      if (part == &parameters)
        throw ArgumentError(detail::text(where, "'", prefix, "' was added already, as '", name, "'"));
    std::vector<ParameterInfo> table = parameters.table();
    for (ParameterInfo& p : table) {
      if (!prefix.empty()) p.name = prefix + "." + p.name;
      p.offset += added_;
      for (const ParameterInfo& other : table_)
        if (other.name == p.name) throw ArgumentError(detail::text(where, "the name '", p.name, "' is taken"));
    }
    parts_.emplace_back(prefix, &parameters);
    table_.insert(table_.end(), table.begin(), table.end());
    added_ += parameters.size();
  }

  /// Allocates the two blocks and moves every registered layer into them. Call once, after the last add().
  /// **Throws** ArgumentError when called again: the layers of the first time would be left behind.
  void pack() {
    if (packed_) throw ArgumentError("FlatParameters::pack: already packed");
    values_.resize(added_);
    gradients_.resize(added_);
    packed_ = true;
    Index offset = 0;
    for (auto& [name, part] : parts_) {
      const Index n = part->size();
      part->relocate(values_.data() + offset, gradients_.data() + offset);
      part->set_name(std::move(name));
      offset += n;
    }
    parts_.clear();
  }

  /// Length of the two blocks; 0 before pack().
  [[nodiscard]] Index size() const noexcept { return values_.size(); }
  [[nodiscard]] const std::vector<ParameterInfo>& table() const noexcept { return table_; }
  [[nodiscard]] std::span<T> values() noexcept { return {values_.data(), std::size_t(values_.size())}; }
  [[nodiscard]] std::span<const T> values() const noexcept { return {values_.data(), std::size_t(values_.size())}; }
  [[nodiscard]] std::span<T> gradients() noexcept { return {gradients_.data(), std::size_t(gradients_.size())}; }
  void zero_gradients() { std::fill(gradients_.begin(), gradients_.end(), T(0)); }

  /// The named entry as a matrix. **Throws** ArgumentError for an unknown name, and before pack().
  [[nodiscard]] MatrixView<T> value(const std::string& name) {
    if (!packed_) throw ArgumentError(detail::text("FlatParameters::value: '", name, "' has no place before pack()"));
    for (const ParameterInfo& p : table_)
      if (p.name == name) return view_of(values_.data() + p.offset, p.rows, p.cols);
    throw ArgumentError(
        detail::text("FlatParameters::value: no parameter named '", name, "' among ", table_.size(), " parameters"));
  }

 private:
  std::vector<std::pair<std::string, Parameters<T>*>> parts_;
  std::vector<ParameterInfo> table_;
  Index added_ = 0;
  Buffer<T> values_, gradients_;
  bool packed_ = false;
};

}  // namespace lowrank

// SPDX-License-Identifier: Apache-2.0
// Trainable values as one contiguous block, gradients as its twin, and a table that says what lies where.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
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

namespace detail {

/// The two blocks of a packed model. Every layer in them holds them too, so that they go when the last user goes.
template <class T>
struct FlatBlocks {
  Buffer<T> values, gradients;
  bool deserted = false;  ///< whether the values of a layer are still here and the layer, or its successor, is not
  std::string deserter;   ///< the first such layer's name

  void desert(std::string& name) noexcept {
    if (!std::exchange(deserted, true)) deserter.swap(name);  // the name's own memory: nothing to allocate
  }
};

/// One layer's parameters: what moves with the layer while its address stays, so that whoever knows it (a
/// FlatParameters, a workspace) still finds it, or learns that it is gone.
template <class T>
struct ParameterNode {
  std::string name;
  std::vector<ParameterInfo> table;
  Index size = 0;
  bool relocated = false;
  Buffer<T> own;
  T *values = nullptr, *gradients = nullptr;
  std::shared_ptr<const void> keep;
  std::shared_ptr<FlatBlocks<T>> flat;
};

}  // namespace detail

template <Real T>
class FlatParameters;

/// A layer's trainable values and their gradients.
///
/// A layer that stands alone owns its two blocks. FlatParameters::pack() moves the contents of many layers into two
/// blocks of its own and points the layers there, so that an optimizer, an all-reduce or a checkpoint of the whole
/// model is one pointer and one length. Views taken before a pack() are stale after it. Moving is O(1) and takes the
/// contents along, registered or packed or not; what was moved from is empty.
template <Real T>
class Parameters {
 public:
  /// Blocks of zeros for the named shapes, in this order. **Throws** ShapeError on a negative size.
  explicit Parameters(std::vector<ParameterInfo> table = {}) : node_(std::make_shared<detail::ParameterNode<T>>()) {
    detail::ParameterNode<T>& n = *node_;
    n.table = std::move(table);
    for (ParameterInfo& p : n.table) {
      if (p.rows < 0 || p.cols < 0)
        throw ShapeError(detail::text("Parameters: '", p.name, "' has shape ", detail::shape_text(p.rows, p.cols)));
      p.offset = n.size;
      n.size += p.size();
    }
    n.own.resize(2 * n.size);
    std::fill(n.own.begin(), n.own.end(), T(0));
    n.values = n.own.data();
    n.gradients = n.own.data() + n.size;
  }
  Parameters(Parameters&&) noexcept = default;
  /// What stood here before is gone, as if destroyed. Were it packed and `other` not, the FlatParameters would go on to
  /// train memory that no layer reads: it refuses from now on.
  Parameters& operator=(Parameters&& other) noexcept {
    if (node_ && other.node_ && node_->flat && node_->flat != other.node_->flat) node_->flat->desert(node_->name);
    node_ = std::move(other.node_);
    return *this;
  }
  Parameters(const Parameters&) = delete;  // two layers writing one block would be a surprise
  Parameters& operator=(const Parameters&) = delete;
  ~Parameters() = default;

  [[nodiscard]] Index size() const noexcept { return node_ ? node_->size : 0; }
  /// The layer's name in the FlatParameters that packed it, empty before; masks of dropout depend on it.
  [[nodiscard]] const std::string& name() const noexcept {
    static const std::string none;
    return node_ ? node_->name : none;
  }
  [[nodiscard]] const std::vector<ParameterInfo>& table() const noexcept {
    static const std::vector<ParameterInfo> none;
    return node_ ? node_->table : none;
  }
  [[nodiscard]] std::span<T> values() noexcept { return {begin_of_values(), std::size_t(size())}; }
  [[nodiscard]] std::span<const T> values() const noexcept { return {begin_of_values(), std::size_t(size())}; }
  [[nodiscard]] std::span<T> gradients() noexcept { return {begin_of_gradients(), std::size_t(size())}; }
  [[nodiscard]] std::span<const T> gradients() const noexcept { return {begin_of_gradients(), std::size_t(size())}; }

  /// Entry i of the table as a matrix; an empty one where there is no such entry.
  [[nodiscard]] MatrixView<T> value(std::size_t i) noexcept { return at(begin_of_values(), i); }
  [[nodiscard]] MatrixView<const T> value(std::size_t i) const noexcept { return at(begin_of_values(), i); }
  [[nodiscard]] MatrixView<T> gradient(std::size_t i) noexcept { return at(begin_of_gradients(), i); }
  [[nodiscard]] MatrixView<const T> gradient(std::size_t i) const noexcept { return at(begin_of_gradients(), i); }

  /// Copies the contents to other memory, of size() scalars each, and uses that from now on. `keep` is held as long as
  /// the layer lives there: the memory's owner, or nothing where the caller sees to it.
  void relocate(T* values, T* gradients, std::shared_ptr<const void> keep = nullptr) {
    if (!node_) return;
    detail::ParameterNode<T>& n = *node_;
    if (n.size > 0) {
      std::memmove(values, n.values, std::size_t(n.size) * sizeof(T));
      std::memmove(gradients, n.gradients, std::size_t(n.size) * sizeof(T));
    }
    n.values = values;
    n.gradients = gradients;
    n.own = Buffer<T>();
    if (std::string name = n.name; n.flat) n.flat->desert(name);
    n.flat.reset();
    n.keep = std::move(keep);
    n.relocated = true;
  }
  /// Whether relocate() has moved the contents out of this object's own memory.
  [[nodiscard]] bool relocated() const noexcept { return node_ && node_->relocated; }
  /// Who this is, wherever it moves: two are one layer's if neither is before the other in owner_before(). Points to
  /// name(). Null for what was moved from.
  [[nodiscard]] std::shared_ptr<const std::string> identity() const noexcept {
    return node_ ? std::shared_ptr<const std::string>(node_, &node_->name) : nullptr;
  }

 private:
  friend class FlatParameters<T>;
  explicit Parameters(std::shared_ptr<detail::ParameterNode<T>>&& node) noexcept : node_(std::move(node)) {}
  [[nodiscard]] T* begin_of_values() const noexcept { return node_ ? node_->values : nullptr; }
  [[nodiscard]] T* begin_of_gradients() const noexcept { return node_ ? node_->gradients : nullptr; }
  [[nodiscard]] MatrixView<T> at(T* base, std::size_t i) const noexcept {
    if (!node_ || i >= node_->table.size()) return {};
    const ParameterInfo& p = node_->table[i];
    return view_of(base + p.offset, p.rows, p.cols);
  }

  std::shared_ptr<detail::ParameterNode<T>> node_;
};

/// The trainable values of a whole model in one block, their gradients in another.
///
///     std::vector<LoraLinear<float>> layers;
///     FlatParameters<float> flat;
///     for (Index i = 0; i < count; ++i) {
///       layers.emplace_back(DenseBase<float>(view_of(W[i])), start[i].factors);
///       flat.add("layers." + std::to_string(i), layers.back().parameters());  // "layers.0.lora_A", …
///     }
///     flat.pack();                                                            // the layers now live in flat's blocks
///     my_optimizer(flat.values().data(), flat.gradients().data(), flat.size());
///
/// Layers may move at any time, before pack() and after it. One that is destroyed before pack() makes it throw. After
/// it, the values of a destroyed layer stay in the blocks; a layer replaced by another, which lives elsewhere, makes
/// values(), gradients() and zero_gradients() throw. The blocks outlive this object as long as a layer lives in them.
template <Real T>
class FlatParameters {
 public:
  FlatParameters() = default;
  FlatParameters(FlatParameters&& other) noexcept { *this = std::move(other); }
  /// Takes over layers and blocks; `other` is as new.
  FlatParameters& operator=(FlatParameters&& other) noexcept {
    parts_ = std::exchange(other.parts_, {});
    table_ = std::exchange(other.table_, {});
    added_ = std::exchange(other.added_, 0);
    blocks_ = std::exchange(other.blocks_, nullptr);
    return *this;
  }
  FlatParameters(const FlatParameters&) = delete;  // a layer lives in one place
  FlatParameters& operator=(const FlatParameters&) = delete;
  ~FlatParameters() = default;

  /// Registers a layer's parameters; their names get `prefix` and a dot in front. Takes effect with pack().
  /// **Throws** ArgumentError after pack(), for a layer that was added already, lives in another's blocks or was moved
  /// from, and for a name that is taken. **Cost** a comparison with every name so far.
  void add(const std::string& prefix, Parameters<T>& parameters) {
    constexpr const char* where = "FlatParameters::add: ";
    if (blocks_) throw ArgumentError(detail::text(where, "'", prefix, "' comes after pack()"));
    if (!parameters.node_) throw ArgumentError(detail::text(where, "'", prefix, "' is a layer that was moved from"));
    if (parameters.relocated())
      throw ArgumentError(detail::text(where, "'", prefix, "' is packed already, as '", parameters.name(), "'"));
    for (const auto& [name, part] : parts_)
      if (part.lock() == parameters.node_)
        throw ArgumentError(detail::text(where, "'", prefix, "' was added already, as '", name, "'"));
    std::vector<ParameterInfo> table = parameters.table();
    for (ParameterInfo& p : table) {
      if (!prefix.empty()) p.name = prefix + "." + p.name;
      p.offset += added_;
      for (const ParameterInfo& other : table_)
        if (other.name == p.name) throw ArgumentError(detail::text(where, "the name '", p.name, "' is taken"));
    }
    parts_.emplace_back(prefix, parameters.node_);
    table_.insert(table_.end(), table.begin(), table.end());
    added_ += parameters.size();
  }

  /// Allocates the two blocks and moves every registered layer into them. Call once, after the last add().
  /// **Throws** ArgumentError when called again, as the layers of the first time would be left behind, and when a
  /// registered layer is gone or lives elsewhere by now. Nothing has moved then.
  void pack() {
    if (blocks_) throw ArgumentError("FlatParameters::pack: already packed");
    std::vector<Node> nodes;
    for (const auto& [name, part] : parts_) {
      nodes.push_back(part.lock());
      if (!nodes.back())
        throw ArgumentError(detail::text("FlatParameters::pack: the layer '", name,
                                         "' was destroyed, or another assigned to it, after add()"));
      if (nodes.back()->relocated)
        throw ArgumentError(detail::text("FlatParameters::pack: the layer '", name, "' was packed elsewhere, as '",
                                         nodes.back()->name, "', after add()"));
    }
    auto blocks = std::make_shared<detail::FlatBlocks<T>>();
    blocks->values.resize(added_);
    blocks->gradients.resize(added_);
    Index offset = 0;
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      Parameters<T> part(std::move(nodes[i]));
      part.relocate(blocks->values.data() + offset, blocks->gradients.data() + offset, blocks);
      part.node_->flat = blocks;
      part.node_->name = std::move(parts_[i].first);
      offset += part.size();
    }
    parts_.clear();
    blocks_ = std::move(blocks);
  }

  /// Length of the two blocks; 0 before pack().
  [[nodiscard]] Index size() const noexcept { return blocks_ ? blocks_->values.size() : 0; }
  [[nodiscard]] const std::vector<ParameterInfo>& table() const noexcept { return table_; }
  /// The blocks. **Throws** ArgumentError before pack() when layers were added, and when a packed layer was replaced by
  /// one that is not in them: they would not be trained. The const form only reads, and gives what there is.
  [[nodiscard]] std::span<T> values() { return used("values", &detail::FlatBlocks<T>::values); }
  [[nodiscard]] std::span<const T> values() const noexcept {
    if (!blocks_) return {};
    return {blocks_->values.data(), std::size_t(size())};
  }
  [[nodiscard]] std::span<T> gradients() { return used("gradients", &detail::FlatBlocks<T>::gradients); }
  void zero_gradients() {
    const std::span<T> g = used("zero_gradients", &detail::FlatBlocks<T>::gradients);
    std::fill(g.begin(), g.end(), T(0));
  }

  /// The named entry as a matrix. **Throws** ArgumentError for an unknown name, and before pack().
  [[nodiscard]] MatrixView<T> value(const std::string& name) {
    if (!blocks_) throw ArgumentError(detail::text("FlatParameters::value: '", name, "' has no place before pack()"));
    for (const ParameterInfo& p : table_)
      if (p.name == name) return view_of(blocks_->values.data() + p.offset, p.rows, p.cols);
    throw ArgumentError(
        detail::text("FlatParameters::value: no parameter named '", name, "' among ", table_.size(), " parameters"));
  }

 private:
  using Node = std::shared_ptr<detail::ParameterNode<T>>;

  [[nodiscard]] std::span<T> used(const char* what, Buffer<T> detail::FlatBlocks<T>::*block) {
    if (!blocks_) {
      if (!parts_.empty()) [[unlikely]]
        throw ArgumentError(detail::text("FlatParameters::", what, ": ", parts_.size(),
                                         " layers were added and pack() was not called; they would not be trained"));
      return {};
    }
    if (blocks_->deserted) [[unlikely]]
      throw ArgumentError(detail::text("FlatParameters::", what, ": after pack() the layer '", blocks_->deserter,
                                       "' was relocated or replaced by another, which is not in these blocks and would "
                                       "not be trained; pack anew"));
    return {((*blocks_).*block).data(), std::size_t(size())};
  }

  std::vector<std::pair<std::string, std::weak_ptr<detail::ParameterNode<T>>>> parts_;
  std::vector<ParameterInfo> table_;
  Index added_ = 0;
  std::shared_ptr<detail::FlatBlocks<T>> blocks_;
};

}  // namespace lowrank

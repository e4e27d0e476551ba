// SPDX-License-Identifier: Apache-2.0
// What all layers share: the phase, the workspace between forward and backward, how gradients are written, the bias.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "lowrank/adapter/parameters.hpp"
#include "lowrank/linalg/base.hpp"

namespace lowrank {

/// Whether a forward pass is part of training (dropout acts) or not.
enum class Phase { train, eval };

/// What a layer needs between forward and backward; owned by the caller, reused from step to step, grows to the largest
/// batch seen and allocates nothing after that. One for each forward pass whose backward is still to come. It knows
/// whose pass it holds: backward of another layer refuses it.
///
/// The mask of a forward that drops is a function of the layer's seed and name, `stream` and `call`. So passes in
/// flight on one layer have masks of their own, and a pass is repeated exactly by setting the two as they were.
template <Real T>
struct LoraWorkspace {
  Matrix<T> reduced;         ///< T = s·X̃·Aᵀ, tokens×r
  Matrix<T> U;               ///< s·G·B, tokens×r
  Matrix<T> dropped;         ///< X̃ = mask∘X/(1−p) in forward, U·A in backward; unused without dropout
  std::uint64_t call = 0;    ///< counts training forwards that drop: set it to resume a run or repeat a pass exactly
  std::int64_t stream = -1;  ///< which of its layer's workspaces this is: the layer numbers them 0, 1, … as each first
                             ///< drops. Set it where threads share a layer, or the order of their first passes decides
  Index tokens = -1;                       ///< rows of the last forward
  bool masked = false;                     ///< whether the last forward dropped anything
  std::weak_ptr<const std::string> layer;  ///< Parameters::identity() of the layer of the last forward, none after
                                           ///< the function lora_forward
};

/// How a backward pass writes: gradients added to what is there (as after several micro-batches) or assigned, dX
/// likewise.
struct BackwardOptions {
  Update gradients = Update::accumulate;
  Update dx = Update::assign;
};

namespace detail {

template <class Y, class X, class T>
concept NotBothMatrices = !MatrixOf<X, const T> || !MatrixOf<Y, T>;
template <class DX, class X, class G, class T>
concept NotAllMatrices = !std::is_same_v<std::remove_cvref_t<DX>, BackwardOptions> &&
                         !(MatrixOf<X, const T> && MatrixOf<G, const T> && MatrixOf<DX, T>);

/// What forward and backward of a linear layer must not be given, for the compiler to say so in a line or two: the
/// overloads that take it are deleted. GCC begins with the name of this class, Clang with the line of the function.
template <class T>
class EvaluateOrCastToMatrixOf {
 public:
  template <class X, NotBothMatrices<X, T> Y, class W>
  void forward(X&&, Y&&, W&&, Phase = {}) const = delete;  // MatrixOf<T>: evaluate expressions, cast to scalar T
  template <class X, NotBothMatrices<X, const T> G, class W>
  void backward(X&&, G&&, W&&, BackwardOptions = {}) = delete;  // MatrixOf<T>: evaluate expressions, cast to scalar T
  template <class X, class G, class W, NotAllMatrices<X, G, T> DX>
  void backward(X&&, G&&, W&&, DX&&, BackwardOptions = {}) = delete;  // MatrixOf<T>: evaluate, cast; dX not const

 protected:
  ~EvaluateOrCastToMatrixOf() = default;
  EvaluateOrCastToMatrixOf() = default;
  EvaluateOrCastToMatrixOf(EvaluateOrCastToMatrixOf&&) noexcept = default;
  EvaluateOrCastToMatrixOf& operator=(EvaluateOrCastToMatrixOf&&) noexcept = default;
};

/// What the backward pass of a linear layer asks of its arguments, before it writes: X tokens×in, G tokens×out, and dX,
/// where there is one, tokens×in and apart from G. **Throws** ShapeError, ArgumentError.
template <class T>
void expect_backward(const char* where, MatrixView<const T> X, MatrixView<const T> G,
                     const std::optional<MatrixView<T>>& dX, Index in, Index out) {
  expect_shape(where, "X", X.rows(), X.cols(), X.rows(), in);
  expect_shape(where, "G", G.rows(), G.cols(), X.rows(), out);
  if (dX) expect_operands<T>(where, "G", G, out, "dX", *dX, in);
}

/// Whether two refer to one layer, wherever it is by now.
inline bool same_layer(const std::weak_ptr<const std::string>& a, const std::weak_ptr<const std::string>& b) noexcept {
  return !a.owner_before(b) && !b.owner_before(a);
}

/// **Throws** ArgumentError for a layer without parameters: one that was moved from.
template <class T>
void expect_not_moved_from(const char* where, const Parameters<T>& parameters) {
  if (!parameters.identity()) [[unlikely]]
    throw ArgumentError(text(where, ": this layer was moved from; use the one it was moved to"));
}

/// **Throws** ArgumentError unless the workspace holds a forward pass of this layer, of out×in and `rank`.
template <class T>
void expect_own_pass(const char* where, const LoraWorkspace<T>& ws, const Parameters<T>& parameters, Index out,
                     Index in, Index rank) {
  expect_not_moved_from(where, parameters);
  if (ws.tokens < 0 || same_layer(ws.layer, parameters.identity())) return;  // no pass at all is told by the caller
  const std::shared_ptr<const std::string> other = ws.layer.lock();
  const auto quoted = [](const std::string& name) { return name.empty() ? std::string() : " '" + name + "'"; };
  throw ArgumentError(text(where, ": the workspace holds a pass of ", ws.tokens, " tokens through another layer",
                           quoted(other ? *other : std::string()), ", this is", quoted(parameters.name()),
                           " a layer of ", shape_text(out, in), " and rank ", rank,
                           "; give each layer a workspace of its own"));
}

/// Adds a bias of `out` scalars to every row of Y.
template <class T>
void add_bias(std::span<const T> bias, MatrixView<T> Y) {
  for (Index i = 0; i < Y.rows(); ++i)
    for (Index j = 0; j < Y.cols(); ++j) Y(i, j) += bias[std::size_t(j)];
}

/// db = column sums of G, in double.
template <class T>
void bias_gradient(MatrixView<const T> G, bool accumulate, MatrixView<T> db) {
  for (Index j = 0; j < G.cols(); ++j) {
    double sum = accumulate ? double(db(0, j)) : 0.0;
    for (Index i = 0; i < G.rows(); ++i) sum += double(G(i, j));
    db(0, j) = T(sum);
  }
}

template <class T>
std::vector<T> checked_bias(const char* where, std::vector<T> bias, Index out) {
  if (!bias.empty() && Index(bias.size()) != out)
    throw ShapeError(text(where, ": bias must have ", out, " elements, got ", bias.size()));
  return bias;
}

}  // namespace detail
}  // namespace lowrank

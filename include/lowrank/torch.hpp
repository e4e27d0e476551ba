// SPDX-License-Identifier: Apache-2.0
// The libtorch front end: strided CPU tensors become matrices, and a layer becomes a torch::nn::Module that autograd
// and torch's optimizers train. Needs libtorch 1.13 or later.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/nn/module.h>

#include <atomic>
#include <concepts>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/core/detail/collapse.hpp"
#include "lowrank/core/half.hpp"
#include "lowrank/core/matrix.hpp"

namespace lowrank {

/// A scalar that a tensor can hold and a view can look at: float, double, bf16 and f16, const or not.
template <class T>
concept TorchScalar = std::same_as < std::remove_const_t<T>,
float > || std::same_as<std::remove_const_t<T>, double> || std::same_as<std::remove_const_t<T>, bf16> ||
    std::same_as<std::remove_const_t<T>, f16>;

namespace detail {

template <TorchScalar T>
inline constexpr at::ScalarType torch_dtype = std::same_as<T, float>    ? at::kFloat
                                              : std::same_as<T, double> ? at::kDouble
                                              : std::same_as<T, bf16>   ? at::kBFloat16
                                                                        : at::kHalf;

/// Throws ArgumentError unless the tensor is defined, on the CPU, strided, and of the dtype of T.
template <class T>
void expect_tensor(const char* where, const at::Tensor& t) {
  if (!t.defined()) [[unlikely]]
    throw ArgumentError(text(where, ": the tensor is undefined"));
  if (!t.device().is_cpu()) [[unlikely]]
    throw ArgumentError(
        text(where, ": expected a tensor on the CPU, got one on ", t.device().str(), "; .cpu() copies"));
  if (t.layout() != at::kStrided) [[unlikely]]
    throw ArgumentError(text(where, ": expected a strided tensor, got a sparse or opaque one; .to_dense() copies"));
  if (t.scalar_type() != torch_dtype<T>) [[unlikely]]
    throw ArgumentError(
        text(where, ": expected a tensor of ", at::toString(torch_dtype<T>), ", got ", at::toString(t.scalar_type())));
}

template <class T>
MatrixView<T> torch_view(const at::Tensor& t) {
  using S = std::remove_const_t<T>;
  expect_tensor<S>("view_of(Tensor)", t);
  if (t.is_neg()) [[unlikely]]
    throw ArgumentError("view_of(Tensor): the tensor is a negated view of its memory; .resolve_neg() copies");
  if (t.requires_grad() && at::GradMode::is_enabled()) [[unlikely]]
    throw ArgumentError(
        "view_of(Tensor): the tensor requires a gradient, and autograd does not see what goes through a view; view "
        ".detach(), work under torch::NoGradGuard, or use lowrank::torch_layer, which autograd does see");
  const Collapsed c = collapse("view_of(Tensor)", "copy it first (.contiguous())", t.sizes(), t.strides());
  return {static_cast<T*>(t.data_ptr()), c.rows, c.cols, c.row_stride, c.col_stride};
}
template <class T>
MatrixView<T> unambiguous_view(const at::Tensor& t) {
  const MatrixView<T> v = torch_view<T>(t);
  expect_unambiguous("view_of(Tensor)", ".flatten(0, -2)", ".flatten(1)", t.sizes());
  return v;
}

}  // namespace detail

/// The view of a tensor whose elements are T, `view_of<float>(t)`: same pointer, same strides, no copy.
///
/// A tensor's type is known at run time, so T is named; bf16 and f16 look at torch.bfloat16 and torch.float16. A
/// `const at::Tensor&` gives a read-only view. Autograd and its version counters do not see what is written through
/// one.
/// **Shapes** a tensor of shape [batch, tokens, in] is the matrix (batch·tokens)×in, in row-major order of the leading
/// indices; a 1-D tensor is one row. Two dimensions may be transposed, and rows may lie any distance apart. Above three
/// dimensions `.flatten(0, -2)` makes tokens of it, `.flatten(1)` a convolution's weight out×(in·kh·kw), as files fold
/// it; one of three dimensions (Conv1d) needs the latter too.
/// **Throws** ArgumentError for a tensor that is undefined, not on the CPU, not strided, of another dtype, lazily
/// negated, or that requires a gradient while gradients are recorded; ShapeError for a 0-D tensor, for one of more than
/// three dimensions, for leading
/// dimensions that are not evenly spaced, and for strides of which none is 1 or that make elements share memory
/// (.expand()). **Cost** O(1).
template <TorchScalar T>
MatrixView<T> view_of(at::Tensor& t) {
  return detail::unambiguous_view<T>(t);
}
template <TorchScalar T>
MatrixView<const T> view_of(const at::Tensor& t) {
  return detail::unambiguous_view<const T>(t);
}

/// A temporary tensor passed as a view. Name it, then pass it. Some temporaries share the memory of a tensor that lives
/// on (`t.t()`, `t[0]`), others are all that keeps theirs (`a + b`, `t.contiguous()`); the type is the same, so all are
/// refused.
template <class TemporaryToNameFirst>
void view_of(at::Tensor&&) = delete;
template <class TemporaryToNameFirst>
void view_of(const at::Tensor&&) = delete;

/// A view as a two-dimensional tensor with the view's strides. The memory must outlive it and all that shares its
/// storage. Tensors cannot be read-only, so views of const are refused. **Cost** O(1), no copy.
template <TorchScalar T>
requires(!std::is_const_v<T>) at::Tensor as_torch(MatrixView<T> v) {
  return at::from_blob(v.data(), {v.rows(), v.cols()}, {v.row_stride(), v.col_stride()},
                       at::dtype(detail::torch_dtype<T>));
}
/// A lowrank::Matrix as a tensor; it must outlive the tensor.
template <TorchScalar T>
at::Tensor as_torch(Matrix<T>& m) {
  return as_torch(m.view());
}
/// A lowrank::Matrix given away: the tensor keeps it, without a copy.
template <TorchScalar T>
at::Tensor as_torch(Matrix<T>&& m) {
  const auto kept = std::make_shared<Matrix<T>>(std::move(m));
  const MatrixView<T> v = kept->view();
  return at::from_blob(
      v.data(), {v.rows(), v.cols()}, {v.row_stride(), v.col_stride()}, [kept](void*) {},
      at::dtype(detail::torch_dtype<T>));
}

namespace detail {

/// The tensor itself where it reads as a matrix, a contiguous copy where not: torch's own layers do the same, and the
/// gradients autograd brings (those of a sum are expanded scalars) are nobody's choice.
inline at::Tensor as_rows(const at::Tensor& t) {
  if (t.is_contiguous() || t.dim() == 0) return t.resolve_neg();
  const Collapsed c = try_collapse(t.sizes(), t.strides());
  const bool fits = c.evenly_spaced &&
                    ((c.col_stride == 1 && c.row_stride >= c.cols) || (c.row_stride == 1 && c.col_stride >= c.rows));
  return fits ? t.resolve_neg() : t.contiguous().resolve_neg();
}

/// A layer whose two blocks lie in tensors' memory. Shared by the module and the graphs its forwards left behind, so
/// that either may go first.
template <class Layer>
struct TorchLayerState {
  using T = typename Layer::scalar;

  TorchLayerState(Layer l, std::vector<at::Tensor> k) : layer(std::move(l)), keep(std::move(k)) {
    Parameters<T>& p = layer.parameters();
    const at::NoGradGuard no_grad;
    values = at::empty({p.size()}, at::dtype(torch_dtype<T>));
    gradients = at::zeros({p.size()}, at::dtype(torch_dtype<T>));
    p.relocate(values.data_ptr<T>(), gradients.data_ptr<T>());
  }

  /// Entry i of the layer's table as a tensor of its own on the layer's memory, which it keeps alive.
  [[nodiscard]] at::Tensor value(std::size_t i) {
    const MatrixView<T> v = layer.parameters().value(i);
    return at::from_blob(
        v.data(), {v.rows(), v.cols()}, [kept = values](void*) {}, at::dtype(torch_dtype<T>));
  }

  Layer layer;
  std::vector<at::Tensor> keep;
  at::Tensor values, gradients;
  std::atomic<std::uint64_t> calls = 0;  ///< training forwards, each with a dropout mask of its own
  std::mutex backward;                   ///< graphs may run backward in several threads; the gradient block is one
};

/// One forward pass whose backward may still come: what autograd keeps for it besides the saved tensors.
template <class Layer>
struct TorchPass : ::torch::CustomClassHolder {
  std::shared_ptr<TorchLayerState<Layer>> state;
  LoraWorkspace<typename Layer::scalar> ws;
  Phase phase = Phase::train;
};

/// The layer as a function of x and its parameters that autograd can differentiate once.
template <class Layer>
struct TorchFunction : ::torch::autograd::Function<TorchFunction<Layer>> {
  using T = typename Layer::scalar;
  using Context = ::torch::autograd::AutogradContext;
  using Pass = TorchPass<Layer>;

  static at::Tensor forward(Context* context, const std::shared_ptr<TorchLayerState<Layer>>& state, Phase phase,
                            const at::Tensor& x, at::TensorList parameters) {
    const at::Tensor rows = as_rows(x);
    const MatrixView<const T> X = torch_view<const T>(rows);
    const Layer& layer = state->layer;
    expect_shape("TorchLayer::forward", "x", X.rows(), X.cols(), X.rows(), layer.in_features());
    auto sizes = x.sizes().vec();
    sizes.back() = layer.out_features();
    at::Tensor y = at::empty(sizes, at::dtype(torch_dtype<T>));

    const auto pass = c10::make_intrusive<Pass>();
    pass->state = state;
    pass->phase = phase;
    if (phase == Phase::train) pass->ws.call = state->calls++;
    layer.forward(X, torch_view<T>(y), pass->ws, phase);
    // The parameters are saved for their version counters: an optimizer step before backward is then an error, not a
    // wrong gradient.
    ::torch::autograd::variable_list saved(parameters.begin(), parameters.end());
    saved.push_back(rows);
    context->save_for_backward(std::move(saved));
    context->saved_data["pass"] = c10::IValue::make_capsule(pass);
    return y;
  }

  static ::torch::autograd::variable_list backward(Context* context, ::torch::autograd::variable_list outputs) {
    const auto saved = context->get_saved_variables();
    const auto pass = c10::static_intrusive_pointer_cast<Pass>(context->saved_data["pass"].toCapsule());
    const std::size_t count = saved.size() - 1, before = 2;  // state and phase have no gradient
    ::torch::autograd::variable_list gradients(before + 1 + count);
    const bool wants_dx = context->needs_input_grad(0);
    {
      const at::NoGradGuard no_grad;
      const at::Tensor& x = saved.back();
      const at::Tensor g = as_rows(outputs[0]);
      const MatrixView<const T> X = torch_view<const T>(x), G = torch_view<const T>(g);
      TorchLayerState<Layer>& state = *pass->state;
      const std::lock_guard<std::mutex> lock(state.backward);
      if (pass->ws.masked && pass->ws.tokens < 0) restore(*pass, X);
      const BackwardOptions assign{.gradients = Update::assign, .dx = Update::assign};
      if (wants_dx) {
        at::Tensor dx = at::empty(x.sizes(), x.options());
        state.layer.backward(X, G, pass->ws, torch_view<T>(dx), assign);
        gradients[before] = dx;
      } else {
        state.layer.backward(X, G, pass->ws, assign);
      }
      const at::Tensor block = state.gradients.clone();  // autograd keeps what it is given; ours is written again
      for (std::size_t i = 0; i < count; ++i) {
        const ParameterInfo& p = state.layer.parameters().table()[i];
        gradients[before + 1 + i] = block.narrow(0, p.offset, p.size()).view({p.rows, p.cols});
      }
    }
    return at::GradMode::is_enabled() ? differentiable_once(std::move(gradients)) : gradients;
  }

 private:
  /// A masked backward uses its workspace up. On a retained graph the forward is repeated, with the same mask.
  static void restore(Pass& pass, MatrixView<const T> X) {
    --pass.ws.call;
    Matrix<T> Y;
    Y.resize(X.rows(), pass.state->layer.out_features());
    std::as_const(pass.state->layer).forward(X, Y, pass.ws, pass.phase);
  }
  /// Under create_graph: the same values, with an error where their derivative would be.
  static ::torch::autograd::variable_list differentiable_once(::torch::autograd::variable_list gradients) {
    ::torch::autograd::variable_list some;
    for (const at::Tensor& g : gradients)
      if (g.defined()) some.push_back(g.detach().set_requires_grad(true));
    const auto error = std::make_shared<::torch::autograd::DelayedError>(
        "lowrank::TorchLayer: second derivatives are not supported", int(some.size()));
    some = (*error)(std::move(some));
    std::size_t next = 0;
    for (at::Tensor& g : gradients)
      if (g.defined()) g = some[next++];
    return gradients;
  }
};

}  // namespace detail

/// A layer that TorchLayer can put into a graph: LoraLinear over any base, FullLinear, FrozenLinear.
template <class Layer>
concept AutogradLayer = requires(Layer& layer, const Layer& same, MatrixView<const typename Layer::scalar> in,
                                 MatrixView<typename Layer::scalar> out, LoraWorkspace<typename Layer::scalar>& ws) {
  layer.parameters().relocate(out.data(), out.data());
  same.forward(in, out, ws, Phase::train);
  layer.backward(in, in, ws, out, BackwardOptions{});
};

/// A lowrank layer as a torch::nn::Module: autograd differentiates it, torch's optimizers train it.
///
///     at::Tensor W = linear->weight.detach();
///     auto Q = lowrank::quantise(lowrank::view_of<float>(W));  // NF4 codes; W may go
///     auto layer = lowrank::torch_layer(lowrank::LoraLinear<float, lowrank::QuantisedMatrix<float>>(
///         std::move(Q), lowrank::kaiming<float>(out, in, {.rank = 16, .alpha = 32}).factors));
///     torch::optim::AdamW optimizer(layer->parameters(), 2e-4);
///     torch::Tensor y = layer->forward(x);
///
/// The parameters are named as the layer names them ("lora_A" r×in, "lora_B" out×r, …) and are the layer's own flat
/// block: an optimizer's step changes the layer, a change of the layer is in the parameters. Gradients arrive in
/// `.grad`, where torch accumulates them; the layer's own gradient block is scratch. The base is no parameter and not
/// in the state, so torch::save writes the adapter alone. Dropout acts in train(), not in eval(). Every forward has a
/// workspace of its own, so a layer may be used several times before a backward. After torch::load or to() the new
/// values come into the block with the next forward() or layer().
template <class Layer>
requires AutogradLayer<Layer>
class TorchLayer : public ::torch::nn::Module {
 public:
  using scalar = typename Layer::scalar;

  /// Takes the layer over; `keep` are tensors it looks at, such as the W of DenseBase(view_of<float>(W)).
  explicit TorchLayer(Layer layer, std::vector<at::Tensor> keep = {})
      : ::torch::nn::Module("lowrank::TorchLayer"),
        state_(std::make_shared<detail::TorchLayerState<Layer>>(std::move(layer), std::move(keep))) {
    const auto& table = state_->layer.parameters().table();
    for (std::size_t i = 0; i < table.size(); ++i)
      handles_.push_back(register_parameter(table[i].name, state_->value(i)));
  }

  /// Y from X, recorded by autograd. A tensor that does not read as a matrix is copied first, as torch's layers do.
  ///
  /// **Shapes** x [..., in] gives [..., out]. **Throws** ShapeError when the last extent is not in; ArgumentError for
  /// another dtype than the layer's or a tensor not on the CPU. Backward throws c10::Error when a parameter or x was
  /// modified since; so does a second derivative. **Cost** LoraLinear's; backward copies the gradients of the
  /// parameters once.
  at::Tensor forward(const at::Tensor& x) {
    detail::expect_tensor<scalar>("TorchLayer::forward", x);
    bring_home();
    const Phase phase = is_training() ? Phase::train : Phase::eval;
    return detail::TorchFunction<Layer>::apply(state_, phase, x, at::TensorList(handles_));
  }

  /// The layer itself: its factors, scale and base. What it changes of its parameters, autograd does not see.
  [[nodiscard]] Layer& layer() {
    bring_home();
    return state_->layer;
  }

 private:
  /// torch::load and to() point parameters at other memory. Their values go back into the block, and they with them.
  void bring_home() {
    for (std::size_t i = 0; i < handles_.size(); ++i) {
      at::Tensor& p = handles_[i];
      const MatrixView<scalar> v = state_->layer.parameters().value(i);
      if (p.defined() && p.data_ptr() == v.data()) continue;
      const at::NoGradGuard no_grad;
      const at::Tensor data = p.detach();
      detail::expect_tensor<scalar>("TorchLayer: its parameters were moved", data);
      at::Tensor home = state_->value(i);
      if (!data.sizes().equals(home.sizes()))
        throw ShapeError(detail::text("TorchLayer: parameter '", state_->layer.parameters().table()[i].name,
                                      "' must be ", detail::shape_text(v.rows(), v.cols()), ", it was given ",
                                      data.numel(), " elements"));
      home.copy_(data);
      p.set_data(home);
    }
  }

  std::shared_ptr<detail::TorchLayerState<Layer>> state_;
  std::vector<at::Tensor> handles_;
};

/// The layer as a module, ready for register_module. See TorchLayer.
template <class Layer>
requires AutogradLayer<Layer> std::shared_ptr<TorchLayer<Layer>> torch_layer(Layer layer,
                                                                             std::vector<at::Tensor> keep = {}) {
  return std::make_shared<TorchLayer<Layer>>(std::move(layer), std::move(keep));
}

}  // namespace lowrank

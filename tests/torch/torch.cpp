// SPDX-License-Identifier: Apache-2.0
// libtorch tensors as views, and layers in an autograd graph against the same layer written in torch's own operations.
#include "embedding_include.inc"  // as docs/embedding.md says: lowrank/torch.hpp

#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

// glog, which libtorch brings along, has macros of the same names.
#undef CHECK
#undef CHECK_EQ
#undef CHECK_NE
#undef CHECK_LT
#undef CHECK_LE
#undef CHECK_GT
#undef CHECK_GE
#include <doctest/doctest.h>

#include <sstream>
#include <thread>

#include "lowrank/adapter/linear.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/quant/quantise.hpp"

using lowrank::ArgumentError;
using lowrank::as_torch;
using lowrank::DenseBase;
using lowrank::Index;
using lowrank::LoraFactors;
using lowrank::LoraLinear;
using lowrank::MatrixView;
using lowrank::ShapeError;
using lowrank::torch_layer;
using lowrank::view_of;

namespace {

template <class T>
constexpr at::ScalarType dtype = lowrank::detail::torch_dtype<T>;

/// Normal numbers of double precision, the same on every machine and with every libtorch.
at::Tensor normal(at::IntArrayRef sizes, std::uint64_t seed) {
  at::Tensor t = at::empty(sizes, at::kDouble);
  lowrank::CounterRng(seed).fill_normal(view_of<double>(t));
  return t;
}

template <class T>
at::Tensor numbered(at::IntArrayRef sizes) {
  std::int64_t n = 1;
  for (const std::int64_t s : sizes) n *= s;
  return at::arange(1, n + 1, at::kLong).view(sizes).to(dtype<T>);  // below 256: exact in bf16 too
}

/// The view of a tensor of two dimensions is the same elements at the same addresses.
template <class T>
void check_same(const MatrixView<T>& v, const at::Tensor& t) {
  REQUIRE(v.rows() == t.size(0));
  REQUIRE(v.cols() == t.size(1));
  for (Index i = 0; i < v.rows(); ++i)
    for (Index j = 0; j < v.cols(); ++j) {
      CHECK(static_cast<const void*>(&v(i, j)) == t[i][j].data_ptr());
      CHECK(double(v(i, j)) == t[i][j].item<double>());
    }
}

template <class X>
concept viewable = requires(X&& x) {
  view_of<float>(std::forward<X>(x));
};
static_assert(viewable<at::Tensor&> && viewable<const at::Tensor&>);
static_assert(!viewable<at::Tensor> && !viewable<const at::Tensor>);
static_assert(std::is_same_v<decltype(view_of<float>(std::declval<at::Tensor&>())), MatrixView<float>>);
static_assert(std::is_same_v<decltype(view_of<float>(std::declval<const at::Tensor&>())), MatrixView<const float>>);

// ---- the oracle: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ (+ b) in torch's operations, differentiated by autograd
// ----------------------

struct Problem {
  at::Tensor W, A, B, b, x, G;
  double s = 1;
};

Problem problem(at::IntArrayRef leading, Index in, Index out, Index r, double alpha, std::uint64_t seed) {
  std::vector<std::int64_t> xs(leading.begin(), leading.end()), ys = xs;
  xs.push_back(in);
  ys.push_back(out);
  return {normal({out, in}, seed), normal({r, in}, seed + 1), normal({out, r}, seed + 2),   normal({1, out}, seed + 3),
          normal(xs, seed + 4),    normal(ys, seed + 5),      lowrank::lora_scale(alpha, r)};
}

Problem magnitudes(const Problem& p) {
  return {p.W.abs(), p.A.abs(), p.B.abs(), p.b.abs(), p.x.abs(), p.G.abs(), std::abs(p.s)};
}

at::Tensor by_torch(const Problem& p, const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
  return at::matmul(x, p.W.t()) + p.s * at::matmul(at::matmul(x, A.t()), B.t());
}

struct Gradients {
  at::Tensor y, dx, dA, dB, db;
};

/// Of L = Σ G∘f(x, A, B, b) for a leaf each.
template <class F>
Gradients gradients(const Problem& p, F&& f) {
  const auto leaf = [](const at::Tensor& t) { return t.detach().clone().set_requires_grad(true); };
  const at::Tensor x = leaf(p.x), A = leaf(p.A), B = leaf(p.B), b = leaf(p.b);
  const at::Tensor y = f(x, A, B, b);
  y.backward(p.G);
  const auto grad = [](const at::Tensor& t) { return t.grad().defined() ? t.grad() : at::zeros_like(t); };
  return {y.detach(), grad(x), grad(A), grad(B), grad(b)};
}
Gradients gradients(const Problem& p, bool bias) {
  return gradients(p, [&](const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor& b) {
    return bias ? by_torch(p, x, A, B) + b.view(-1) : by_torch(p, x, A, B);
  });
}

/// Two evaluations of the same sums of products in different orders: each is off by at most K·eps times the same sums
/// of magnitudes, K the number of roundings on the longest path, which is below the sum of all extents plus a few.
void check_close(const at::Tensor& mine, const at::Tensor& theirs, const at::Tensor& magnitude, double K, double eps) {
  REQUIRE(mine.defined());
  REQUIRE(mine.sizes().vec() == theirs.sizes().vec());
  CHECK((mine - theirs).abs().le(2 * K * eps * magnitude).all().item<bool>());
}
double roundings(const Problem& p) {
  return double(p.x.numel() / std::max<std::int64_t>(p.x.size(-1), 1) + p.W.size(0) + p.W.size(1) + p.A.size(0) + 4);
}
void check_close(const Gradients& mine, const Gradients& theirs, const Gradients& magnitude, double K,
                 double eps = 0x1p-52) {
  check_close(mine.y, theirs.y, magnitude.y, K, eps);
  check_close(mine.dx, theirs.dx, magnitude.dx, K, eps);
  check_close(mine.dA, theirs.dA, magnitude.dA, K, eps);
  check_close(mine.dB, theirs.dB, magnitude.dB, K, eps);
}

template <class T>
lowrank::Matrix<T> matrix(const at::Tensor& t) {
  const at::Tensor of_type = t.to(dtype<T>);
  return lowrank::Matrix<T>(view_of<T>(of_type));
}
template <class T>
LoraFactors<T> factors(const Problem& p) {
  return {matrix<T>(p.A), matrix<T>(p.B), T(p.s)};
}

auto dense_layer(const Problem& p, const lowrank::LoraLinearOptions& options = {}, bool bias = false) {
  const at::Tensor row = p.b.view(-1);
  std::vector<double> b;
  if (bias) b.assign(row.data_ptr<double>(), row.data_ptr<double>() + row.numel());
  return torch_layer(LoraLinear<double>(DenseBase<double>(view_of<double>(p.W)), factors<double>(p), options, b),
                     {p.W});
}

template <class Module>
Gradients gradients_of(Module& module, const at::Tensor& y, const at::Tensor& x) {
  auto named = module.named_parameters();
  const auto grad = [&](const char* name) { return named.contains(name) ? named[name].grad().clone() : at::Tensor(); };
  return {y.detach(), x.grad().defined() ? x.grad().clone() : at::Tensor(), grad("lora_A"), grad("lora_B"),
          grad("bias")};
}

}  // namespace

TEST_CASE_TEMPLATE("a tensor as a view: same pointer, same strides", T, float, double, lowrank::bf16, lowrank::f16) {
  at::Tensor t = numbered<T>({6, 8});
  SUBCASE("contiguous, and written through") {
    MatrixView<T> v = view_of<T>(t);
    CHECK(v.data() == t.data_ptr());
    CHECK(v.is_contiguous());
    check_same(v, t);
    v(2, 3) = T(-5.0F);
    CHECK(t[2][3].item<double>() == -5);
    const at::Tensor& read_only = t;
    CHECK(view_of<T>(read_only).data() == t.data_ptr());
    CHECK(view_of<const T>(t).data() == t.data_ptr());
  }
  SUBCASE("parts: an offset, and rows any distance apart") {
    at::Tensor part = t.narrow(0, 1, 4).narrow(1, 2, 5), every_other_row = t.slice(0, 0, 6, 2);
    CHECK(view_of<T>(part).leading_dimension() == 8);
    check_same(view_of<T>(part), part);
    CHECK(view_of<T>(every_other_row).leading_dimension() == 16);
    check_same(view_of<T>(every_other_row), every_other_row);
    at::Tensor row = t[3], column = t.narrow(1, 3, 1);
    CHECK(view_of<T>(row).rows() == 1);
    CHECK(view_of<T>(row).cols() == 8);
    CHECK(static_cast<void*>(view_of<T>(row).data()) == row.data_ptr());
    check_same(view_of<T>(column), column);
  }
  SUBCASE("transposes") {
    at::Tensor turned = t.t(), part = turned.narrow(0, 1, 3).narrow(1, 2, 2);
    CHECK(view_of<T>(turned).order() == lowrank::Order::col_major);
    check_same(view_of<T>(turned), turned);
    check_same(view_of<T>(part), part);
  }
  SUBCASE("[batch, sequence, in] reads as tokens in order") {
    at::Tensor batch = numbered<T>({3, 4, 5}), features = batch.narrow(2, 1, 3), one = batch.narrow(1, 2, 1);
    for (at::Tensor* b : {&batch, &features, &one}) {
      const auto v = view_of<T>(*b);
      CHECK(static_cast<void*>(v.data()) == b->data_ptr());
      REQUIRE(v.rows() == b->size(0) * b->size(1));
      REQUIRE(v.cols() == b->size(2));
      for (Index i = 0; i < b->size(0); ++i)
        for (Index j = 0; j < b->size(1); ++j)
          for (Index k = 0; k < b->size(2); ++k)
            CHECK(static_cast<void*>(&v(i * b->size(1) + j, k)) == (*b)[i][j][k].data_ptr());
    }
    at::Tensor four = numbered<T>({2, 3, 2, 5});
    CHECK(view_of<T>(four).rows() == 12);
    CHECK(double(view_of<T>(four)(11, 4)) == 60);
    at::Tensor slice = batch.narrow(1, 1, 2), swapped = batch.transpose(0, 1);
    CHECK_THROWS_WITH_AS(view_of<T>(slice), doctest::Contains("shape (3, 2, 5) with strides (20, 5, 1)"), ShapeError);
    CHECK_THROWS_WITH_AS(view_of<T>(slice), doctest::Contains(".contiguous()"), ShapeError);
    CHECK_THROWS_AS(view_of<T>(swapped), ShapeError);
  }
  SUBCASE("extents of 0 and 1") {
    for (const auto& [r, c] : {std::pair<Index, Index>{1, 6}, {6, 1}, {1, 1}, {0, 4}, {4, 0}, {0, 0}}) {
      at::Tensor some = numbered<T>({r, c}), turned = some.t();
      check_same(view_of<T>(some), some);
      check_same(view_of<T>(turned), turned);
    }
  }
  SUBCASE("strides nobody supports") {
    at::Tensor columns = t.slice(1, 0, 8, 2), spread = t[0].expand({3, 8}), scalar = t[0][0], steps = t.diagonal();
    CHECK_THROWS_WITH_AS(view_of<T>(columns), doctest::Contains("one stride must be 1"), ShapeError);
    CHECK_THROWS_WITH_AS(view_of<T>(spread), doctest::Contains("leading dimension 0"), ShapeError);
    CHECK_THROWS_WITH_AS(view_of<T>(scalar), doctest::Contains("zero-dimensional"), ShapeError);
    CHECK(view_of<T>(steps).cols() == 6);  // a 1-D tensor of stride 9 reads as a row of a column-major matrix
    CHECK(static_cast<void*>(&view_of<T>(steps)(0, 5)) == steps[5].data_ptr());
  }
}

TEST_CASE("bf16 and f16 have torch's bits") {
  const at::Tensor x = normal({4, 9}, 7).to(at::kFloat);
  const at::Tensor half = x.to(at::kHalf), brain = x.to(at::kBFloat16);
  const auto v = view_of<float>(x);
  for (Index i = 0; i < 4; ++i)
    for (Index j = 0; j < 9; ++j) {
      CHECK(view_of<lowrank::f16>(half)(i, j).bits == lowrank::f16(v(i, j)).bits);
      CHECK(view_of<lowrank::bf16>(brain)(i, j).bits == lowrank::bf16(v(i, j)).bits);
    }
}

TEST_CASE("tensors that are no matrix in memory are refused by name") {
  at::Tensor t = at::ones({2, 3}), nothing;
  CHECK_THROWS_WITH_AS(view_of<float>(nothing), doctest::Contains("undefined"), ArgumentError);
  CHECK_THROWS_WITH_AS(view_of<double>(t), doctest::Contains("expected a tensor of Double, got Float"), ArgumentError);
  CHECK_THROWS_WITH_AS(view_of<lowrank::f16>(t), doctest::Contains("expected a tensor of Half, got Float"),
                       ArgumentError);
  at::Tensor whole = at::ones({2, 3}, at::kLong), meta = at::empty({2, 3}, at::device(at::kMeta));
  at::Tensor sparse = t.to_sparse(), negated = at::_neg_view(t);
  CHECK_THROWS_WITH_AS(view_of<float>(whole), doctest::Contains("got Long"), ArgumentError);
  CHECK_THROWS_WITH_AS(view_of<float>(meta), doctest::Contains("got one on meta"), ArgumentError);
  CHECK_THROWS_WITH_AS(view_of<float>(sparse), doctest::Contains("sparse"), ArgumentError);
  CHECK_THROWS_WITH_AS(view_of<float>(negated), doctest::Contains("resolve_neg"), ArgumentError);

  at::Tensor leaf = at::ones({2, 3}).set_requires_grad(true), inner = leaf * 2, detached = leaf.detach();
  CHECK_THROWS_WITH_AS(view_of<float>(leaf), doctest::Contains(".detach()"), ArgumentError);
  CHECK_THROWS_WITH_AS(view_of<float>(inner), doctest::Contains("requires a gradient"), ArgumentError);
  CHECK(view_of<float>(detached).data() == leaf.data_ptr());
  const at::NoGradGuard no_grad;
  CHECK(view_of<float>(leaf).data() == leaf.data_ptr());
}

TEST_CASE("as_torch is the way back") {
  lowrank::Matrix<double> m(3, 5);
  lowrank::CounterRng(1).fill_normal(m.view());
  const at::Tensor whole = as_torch(m), part = as_torch(m.view().block(1, 1, 2, 3).transposed());
  CHECK(whole.data_ptr() == m.data());
  check_same(m.view(), whole);
  check_same(m.view().block(1, 1, 2, 3).transposed(), part);
  const double* data = m.data();
  const at::Tensor given = as_torch(std::move(m));  // the tensor keeps the matrix now
  CHECK(given.data_ptr() == data);
  CHECK(given.sizes().vec() == std::vector<std::int64_t>{3, 5});
  lowrank::Matrix<float> none(0, 4);
  CHECK(as_torch(none).sizes().vec() == std::vector<std::int64_t>{0, 4});
}

TEST_CASE("y, dX, dA, dB and db are those of the same layer in torch's operations") {
  std::uint64_t seed = 100;
  const std::vector<std::vector<std::int64_t>> leading{{7}, {1}, {40}, {0}, {2, 3}, {2, 1, 3}, {}};
  for (const auto& lead : leading)
    for (const auto& [in, out, r] : {std::array<Index, 3>{12, 9, 3}, {8, 5, 5}, {1, 6, 1}, {6, 1, 1}, {33, 70, 4}})
      for (const bool bias : {false, true}) {
        CAPTURE(lead.size());
        CAPTURE(in);
        CAPTURE(out);
        const Problem p = problem(lead, in, out, r, 2.5 * double(r) + 1, seed += 10);
        const auto layer = dense_layer(p, {.train_bias = bias}, bias);
        at::Tensor x = p.x.clone().set_requires_grad(true);
        const at::Tensor y = layer->forward(x);
        y.backward(p.G);
        const Gradients mine = gradients_of(*layer, y, x), theirs = gradients(p, bias),
                        magnitude = gradients(magnitudes(p), bias);
        check_close(mine, theirs, magnitude, roundings(p));
        if (bias) check_close(mine.db, theirs.db, magnitude.db, roundings(p), 0x1p-52);
      }
}

TEST_CASE("activations and gradients of any strides") {
  const Problem p = problem({4, 6}, 10, 8, 3, 5, 900);
  const auto layer = dense_layer(p);
  const auto check = [&](const at::Tensor& x0, const at::Tensor& G) {
    Problem q = p;
    q.x = x0.contiguous();
    q.G = G.contiguous();
    at::Tensor x = x0.detach().set_requires_grad(true);
    layer->zero_grad();
    const at::Tensor y = layer->forward(x);
    y.backward(G);
    check_close(gradients_of(*layer, y, x), gradients(q, false), gradients(magnitudes(q), false), roundings(q));
  };
  check(p.x.transpose(0, 1), p.G.transpose(0, 1));
  check(p.x.narrow(1, 1, 3), p.G.narrow(1, 1, 3));
  check(normal({10, 7}, 950).t(), normal({8, 7}, 951).t());
  check(p.x, at::ones({1}, at::kDouble).expand_as(p.G));  // what y.sum() sends back
  check(normal({4, 6, 20}, 952).slice(2, 0, 20, 2), p.G);
}

TEST_CASE("several forwards before a backward") {
  const Problem p = problem({5}, 8, 8, 2, 3, 1000);
  const double K = 3 * roundings(p);  // up to three passes follow one another
  SUBCASE("the same layer twice in one pass, and side by side") {
    const auto through = [](const auto& f) {
      return [f](const at::Tensor& x, const at::Tensor& A, const at::Tensor& B, const at::Tensor&) {
        return f(f(x, A, B), A, B) + f(x * 2, A, B);
      };
    };
    const auto oracle = [&](const Problem& q) {
      return gradients(q, through([&](const at::Tensor& x, const at::Tensor& A, const at::Tensor& B) {
                         return by_torch(q, x, A, B);
                       }));
    };
    const auto layer = dense_layer(p);
    at::Tensor x = p.x.clone().set_requires_grad(true);
    const at::Tensor y = layer->forward(layer->forward(x)) + layer->forward(x * 2);
    y.backward(p.G);
    check_close(gradients_of(*layer, y, x), oracle(p), oracle(magnitudes(p)), K);
  }
  SUBCASE("micro-batches of different lengths, backward in the other order") {
    const auto layer = dense_layer(p);
    at::Tensor x = p.x.clone().set_requires_grad(true);
    const at::Tensor head = layer->forward(x.narrow(0, 0, 2)), tail = layer->forward(x.narrow(0, 2, 3));
    tail.backward(p.G.narrow(0, 2, 3));
    head.backward(p.G.narrow(0, 0, 2));
    check_close(gradients_of(*layer, at::cat({head, tail}), x), gradients(p, false), gradients(magnitudes(p), false),
                K);
    layer->zero_grad();
    for (const auto& parameter : layer->parameters())
      CHECK((!parameter.grad().defined() || parameter.grad().eq(0).all().item<bool>()));
  }
  SUBCASE("a retained graph") {
    const auto layer = dense_layer(p);
    at::Tensor x = p.x.clone().set_requires_grad(true);
    const at::Tensor y = layer->forward(x);
    y.backward(p.G, /*retain_graph=*/true);
    const Gradients once = gradients_of(*layer, y, x);
    y.backward(p.G);
    const Gradients twice = gradients_of(*layer, y, x);
    CHECK(at::equal(twice.dA, 2 * once.dA));
    CHECK(at::equal(twice.dB, 2 * once.dB));
    CHECK(at::equal(twice.dx, 2 * once.dx));
    CHECK_THROWS_WITH_AS(y.backward(p.G), doctest::Contains("second time"), c10::Error);
  }
}

TEST_CASE("what autograd asks for, and nothing else") {
  const Problem p = problem({5}, 8, 6, 2, 3, 1100);
  const Gradients theirs = gradients(p, false), magnitude = gradients(magnitudes(p), false);
  const double K = roundings(p);
  const auto layer = dense_layer(p);
  auto named = layer->named_parameters();
  SUBCASE("x without a gradient") {
    layer->forward(p.x).backward(p.G);
    check_close(named["lora_A"].grad(), theirs.dA, magnitude.dA, K, 0x1p-52);
    CHECK(!p.x.grad().defined());
  }
  SUBCASE("A frozen") {
    named["lora_A"].set_requires_grad(false);
    layer->forward(p.x).backward(p.G);
    CHECK(!named["lora_A"].grad().defined());
    check_close(named["lora_B"].grad(), theirs.dB, magnitude.dB, K, 0x1p-52);
  }
  SUBCASE("autograd::grad leaves .grad alone") {
    const at::Tensor y = layer->forward(p.x);
    const auto only = torch::autograd::grad({y}, {named["lora_B"]}, {p.G});
    check_close(only[0], theirs.dB, magnitude.dB, K, 0x1p-52);
    CHECK(!named["lora_B"].grad().defined());
  }
  SUBCASE("no graph under NoGradGuard") {
    const at::NoGradGuard no_grad;
    const at::Tensor y = layer->forward(p.x);
    CHECK(!y.requires_grad());
    check_close(y, theirs.y, magnitude.y, K, 0x1p-52);
  }
  SUBCASE("second derivatives are an error, first ones under create_graph are not") {
    at::Tensor x = p.x.clone().set_requires_grad(true);
    const at::Tensor y = layer->forward(x);
    const auto first = torch::autograd::grad({y}, {x}, {p.G}, true, /*create_graph=*/true);
    check_close(first[0].detach(), theirs.dx, magnitude.dx, K, 0x1p-52);
    CHECK_THROWS_WITH_AS(first[0].square().sum().backward(), doctest::Contains("second derivatives"), std::exception);
  }
  SUBCASE("a parameter stepped before its backward") {
    const at::Tensor y = layer->forward(p.x);
    {
      const at::NoGradGuard no_grad;
      named["lora_B"].mul_(2);
    }
    CHECK_THROWS_WITH_AS(y.backward(p.G), doctest::Contains("modified by an inplace operation"), c10::Error);
  }
  SUBCASE("several threads, a graph each") {
    std::array<bool, 2> same{};
    const auto reference = torch::autograd::grad({layer->forward(p.x)}, layer->parameters(), {p.G});
    std::vector<std::thread> threads;
    for (bool& ok : same)
      threads.emplace_back([&] {
        ok = true;
        for (int i = 0; i < 50; ++i) {
          const auto g = torch::autograd::grad({layer->forward(p.x)}, layer->parameters(), {p.G});
          ok = ok && at::equal(g[0], reference[0]) && at::equal(g[1], reference[1]);
        }
      });
    for (std::thread& thread : threads) thread.join();
    CHECK(same[0]);
    CHECK(same[1]);
  }
}

TEST_CASE("the parameters are the layer, whoever goes first") {
  const Problem p = problem({3}, 7, 5, 2, 3, 1200);
  auto layer = dense_layer(p);
  auto named = layer->named_parameters();
  CHECK(named["lora_A"].data_ptr() == layer->layer().A().data());
  CHECK(named["lora_B"].data_ptr() == layer->layer().B().data());
  CHECK(named["lora_A"].data_ptr<double>() + 14 == named["lora_B"].data_ptr<double>());  // one block
  CHECK(layer->parameters().size() == 2);
  SUBCASE("both ways") {
    layer->layer().B()(4, 1) = 42;
    CHECK(named["lora_B"][4][1].item<double>() == 42);
    const at::NoGradGuard no_grad;
    named["lora_A"].fill_(3);
    CHECK(layer->layer().A()(1, 6) == 3);
  }
  SUBCASE("a graph and a parameter outlive the module") {
    at::Tensor kept = named["lora_A"], x = p.x.clone().set_requires_grad(true);
    const at::Tensor y = layer->forward(x);
    named.clear();
    layer.reset();
    y.backward(p.G);
    const Gradients theirs = gradients(p, false), magnitude = gradients(magnitudes(p), false);
    check_close(kept.grad(), theirs.dA, magnitude.dA, roundings(p), 0x1p-52);
    CHECK(at::equal(kept.detach(), p.A));
  }
  SUBCASE("save and load") {
    std::stringstream file;
    torch::serialize::OutputArchive out;
    layer->save(out);
    out.save_to(file);
    const Problem other = problem({3}, 7, 5, 2, 3, 1300);
    const auto loaded = dense_layer(other);
    torch::serialize::InputArchive in;
    in.load_from(file);
    loaded->load(in);
    CHECK(at::equal(as_torch(loaded->layer().A()), p.A));
    CHECK(at::equal(as_torch(loaded->layer().B()), p.B));
    CHECK(loaded->named_parameters()["lora_A"].data_ptr() == loaded->layer().A().data());
    // and without asking for the layer in between
    const at::Tensor moved = normal({2, 7}, 1400);
    loaded->named_parameters()["lora_A"].set_data(moved);
    loaded->forward(p.x).backward(p.G);
    CHECK(at::equal(as_torch(loaded->layer().A()), moved));
    CHECK(loaded->named_parameters()["lora_A"].grad().defined());
  }
  SUBCASE("moved to another type") {
    layer->to(at::kFloat);
    CHECK_THROWS_WITH_AS(layer->forward(p.x), doctest::Contains("expected a tensor of Double, got Float"),
                         ArgumentError);
    layer->to(at::kDouble);
    CHECK(layer->forward(p.x).defined());
    CHECK(named["lora_A"].data_ptr() == layer->layer().A().data());
  }
  SUBCASE("what does not fit") {
    at::Tensor narrow = at::ones({3, 6}, at::kDouble), single = at::ones({3, 7});
    CHECK_THROWS_WITH_AS(layer->forward(narrow), doctest::Contains("x must be 3x7, got 3x6"), ShapeError);
    CHECK_THROWS_WITH_AS(layer->forward(single), doctest::Contains("expected a tensor of Double, got Float"),
                         ArgumentError);
    CHECK_THROWS_AS(layer->forward(at::ones({}, at::kDouble)), ShapeError);
    CHECK_THROWS_AS(layer->forward(at::Tensor()), ArgumentError);
    layer->named_parameters()["lora_A"].set_data(at::ones({2, 6}, at::kDouble));
    CHECK_THROWS_WITH_AS(layer->forward(p.x), doctest::Contains("'lora_A' must be 2x7"), ShapeError);
  }
}

TEST_CASE("twenty steps of torch's AdamW are those of the layer in torch's operations") {
  const Problem p = problem({16}, 12, 10, 3, 5, 1500);
  const auto train = [&](auto&& forward, std::vector<at::Tensor> parameters) {
    torch::optim::AdamW optimizer(std::move(parameters), torch::optim::AdamWOptions(1e-2).weight_decay(0.1));
    double loss_of_last = 0;
    for (int step = 0; step < 20; ++step) {
      optimizer.zero_grad();
      at::Tensor loss = (forward() - p.G).square().mean();
      loss.backward();
      optimizer.step();
      loss_of_last = loss.item<double>();
    }
    return loss_of_last;
  };
  // How far rounding may carry two such runs apart: as far as the oracle's own result moves when its start is off by as
  // many roundings as one gradient has.
  const auto by_torch_from = [&](double relative) {
    at::Tensor A = (p.A * (1 + relative)).set_requires_grad(true), B = (p.B * (1 - relative)).set_requires_grad(true);
    train([&] { return by_torch(p, p.x, A, B); }, {A, B});
    return std::pair(A.detach(), B.detach());
  };
  const auto [A, B] = by_torch_from(0);
  const auto [A_off, B_off] = by_torch_from(roundings(p) * 0x1p-52);
  const auto layer = dense_layer(p);
  const double first = (layer->forward(p.x) - p.G).square().mean().item<double>();
  const double last = train([&] { return layer->forward(p.x); }, layer->parameters());
  CHECK(last < 0.9 * first);
  const LoraFactors<double> trained = layer->layer().factors();
  const at::Tensor mine_A = as_torch(layer->layer().A()), mine_B = as_torch(layer->layer().B());
  CHECK((mine_A - A).abs().max().item<double>() <= (A_off - A).abs().max().item<double>());
  CHECK((mine_B - B).abs().max().item<double>() <= (B_off - B).abs().max().item<double>());
  CHECK((A - p.A).abs().max().item<double>() > 0.1);  // it did go somewhere
  CHECK(trained.B(9, 2) == mine_B[9][2].item<double>());
}

TEST_CASE("over 4-bit and bf16 weights, as over their dequantised values in torch") {
  for (const std::int64_t tokens : {1, 3, 33}) {
    CAPTURE(tokens);
    Problem p = problem({tokens}, 96, 40, 4, 6, 1600);
    for (at::Tensor* t : {&p.W, &p.A, &p.B, &p.b, &p.x, &p.G}) *t = t->to(at::kFloat);
    const auto check = [&](auto layer, const at::Tensor& W) {
      Problem q = p;
      for (at::Tensor* t : {&q.A, &q.B, &q.b, &q.x, &q.G}) *t = t->to(at::kDouble);
      q.W = W.to(at::kDouble);
      at::Tensor x = p.x.clone().set_requires_grad(true);
      const at::Tensor y = layer->forward(x);
      y.backward(p.G);
      check_close(gradients_of(*layer, y, x), gradients(q, false), gradients(magnitudes(q), false), roundings(p),
                  0x1p-23);
    };
    auto codes = lowrank::quantise(view_of<float>(p.W));
    const at::Tensor values = as_torch(codes.dequantise());
    CHECK((values - p.W).abs().max().item<double>() > 0.01);  // it is quantised
    check(torch_layer(LoraLinear<float, lowrank::QuantisedMatrix<float>>(std::move(codes), factors<float>(p))), values);

    const at::Tensor narrow = p.W.to(at::kBFloat16);
    check(torch_layer(LoraLinear<float, DenseBase<float, lowrank::bf16>>(
                          DenseBase<float, lowrank::bf16>(view_of<lowrank::bf16>(narrow)), factors<float>(p)),
                      {narrow}),
          narrow);
  }
}

TEST_CASE("dropout acts in train() alone, and a graph keeps its mask") {
  const Problem p = problem({50}, 20, 10, 3, 5, 1700);
  const auto layer = dense_layer(p, {.dropout = 0.5, .seed = 3});
  at::Tensor x = p.x.clone().set_requires_grad(true);
  layer->eval();
  const Gradients plain = gradients(p, false), magnitude = gradients(magnitudes(p), false);
  check_close(layer->forward(x).detach(), plain.y, magnitude.y, roundings(p), 0x1p-52);
  layer->train();
  const at::Tensor y = layer->forward(x), z = layer->forward(x);
  CHECK(!at::allclose(y, z));
  CHECK(!at::allclose(y.detach(), plain.y));
  // y − x·Wᵀ is linear in A, in B and, as y is, in x: the gradients of Σ G∘y give its value back, mask and all.
  y.backward(p.G, /*retain_graph=*/true);
  const Gradients once = gradients_of(*layer, y, x);
  const double update = (p.G * (y.detach() - at::matmul(p.x, p.W.t()))).sum().item<double>();
  const double bound = 4 * double(p.G.numel()) * 0x1p-52 * (magnitude.y * p.G.abs()).sum().item<double>();
  CHECK(std::abs((once.dA * p.A).sum().item<double>() - update) < bound);
  CHECK(std::abs((once.dB * p.B).sum().item<double>() - update) < bound);
  CHECK(std::abs((once.dx * p.x).sum().item<double>() - (p.G * y.detach()).sum().item<double>()) < bound);
  y.backward(p.G);  // the mask is drawn again
  CHECK(at::equal(gradients_of(*layer, y, x).dA, 2 * once.dA));
  CHECK(at::equal(gradients_of(*layer, y, x).dx, 2 * once.dx));
}

TEST_CASE("the two ends LoRA is compared with") {
  const Problem p = problem({6}, 9, 7, 2, 3, 1800);
  const double K = roundings(p);
  const Problem m = magnitudes(p);
  const auto full = torch_layer(lowrank::FullLinear<double>(view_of<double>(p.W)));
  const auto frozen = torch_layer(lowrank::FrozenLinear<double>(DenseBase<double>(view_of<double>(p.W))), {p.W});
  CHECK(full->parameters().size() == 1);
  CHECK(frozen->parameters().empty());
  for (const bool trained : {true, false}) {
    at::Tensor x = p.x.clone().set_requires_grad(true);
    const at::Tensor y = trained ? full->forward(x) : frozen->forward(x);
    y.backward(p.G);
    check_close(y.detach(), at::matmul(p.x, p.W.t()), at::matmul(m.x, m.W.t()), K, 0x1p-52);
    check_close(x.grad(), at::matmul(p.G, p.W), at::matmul(m.G, m.W), K, 0x1p-52);
  }
  check_close(full->named_parameters()["weight"].grad(), at::matmul(p.G.t(), p.x), at::matmul(m.G.t(), m.x), K,
              0x1p-52);
  CHECK(!frozen->forward(p.x).requires_grad());
}

TEST_CASE("docs/embedding.md, its libtorch blocks as they stand there") {
  torch::nn::Linear linear(torch::nn::LinearOptions(24, 16).bias(false));
  const at::Tensor x = normal({2, 3, 24}, 1).to(at::kFloat), target = normal({2, 3, 16}, 2).to(at::kFloat);
#include "embedding_lora.inc"
  CHECK((q_proj->forward(x) - target).square().mean().item<double>() <
        (linear->forward(x) - target).square().mean().item<double>());
  CHECK(trained.rank() == 4);
#include "embedding_qlora.inc"
  CHECK(y.sizes().vec() == std::vector<std::int64_t>{2, 3, 16});
}

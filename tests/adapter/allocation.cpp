// Steady state allocates nothing: counts every operator new of this program.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "lowrank/adapter/dora.hpp"
#include "lowrank/adapter/embedding.hpp"
#include "lowrank/adapter/linear.hpp"
#include "lowrank/adapter/lora.hpp"
#include "lowrank/optim/adamw.hpp"
#include "lowrank/optim/clip.hpp"
#include "support/compare.hpp"

namespace {
std::atomic<long> allocations{0};

void* count(std::size_t n, std::size_t alignment) {
  ++allocations;
  void* p = std::aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(std::size_t n) { return count(n, alignof(std::max_align_t)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return count(n, alignof(std::max_align_t)); }
void* operator new(std::size_t n, std::align_val_t a) { return count(n, std::size_t(a)); }
// Inlined beside an operator new that is not, GCC sees free() of what new returned and warns.
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

using namespace lowrank;
using test::random_matrix;

TEST_CASE("the second step of a training loop allocates nothing") {
  const Matrix<float> W = random_matrix<float>(70, 90, 1), E = random_matrix<float>(50, 90, 2);
  const Matrix<bf16> H(W.view());
  for (const double dropout : {0.0, 0.1})
    for (const Index tokens : {Index(1), Index(64)}) {
      CAPTURE(dropout);
      CAPTURE(tokens);
      const LoraFactors<float> f{random_matrix<float>(8, 90, 3), random_matrix<float>(70, 8, 4), 1.5F};
      LoraEmbedding<float> embedding(
          DenseBase<float>(E.view()),
          LoraFactors<float>{random_matrix<float>(8, 50, 3), random_matrix<float>(90, 8, 4), 2.F});
      LoraLinear<float> lora(DenseBase<float>(W.view()), f, {.dropout = dropout, .train_bias = true},
                             std::vector<float>(70));
      LoraLinear<float, DenseBase<float, bf16>> half(DenseBase<float, bf16>(H.view()), f);
      FullLinear<float> full(W);
      DoraLinear<float> dora(DenseBase<float>(W.view()), f, {.dropout = dropout});
      FlatParameters<float> flat;
      flat.add("e", embedding.parameters());
      flat.add("l", lora.parameters());
      flat.add("h", half.parameters());
      flat.add("f", full.parameters());
      flat.add("d", dora.parameters());
      flat.pack();
      AdamW<float> adam(flat.size(), {}, lora_plus_groups(flat.table(), 16));
      LoraWorkspace<float> we, wl, wh, wf;
      DoraWorkspace<float> wd;
      Matrix<float> X(tokens, 90), Y(tokens, 70), dX(tokens, 90);
      const std::vector<std::int32_t> ids(std::size_t(tokens), 3);
      const auto step = [&] {
        flat.zero_gradients();
        embedding.forward(ids, X, we);
        lora.forward(X, Y, wl);
        lora.backward(X, Y, wl, dX);
        half.forward(X, Y, wh);
        half.backward(X, Y, wh, dX);
        full.forward(X, Y, wf);
        full.backward(X, Y, wf, dX);
        dora.forward(X, Y, wd);
        dora.backward(X, Y, wd, dX);
        dora.forward(X, Y, wd, Phase::eval);
        embedding.backward(ids, dX, we);
        clip_gradients(flat.gradients(), 1.0);
        adam.step(flat.values(), flat.gradients(), 1e-4);
      };
      step();
      step();
      const long before = allocations;
      step();
      CHECK(allocations - before == 0);
    }
}

// SPDX-License-Identifier: Apache-2.0
// What a QLoRA step allocates: one panel a thread and the adapter's own state the first time, nothing afterwards.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/init/kaiming.hpp"
#include "lowrank/quant/quantise.hpp"
#include "support/compare.hpp"

namespace {
std::atomic<long long> allocated{0}, allocations{0};

void* counted_or_null(std::size_t n, std::size_t alignment) noexcept {
  allocated += static_cast<long long>(n);
  ++allocations;
  return std::aligned_alloc(alignment, (n + alignment - 1) / alignment * alignment);
}
void* counted(std::size_t n, std::size_t alignment) {
  void* p = counted_or_null(n, alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
}  // namespace

void* operator new(std::size_t n) { return counted(n, 16); }
void* operator new(std::size_t n, std::align_val_t a) { return counted(n, std::size_t(a)); }
// std::stable_sort takes its buffer by the nothrow form.
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return counted_or_null(n, 16); }
// Inlined beside an operator new that is not, GCC sees free() of what new returned and warns.
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

using namespace lowrank;

TEST_CASE("a QLoRA step needs codes, scales, adapter state and one panel a thread") {
  const Index out = 768, in = 1024, tokens = 96, r = 8;
  auto q = quantise(test::random_matrix<float>(out, in, 1).view(), {.double_quantise = true});
  CHECK(q.storage_bytes() < out * in * 4.3 / 8);
  CHECK(q.bits_per_weight() == doctest::Approx(8.0 * double(q.storage_bytes()) / double(out * in)));
  LoraLinear<float, QuantisedMatrix<float>> layer(std::move(q), kaiming<float>(out, in, {.rank = r}).factors);
  const Matrix<float> X = test::random_matrix<float>(tokens, in, 2), G = test::random_matrix<float>(tokens, out, 3);
  Matrix<float> Y(tokens, out), dX(tokens, in);
  LoraWorkspace<float> ws;
  const auto step = [&] {
    layer.forward(X, Y, ws);
    layer.backward(X, G, ws, dX);
    layer.forward(X.view().middle_rows(0, 1), Y.view().middle_rows(0, 1), ws);
  };
  const long long before = allocated;
  step();
  // Packed blocks of both operands a thread, and T = s·X·Aᵀ and U = s·G·B; a buffer that grows is counted each time.
  const long long panel = 4 * (detail::block_cols<float> + detail::block_rows<float>)*detail::block_depth<float>;
  const long long state = 4 * 2 * (tokens + 1) * r;
  CHECK(allocated - before <= 2 * panel * max_threads() + state + 4096);
  const long long count = allocations;
  step();
  CHECK(allocations == count);
}

// SPDX-License-Identifier: Apache-2.0
// No matrix library at all: pointers, shapes and strides in; two layers' parameters out as one pointer and one length.
#undef NDEBUG
#include <cassert>
#include <cstdio>
#include <vector>

#include "lowrank/adapter/lora.hpp"
#include "lowrank/init/gaussian.hpp"

using namespace lowrank;

int main() {
  constexpr Index in = 12, hidden = 10, tokens = 7;
  std::vector<float> w1(hidden * in), w2(hidden * hidden);  // two frozen weights, as some checkpoint has them
  std::vector<float> buffer(tokens * 32);                   // activations with room between the rows
  CounterRng(1).fill_normal(view_of(w1.data(), hidden, in));
  CounterRng(2).fill_normal(view_of(w2.data(), hidden, hidden));
  const auto x = view_of(buffer.data(), tokens, in, Order::row_major, 32);  // 32 floats from row to row
  const auto y = view_of(buffer.data() + 16, tokens, hidden, Order::row_major, 32);
  CounterRng(3).fill_normal(x);

  const float* frozen = w2.data();
  LoraLinear<float> first(DenseBase<float>(view_of(w1.data(), hidden, in)),
                          gaussian<float>(hidden, in, {.rank = 2, .alpha = 4}).factors);
  LoraLinear<float> second(DenseBase<float>(view_of(frozen, hidden, hidden)),
                           gaussian<float>(hidden, hidden, {.rank = 3, .alpha = 6}).factors);
  FlatParameters<float> flat;
  flat.add("up", first.parameters());
  flat.add("down", second.parameters());
  flat.pack();

  std::vector<float> z(tokens * hidden), g(tokens * hidden, 0.01F), dy(tokens * hidden);
  const auto zv = view_of(z.data(), tokens, hidden), gv = view_of(g.data(), tokens, hidden),
             dyv = view_of(dy.data(), tokens, hidden);
  LoraWorkspace<float> ws1, ws2;  // one for each pass that still waits for its backward
  const auto loss = [&] {
    first.forward(x, y, ws1);
    second.forward(y, zv, ws2);
    double sum = 0;
    for (const float v : z) sum += 0.01 * double(v);
    return sum;
  };
  const double before = loss();
  second.backward(y, gv, ws2, dyv);
  first.backward(x, dyv, ws1);
  float* values =
      flat.values().data();  // plain gradient descent; any optimizer that takes a pointer and a length will do
  for (Index i = 0; i < flat.size(); ++i) values[i] -= 0.1F * flat.gradients()[std::size_t(i)];
  const double after = loss();
  for (const ParameterInfo& p : flat.table())
    std::printf("%-12s %2d x %2d at %3d\n", p.name.c_str(), int(p.rows), int(p.cols), int(p.offset));
  std::printf("loss %.5f -> %.5f\n", before, after);
  assert(after < before && flat.size() == 2 * (in + hidden) + 3 * (hidden + hidden));
}

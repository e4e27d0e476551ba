// SPDX-License-Identifier: Apache-2.0
// Five steps of AdamW on the adapters of two layers, for peft_trains.py to compare with the same steps in PEFT:
//     peer_train BASE ADAPTER BATCHES.npz RATE DECAY OUT
// The net is y = second(tanh(first(x))), the loss the mean squared error; the base is dense or in bitsandbytes' 4 bits.
#include <lowrank/adapter/lora.hpp>
#include <lowrank/io/bitsandbytes.hpp>
#include <lowrank/io/npz.hpp>
#include <lowrank/io/peft.hpp>
#include <lowrank/optim/adamw.hpp>

#include <cmath>
#include <cstdio>
#include <exception>
#include <string>

namespace {

using namespace lowrank;

constexpr int steps = 5;

const LoraFactors<float>& factors_of(const io::PeftAdapter& adapter, const std::string& name) {
  for (const io::AdapterModule& m : adapter.modules)
    if (m.name == name) return m.factors;
  throw ArgumentError("the adapter has no module " + name);
}

template <class Layer>
void put_back(io::PeftAdapter& adapter, const std::string& name, const Layer& layer) {
  for (io::AdapterModule& m : adapter.modules)
    if (m.name == name) {
      m.factors.A.assign(layer.A());
      m.factors.B.assign(layer.B());
    }
}

template <class Base>
void train(Base first_base, Base second_base, io::PeftAdapter& adapter, const io::NpzFile& batches, double rate,
           double decay) {
  LoraLinear<float, Base> first(std::move(first_base), factors_of(adapter, "first"));
  LoraLinear<float, Base> second(std::move(second_base), factors_of(adapter, "second"));
  LoraWorkspace<float> first_pass, second_pass;
  AdamW<float> first_steps(first.parameters().size(), {.weight_decay = decay});
  AdamW<float> second_steps(second.parameters().size(), {.weight_decay = decay});
  for (int step = 0; step < steps; ++step) {
    const std::string k = std::to_string(step);
    const Matrix<float> x = batches["x" + k].to_matrix<float>(), target = batches["y" + k].to_matrix<float>();
    Matrix<float> hidden, y, gradient, hidden_gradient;
    hidden.resize(x.rows(), first.out_features());
    first.forward(x, hidden, first_pass);
    for (Index i = 0; i < hidden.size(); ++i) hidden.data()[i] = std::tanh(hidden.data()[i]);
    y.resize(x.rows(), second.out_features());
    second.forward(hidden, y, second_pass);
    gradient.resize(y.rows(), y.cols());
    double loss = 0;
    for (Index i = 0; i < y.size(); ++i) {
      const float off = y.data()[i] - target.data()[i];
      loss += double(off) * double(off) / double(y.size());
      gradient.data()[i] = 2.0F * off / float(y.size());
    }
    hidden_gradient.resize(hidden.rows(), hidden.cols());
    second.backward(hidden, gradient, second_pass, hidden_gradient, {.gradients = Update::assign});
    for (Index i = 0; i < hidden.size(); ++i) hidden_gradient.data()[i] *= 1.0F - hidden.data()[i] * hidden.data()[i];
    first.backward(x, hidden_gradient, first_pass, {.gradients = Update::assign});
    first_steps.step(first.parameters().values(), first.parameters().gradients(), rate);
    second_steps.step(second.parameters().values(), second.parameters().gradients(), rate);
    std::printf("%.9g\n", loss);
  }
  put_back(adapter, "first", first);
  put_back(adapter, "second", second);
}
}  // namespace

int main(int argc, char** argv) try {
  if (argc != 7) return 2;
  const io::Checkpoint base(argv[1]);
  io::PeftAdapter adapter = io::read_peft(argv[2]);
  const io::NpzFile batches(argv[3]);
  const double rate = std::stod(argv[4]), decay = std::stod(argv[5]);
  if (io::bitsandbytes_type(base, "first.weight").empty()) {
    const Matrix<float> first = base["first.weight"].to_matrix<float>(),
                        second = base["second.weight"].to_matrix<float>();
    train(DenseBase<float>(view_of(first)), DenseBase<float>(view_of(second)), adapter, batches, rate, decay);
  } else {
    train(io::read_bitsandbytes<float>(base, "first.weight"), io::read_bitsandbytes<float>(base, "second.weight"),
          adapter, batches, rate, decay);
  }
  io::write_peft(argv[6], adapter);
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "peer_train: %s\n", e.what());
  return 1;
}

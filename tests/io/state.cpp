// SPDX-License-Identifier: Apache-2.0
// A run that is stopped and resumed equals one that was not, bit for bit; 4-bit weights survive the way to disk.
#include "lowrank/io/bitsandbytes.hpp"
#include "lowrank/io/training_state.hpp"
#include "lowrank/quant/quantise.hpp"
#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;

namespace {
/// Two blocks of parameters that follow a noisy gradient, every number a function of (seed, step).
template <class T>
struct Run {
  Parameters<T> a{{{"lora_A", 3, 5, 0}, {"lora_B", 7, 3, 0}}}, b{{{"lora_A", 1, 4, 0}, {"lora_B", 0, 1, 0}}};
  FlatParameters<T> flat;
  std::unique_ptr<AdamW<T>> optimizer;
  explicit Run(std::uint64_t seed) {
    CounterRng(seed).fill_normal(a.value(0));
    CounterRng(seed, 1).fill_normal(b.value(0));
    flat.add("layers.0", a);
    flat.add("layers.1", b);
    flat.pack();
    optimizer = std::make_unique<AdamW<T>>(flat.size(), AdamWOptions{.weight_decay = 0.01});
  }
  void step(std::uint64_t seed) {
    const CounterRng rng(seed, std::uint64_t(optimizer->steps()));
    for (std::size_t i = 0; i < flat.gradients().size(); ++i) flat.gradients()[i] = flat.values()[i] + T(rng.normal(i));
    optimizer->step(flat.values(), flat.gradients(), 1e-2);
  }
  bool same(Run& other) {
    const auto equal = [](std::span<T> x, std::span<T> y) {
      return std::memcmp(x.data(), y.data(), x.size_bytes()) == 0;
    };
    return equal(flat.values(), other.flat.values()) &&
           equal(optimizer->first_moments(), other.optimizer->first_moments()) &&
           equal(optimizer->second_moments(), other.optimizer->second_moments()) &&
           optimizer->steps() == other.optimizer->steps();
  }
};
}  // namespace

TEST_CASE_TEMPLATE("a resumed run equals an uninterrupted one", T, float, double) {
  TempDir dir;
  Run<T> whole(3), first(3), second(99);  // the second starts from other numbers: all must come from the file
  for (int i = 0; i < 20; ++i) whole.step(5);
  for (int i = 0; i < 8; ++i) first.step(5);
  save_training_state(dir / "s", first.flat, *first.optimizer, {{{"step", 8}, {"seed", -(std::int64_t(1) << 62) - 1}}});
  const TrainingCounters counters = load_training_state(dir / "s", second.flat, *second.optimizer);
  CHECK(counters.values.at("step") == 8);
  CHECK(counters.values.at("seed") == -(std::int64_t(1) << 62) - 1);
  CHECK(second.same(first));
  for (int i = 0; i < 12; ++i) second.step(5);
  CHECK(second.same(whole));
}

TEST_CASE("notes and series of a run come back exactly, before and with the blocks") {
  TempDir dir;
  Run<float> run(1), other(2);
  run.step(1);
  const TrainingCounters kept{{{"step", 1}},
                              {{"method", "lora"}, {"rate", "0.1"}, {"", ""}},
                              {{"losses", {1.0 / 3, -0.0, std::numeric_limits<double>::infinity()}}, {"empty", {}}}};
  save_training_state(dir / "s", run.flat, *run.optimizer, kept);
  for (const TrainingCounters& back :
       {read_training_counters(dir / "s"), load_training_state(dir / "s", other.flat, *other.optimizer)}) {
    CHECK(back.values == kept.values);
    CHECK(back.notes == kept.notes);
    CHECK(back.series == kept.series);
  }
  CHECK(other.same(run));
  SafeTensorsWriter bad(dir / "x", {{"series.a", Dtype::F32, {1}}}, {{"format", "lowrank-training-state-1"}});
  const std::vector<std::byte> zero(4);
  bad.write("series.a", zero);
  bad.commit();
  check_error([&] { read_training_counters(dir / "x"); }, {"series.a", "F32 [1]", "expected a F64 vector"});
  check_error([&] { read_training_counters(dir.write("y", "text")); }, {"y"});
}

TEST_CASE("a state that does not fit is refused and nothing changes") {
  TempDir dir;
  Run<float> run(1), other(2), untouched(2);
  run.step(1);
  save_training_state(dir / "s", run.flat, *run.optimizer);
  Parameters<float> p{{{"lora_A", 3, 5, 0}}};
  FlatParameters<float> flat;
  flat.add("layers.0", p);
  flat.pack();
  AdamW<float> adam(flat.size());
  check_error([&] { load_training_state(dir / "s", flat, adam); }, {"12 tensors", "expected 3"});
  check_error<ShapeError>([&] { load_training_state(dir / "s", flat, *run.optimizer); }, {"elements"});
  Run<double> wide(1);
  check_error([&] { load_training_state(dir / "s", wide.flat, *wide.optimizer); }, {"layers.0.lora_A", "F32", "F64"});
  const auto rewrite = [&](std::map<std::string, std::string> metadata, bool drop) {
    const SafeTensors in(dir / "s");
    std::vector<TensorSpec> specs(in.tensors().begin(), in.tensors().end());
    if (drop) specs.erase(specs.begin());
    for (const auto& [k, v] : in.metadata()) metadata.emplace(k, v);
    SafeTensorsWriter w(dir / "x", specs, metadata, TensorOrder::as_given);
    for (const auto& t : specs) w.copy(t.name, in[t.name]);
    w.commit();
  };
  rewrite({{"format", "pt"}}, false);
  check_error([&] { load_training_state(dir / "x", other.flat, *other.optimizer); }, {"not a training state"});
  rewrite({{"adamw.steps", "1.5"}}, false);
  check_error([&] { load_training_state(dir / "x", other.flat, *other.optimizer); }, {"adamw.steps", "integer"});
  rewrite({}, true);
  check_error([&] { load_training_state(dir / "x", other.flat, *other.optimizer); }, {"no such tensor"});
  CHECK(other.same(untouched));
}

TEST_CASE("4-bit weights survive the way to disk, plain and double-quantised, odd sizes too") {
  for (const bool nested : {false, true})
    for (const auto& [m, n] : {std::pair<Index, Index>{1, 1}, {3, 5}, {64, 64}, {33, 129}}) {
      for (const bool fp4 : {false, true}) {
        TempDir dir;
        const Matrix<float> W = random_matrix(m, n, 7);
        QuantiseOptions o;
        if (fp4) o.codebook = Codebook::fp4();
        o.double_quantise = nested;
        const auto q = quantise(W, o);
        const auto tensors = bitsandbytes_tensors("x.weight", q, "float16");
        std::vector<TensorSpec> specs;
        for (const auto& t : tensors) specs.push_back(t.spec);
        CHECK(specs[0].shape == Shape{std::uint64_t(m * n + 1) / 2, 1});
        SafeTensorsWriter w(dir / "model.safetensors", specs);
        for (const auto& t : tensors) w.write(t.spec.name, t.bytes);
        w.commit();
        const Checkpoint c(dir.path());
        CHECK(bitsandbytes_type(c, "x.weight") == (fp4 ? "fp4" : "nf4"));
        const auto back = read_bitsandbytes(c, "x.weight");
        CHECK(same_bits(back.dequantise(), q.dequantise()));
        // The same tensors come out again: nothing was lost on the way.
        const auto again = bitsandbytes_tensors("x.weight", back, "float16");
        REQUIRE(again.size() == tensors.size());
        for (std::size_t i = 0; i < again.size(); ++i) CHECK(again[i].bytes == tensors[i].bytes);
      }
    }
}

TEST_CASE("the first element of a pair sits in the high nibble, as bitsandbytes packs") {
  Matrix<float> W(1, 2);
  W(0, 0) = 1;   // code 15 of NF4
  W(0, 1) = -1;  // code 0
  const auto t = bitsandbytes_tensors("w", quantise(W));
  CHECK(t[0].bytes[0] == std::byte(0xF0));
}

TEST_CASE("a damaged 4-bit state is refused by name") {
  TempDir dir;
  const Matrix<float> W = random_matrix(8, 16, 7);
  const auto good = bitsandbytes_tensors("x.weight", quantise(W));
  const auto refuses = [&](auto&& damage, std::initializer_list<const char*> parts) {
    auto tensors = good;
    damage(tensors);
    std::vector<TensorSpec> specs;
    for (const auto& t : tensors) specs.push_back(t.spec);
    SafeTensorsWriter w(dir / "model.safetensors", specs);
    for (const auto& t : tensors) w.write(t.spec.name, t.bytes);
    w.commit();
    const Checkpoint c(dir.path());
    check_error([&] { (void)read_bitsandbytes(c, "x.weight"); }, parts);
  };
  using V = std::vector<OwnedTensor>;
  const auto find = [](V& v, const std::string& end) -> OwnedTensor& {
    for (OwnedTensor& t : v)
      if (t.spec.name.ends_with(end)) return t;
    throw std::runtime_error("no " + end);
  };
  const auto state = [&](V& v, const std::string& json) {
    auto& t = find(v, "__nf4");
    t.bytes.resize(json.size());
    std::memcpy(t.bytes.data(), json.data(), json.size());
    t.spec.shape = {json.size()};
  };
  refuses([&](V& v) { std::erase_if(v, [](const OwnedTensor& t) { return t.spec.name.ends_with(".absmax"); }); },
          {".absmax", "no such tensor"});
  refuses([&](V& v) { std::erase_if(v, [](const OwnedTensor& t) { return t.spec.name.ends_with("__nf4"); }); },
          {"'x.weight'", "no 4-bit weight"});
  refuses(
      [&](V& v) {
        auto& t = find(v, ".quant_map");
        t.bytes[3] = std::byte(0x3f);  // +1 in place of -1
      },
      {"quant_map"});
  refuses(
      [&](V& v) {
        auto& t = find(v, "x.weight");
        t.bytes.pop_back();
        t.spec.shape[0] -= 1;
      },
      {"'x.weight'", "codes"});
  refuses(
      [&](V& v) {
        auto& t = find(v, ".absmax");
        t.bytes[3] = std::byte(0xff);
        t.bytes[2] = std::byte(0xc0);
      },
      {"'x.weight'"});
  refuses([&](V& v) { state(v, "{"); }, {"JSON"});
  refuses([&](V& v) { state(v, R"({"quant_type":"nf5","blocksize":64,"shape":[8,16]})"); }, {"quant_type", "nf5"});
  refuses([&](V& v) { state(v, R"({"quant_type":"nf4","blocksize":48,"shape":[8,16]})"); }, {"'x.weight'", "48"});
  // A small file must not ask for the memory of a large one.
  refuses([&](V& v) { state(v, R"({"quant_type":"nf4","blocksize":64,"shape":[262144,262144]})"); },
          {"'x.weight'", "codes must have 34359738368 elements, got 64"});
  refuses([&](V& v) { state(v, R"({"quant_type":"nf4","blocksize":64,"shape":[8]})"); }, {"shape"});
  refuses([&](V& v) { state(v, R"({"quant_type":"nf4","blocksize":64,"shape":[8,-16]})"); }, {"shape"});
  refuses([&](V& v) { state(v, R"({"quant_type":"nf4","blocksize":64,"shape":[2147483648,2147483648]})"); },
          {"'x.weight'"});
}

// SPDX-License-Identifier: Apache-2.0
// Files that strangers wrote: PEFT, Transformers with bitsandbytes, the gguf package. tests/fixtures/make_peers.py made
// them, each with what its own program makes of it.
#include "lowrank/io/bitsandbytes.hpp"
#include "lowrank/io/gguf_adapter.hpp"
#include "lowrank/io/peft.hpp"
#include "support/capture.hpp"

#include "support.hpp"

using namespace lowrank;
using namespace lowrank::io;
using namespace test;

namespace {

const std::string peers = LOWRANK_TEST_DATA "/peers/";

/// The merged weight in double, as the papers have it: W + s·B·A, or m·(W + s·B·A)/‖row‖.
Matrix<double> merged_by_hand(const AdapterModule& m, const Matrix<double>& W) {
  Matrix<double> out;
  out.resize(W.rows(), W.cols());
  const bool transposed = m.kind == ModuleKind::embedding;
  for (Index i = 0; i < W.rows(); ++i) {
    double squares = 0;
    for (Index j = 0; j < W.cols(); ++j) {
      double update = 0;
      for (Index k = 0; k < m.factors.rank(); ++k)
        update += transposed ? double(m.factors.B(j, k)) * double(m.factors.A(k, i))
                             : double(m.factors.B(i, k)) * double(m.factors.A(k, j));
      out(i, j) = W(i, j) + double(m.factors.scale) * update;
      squares += out(i, j) * out(i, j);
    }
    if (!m.magnitude.empty())
      for (Index j = 0; j < W.cols(); ++j) out(i, j) *= double(m.magnitude[std::size_t(i)]) / std::sqrt(squares);
  }
  return out;
}
}  // namespace

TEST_CASE("adapters PEFT wrote mean what PEFT merges") {
  for (const auto& [name, modules] : {std::pair("peft_patterns", 5), std::pair("peft_dora", 4)}) {
    CAPTURE_BOUND(name);
    const PeftAdapter adapter = read_peft(peers + name);
    REQUIRE(int(adapter.modules.size()) == modules);
    CHECK(adapter.saved.size() == (adapter.config.use_dora ? 0 : 6));  // five norms end in "norm"; the table too
    const SafeTensors weights(peers + name + "/merge_and_unload.safetensors");
    for (const AdapterModule& m : adapter.modules) {
      CAPTURE(m.name);
      const Matrix<double> base = weights["base." + m.name + ".weight"].to_matrix<double>(),
                           wanted = weights["merged." + m.name + ".weight"].to_matrix<double>();
      const Matrix<double> got = merged_by_hand(m, base);
      double largest = 0, off = 0, moved = 0;
      for (Index i = 0; i < got.rows(); ++i)
        for (Index j = 0; j < got.cols(); ++j) {
          largest = std::max(largest, std::abs(wanted(i, j)));
          off = std::max(off, std::abs(got(i, j) - wanted(i, j)));
          moved = std::max(moved, std::abs(base(i, j) - wanted(i, j)));
        }
      CHECK(moved > 1e-2 * largest);  // the adapter does something
      CHECK(off <= 1e-6 * largest);   // PEFT merges in float
    }
  }
}

TEST_CASE("4-bit weights Transformers wrote have the values bitsandbytes gives them") {
  for (const char* name : {"nf4", "nf4_nested", "fp4", "fp4_nested"}) {
    CAPTURE(name);
    const Checkpoint packed(peers + name + "/packed.safetensors");
    const SafeTensors values(peers + name + "/dequantised.safetensors");
    CHECK(values.tensors().size() == 14);
    for (const TensorInfo& t : values.tensors()) {
      CAPTURE(t.name);
      const Matrix<float> wanted = values[t.name].to_matrix<float>();
      const Matrix<float> got = read_bitsandbytes<float>(packed, t.name).dequantise();
      REQUIRE(got.rows() == wanted.rows());
      REQUIRE(got.cols() == wanted.cols());
      Index wrong = 0;
      for (Index i = 0; i < got.size(); ++i) wrong += got.data()[i] != wanted.data()[i];
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("an adapter the gguf package wrote has the factors it was given") {
  const PeftAdapter adapter = read_gguf_adapter(peers + "adapter.gguf", {.heads = 2, .kv_heads = 1});
  REQUIRE(adapter.modules.size() == 3);
  const SafeTensors factors(peers + "adapter_factors.safetensors");
  for (const AdapterModule& m : adapter.modules) {
    CAPTURE(m.name);
    CHECK(m.factors.scale == 1.5F);  // 6/4
    for (const bool second : {false, true}) {
      const Matrix<float> wanted = factors[m.name + (second ? ".B" : ".A")].to_matrix<float>();
      const Matrix<float>& got = second ? m.factors.B : m.factors.A;
      REQUIRE(got.rows() == wanted.rows());
      REQUIRE(got.cols() == wanted.cols());
      for (Index i = 0; i < got.size(); ++i) CHECK(got.data()[i] == wanted.data()[i]);
    }
  }
}

// SPDX-License-Identifier: Apache-2.0
// What lowrank::quantise makes of a matrix, as plain arrays, for bitsandbytes.py to compare:
//     peer_quantise IN.npy OUT.npz nf4|fp4|int8 BLOCK_SIZE [nested]
#include <lowrank/io/npy.hpp>
#include <lowrank/io/npz.hpp>
#include <lowrank/quant/quantise.hpp>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

namespace {

lowrank::QuantiseOptions options(const std::string& type, int block_size, bool nested) {
  lowrank::QuantiseOptions o;
  if (type == "int8") {
    o.codebook = lowrank::Codebook::int8();
    o.blocking = lowrank::Blocking::row;
    return o;
  }
  o.codebook = type == "fp4" ? lowrank::Codebook::fp4() : lowrank::Codebook::nf4();
  o.block_size = block_size;
  o.double_quantise = nested;
  return o;
}
}  // namespace

int main(int argc, char** argv) try {
  if (argc < 5) return 2;
  const bool nested = argc > 5 && std::strcmp(argv[5], "nested") == 0;
  const lowrank::Matrix<float> W = lowrank::io::NpyFile(argv[1])->to_matrix<float>();
  const auto q = lowrank::quantise(W, options(argv[3], std::stoi(argv[4]), nested));
  lowrank::io::NpzWriter out(argv[2]);
  out.add("codes", q.codes());
  if (q.is_double_quantised()) {
    const lowrank::NestedScales& n = q.nested();
    out.add("nested_codes", std::span<const std::uint8_t>(n.codes));
    out.add("nested_absmax", std::span<const float>(n.absmax));
    out.add("nested_values", std::span<const float>(n.values));
    out.add("nested_offset", std::span<const float>(&n.offset, 1));
  } else {
    out.add("absmax", q.absmax());
  }
  const lowrank::Matrix<float> values = q.dequantise();
  out.add("values", values);
  out.commit();
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "peer_quantise: %s\n", e.what());
  return 1;
}

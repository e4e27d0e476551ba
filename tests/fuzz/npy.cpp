// SPDX-License-Identifier: Apache-2.0
// .npy: accepted files hold exactly their array, and our header for it says the same.
#include "lowrank/io/npy.hpp"

#include "check.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  NpyHeader h;
  const Bytes file = fuzz::bytes(data, size);
  if (!fuzz::accepted([&] { h = parse_npy("f", file); })) return 0;
  LOWRANK_PROMISE(h.data_offset <= size && byte_size(h.dtype, h.shape) == size - h.data_offset);
  std::string again = npy_header(h.dtype, h.shape, h.fortran_order);
  LOWRANK_PROMISE(again.size() % 64 == 0);
  again.append(reinterpret_cast<const char*>(data) + h.data_offset, size - h.data_offset);
  NpyHeader second = parse_npy("f", fuzz::bytes(again));
  second.data_offset = h.data_offset;
  LOWRANK_PROMISE(second == h);
  const NpyArray array("f", h, file);
  (void)fuzz::accepted([&] {  // elements are read where the header says, whatever the type
    if (h.shape.size() <= 2 && array.size() <= 4096) {
      const Matrix<float> m = array.to_matrix<float>();
      LOWRANK_PROMISE(m.size() == array.size());
    }
  });
  (void)fuzz::accepted([&] { LOWRANK_PROMISE(Index(array.to_integers().size()) == array.size()); });
  return 0;
}

// SPDX-License-Identifier: Apache-2.0
// .npz: members lie inside the archive, apart from each other, with the checksum they claim.
#include "lowrank/io/npz.hpp"

#include "check.hpp"

using namespace lowrank;
using namespace lowrank::io;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Bytes file = fuzz::bytes(data, size);
  std::vector<io::detail::ZipEntry> entries;
  if (!fuzz::accepted([&] { entries = io::detail::parse_zip("f", file); })) return 0;
  for (const auto& a : entries) {
    LOWRANK_PROMISE(a.offset <= size && a.size <= size - a.offset);
    for (const auto& b : entries)
      LOWRANK_PROMISE(&a == &b || a.size == 0 || b.size == 0 || a.offset + a.size <= b.offset ||
                      b.offset + b.size <= a.offset);
  }
  (void)fuzz::accepted([&] {
    for (const auto& [name, array] : parse_npz("f", file))
      LOWRANK_PROMISE(array.bytes().empty() || (array.bytes().data() >= file.data() &&
                                                array.bytes().data() + array.bytes().size() <= file.data() + size));
  });
  return 0;
}
